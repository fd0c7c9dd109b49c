"""How a model is built whose weights are then loaded: the random state stays as it is, and memory has a bound."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SPARE = 8
"""Numbers that a model may make while it is built for each one that is stored: some are made more than once."""


class Building(TorchDispatchMode):
    """Inside this context the thread builds a model whose weights will be loaded.

    Fresh weights are drawn from a random source of their own: PyTorch's belongs to all threads, and if it were put back
    afterwards another one, which draws meanwhile, would get the same numbers twice.

    A model that is far larger than what is stored is refused before there is memory for it. A config can ask for more
    than there is; then the system would end the process.

    Args:
        stored: how many numbers will be loaded; None for no bound.

    Raises:
        ValueError: the model would have more than :data:`SPARE` times as many.
    """

    def __init__(self, stored: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = math.inf if stored is None else SPARE * stored
        self._rng = torch.Generator().manual_seed(0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else PyTorch would import all of its compiler at first use, seconds, to keep it from compiling this."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        if isinstance(given.get("size"), (list, tuple)):  # of ``empty``, ``zeros`` and all that make new tensors
            self._left -= math.prod(given["size"])
            if self._left < 0:
                raise ValueError("it would be many times as large as what is stored")
        if _is_on_cpu(given):
            if func._overloadname == "default" and "generator" in func.overloadpacket.overloads():
                func = func.overloadpacket.generator  # of ``randn`` and all that make random tensors
                names.append("generator")
            if "generator" in names and given.get("generator") is None:
                kwargs = {**(kwargs or {}), "generator": self._rng}
        return func(*args, **(kwargs or {}))


def _is_on_cpu(given: dict[str, Any]) -> bool:
    """Whether an operation with these arguments, by name, makes or changes a tensor on the CPU."""
    changed = given.get("self")
    device = changed.device if isinstance(changed, Tensor) else given.get("device")
    return device is None or torch.device(device).type == "cpu"
