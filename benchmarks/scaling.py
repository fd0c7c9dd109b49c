"""Two ranks with one thread each beside one rank with one thread: the same step of the reference's networks.

``python -m benchmarks.scaling`` is what each rank runs; it prints the seconds of a step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.measure import Row, interleaved, median, printed_number, ratio
from benchmarks.training import trainer
from condgan.ranks import joined

SCENES = 12
"""Scenes a step, over all ranks."""
STEPS = 2
"""Measured in each process, after one that is not."""


def main() -> None:
    """Measure as one of the ranks that ``torchrun`` has started."""
    torch.set_num_threads(1)
    with joined("cpu") as ranks:
        times = interleaved({"step": trainer(10**9, SCENES, ranks).train_step}, STEPS)
        if ranks.leads:
            print(median(times, "step"))


def _step(count: int) -> float:
    """Seconds of a step of so many ranks.

    Raises:
        subprocess.CalledProcessError: a rank failed.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return printed_number(*launch, "-m", "benchmarks.scaling", OMP_NUM_THREADS="1")


def run(rounds: int) -> Iterator[Row]:
    """All rows of this part, of a third of the rounds, since each takes a minute."""
    times: dict[str, list[float]] = {"one": [], "two": []}
    for _ in range(max(3, rounds // 3)):
        times["one"].append(_step(1))
        times["two"].append(_step(2))
    pictures = 3 * SCENES
    for name in times:
        row = f"{name} rank{'s' if name == 'two' else ''} with one thread each"
        yield Row("ranks", row, pictures / median(times, name), "pictures/s")
    yield Row("ranks", "two ranks against one", ratio(times, "one", "two"), "times faster")


if __name__ == "__main__":
    main()
