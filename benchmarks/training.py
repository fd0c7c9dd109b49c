"""A training step of the reference's networks: the plain way, ours with penalties more and less often, the limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import DTYPES, Row, interleaved, matrix_product, median, operations, ratio
from benchmarks.plain import PlainTraining
from condgan import DiffDiscriminator, IterativeGenerator
from condgan.batches import TrainingScenes
from condgan.images import from_uint8
from condgan.presets import PRESETS
from condgan.ranks import ALONE, Ranks
from condgan.training import Trainer

SCENES = PRESETS["reference"].batch_scenes
"""Scenes a step; each has three turns, every one a picture to learn from."""
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


def run(rounds: int) -> Iterator[Row]:
    """All rows of this part."""
    data = random_scenes(SCENES)
    images = torch.cat((torch.zeros(SCENES, 1, 3, 64, 64), from_uint8(data.pixels)), 1)
    ours, without = trainer(1), trainer(10**9)
    straight = PlainTraining(IterativeGenerator(), DiffDiscriminator(), images, F.one_hot(data.objects, 24).float())
    limit, multiplied = matrix_product([*DTYPES.values()][-1])
    work = {"penalty": operations(ours.train_step), "no penalty": operations(without.train_step)}
    times = interleaved(
        {"plain": straight.step, "penalty": ours.train_step, "no penalty": without.train_step, "limit": limit}, rounds
    )
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
