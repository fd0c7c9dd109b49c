"""The scenes of a training run, step by step: which ones, in which part of a step, with which random numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from condgan import images as pictures
from condgan.datasets import SceneDataset
from condgan.devices import cpu_by_default
from condgan.functional import SCENES_AT_ONCE, places_of_turns
from condgan.models import IterativeGenerator
from condgan.ranks import Ranks
from condgan.requests import fold_seed, parse_whole


class Part(NamedTuple):
    """Some of the scenes of a step: those that one rank has on its device at once."""

    first: int
    """Number of the first scene."""
    size: int
    """How many they are."""
    total: int
    """Scenes of the whole step."""

    @property
    def scenes(self) -> slice:
        """Where they are among all scenes of the step."""
        return slice(self.first, self.first + self.size)

    def pictures(self, turns: int) -> slice:
        """Where their turns are among those of all scenes."""
        return slice(self.first * turns, (self.first + self.size) * turns)

    @property
    def share(self) -> float:
        """Weight of a mean over these scenes in the mean over all."""
        return self.size / self.total


class Batch(NamedTuple):
    """The turns of a few scenes, flattened: N = scenes x turns, scene by scene."""

    prev_images: Tensor
    """(N, 3, H, W) in [-1, 1]."""
    images: Tensor
    """(N, 3, H, W) in [-1, 1]: what the turn made of it."""
    objects: Tensor
    """(scenes, turns, K) multi-hot."""
    places: Tensor | None
    """(N, 2) pixels, for models that know places."""
    part: Part
    """Which scenes of the step they are."""

    @property
    def turns(self) -> int:
        """Turns of each scene."""
        return self.objects.shape[1]

    def mean(self, values: Tensor) -> Tensor:
        """What the mean of these pictures' values, (N,), adds to the mean over all pictures of the step."""
        return values.mean() * self.part.share

    def rows(self, values: Tensor) -> Tensor:
        """These pictures' rows of what was drawn for all pictures of the step."""
        return values[self.part.pictures(self.turns)].to(self.images.device)


def own_parts(scenes: int, ranks: Ranks, accumulate: int) -> list[Part]:
    """Which of a step's scenes this rank takes: consecutive ones of equal number, or one more or less, in each part."""
    accumulate = parse_whole("accumulate", accumulate, 1)
    count = ranks.count * accumulate
    if count > scenes:
        raise ValueError(
            f"batch_scenes is {scenes}, too few for {ranks.count} ranks with {accumulate} parts each: "
            f"take more scenes a step, or fewer ranks or parts"
        )
    starts = [scenes * i // count for i in range(count + 1)]
    ours = range(ranks.rank, count, ranks.count)  # a part is next to those that the other ranks have at the same time
    return [Part(starts[i], starts[i + 1] - starts[i], scenes) for i in ours]


class TrainingScenes:
    """The train split with an empty scene before every first turn and the place of every object.

    Args:
        data: scenes of the train split.
        generator: its canvas and what it knows of light are fitted to them, unless they were before.
        fit_canvas: whether to fit them.
        progress: show a progress bar on stderr while they are.

    Raises:
        ValueError: the data has other objects than the generator, or pictures of another size.
    """

    @cpu_by_default()
    def __init__(
        self, data: SceneDataset, generator: IterativeGenerator, fit_canvas: bool = True, *, progress: bool = False
    ) -> None:
        if data.vocabulary.names != generator.vocabulary.names:
            raise ValueError(f"data: its objects.json must name the model's objects: {generator.vocabulary.names}")
        if data.pixels.shape[-1] != generator.image_size:
            raise ValueError(
                f"data: pictures are {data.pixels.shape[-1]} pixels wide, those of the generator {generator.image_size}"
            )
        device = generator.canvas.mean.device
        first = pictures.from_uint8(data.pixels[:, 0].to(device))
        if fit_canvas:
            generator.canvas.fit(first, data.objects[:, 0], progress=progress)
        if generator.config.light_components:
            empty, _ = pictures.round_levels(generator.canvas.remove_objects(first))
            uniform = torch.rand(2, len(empty), 1, *empty.shape[2:], generator=torch.Generator().manual_seed(0))
            chunks = zip(*(x.to(device).split(SCENES_AT_ONCE) for x in (empty, *uniform)), strict=True)
            empty = torch.cat(  # the next picture has grain of its own
                [pictures.render_anew(x, pictures.estimate_rest(x, of_rest), grain) for x, of_rest, grain in chunks]
            )
        else:
            empty = generator.canvas.mean.expand_as(first)
        if fit_canvas and generator.light is not None:
            generator.light.fit(empty)
        self.pixels = torch.cat((pictures.to_uint8(empty).cpu()[:, None], data.pixels), 1)  # (S, T + 1, 3, H, W)
        self.objects = data.objects  # (S, T) ids
        self.names = data.vocabulary.names
        self.num_objects = len(self.names)
        self._epoch: tuple[int, int] | None = None
        self.places = None
        if generator.config.places:
            self.places = places_of_turns(self.pixels)  # (S, T, 2)

    @property
    def first_turns(self) -> tuple[Tensor, Tensor]:
        """Empty scenes and what first turns made of them, (S, 2, 3, H, W) uint8, and the ids of their objects, (S,)."""
        return self.pixels[:, :2], self.objects[:, 0]

    def batch(
        self, step: int, size: int, seed: int, part: Part | None = None, device: torch.device | str = "cpu"
    ) -> Batch:
        """The scenes of one step, or a part of them: every epoch is a permutation, a function of seed and step only."""
        part = part or Part(0, size, size)
        scenes = []
        for position in range(step * size, (step + 1) * size)[part.scenes]:
            epoch, offset = divmod(position, len(self.pixels))
            scenes.append(int(self._permutation(epoch, seed)[offset]))
        images = pictures.from_uint8(self.pixels[scenes].to(device))  # bytes on the way: a quarter of floats
        objects = F.one_hot(self.objects[scenes], self.num_objects).float().to(device)
        places = None if self.places is None else self.places[scenes].flatten(0, 1).to(device)
        return Batch(images[:, :-1].flatten(0, 1), images[:, 1:].flatten(0, 1), objects, places, part)

    def _permutation(self, epoch: int, seed: int) -> Tensor:
        if self._epoch != (epoch, seed):
            self._epoch = (epoch, seed)
            self._order = torch.randperm(len(self.pixels), generator=step_rng(seed, epoch, "order"))
        return self._order


def step_rng(seed: int, step: int, purpose: str) -> torch.Generator:
    """A random source of its own for every step and purpose, so that resuming needs no random state."""
    salt = sum(ord(letter) * 257**i for i, letter in enumerate(purpose))
    return torch.Generator().manual_seed(((fold_seed(seed) * 1_000_003 + step) * 1_000_033 + salt % 1_000_033) % 2**64)
