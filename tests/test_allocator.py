"""allocator.py: memory that is freed is there at once when it is asked for again."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from condgan.allocator import keep_freed_memory

PROGRAM = """
import resource
import torch
from condgan.allocator import keep_freed_memory

{first}
for _ in range(10):  # until it has as much as the alignment of maps takes
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 10 * 10_000_000 * 4 // 4096
"""Of the ten maps that are counted, in 4 KiB."""


def new_pages(first: str) -> int:
    """How many pages the system made for ten maps of 40 MB, one after the other, after ten such."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(first=first)], check=True, capture_output=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again() -> None:
    assert new_pages("keep_freed_memory()") < PAGES / 100
    assert new_pages("") > PAGES / 600, "without it every map is made of new pages, which may be large ones"


def test_where_it_cannot_be_told_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
