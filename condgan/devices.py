"""On which device tensors are made that nobody asked for a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cpu_by_default() -> Iterator[None]:
    """Inside the block, or the function that it decorates, ``torch.set_default_device`` has no effect.

    What is random is drawn by sources of the CPU, so that it is the same on every device, and then moved to where it is
    used: a tensor that a source of the CPU is to fill must not be made on a GPU because that is the user's default.
    """
    if torch.get_default_device().type == "cpu":  # the context costs a little in every operation
        yield
        return
    with torch.device("cpu"):
        yield
