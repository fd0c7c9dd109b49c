"""Two ranks with one thread each beside one rank with one thread: the same step of the reference's networks.

``python -m benchmarks.scaling SCENES`` is what each rank runs; it prints the seconds of a step of so many scenes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from benchmarks.measure import Row, interleaved, median, printed_number, ratio
from benchmarks.training import step_of_command
from condgan.ranks import joined

SCENES = 12
"""Scenes of a step of one rank: about as many as the preset has."""
STEPS = 2
"""Measured in each process, after some that are not."""


def main() -> None:
    """Measure as one of the ranks that ``torchrun`` has started."""
    torch.set_num_threads(1)
    with joined("cpu") as ranks:
        times = interleaved({"step": step_of_command(10**9, int(sys.argv[1]), ranks)}, STEPS)
        if ranks.leads:
            print(median(times, "step"))


def _step(ranks: int, scenes: int) -> float:
    """Seconds of a step of so many ranks, which share the scenes.

    Raises:
        subprocess.CalledProcessError: a rank failed.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return printed_number(*launch, "-m", "benchmarks.scaling", str(scenes), OMP_NUM_THREADS="1")


def _apart(scenes: int) -> float:
    """Seconds of a step of two processes that know nothing of each other, with half of the scenes each."""
    with ThreadPoolExecutor() as both:
        return max(both.map(_step, (1, 1), (scenes // 2, scenes // 2)))


def run(rounds: int) -> Iterator[Row]:
    """All rows of this part, of a third of the rounds, since each takes a minute."""
    cases = {
        "one rank": (partial(_step, 1), SCENES),
        "two ranks": (partial(_step, 2), SCENES),
        "two processes that share nothing": (_apart, SCENES),
        "two ranks, as many scenes each": (partial(_step, 2), 2 * SCENES),
        "two processes that share nothing, as many scenes each": (_apart, 2 * SCENES),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(max(3, rounds // 3)):
        for name, (case, scenes) in cases.items():
            seconds[name].append(case(scenes) / scenes)
    for name in seconds:
        yield Row("ranks", f"{name}, one thread each", 3 / median(seconds, name), "pictures/s")
    for name in [*cases][1:]:
        yield Row("ranks", f"{name}, against one rank", ratio(seconds, "one rank", name), "times faster")


if __name__ == "__main__":
    main()
