"""Getting batches of scenes: from the packed data in memory, and the plain way, from PNG files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from benchmarks.measure import Row, copying, interleaved, median, ratio
from benchmarks.training import random_scenes
from condgan import GeneratorConfig, IterativeGenerator
from condgan.batches import TrainingScenes

SCENES = 32


def run(rounds: int) -> Iterator[Row]:
    """All rows of this part."""
    scenes = TrainingScenes(random_scenes(10 * SCENES), IterativeGenerator(GeneratorConfig(width=1)), fit_canvas=False)
    steps = count()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.png" for i in range(3 * SCENES)]
        ramp = np.linspace(0, 255, 320 * 240 * 3).reshape(240, 320, 3)
        for i, file in enumerate(files):
            Image.fromarray(((ramp + i) % 256).astype(np.uint8)).save(file)

        def read_files() -> None:
            pictures = (Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR) for file in files)
            torch.stack([to_tensor(picture) * 2 - 1 for picture in pictures])

        copy, copied = copying()
        cases = {"plain": read_files, "packed": lambda: scenes.batch(next(steps), SCENES, seed=0), "limit": copy}
        times = interleaved(cases, rounds)
    pictures = 3 * SCENES
    moved = pictures * 3 * 64 * 64 * 2 * (1 + 4)  # every picture is read as uint8 and written as float32, twice
    share = moved / copied * ratio(times, "limit", "packed")
    yield Row("loading", "plain, PNG files of 320x240", pictures / median(times, "plain"), "pictures/s", 1.0)
    faster = ratio(times, "plain", "packed")
    yield Row("loading", "condgan, packed", pictures / median(times, "packed"), "pictures/s", faster, share)
