"""The scenes that an evaluation looks at: drawn as users would get them, and real ones that nobody learned from."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from condgan.datasets import SceneDataset, Split
from condgan.drawing import Redraw, SceneModel, draw_best
from condgan.functional import encode_objects, places_of_turns
from condgan.images import from_uint8, to_uint8
from condgan.requests import Place, parse_scenes
from condgan.vocab import Vocabulary


class Scenes(NamedTuple):
    """S scenes of up to T turns, drawn or real."""

    pictures: Tensor
    """(S, T + 1, 3, H, W) uint8: the empty scene, then the picture after each turn; short scenes repeat theirs."""
    objects: Tensor
    """(S, T, K) 0 or 1: what each turn added; zero rows after a scene's last turn."""

    @property
    def present(self) -> Tensor:
        """(S, T) bool: which turns there are."""
        return self.objects.any(2)

    @property
    def asked(self) -> Tensor:
        """(S, T, K) 0 or 1: all objects that are to be in the picture after each turn."""
        return self.objects.cummax(1).values

    @property
    def final(self) -> Tensor:
        """(S, 3, H, W) uint8: the last picture of each."""
        return self.pictures[:, -1]


@dataclass(frozen=True)
class SceneDrawer:
    """Draws scenes in batches, as users would get them."""

    generator: SceneModel
    vocabulary: Vocabulary
    """In which the objects of the scenes are given: the judge's."""
    best_of: int
    redraw: Redraw
    batch_size: int
    progress: bool

    def draw(
        self,
        lists: Sequence[Sequence[str]],
        seeds: Sequence[int],
        places: Sequence[Sequence[Place | None]] | None = None,
    ) -> tuple[Scenes, float]:
        """One scene for each list and seed, and the passes of the generator for a picture, on average."""
        from tqdm import tqdm

        objects = encode_objects(lists, self.vocabulary)
        pictures, passes = [], 0
        with tqdm(total=len(seeds), desc="drawing", unit="picture", file=sys.stderr, disable=not self.progress) as bar:
            for low in range(0, len(seeds), self.batch_size):
                part = slice(low, low + self.batch_size)
                where = None if places is None else places[part]
                best = draw_best(
                    self.generator, lists[part], list(seeds[part]), self.best_of, self.redraw, places=where
                )
                missing = objects.shape[1] + 1 - best.images.shape[1]
                pictures.append(to_uint8(torch.cat([best.images, *[best.images[:, -1:]] * missing], 1)))
                passes += sum(map(sum, best.draws))
                bar.update(len(best.images))
        return Scenes(torch.cat(pictures), objects), passes / len(seeds)


@dataclass(frozen=True)
class RealScenes:
    """Real scenes that no model was trained on."""

    test: Scenes
    validation: Scenes | None
    """None where there are none."""
    lists: list[list[str]]
    """The objects of each test scene in the order of its turns."""
    validation_lists: list[list[str]]
    """Likewise of each validation scene."""
    places: Tensor
    """(S, T, 2) where they are in the test scenes, in pixels."""
    training: Tensor
    """(R, T, 3, H, W) uint8: the pictures of the train split, which generators learned from; R may be 0."""
    training_objects: Tensor
    """(R, T, K) 0 or 1: what each turn of the train split added."""

    @property
    def turns(self) -> list[tuple[Tensor, Tensor]]:
        """Pictures after each turn and what it added, of each split: how real scenes vary needs them all."""
        seen = [scenes for scenes in (self.test, self.validation) if scenes is not None]
        return [*((x.pictures[:, 1:], x.objects) for x in seen), (self.training, self.training_objects)]


def open_real(data: str | Path, image_size: int, split: Split | None = None) -> SceneDataset:
    """Open real scenes of the size that a generator draws; damage shows in the file's checksum.

    Args:
        data: packed file of ``condgan prepare``, or the folder with it.
        image_size: side of the generator's pictures.
        split: which scenes; None is all.

    Raises:
        DatasetError: there is no such file, or it is damaged.
        ValueError: it has pictures of another size.
    """
    dataset = SceneDataset(data, split, image_size=image_size)
    size = dataset.pixels.shape[-1]
    if size != image_size:
        raise ValueError(
            f"data: {str(dataset.path)!r} has pictures of {size} pixels, but the generator draws {image_size}; "
            "prepare the data in its size"
        )
    if split in (None, "test") and dataset.checksum is not None:  # once, where the splits are read one by one
        dataset.verify()
    return dataset


def read_real(data: str | Path, generator: SceneModel, vocabulary: Vocabulary) -> RealScenes:
    """Read the real scenes that a generator is held against.

    What a first turn changed is seen against the empty scene that the generator's canvas makes of its picture.

    Args:
        data: packed file of ``condgan prepare``, or the folder with it.
        generator: which says the size of the pictures and knows the names of all objects.
        vocabulary: in which the objects are given.

    Raises:
        DatasetError: there is no such file, or it is damaged.
        ValueError: it has pictures of another size, an unknown object, or no scene of the test split.

    Warns:
        UserWarning: there is no scene of the validation split.
    """

    def read(dataset: SceneDataset) -> tuple[Scenes, list[list[str]]]:
        lists = parse_scenes(dataset.lists, generator.vocabulary)
        return Scenes(_after_empty(dataset.pixels, generator), encode_objects(lists, vocabulary)), lists

    splits: tuple[Split, ...] = ("test", "validation", "train")
    of_test, of_validation, training = (open_real(data, generator.image_size, split) for split in splits)
    if not len(of_test):
        raise ValueError(
            f"data: {str(of_test.path)!r} has no scene of the test split; leave data out, or prepare more scenes"
        )
    test, lists = read(of_test)
    validation: Scenes | None = None
    validation_lists: list[list[str]] = []
    if len(of_validation):
        validation, validation_lists = read(of_validation)
    else:
        warnings.warn(
            f"data: {str(of_test.path)!r} has no scene of the validation split, which sets floors: look, copies and "
            "layout are not measured; prepare more scenes for them",
            stacklevel=4,
        )
    return RealScenes(
        test=test,
        validation=validation,
        lists=lists,
        validation_lists=validation_lists,
        places=places_of_turns(test.pictures),
        training=training.pixels,
        training_objects=encode_objects(training.lists, vocabulary) if len(training) else torch.zeros(0, 1, 1),
    )


def as_real(drawn: Scenes, generator: SceneModel) -> Scenes:
    """Drawn scenes as real ones are known: by their pictures, without the canvas that they were drawn on.

    What real first turns changed is seen against what the canvas makes of their pictures, which takes the light that an
    object throws on the floor for that of the lamps, and is no noisier than they are. Where objects stand is compared
    with drawn scenes that are seen in the same way.
    """
    return drawn._replace(pictures=_after_empty(drawn.pictures[:, 1:], generator))


def _after_empty(pictures: Tensor, generator: SceneModel) -> Tensor:
    """Pictures after each turn, (S, T, 3, H, W) uint8, after the empty scene that is estimated from the first."""
    weight = next(generator.parameters())
    first = from_uint8(pictures[:, 0]).to(weight.device, weight.dtype)
    empty = to_uint8(generator.canvas.remove_objects(first).float().cpu())
    return torch.cat((empty[:, None], pictures), 1)
