"""What a process does with memory that it no longer needs."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``, from its ``malloc.h``."""


def keep_freed_memory() -> None:
    """From now on this process keeps what it frees for what it asks for next. With glibc only; elsewhere a no-op.

    A training step frees all its maps, and the next one asks for as many of the same sizes. Large ones glibc gives back
    to the system at once, which makes every page of the next map anew: with the reference's networks a quarter of a
    million pages a step. It is for processes that do one thing, as those of ``condgan train`` do: no other one gets the
    memory before they end.

    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or another system
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
