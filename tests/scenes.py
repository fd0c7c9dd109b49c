"""Tiny pictures in the manner of i-CLEVR, drawn with Pillow: what the project's tests read, learn from and score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from condgan.render import COLOURS
from condgan.vocab import ICLEVR_OBJECTS


class DrawnScene(NamedTuple):
    """A scene of T turns."""

    pictures: list[Image.Image]
    """T pictures, each with one object more than the last and otherwise equal to it."""
    objects: list[str]
    """The object that each turn added; none is repeated."""
    places: list[tuple[int, int]]
    """The centre of each of these objects, (x, y) in pixels of the picture; the first is the picture's centre."""


def draw_scene(rng: np.random.Generator, image_size: tuple[int, int] = (96, 72), num_turns: int = 3) -> DrawnScene:
    """Draw one scene: rectangles (cubes), ellipses (spheres) and rounded boxes (cylinders) that do not overlap.

    Args:
        rng: the source of randomness; light and grain of the background are drawn too, once a scene.
        image_size: width and height, at least 15 each.
        num_turns: 1 to 9.
    """
    width, height = image_size
    light = np.linspace(rng.uniform(96, 110), rng.uniform(120, 150), height)[:, None, None]
    floor = light + rng.normal(0, 1, (height, width, 3))
    picture = Image.fromarray(floor.round().clip(0, 255).astype(np.uint8))
    half_width, half_height = width // 10, height // 14
    cells = [4, *rng.permutation([0, 1, 2, 3, 5, 6, 7, 8]).tolist()][:num_turns]  # of a 3x3 grid, the middle first
    scene = DrawnScene([], [ICLEVR_OBJECTS[i] for i in rng.permutation(len(ICLEVR_OBJECTS))[:num_turns]], [])
    for name, cell in zip(scene.objects, cells, strict=True):
        x, y = width // 2, height // 2
        if cell != 4:
            slack_x, slack_y = width // 6 - half_width - 1, height // 6 - half_height - 1
            x += (cell % 3 - 1) * width // 3 + int(rng.integers(-slack_x, slack_x, endpoint=True))
            y += (cell // 3 - 1) * height // 3 + int(rng.integers(-slack_y, slack_y, endpoint=True))
        colour, shape = name.split()
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        picture = picture.copy()
        draw = ImageDraw.Draw(picture)
        if shape == "cube":
            draw.rectangle(box, fill=COLOURS[colour])
        elif shape == "sphere":
            draw.ellipse(box, fill=COLOURS[colour])
        else:
            draw.rounded_rectangle(box, radius=half_width / 3, fill=COLOURS[colour])
        scene.pictures.append(picture)
        scene.places.append((x, y))
    return scene


def write_iclevr_layout(
    folder: str | Path, num_scenes: int, image_size: tuple[int, int] = (96, 72), seed: int = 0
) -> Path:
    """Write drawn scenes of three turns as people have i-CLEVR, and return the folder.

    ``images/CLEVR_train_000000_0.png`` ..., ``train.json``, ``objects.json``, and ``test.json`` and ``new_test.json``
    with six lists of one to three objects each. Scene number i is the same for any ``num_scenes``. Their names put
    scene 8 first into the test split and scene 23 first into the validation split: 24 scenes have all three splits.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True)
    labels = {}
    for number in range(num_scenes):
        scene = draw_scene(np.random.default_rng([seed, number]), image_size)
        for turn, picture in enumerate(scene.pictures):
            file = f"CLEVR_train_{number:06d}_{turn}.png"
            picture.save(folder / "images" / file)
            labels[file] = scene.objects[: turn + 1]
    rng = np.random.default_rng(seed)
    conditions = [[ICLEVR_OBJECTS[i] for i in rng.permutation(24)[: 1 + number % 3]] for number in range(12)]
    contents = {
        "train.json": labels,
        "objects.json": {name: index for index, name in enumerate(ICLEVR_OBJECTS)},
        "test.json": conditions[:6],
        "new_test.json": conditions[6:],
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
