"""The measures of an evaluation, of scenes drawn or real: what was asked, what a turn leaves alone, how scenes vary.

Each gives a score with a 95 % interval. The interval resamples groups, the lists or scenes that pictures belong to:
pictures of one group are alike and count as one observation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from condgan import metrics
from condgan.functional import place_of_change
from condgan.images import from_uint8
from condgan.layout import Layout, measure_layout
from condgan.scenes import Scenes
from condgan.vocab import Vocabulary

Interval = tuple[float, float]
CHUNK = 256
"""Scenes that are turned to floating point at once."""
NEIGHBOURS = 5
"""A neighbourhood of features reaches to this nearest picture of the same kind."""


class Score(NamedTuple):
    """One number and how sure it is; None where there is nothing to measure."""

    value: float | None
    ci95: Interval | None
    samples: int


NOTHING = Score(None, None, 0)


def ratio(values: Tensor, weights: Tensor, groups: int, samples: int | None = None) -> Score:
    """Sum of values / sum of weights, with its interval.

    Args:
        values: (N,) of N pictures, or scenes, in the order of their groups.
        weights: (N,) not negative.
        groups: number of groups, of N / groups pictures each; those whose weights are all zero are left out.
        samples: of the score; None is the sum of the weights.
    """
    values, weights = (x.double().reshape(groups, -1).sum(1) for x in (values, weights))
    values, weights = values[weights > 0], weights[weights > 0]
    if len(weights) == 0:
        return NOTHING
    interval = metrics.bootstrap_interval(values, weights, rng_seed=0)
    return Score(float(values.sum() / weights.sum()), interval, int(weights.sum()) if samples is None else samples)


def quantile(values: Tensor, share: float, resamples: int = 2000) -> Score:
    """A quantile of values (S, T) of S scenes, NaN being none, with its interval over scenes."""
    values = values[~values.isnan().all(1)].double()
    if len(values) == 0:
        return NOTHING
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(len(values), (resamples, len(values)), generator=rng)
    found = torch.cat([values[part].flatten(1).nanquantile(share, 1) for part in rows.split(100)])
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Score(float(values.nanquantile(share)), (low, high), int((~values.isnan()).sum()))


def rightness(
    logits: Tensor, asked: Tensor, counts: Tensor | None, groups: int, importance: Tensor | None = None
) -> dict[str, Score]:
    """Whether the asked objects are there, and no others.

    Args:
        logits: (N, K) of a judge.
        asked: (N, K) multi-hot.
        counts: (N,) objects found in each picture, whatever they are; None leaves ``count_accuracy`` out.
        groups: as in :func:`ratio`.
        importance: (N,) how often each picture counts; None is once.
    """
    wanted, seen = asked > 0.5, logits.sigmoid() > 0.5
    num_asked, num_seen, num_both = wanted.sum(1), seen.sum(1), (wanted & seen).sum(1)
    one_each = torch.ones(len(asked))

    def share(values: Tensor, weights: Tensor, samples: Tensor) -> Score:
        if importance is not None:
            values, weights = values * importance, weights * importance
        return ratio(values, weights, groups, int(samples.sum()))

    scores = {
        "accuracy": share(metrics.top_k_found(logits, asked), num_asked, num_asked),
        "exact": share(metrics.exact_set(logits, asked), one_each, one_each),
        "object_precision": share(num_both, num_seen, num_seen),
        "object_recall": share(num_both, num_asked, num_asked),
        "object_f1": share(2 * num_both, num_asked + num_seen, num_asked),
    }
    if counts is not None:
        scores["count_accuracy"] = share(counts.cpu() == num_asked, one_each, one_each)
    return scores


def importance_like(lengths: Tensor, wanted: Tensor) -> Tensor | None:
    """How often pictures must count, so that those of each number of objects have the share that they have of lists.

    Args:
        lengths: (N,) objects in each picture.
        wanted: (L,) objects in each list.

    Returns:
        (N,) float64 of mean 1; None where no picture has as many objects as one of the lists.
    """
    have, want = (x.bincount(minlength=int(max(lengths.max(), wanted.max())) + 1).double() for x in (lengths, wanted))
    if bool((want > 0)[have == 0].any()):
        return None
    return (want / have.clamp(min=1) * (len(lengths) / len(wanted)))[lengths]


def retention(logits: Tensor, scenes: Scenes, groups: int) -> Score:
    """Whether objects that the judge found after one turn are still found after the next.

    Args:
        logits: (S, T, K) of a judge, of the picture after each turn.
        scenes: the scenes.
        groups: as in :func:`ratio`.
    """
    seen = (logits.sigmoid() > 0.5) & (scenes.asked > 0.5)
    before = seen[:, :-1] & scenes.present[:, 1:, None]
    kept = before & seen[:, 1:]
    return ratio(kept.sum((1, 2)), before.sum((1, 2)), groups)


def surroundings(scenes: Scenes, groups: int) -> dict[str, Score]:
    """What turns after a scene's first change: outside the new object, and how much of the picture in all.

    A turn that changes nothing has no new object and no surroundings: it has no part in ``preservation``, or who draws
    nothing would be the best.
    """
    if scenes.objects.shape[1] < 2:
        return {"preservation": NOTHING, "changed_area": NOTHING}
    present = scenes.present[:, 1:]
    outside, area = (
        torch.cat([measure(from_uint8(chunk)) for chunk in scenes.pictures[:, 1:].split(CHUNK)])
        for measure in (metrics.preservation, metrics.changed_area)
    )
    changed = present & (area > 0)
    return {
        "preservation": ratio((outside * changed).sum(1), changed.sum(1), groups),
        "changed_area": ratio((area * present).sum(1), present.sum(1), groups),
    }


def place_errors(scenes: Scenes, places: Tensor) -> Tensor:
    """Distance in pixels of where each turn changed the picture to where it was asked to.

    Args:
        scenes: S scenes of T turns.
        places: (S, T, 2) asked centres in pixels (x, y).

    Returns:
        (S, T): the picture's diagonal where a turn changed nothing, NaN after a scene's last turn.
    """
    before, after = from_uint8(scenes.pictures[:, :-1]).flatten(0, 1), from_uint8(scenes.pictures[:, 1:]).flatten(0, 1)
    found = place_of_change(before, after).unflatten(0, places.shape[:2])
    error = (found - places).norm(dim=2)
    error = error.nan_to_num(nan=math.hypot(*scenes.pictures.shape[-2:]))
    return error.masked_fill(~scenes.present, math.nan)


def scene_layout(scenes: Scenes, vocabulary: Vocabulary) -> Layout:
    """The layout of scenes; cubes are the objects of the vocabulary whose last word is ``cube``."""
    is_cube = torch.tensor([name.split()[-1] == "cube" for name in vocabulary.names])
    cubes = (scenes.objects > 0)[:, :, is_cube].any(2)
    return measure_layout(from_uint8(scenes.pictures), scenes.present.sum(1), cubes)


def diversity(final: Tensor, objects: Tensor, real: Scenes | None) -> dict[str, Score]:
    """How far the draws of one list are apart, and real pictures of one set of objects.

    Args:
        final: (L, D, 3, H, W) uint8, D draws of L lists; one draw has no diversity.
        objects: (L, K) multi-hot.
        real: scenes that may hold equal sets; None leaves ``diversity_real`` and ``diversity_ratio`` out.

    Returns:
        ``diversity`` in grey levels; ``diversity_real``, over the lists of sizes of which real pairs exist; and
        ``diversity_ratio``, drawn by real over these lists.
    """
    if final.shape[1] < 2:
        return {}
    drawn = torch.tensor([metrics.diversity(from_uint8(pictures)) for pictures in final])
    pairs = final.shape[1] * (final.shape[1] - 1) // 2
    scores = {"diversity": ratio(drawn, torch.ones(len(drawn)), len(drawn), samples=len(drawn) * pairs)}
    if real is not None:
        of_sizes = _diversity_by_size(real)
        aims = torch.tensor([of_sizes.get(int(size), 0.0) for size in objects.sum(1)])
        drawn, aims = drawn[aims > 0], aims[aims > 0]
        if len(aims):
            scores["diversity_real"] = ratio(aims, torch.ones(len(aims)), len(aims))
            scores["diversity_ratio"] = ratio(drawn, aims, len(aims), samples=len(aims) * pairs)
    return scores


def _diversity_by_size(real: Scenes) -> dict[int, float]:
    """Mean distance of all pairs of real pictures that hold the same set, for each size of set that has pairs."""
    groups: dict[tuple[float, ...], list[Tensor]] = {}
    pictures, asked = real.pictures[:, 1:].flatten(0, 1), real.asked.flatten(0, 1)
    for picture, objects in zip(pictures, asked.tolist(), strict=True):
        groups.setdefault(tuple(objects), []).append(picture)
    total: dict[int, float] = {}
    pairs: dict[int, int] = {}
    for objects, group in groups.items():
        if len(group) > 1:
            size, count = int(sum(objects)), len(group) * (len(group) - 1) // 2
            total[size] = total.get(size, 0.0) + count * metrics.diversity(from_uint8(torch.stack(group)))
            pairs[size] = pairs.get(size, 0) + count
    return {size: total[size] / pairs[size] for size in total}


def looks(drawn: Tensor, real: Tensor, *, frechet_interval: bool = True) -> dict[str, Score]:
    """Distances of drawn pictures to real ones in features, and neighbourhoods of both.

    Args:
        drawn: (S, T, D) features of the pictures after each turn of S scenes, on the scale of real pictures.
        real: likewise, of as many scenes.
        frechet_interval: whether the Fréchet distance gets its interval, which takes 20 times as long as the distance.

    Returns:
        ``frechet_distance`` and ``kernel_distance`` of all pictures; ``precision``, ``recall``, ``density`` and
        ``coverage`` of each scene's last. With fewer than three scenes there is the first only, without an interval.
    """

    def distance(samples: Sequence[Tensor]) -> float:
        return metrics.frechet_distance(samples[0].flatten(0, 1), samples[1].flatten(0, 1))

    num_scenes, turns, _ = drawn.shape
    pictures = num_scenes * turns
    interval = jackknife(distance, (drawn, real)) if frechet_interval and num_scenes > 2 else None
    scores = {"frechet_distance": Score(distance((drawn, real)), interval, pictures)}
    if num_scenes < 3:
        return scores
    kernel = metrics.kernel_distance(drawn.flatten(0, 1), real.flatten(0, 1), group_size=turns)
    near, far = max(kernel.with_noise - 1.96 * kernel.standard_error, 0.0), 1.96 * kernel.standard_error
    neighbours = metrics.neighbour_scores(real[:, -1], drawn[:, -1], k=min(NEIGHBOURS, num_scenes - 1))
    one_each = torch.ones(num_scenes)
    return {
        **scores,
        "kernel_distance": Score(kernel.with_noise, (near, kernel.with_noise + far), pictures),
        **{name: ratio(hits, one_each, num_scenes) for name, hits in neighbours._asdict().items()},
    }


def memorisation(drawn: Tensor, held_out: Tensor) -> dict[str, Score]:
    """Whether pictures are nearer to the training pictures than held-out real ones are.

    Args:
        drawn: (S,) distances to the nearest training picture (:func:`condgan.features.copy_distances`).
        held_out: (R,) the same of held-out real pictures.
    """
    found = metrics.memorisation(drawn, held_out, rng_seed=0)
    return {
        "memorisation_ratio": Score(found.ratio, found.ratio_ci95, len(drawn)),
        "memorisation_nearer": Score(found.nearer, found.nearer_ci95, len(drawn)),
        "memorisation_p": Score(found.p_value, None, len(drawn)),
    }


def jackknife(function: Callable[[Sequence[Tensor]], float], samples: Sequence[Tensor], blocks: int = 20) -> Interval:
    """95 % interval of a smooth function of several samples of scenes, by leaving out a block of scenes at a time.

    For what a bootstrap would distort: distances of distributions grow when scenes are repeated.

    Args:
        function: of samples such as those given.
        samples: tensors whose first axis is scenes.
        blocks: parts that every sample is divided into, or as many as the smallest has scenes.

    Source: Shao and Wu 1989, "A general theory for jackknife variance estimation"; normal interval.
    """
    whole = function(samples)
    blocks = min(blocks, *map(len, samples))
    values = []
    for block in range(blocks):
        rest = [torch.cat([x for i, x in enumerate(sample.tensor_split(blocks)) if i != block]) for sample in samples]
        values.append(function(rest))
    found = torch.tensor(values, dtype=torch.float64)
    error = ((blocks - 1) / blocks * (found - found.mean()).square().sum()).sqrt().item()
    return max(whole - 1.96 * error, 0.0), whole + 1.96 * error
