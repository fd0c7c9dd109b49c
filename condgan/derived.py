"""What a layer makes of its weights before it uses them, remembered as long as they stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

MadeT = TypeVar("MadeT")


_steady: ContextVar[object | None] = ContextVar("steady weights", default=None)
"""Of the innermost block of :func:`steady_weights`, something that no other block has."""


def is_eager() -> bool:
    """Whether operations run now, on the values that tensors have: nothing is compiled, traced or differentiated.

    That is, inside no ``torch.compile``, ``torch.export``, ``torch.jit.trace``, transform of ``torch.func`` or level of
    forward-mode derivatives. There, values cannot be looked at, and nothing may be kept for later.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class Derived(Generic[MadeT]):
    """What a layer makes of its weights before it uses them; made once for many calls, as long as they stay the same.

    Remembered on a CPU, without gradients: there making it takes a good part of the time that one picture takes.
    However a weight is changed, what is handed out is up to date: the weights are compared with a copy at every call,
    but only at the first one inside a block of :func:`steady_weights`. It is made without autocast, which some calls
    have and others have not.

    Args:
        make: takes the weights.
    """

    def __init__(self, make: Callable[..., MadeT]) -> None:
        self._make = make
        self._known: tuple[tuple[Tensor, ...], MadeT] | None = None
        self._compared_in: object | None = None

    def __call__(self, *weights: Tensor) -> MadeT:
        if torch.is_grad_enabled() or weights[0].device.type != "cpu" or not is_eager():
            return self._make(*weights)
        known, block = self._known, _steady.get()
        compared = block is not None and block is self._compared_in
        if known is None or not (compared or all(map(_same, known[0], weights))):
            copies = tuple(weight.detach().clone() for weight in weights)
            with torch.autocast("cpu", enabled=False):
                known = copies, self._make(*copies)  # and not of weights that another thread may change meanwhile
            if type(copies[0]) is not Tensor:  # of a mode in which tensors have no values, such as FakeTensorMode
                return known[1]
            self._known = known
        self._compared_in = block
        return known[1]

    def __getstate__(self) -> dict[str, object]:
        """Without what is remembered: of no use in a file or in another process."""
        return {"_make": self._make, "_known": None, "_compared_in": None}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@contextmanager
def steady_weights() -> Iterator[None]:
    """Inside the block no weight changes: every :class:`Derived` compares once. Other threads are not in the block."""
    token = _steady.set(object())
    try:
        yield
    finally:
        _steady.reset(token)
