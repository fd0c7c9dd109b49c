"""What a layer makes of its weights before it uses them, remembered as long as they stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

MadeT = TypeVar("MadeT")


class Derived(Generic[MadeT]):
    """What a layer makes of its weights before it uses them; made once for many calls, as long as they stay the same.

    Remembered on a CPU, without gradients: there making it takes a good part of the time that one picture takes.
    However a weight is changed, what is handed out is up to date: the weights are compared with a copy at every call,
    but only at the first one inside a block of :func:`steady_weights`.

    Args:
        make: takes the weights.
    """

    def __init__(self, make: Callable[..., MadeT]) -> None:
        self._make = make
        self._known: tuple[tuple[Tensor, ...], MadeT] | None = None
        self._steady = False
        self._looked = False

    def __call__(self, *weights: Tensor) -> MadeT:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or weights[0].device.type != "cpu":
            return self._make(*weights)
        known = self._known
        if known is None or not (self._looked or all(map(_same, known[0], weights))):
            copies = tuple(weight.detach().clone() for weight in weights)
            self._known = known = copies, self._make(*(weight.detach() for weight in weights))
        self._looked = self._steady
        return known[1]

    def hold(self, steady: bool) -> None:
        """See :func:`steady_weights`."""
        self._steady, self._looked = steady, False


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@contextmanager
def steady_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block no weight changes: every :class:`Derived` of a module looks once."""
    made = [value for module in modules for value in vars(module).values() if isinstance(value, Derived)]
    for derived in made:
        derived.hold(True)
    try:
        yield
    finally:
        for derived in made:
            derived.hold(False)
