"""Train the counter on real i-CLEVR, with objects pasted and taken away: the recipe of the one that ships.

python examples/train_counter.py --data iclevr --out runs/counter
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from condgan import GeneratorConfig, IterativeGenerator
from condgan.batches import TrainingScenes
from condgan.counter import STRIDE, ObjectCounter, ObjectCounterConfig, find_centres, match_places
from condgan.datasets import SceneDataset, augment_scene
from condgan.functional import changed_region, local_mean, place_map, place_of_change
from condgan.images import from_uint8
from condgan.measures import ratio
from condgan.precision import autocast

HALF, SEED = 1, 303  # the half of the judge, a seed of its own
NOTHING, OBJECT, UNCLEAR = 0, 1, 2
MIN_VISIBLE = 20  # changed pixels; the most hidden objects of i-CLEVR have as many, fewer are unclear
MIN_DISTANCE = 7.5  # pixels between two places; real ones are 8 apart
NEAR = 4.0  # pixels from a true place within which an object counts as found


class Scenes(NamedTuple):
    """Scenes with the empty floor before their first turn, and what each of their T turns added."""

    pixels: Tensor
    """(S, T + 1, 3, H, W) uint8."""
    regions: Tensor
    """(S, T, H, W) bool: the pixels that the turn changed."""
    places: Tensor
    """(S, T, 2) pixels (x, y)."""
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
    return Scenes(pixels, region, torch.cat(places), ~touches & (region.sum((2, 3)) >= MIN_VISIBLE))


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
    images, regions, places, kinds = pictures
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
    places, kinds = places.clone(), kinds.clone()
    places[:, slot] = seen
    kinds[:, slot] = torch.where(fits, kind, NOTHING)
    return Pictures(images, regions, places, kinds)


def training_pictures(scenes: Scenes, size: int, rng: torch.Generator) -> Pictures:
    """Pictures of 0 to 6 objects, not seldom alike; a third of them is real, the others may be edited."""
    num_turns = scenes.regions.shape[1]
    rows = torch.randint(len(scenes.pixels), (size,), generator=rng)
    pictures = real_pictures(scenes, rows, torch.randint(num_turns + 1, (size,), generator=rng), spare=3)
    may_change = torch.arange(size) >= size // 3

    def some(share: float) -> Tensor:
        return (may_change & (torch.rand(size, generator=rng) < share)).nonzero().flatten()

    chosen = some(0.4)
    turn = torch.randint(num_turns, (len(chosen),), generator=rng)
    put(pictures, chosen, take_away(take(pictures, chosen), scenes, rows[chosen], turn))
    for slot in range(num_turns, num_turns + 3):
        chosen = some(0.5)
        put(pictures, chosen, add(take(pictures, chosen), slot, scenes, rng))
    return pictures


def take(pictures: Pictures, chosen: Tensor) -> Pictures:
    """Some of the pictures, by their numbers or a mask (N,)."""
    return Pictures(*(field[chosen] for field in pictures))


def put(pictures: Pictures, chosen: Tensor, new: Pictures) -> None:
    """Replace some of the pictures."""
    for field, values in zip(pictures, new, strict=True):
        field[chosen] = values


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Slight blur, brightness and noise: (N, 3, H, W) in [-1, 1] to the same."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(images), 1, 1, 1).uniform_(low, high, generator=rng)

    images = torch.lerp(images, local_mean(images, 3), uniform(-0.5, 0.7).clamp(min=0))
    images = images * uniform(0.9, 1.1) + uniform(-0.05, 0.05)
    return images + 0.02 * uniform(0, 1) * torch.randn(images.shape, generator=rng)


def focal_loss(logits: Tensor, places: Tensor, kinds: Tensor) -> Tensor:
    """Penalty-reduced focal loss an object: eq. 1 of arXiv:1904.07850, with Gaussians of one cell around the centres.

    Args:
        logits: (N, 1, h, w).
        places: (N, M, 2) pixels.
        kinds: (N, M); within 2 cells of what is unclear nothing is asked for.
    """
    n, slots, _ = places.shape
    side = logits.shape[-1]
    cells = (places.flatten(0, 1) - (STRIDE - 1) / 2) / STRIDE
    blobs = place_map(cells, side, sigma=1.0).view(n, slots, side, side)
    wanted = torch.where((kinds == OBJECT)[:, :, None, None], blobs, 0).amax(1)
    unclear = torch.where((kinds == UNCLEAR)[:, :, None, None], blobs, 0).amax(1) > 0.1
    cares = (~unclear | (wanted > 0.1)).float()
    nearest = place_map(cells.round().clamp(0, side - 1), side, sigma=0.1).view(n, slots, side, side) > 0.5
    centre = (nearest & (kinds == OBJECT)[:, :, None, None]).any(1)
    logits = logits[:, 0]
    heat = logits.sigmoid()
    found = (1 - heat) ** 2 * F.logsigmoid(logits)
    empty = (1 - wanted) ** 4 * heat**2 * F.logsigmoid(-logits)
    return -(torch.where(centre, found, empty) * cares).sum() / centre.sum().clamp(min=1)


@torch.no_grad()
def heat_maps(model: ObjectCounter, images: Tensor) -> Tensor:
    """Logits of pictures (N, 3, H, W), batch by batch."""
    return torch.cat([model(chunk) for chunk in images.split(256)])


def is_right(logits: Tensor, kinds: Tensor, threshold: float) -> Tensor:
    """Whether each picture's count is right, (N,) float."""
    counts = torch.tensor([len(centres) for centres in find_centres(logits, threshold)])
    return (counts == (kinds == OBJECT).sum(1)).float()


def fix_threshold(model: ObjectCounter, scenes: Scenes) -> float:
    """The middle of the thresholds that count most real and edited pictures of the validation split rightly."""
    rng = torch.Generator().manual_seed(SEED)
    pictures = training_pictures(scenes, 3 * len(scenes.pixels), rng)
    clear = (pictures.kinds != UNCLEAR).all(1)
    logits = heat_maps(model, pictures.images[clear])
    right = [float(is_right(logits, pictures.kinds[clear], percent / 100).mean()) for percent in range(10, 91)]
    best = [percent for percent, share in zip(range(10, 91), right, strict=True) if share == max(right)]
    return best[len(best) // 2] / 100


def score(model: ObjectCounter, scenes: Scenes) -> dict[str, object]:
    """Right counts and distances on every real picture, and on pictures with one object too many or too few."""
    rng = torch.Generator().manual_seed(SEED)
    num_scenes, num_turns = scenes.regions.shape[:2]
    rows = torch.arange(num_scenes).repeat_interleave(num_turns)
    turns = torch.arange(num_turns).repeat(num_scenes)
    real = real_pictures(scenes, rows, turns + 1, spare=1)
    more = add(real, num_turns, scenes, rng, only_objects=True)
    more = take(more, more.kinds[:, num_turns] == OBJECT)
    fewer = take_away(real, scenes, rows, torch.randint(num_turns, (len(rows),), generator=rng) % (turns + 1))
    fewer = take(fewer, (fewer.kinds != real.kinds).any(1))
    report: dict[str, object] = {}
    for name, pictures in (("real", real), ("one_more", more), ("one_fewer", fewer)):
        right = is_right(heat_maps(model, pictures.images), pictures.kinds, model.config.threshold)
        report[name] = {"pictures": len(right), "right": round(float(right.mean()), 4)}
        if name == "real" and (interval := ratio(right, torch.ones_like(right), num_scenes, share=True).ci95):
            report["real_ci95"] = [round(end, 4) for end in interval]
    distances = []
    wanted_total = 0
    for found, places, kinds in zip(model.places(real.images), real.places, real.kinds, strict=True):
        wanted = places[kinds == OBJECT]
        pairs = match_places(found, wanted, NEAR)
        distances.append((found[pairs[:, 0]] - wanted[pairs[:, 1]]).norm(dim=1))
        wanted_total += len(wanted)
    distance = torch.cat(distances)
    quantiles = distance.quantile(torch.tensor([0.5, 0.95])).tolist() if len(distance) else []
    return report | {
        "found": round(len(distance) / wanted_total, 4),
        "distance_median_and_p95": [round(quantile, 3) for quantile in quantiles],
    }


def main() -> None:
    """Parse the command line, train, fix the threshold, report on the test split, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on")
    parser.add_argument("--out", required=True, help="folder to write the counter to")
    parser.add_argument("--steps", type=int, default=1500, help="steps of 64 pictures")
    args = parser.parse_args()
    try:
        Path(args.out).expanduser().mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        parser.error(f"--out: {args.out!r} cannot be written to: {error}")

    torch.manual_seed(SEED)
    rng = torch.Generator().manual_seed(SEED)
    start = time.time()
    train = SceneDataset(args.data, "train", HALF)
    held_out, last = (SceneDataset(args.data, split) for split in ("validation", "test"))
    for split, dataset in (("train", train), ("validation", held_out), ("test", last)):
        if not len(dataset):
            parser.error(f"--data: there is no scene of the {split} split to learn from: prepare more scenes")
    light_components = min(16, len(train) // 2)
    size, names = train.pixels.shape[-1], train.vocabulary.names
    generator = IterativeGenerator(
        GeneratorConfig(image_size=size, objects=names, width=4, output="blend", light_components=light_components)
    )
    scenes = read_scenes(train, generator, fit_canvas=True)
    validation = read_scenes(held_out, generator, fit_canvas=False)
    model = ObjectCounter(ObjectCounterConfig(image_size=size)).to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps, pct_start=0.1)
    for step in range(1, args.steps + 1):
        pictures = training_pictures(scenes, 64, rng)
        images, places = augment_scene(
            pictures.images[:, None].expand(-1, pictures.places.shape[1], -1, -1, -1), rng, pictures.places
        )
        images = augment(images[:, 0], rng)
        with autocast("cpu"):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = focal_loss(logits.float(), places, pictures.kinds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if step % 500 == 0 or step == args.steps:
            report = {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.time() - start)}
            print(json.dumps(report | score(average.module.eval(), validation)), flush=True)
    trained = average.module.eval()
    threshold = fix_threshold(trained, validation)
    counter = ObjectCounter(dataclasses.replace(trained.config, threshold=threshold)).eval()
    counter.load_state_dict(trained.state_dict())
    counter.save_pretrained(args.out, dtype=torch.float16)
    test = read_scenes(last, generator, fit_canvas=False)
    print(json.dumps({"split": "test", "threshold": threshold} | score(counter, test)))


if __name__ == "__main__":
    main()
