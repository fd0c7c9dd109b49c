"""What users get: drawings, turns, the files they are saved to, and what the verifier says of them."""

from __future__ import annotations

import copy
import errno
import io
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from condgan import images as pictures
from condgan.classifier import SceneClassifier
from condgan.files import replacing
from condgan.precision import full_precision
from condgan.requests import Place, parse_whole
from condgan.vocab import Vocabulary

FOLDER_ADVICE = "the folder must be there, be yours to write and have space"
VERIFIER_SIZE = 64
"""Side of the pictures that the verifier was trained on, in pixels."""


class Found(NamedTuple):
    """What the verifier says of one object in one picture."""

    found: bool
    """Whether it is there: the probability is above one half."""
    probability: float
    """In [0, 1]."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """What ``generate`` and ``add`` return: N pictures and how they came about. Shows itself in notebooks."""

    conditions: list[list[str]]
    """For each picture the objects that it was asked to add, in order."""
    seeds: list[int]
    """For each picture the seed that draws it again, with the arguments of ``again`` if there are any."""
    places: list[list[Place]] | None
    """For each picture where each object was put, in pixels (x, y); None if the model does not know places."""
    trajectory: Tensor
    """(N, T + 1, 3, H, W) float32 in [-1, 1]: the canvas, then the picture after each turn."""
    scores: list[float] | None = None
    """With ``best_of``: the verifier's probability that exactly the asked objects are in the picture; those that it saw
    in the picture that ``add`` was given are asked, too."""
    draws: list[list[int]] | None = None
    """For each picture how often each of its turns was drawn: passes of the generator, 1 each unless ``best_of``."""
    again: list[dict[str, object]] | None = None
    """With ``redraw="turn"``: for each picture the arguments ``at``, ``best_of`` and ``redraw`` that draw it again
    with its seed; without, seed and places do."""

    @property
    def passes(self) -> list[int] | None:
        """For each picture the passes of the generator that it took, those of candidates that were not kept too."""
        return None if self.draws is None else [sum(turns) for turns in self.draws]

    @property
    def tensor(self) -> Tensor:
        """The final pictures, (N, 3, H, W) float32 in [-1, 1]."""
        return self.trajectory[:, -1]

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return pictures.to_pil(self.tensor[0])

    @property
    def images(self) -> list[Image.Image]:
        """All pictures, after their final turn."""
        return [pictures.to_pil(image) for image in self.tensor]

    @property
    def turns(self) -> list[list[Image.Image]]:
        """For each picture the pictures after each of its turns; the last one is the final picture."""
        return [
            [pictures.to_pil(image) for image in images[1 : len(scene) + 1]]
            for images, scene in zip(self.trajectory, self.conditions, strict=True)
        ]

    def grid(self, columns: int | None = None, turns: bool = False) -> Image.Image:
        """All pictures on one sheet.

        Args:
            columns: pictures a row; None is a roughly square sheet.
            turns: one row a picture instead, the canvas and every turn side by side.

        Raises:
            TypeError: ``columns`` is not a whole number.
            ValueError: it is less than 1.
        """
        if turns:
            images = [pictures.to_pil(image) for row in self.trajectory for image in row]
            return pictures.grid(images, self.trajectory.shape[1])
        square = math.ceil(len(self.seeds) ** 0.5)
        return pictures.grid(self.images, square if columns is None else parse_whole("columns", columns, 1))

    def metadata(self, index: int) -> dict[str, object]:
        """How to draw picture ``index`` again: conditions, seed and places, and the arguments of ``again``."""
        shared = {
            "conditions": self.conditions[index],
            "seed": self.seeds[index],
            "places": None if self.places is None else self.places[index],
            **({} if self.again is None else self.again[index]),
        }
        return copy.deepcopy(shared)

    def save(self, path: str | os.PathLike[str], index: int | None = None) -> list[Path]:
        """Write the pictures; a PNG file carries conditions, seed and places as JSON in its text field ``condgan``.

        Args:
            path: file name whose ending says the format. Several pictures become ``name-0.png``, ``name-1.png``, ...
            index: write this picture only, under ``path`` itself.

        Returns:
            The files written, each whole or not at all.

        Raises:
            OSError: the folder is not there or cannot be written.
            TypeError: ``index`` is not a whole number.
            ValueError: the ending of ``path`` is not that of a picture format that can be written, or there is no
                picture ``index``.
        """
        path = Path(path)
        if index is None and len(self.seeds) > 1:
            files = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(self.seeds))]
            for i, file in enumerate(files):
                self.save(file, i)
            return files
        index = 0 if index is None else parse_whole("index", index, 0)
        if index >= len(self.seeds):
            raise ValueError(f"index must be below {len(self.seeds)}, the number of pictures, got {index}")
        save_image(pictures.to_pil(self.tensor[index]), path, self.metadata(index))
        return [path]

    def verify(self) -> list[dict[str, Found]]:
        """Ask the bundled verifier which of the asked objects it finds.

        Returns:
            For each picture the asked objects, by name, each with :class:`Found`.

        Raises:
            ValueError: the verifier does not know an object of the model's own vocabulary.
        """
        asked = _verifier_objects(self.conditions)
        return [
            {name: Found(p[i] > 0.5, p[i]) for name, i in zip(scene, objects, strict=True)}
            for scene, objects, p in zip(self.conditions, asked, _seen_objects(self.tensor).tolist(), strict=True)
        ]

    def _repr_png_(self) -> bytes:
        return pictures.to_png(self.grid())

    def __repr__(self) -> str:
        n, _, _, height, width = self.trajectory.shape
        scenes = ", ".join(f"{scene} seed {seed}" for scene, seed in zip(self.conditions[:3], self.seeds, strict=False))
        return f"Drawing({n} x {width}x{height}: {scenes}{', ...' if n > 3 else ''})"


@dataclass(frozen=True, eq=False)
class Turn:
    """One step of ``stream``."""

    tensor: Tensor
    """(3, H, W) float32 in [-1, 1]: the picture after this turn."""
    previous: Tensor
    """(3, H, W) float32 in [-1, 1]: the picture before it."""
    added: str
    """The object that this turn added."""
    place: Place | None
    """Where it was put, in pixels (x, y); None if the model does not know places."""
    seed: int
    """The seed that draws the scene again."""

    @property
    def image(self) -> Image.Image:
        """The picture after this turn."""
        return pictures.to_pil(self.tensor)

    @property
    def difference(self) -> Image.Image:
        """What changed: half the signed difference to the picture before, mid-gray where nothing did."""
        return pictures.to_pil((self.tensor - self.previous) / 2)


def check_picture_path(path: Path) -> str:
    """The format of a picture that is to be written, before there is one.

    Raises:
        OSError: its folder is not there or may not be written, or there is a folder of its name.
        ValueError: its name does not end like that of a picture.
    """
    picture_format = Image.registered_extensions().get(path.suffix.lower())
    if picture_format not in Image.SAVE:
        raise ValueError(f"path must end like a picture file, such as scene.png, got {str(path)!r}")
    code = None
    if not path.parent.exists():
        code = errno.ENOENT
    elif not path.parent.is_dir():
        code = errno.ENOTDIR
    elif path.is_dir():
        code = errno.EISDIR
    elif not os.access(path.parent, os.W_OK):
        code = errno.EACCES
    if code is not None:
        raise OSError(f"cannot write {str(path)!r} ({os.strerror(code)}): {FOLDER_ADVICE}")
    return picture_format


def save_image(image: Image.Image, path: Path, metadata: dict[str, object]) -> None:
    """Write a picture, whole or not at all; the PNG text field ``condgan`` holds ``metadata`` as JSON."""
    picture_format = check_picture_path(path)
    text = PngInfo()
    text.add_text("condgan", json.dumps(metadata))
    content = io.BytesIO()  # not yet a file, so that what goes wrong is not to be blamed on its folder
    try:
        image.save(content, picture_format, **({"pnginfo": text} if picture_format == "PNG" else {}))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is of a format that cannot hold this picture ({error}): choose another, such as scene.png"
        ) from error
    try:
        with replacing(path) as partial:
            partial.write_bytes(content.getvalue())
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r} ({error.strerror or error}): {FOLDER_ADVICE}") from error


@lru_cache(maxsize=1)
def _verifier() -> SceneClassifier:
    return SceneClassifier.from_pretrained("verifier")


def _seen_objects(images: Tensor) -> Tensor:
    """The verifier's probability (N, K) of every object in pictures (N, 3, H, W) of any size, float64 on the CPU.

    As in drawing, pictures on a CPU pass one at a time: the last bits do not depend on those beside it.
    """
    parts = pictures.resize(images, VERIFIER_SIZE).split(1 if images.device.type == "cpu" else len(images))
    with full_precision(images.device):
        return torch.cat([_verifier().probabilities(part) for part in parts]).double().cpu()


def _verifier_objects(scenes: Sequence[Sequence[str]]) -> list[list[int]]:
    """The verifier's ids of the objects of every scene."""
    vocabulary = Vocabulary(_verifier().config.objects)
    try:
        return [[vocabulary.parse(name) for name in scene] for scene in scenes]
    except ValueError:
        raise ValueError(
            f"the bundled verifier knows i-CLEVR's objects only, not all of {sorted({*itertools.chain(*scenes)})}: "
            "use a classifier of your own (examples/train_classifier.py)"
        ) from None


def target_objects(scenes: Sequence[Sequence[str]], start: Tensor | None) -> Tensor:
    """What the verifier should see, multi-hot (N, K): the objects asked and those of the picture ``start``, if any."""
    target = torch.zeros(len(scenes), len(_verifier().config.objects), dtype=torch.bool)
    for row, objects in zip(target, _verifier_objects(scenes), strict=True):
        row[objects] = True
    return target if start is None else target | (_seen_objects(start[None]) > 0.5)


def exact_probability(images: Tensor, target: Tensor) -> Tensor:
    """The verifier's probability (N,) that exactly the target's objects are in each picture."""
    probabilities = _seen_objects(images)
    return torch.where(target, probabilities, 1 - probabilities).prod(1)
