"""A training step of the reference's networks: the plain way, ours with penalties more and less often, the limit.

Ours is that of ``condgan train``, in a process that is set up as it sets up its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import DTYPES, Row, elsewhere, interleaved, matrix_product, median, operations, ratio
from benchmarks.plain import PlainTraining
from condgan import DiffDiscriminator, IterativeGenerator
from condgan.allocator import keep_freed_memory
from condgan.batches import TrainingScenes
from condgan.images import from_uint8
from condgan.presets import PRESETS
from condgan.ranks import ALONE, Ranks
from condgan.training import Trainer

SCENES = PRESETS["reference"].batch_scenes
"""Scenes a step; each has three turns, every one a picture to learn from."""
CASES = {"penalty": 1, "no penalty": 10**9}
"""Steps from one penalty to the next."""
WARM_UP = 2
"""Steps until a process that keeps what it frees has all the memory that it needs."""
INTERVAL = 16
"""Steps from one lazy penalty to the next (Karras et al. 2020, arXiv:1912.04958, section 3.1)."""


def _mean_step(penalised: float, plain: float) -> float:
    """The mean over the steps from one lazy penalty to the next, of what each kind of step takes."""
    return (penalised + (INTERVAL - 1) * plain) / INTERVAL


def random_scenes(count: int) -> Any:
    """A stand-in for a packed data set: the work does not depend on what is in the pictures."""
    rng = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        pixels=torch.randint(0, 256, (count, 3, 3, 64, 64), generator=rng, dtype=torch.uint8),
        objects=torch.randint(0, 24, (count, 3), generator=rng),
        vocabulary=IterativeGenerator().vocabulary,
    )


def trainer(penalty_interval: int, num_scenes: int = SCENES, ranks: Ranks = ALONE) -> Trainer:
    """Ours, of fresh reference networks."""
    config = dataclasses.replace(PRESETS["reference"], batch_scenes=num_scenes, penalty_interval=penalty_interval)
    generator = IterativeGenerator(config.generator)
    scenes = TrainingScenes(random_scenes(num_scenes), generator, fit_canvas=False)
    made = Trainer(config, scenes, generator, DiffDiscriminator(config.discriminator), ranks=ranks)
    made.step = 1  # step 0 is always penalised
    return made


def step_of_command(
    penalty_interval: int, num_scenes: int = SCENES, ranks: Ranks = ALONE
) -> Callable[[], dict[str, float]]:
    """A step in a process that does nothing else, as ``condgan train`` takes one after the other."""
    keep_freed_memory()
    step = trainer(penalty_interval, num_scenes, ranks).train_step
    for _ in range(WARM_UP):
        step()
    return step


def run(rounds: int) -> Iterator[Row]:
    """All rows of this part."""
    data = random_scenes(SCENES)
    images = torch.cat((torch.zeros(SCENES, 1, 3, 64, 64), from_uint8(data.pixels)), 1)
    straight = PlainTraining(IterativeGenerator(), DiffDiscriminator(), images, F.one_hot(data.objects, 24).float())
    limit, multiplied = matrix_product([*DTYPES.values()][-1])
    work = {name: operations(trainer(interval).train_step) for name, interval in CASES.items()}
    with ExitStack() as processes:
        ours = {
            name: processes.enter_context(elsewhere(partial(step_of_command, interval)))
            for name, interval in CASES.items()
        }
        times = interleaved({"plain": straight.step, **ours, "limit": limit}, rounds)
    work["lazy penalty"] = _mean_step(work["penalty"], work["no penalty"])
    times["lazy penalty"] = [_mean_step(*pair) for pair in zip(times["penalty"], times["no penalty"], strict=True)]
    pictures = 3 * SCENES
    yield Row("training", "plain, penalty in every step", pictures / median(times, "plain"), "pictures/s", 1.0)
    for name, what in (
        ("penalty", "penalty in every step"),
        ("lazy penalty", f"penalty in every {INTERVAL}th step, {INTERVAL} times as heavy"),
        ("no penalty", "a step without penalty"),
    ):
        share = work[name] / multiplied * ratio(times, "limit", name)
        rate = pictures / median(times, name)
        yield Row("training", f"condgan, {what}", rate, "pictures/s", ratio(times, "plain", name), share)
