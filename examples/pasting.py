"""Edit real scenes: objects pasted in from other scenes and taken away, for classifiers and counters to learn from."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from condgan import GeneratorConfig, IterativeGenerator
from condgan.datasets import SceneDataset
from condgan.functional import changed_region, local_mean, place_of_change
from condgan.images import from_uint8
from condgan.training import TrainingScenes

NOTHING, OBJECT, UNCLEAR = 0, 1, 2
MIN_VISIBLE = 20  # changed pixels; the most hidden objects of i-CLEVR have as many, fewer are unclear
MIN_DISTANCE = 7.5  # pixels between two places; real ones are 8 apart


class Scenes(NamedTuple):
    """Scenes with the empty floor before their first turn, and what each of their T turns added."""

    pixels: Tensor
    """(S, T + 1, 3, H, W) uint8."""
    regions: Tensor
    """(S, T, H, W) bool: the pixels that the turn changed."""
    places: Tensor
    """(S, T, 2) pixels (x, y)."""
    objects: Tensor
    """(S, T) ids."""
    apart: Tensor
    """(S, T) bool: whether the turn's object touches none of the scene's other objects."""


class Pictures(NamedTuple):
    """Pictures with up to M objects."""

    images: Tensor
    """(N, 3, H, W) in [-1, 1]."""
    regions: Tensor
    """(N, M, H, W) bool."""
    places: Tensor
    """(N, M, 2) pixels (x, y); without meaning where there is nothing."""
    kinds: Tensor
    """(N, M): NOTHING, OBJECT or UNCLEAR."""
    objects: Tensor
    """(N, M) ids; without meaning where there is nothing."""


def empty_scenes(data: SceneDataset) -> IterativeGenerator:
    """An untrained generator whose canvas is to be fitted to ``data``: what :func:`read_scenes` needs."""
    light_components = min(16, len(data) // 2)
    return IterativeGenerator(GeneratorConfig(width=4, output="blend", light_components=light_components))


def read_scenes(data: SceneDataset, generator: IterativeGenerator, fit_canvas: bool) -> Scenes:
    """Empty floors from the light of the first turns, and the place of every object from what changed."""
    pixels = TrainingScenes(data, generator, fit_canvas, progress=True).pixels
    regions, places = [], []
    for chunk in pixels.split(256):
        before, after = from_uint8(chunk[:, :-1]).flatten(0, 1), from_uint8(chunk[:, 1:]).flatten(0, 1)
        regions.append(changed_region(before, after).unflatten(0, (len(chunk), -1)))
        places.append(place_of_change(before, after).unflatten(0, (len(chunk), -1)))
    region = torch.cat(regions)
    wide = torch.cat([dilate(chunk.float(), 5) > 0 for chunk in region.split(256)])
    touches = torch.stack([(wide[:, t, None] & region).any(3).any(2).sum(1) > 1 for t in range(region.shape[1])], 1)
    return Scenes(pixels, region, torch.cat(places), data.objects, ~touches & (region.sum((2, 3)) >= MIN_VISIBLE))


def dilate(masks: Tensor, size: int) -> Tensor:
    """The largest value in the square of an odd size around each pixel, (N, C, H, W)."""
    return F.max_pool2d(masks, size, 1, size // 2)


def paste(images: Tensor, before: Tensor, after: Tensor, region: Tensor) -> Tensor:
    """Do to pictures what one turn did to others: ``region`` (N, H, W) is replaced, shadows around it are added."""
    inside = local_mean(dilate(region[:, None].float(), 3), 3)
    return torch.lerp(images + after - before, after, inside)


def real_pictures(scenes: Scenes, rows: Tensor, turns: Tensor, spare: int = 0) -> Pictures:
    """The pictures of some scenes after ``turns`` (N,) turns, 0 to T, with ``spare`` slots for more objects."""
    regions, places = scenes.regions[rows], scenes.places[rows]
    there = torch.arange(regions.shape[1]) < turns[:, None]
    kinds = torch.where(there, torch.where(regions.sum((2, 3)) < MIN_VISIBLE, UNCLEAR, OBJECT), NOTHING)
    return Pictures(
        from_uint8(scenes.pixels[rows, turns]),
        F.pad(regions & there[:, :, None, None], (0, 0, 0, 0, 0, spare)),
        F.pad(places.nan_to_num(0), (0, 0, 0, spare)),
        F.pad(kinds, (0, spare)),
        F.pad(scenes.objects[rows], (0, spare)),
    )


def take_away(pictures: Pictures, scenes: Scenes, rows: Tensor, turn: Tensor) -> Pictures:
    """Take the object of one turn (N,) out of each picture, where it is in it and touches no other."""
    n = torch.arange(len(rows))
    before, after = from_uint8(scenes.pixels[rows, turn]), from_uint8(scenes.pixels[rows, turn + 1])
    without = paste(pictures.images, after, before, scenes.regions[rows, turn])
    can = (pictures.kinds[n, turn] != NOTHING) & scenes.apart[rows, turn]
    kinds, regions = pictures.kinds.clone(), pictures.regions.clone()
    kinds[n[can], turn[can]] = NOTHING
    regions[n[can], turn[can]] = False
    return pictures._replace(
        images=torch.where(can[:, None, None, None], without, pictures.images), kinds=kinds, regions=regions
    )


def add(pictures: Pictures, slot: int, scenes: Scenes, rng: torch.Generator, only_objects: bool = False) -> Pictures:
    """Put something of another scene into a slot of each picture, in the same place, behind what stands before it.

    Half of the somethings are objects. The others are pale objects, which are nothing or unclear, smudges, and shadows
    without an object. A picture stays as it is if the place is too near to another's.
    """
    images, regions, places, kinds, objects = pictures
    n = len(images)
    donors = scenes.apart.nonzero()
    rows, turns = donors[torch.randint(len(donors), (n,), generator=rng)].unbind(1)
    before, after = from_uint8(scenes.pixels[rows, turns]), from_uint8(scenes.pixels[rows, turns + 1])
    region, place = scenes.regions[rows, turns], scenes.places[rows, turns]
    stands_before = (places[:, :, 1] > place[:, None, 1]) & (kinds != NOTHING)
    hidden = dilate((regions & stands_before[:, :, None, None]).any(1, keepdim=True).float(), 3) > 0
    whole = torch.where(hidden, images, paste(images, before, after, region)).clamp(-1, 1)
    inside = dilate(region[:, None].float(), 5)
    shadow = torch.where(hidden, images, images + (after - before) * (1 - inside))
    smudge = images + F.interpolate(F.avg_pool2d(whole - images, 8), images.shape[-2:], mode="bilinear")

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, 1, 1, 1).uniform_(low, high, generator=rng)

    what = torch.ones(n) if only_objects else torch.rand(n, generator=rng)
    is_whole, is_pale = what >= 0.5, what < 0.3
    is_smudge = (what >= 0.3) & (what < 0.4)
    opacity = torch.where(is_pale[:, None, None, None], uniform(0.05, 0.8), uniform(0.8, 1))
    if only_objects:
        opacity = torch.ones_like(opacity)
    new = torch.where(is_smudge[:, None, None, None], smudge, shadow)
    new = torch.where((is_whole | is_pale)[:, None, None, None], torch.lerp(images, whole, opacity), new)

    changed = changed_region(images, whole)
    seen = torch.where(changed.any(2).any(1)[:, None], place_of_change(images, whole), place)
    opacity = opacity.flatten()
    kind = torch.where(opacity > 0.6, OBJECT, torch.where(opacity < 0.25, NOTHING, UNCLEAR))
    kind = torch.where((kind == OBJECT) & (changed.sum((1, 2)) < MIN_VISIBLE), UNCLEAR, kind)
    kind = torch.where(is_whole | is_pale, kind, NOTHING)
    covers = changed & (is_whole | is_pale)[:, None, None]
    left = (regions & ~covers[:, None]).sum((2, 3))
    distance = (places - place[:, None]).norm(dim=2).masked_fill(kinds == NOTHING, torch.inf).amin(1)
    fits = distance > MIN_DISTANCE

    images = torch.where(fits[:, None, None, None], new, images)
    kinds = torch.where(fits[:, None] & (kinds == OBJECT) & (left < MIN_VISIBLE), UNCLEAR, kinds)
    regions = torch.where(fits[:, None, None, None], regions & ~covers[:, None], regions)
    regions[:, slot] = changed & (fits & (kind != NOTHING))[:, None, None]
    places, kinds, objects = places.clone(), kinds.clone(), objects.clone()
    places[:, slot] = seen
    kinds[:, slot] = torch.where(fits, kind, NOTHING)
    objects[:, slot] = scenes.objects[rows, turns]
    return Pictures(images, regions, places, kinds, objects)


def take(pictures: Pictures, chosen: Tensor) -> Pictures:
    """Some of the pictures, by their numbers or a mask (N,)."""
    return Pictures(*(field[chosen] for field in pictures))


def put(pictures: Pictures, chosen: Tensor, new: Pictures) -> None:
    """Replace some of the pictures."""
    for field, values in zip(pictures, new, strict=True):
        field[chosen] = values
