"""Measuring: interleaved runs, their medians and ratios, and what the machine can do at best."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from condgan.precision import fast_bfloat16

MATRIX_SIZE = 1024
DTYPES = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if fast_bfloat16("cpu") else {})
"""What networks are measured in, the fastest last; a processor that imitates bfloat16 would take minutes a batch."""
COPIED_BYTES = 2**26


class Row(NamedTuple):
    """One measured number."""

    part: str
    name: str
    value: float
    unit: str
    ratio: float | None = None
    """How many times better than the plain way."""
    limit: float | None = None
    """Share of what the machine could do."""


Times = Mapping[str, Sequence[float]]
"""Seconds of every round, by case."""


def interleaved(cases: Mapping[str, Callable[[], object]], rounds: int, in_a_row: int = 1) -> dict[str, list[float]]:
    """Seconds of each case in each round; the cases take turns, so that what slows the machine slows all of them.

    With ``in_a_row`` a round runs each case so often before the next one, and its seconds are the median of these: what
    a case costs one who goes on using it, without what the case before it left in the processor's caches.
    """
    for case in cases.values():
        case()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(statistics.median(_seconds(case) for _ in range(in_a_row)))
    return times


def _seconds(case: Callable[[], object]) -> float:
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


@contextmanager
def elsewhere(make: Callable[[], Callable[[], object]]) -> Iterator[Callable[[], object]]:
    """A case that runs in a process of its own, which makes it; between its runs that process does nothing.

    Raises:
        EOFError: that process failed; it says why.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make), daemon=True)
    process.start()
    theirs.close()

    def case() -> None:
        ours.send(None)
        ours.recv()

    try:
        ours.recv()
        yield case
    finally:
        ours.close()
        process.join()


def _serve(told: Connection, make: Callable[[], Callable[[], object]]) -> None:
    """Make a case and run it each time when told to, as long as there is somebody to tell."""
    case = make()
    told.send(None)
    try:
        while True:
            told.recv()
            case()
            told.send(None)
    except (EOFError, BrokenPipeError):
        pass


def median(times: Times, name: str) -> float:
    """Median seconds of a case."""
    return statistics.median(times[name])


def ratio(times: Times, slow: str, fast: str) -> float:
    """Median over the rounds of how many times faster one case is than another."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def matrix_product(dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A case whose speed is the limit of all arithmetic in ``dtype``, and its floating point operations."""
    a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE).to(dtype)
    repeats = 8

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return multiply, repeats * 2.0 * MATRIX_SIZE**3


def copying() -> tuple[Callable[[], object], float]:
    """A case whose speed is the limit of all reading and writing of memory, and the bytes that it moves."""
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * COPIED_BYTES


class _Operations(TorchDispatchMode):
    """Adds up operations as ``FlopCounterMode`` does, but without its hooks, for which layers take the plain way."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def operations(case: Callable[[], object]) -> float:
    """Floating point operations of matrix products and convolutions in one run of ``case``."""
    with _Operations() as counter:
        case()
    return float(counter.total)


class _Dispatched(TorchDispatchMode):
    """Counts what PyTorch dispatches."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def dispatched(case: Callable[[], object]) -> int:
    """Operations, small and large, that PyTorch dispatches in one run of ``case``, after another run."""
    case()
    with _Dispatched() as counter:
        case()
    return int(counter.count)


def python(*arguments: str) -> float:
    """Seconds that a Python process of its own takes; what it prints is thrown away.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def printed_number(*arguments: str, **environment: str) -> float:
    """The last thing that a Python process of its own prints, with more in its environment.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    return float(done.stdout.split()[-1])


PEAK_MEMORY = """
with open("/proc/self/status") as file:  # what getrusage says of the peak includes the parent process
    print(next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM")))
"""


def peak_memory(program: str) -> float:
    """The most memory in MiB that a process of its own had while it ran ``program``; on Linux only, elsewhere NaN."""
    if not sys.platform.startswith("linux"):
        return math.nan
    return printed_number("-W", "ignore", "-c", program + PEAK_MEMORY)
