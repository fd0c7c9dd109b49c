"""The measures of an evaluation, of scenes drawn or real: what was asked, what a turn leaves alone, how scenes vary.

Each gives a score with a 95 % interval. The interval resamples groups, the lists or scenes that pictures belong to:
pictures of one group are alike and count as one observation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from condgan import metrics
from condgan.features import fit_scale, picture_features
from condgan.functional import place_of_change
from condgan.images import from_uint8
from condgan.layout import Layout, measure_layout
from condgan.report import Interval
from condgan.scenes import Scenes
from condgan.vocab import Vocabulary

CHUNK = 256
"""Scenes that are turned to floating point at once."""
SCALE_SCENES = 1000
"""Training scenes from which the scale of features is taken."""
NEIGHBOURS = 5
"""A neighbourhood of features reaches to this nearest picture of the same kind."""


class Score(NamedTuple):
    """One number and how sure it is; None where there is nothing to measure."""

    value: float | None
    ci95: Interval | None
    samples: int


NOTHING = Score(None, None, 0)


def _middle_95(resampled: Tensor) -> Interval:
    """Percentile interval of float64 values (B,)."""
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def ratio(values: Tensor, weights: Tensor, groups: int, samples: int | None = None, *, share: bool = False) -> Score:
    """Sum of values / sum of weights, with its interval.

    Args:
        values: (N,) of N pictures, or scenes, in the order of their groups.
        weights: (N,) not negative.
        groups: number of groups, of N / groups pictures each; those whose weights are all zero are left out. One
            group says nothing of others: there is no interval.
        samples: of the score; None is the sum of the weights.
        share: whether ``values`` are a part of what ``weights`` count; the interval is then
            :func:`condgan.metrics.share_interval`, else :func:`condgan.metrics.bootstrap_interval`.
    """
    values, weights = (x.double().reshape(groups, -1).sum(1) for x in (values, weights))
    values, weights = values[weights > 0], weights[weights > 0]
    if len(weights) == 0:
        return NOTHING
    interval = None
    if len(weights) > 1 and share:
        interval = metrics.share_interval(values, weights)
    elif len(weights) > 1:
        interval = metrics.bootstrap_interval(values, weights, rng_seed=0)
    return Score(float(values.sum() / weights.sum()), interval, int(weights.sum()) if samples is None else samples)


def quantile(values: Tensor, share: float, resamples: int = 2000) -> Score:
    """A quantile of values (S, T) of S scenes, NaN being none, with its interval over scenes, if there are several."""
    values = values[~values.isnan().all(1)].double()
    if len(values) == 0:
        return NOTHING
    whole, samples = float(values.nanquantile(share)), int((~values.isnan()).sum())
    if len(values) == 1:
        return Score(whole, None, samples)
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(len(values), (resamples, len(values)), generator=rng)
    found = torch.cat([values[part].flatten(1).nanquantile(share, 1) for part in rows.split(100)])
    return Score(whole, _middle_95(found), samples)


def quotient(first: Score, second: Score) -> Score:
    """One score by another that was measured on other pictures, with an interval that both intervals make.

    Args:
        first: not negative.
        second: likewise. If it is 0 there is no quotient; if its interval reaches to 0 or to twice its value, or one of
            the two has none, the quotient has no interval.

    Source: MOVER-R, Donner and Zou 2012, "Closed-form confidence intervals for functions of the normal mean and
    standard deviation".
    """
    a, b = first.value, second.value
    if a is None or not b:
        return NOTHING
    if first.ci95 is None or second.ci95 is None or not 0 < second.ci95[0] <= second.ci95[1] < 2 * b:
        return Score(a / b, None, first.samples)
    (a_low, a_high), (b_low, b_high) = first.ci95, second.ci95

    def end(near: float, far: float, sign: float) -> float:
        """Of the ends of the first interval and of the second that are nearer to and farther from this end."""
        below = near * far * (2 * a - near) * (2 * b - far)
        return (a * b + sign * math.sqrt(max((a * b) ** 2 - below, 0))) / (far * (2 * b - far))

    return Score(a / b, (end(a_low, b_high, -1), end(a_high, b_low, 1)), first.samples)


def rightness(
    logits: Tensor,
    asked: Tensor,
    counts: Tensor,
    num_objects: Tensor,
    groups: int,
    importance: Tensor | None = None,
) -> dict[str, Score]:
    """Whether the asked objects are there, and no others.

    Args:
        logits: (N, K) of a judge.
        asked: (N, K) multi-hot.
        counts: (N,) objects found in each picture, whatever they are.
        num_objects: (N,) objects asked, an object of which two were asked counted twice.
        groups: as in :func:`ratio`.
        importance: (N,) how often each picture counts, as :func:`importance_like` says; None is once.
    """
    wanted, seen = asked > 0.5, logits.sigmoid() > 0.5
    if importance is not None:  # to count as much as they say: of Kish 1965, Survey Sampling, section 11.7
        importance = importance * (importance.sum() / importance.square().sum())
    num_asked, num_seen, num_both = wanted.sum(1), seen.sum(1), (wanted & seen).sum(1)
    one_each = torch.ones(len(asked))

    def share(values: Tensor, weights: Tensor, samples: Tensor) -> Score:
        if importance is not None:
            values, weights = values * importance, weights * importance
        return ratio(values, weights, groups, int(samples.sum()), share=True)

    return {
        "accuracy": share(metrics.top_k_found(logits, asked), num_asked, num_asked),
        "exact": share(metrics.exact_set(logits, asked), one_each, one_each),
        "object_precision": share(num_both, num_seen, num_seen),
        "object_recall": share(num_both, num_asked, num_asked),
        "object_f1": share(2 * num_both, num_asked + num_seen, num_asked),
        "count_accuracy": share(counts.cpu() == num_objects, one_each, one_each),
    }


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
    return ratio(kept.sum((1, 2)), before.sum((1, 2)), groups, share=True)


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


def diversity(final: Tensor, objects: Tensor, of_lists: dict[int, Tensor]) -> dict[str, Score]:
    """How far the draws of one list are apart, and real pictures of one list.

    Args:
        final: (L, D, 3, H, W) uint8, D draws of L lists; one draw has no diversity.
        objects: (L, K) multi-hot.
        of_lists: what :func:`real_diversity` says of real scenes; empty leaves ``diversity_real`` and
            ``diversity_ratio`` out.

    Returns:
        ``diversity`` in grey levels; ``diversity_real``, over the lists of sizes of which real pairs exist, its
        interval over lists of real scenes; and ``diversity_ratio``, drawn by real over these lists.
    """
    if final.shape[1] < 2:
        return {}
    drawn = torch.tensor([metrics.diversity(from_uint8(pictures)) for pictures in final])
    pairs = final.shape[1] * (final.shape[1] - 1) // 2
    scores = {"diversity": ratio(drawn, torch.ones(len(drawn)), len(drawn), samples=len(drawn) * pairs)}
    sizes = objects.sum(1).long()
    comparable = torch.tensor([int(size) in of_lists for size in sizes])
    if comparable.any():
        aims, mean = _aims(sizes[comparable], of_lists)
        scores["diversity_real"] = mean
        if mean.value:
            paired = ratio(drawn[comparable], aims, len(aims), samples=len(aims) * pairs)
            scores["diversity_ratio"] = quotient(paired, _divided(mean, mean.value))
    return scores


def _divided(score: Score, divisor: float) -> Score:
    """A score in other units."""
    if score.value is None or score.ci95 is None:
        return score
    low, high = score.ci95
    return Score(score.value / divisor, (low / divisor, high / divisor), score.samples)


def real_diversity(real: Sequence[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """How far real pictures of one list are apart.

    Pairs are of pictures that hold the same objects and began with the same one: that stands in the middle, and where
    another does, pictures are farther apart than draws of one list can be.

    Args:
        real: scenes that may hold equal lists, in parts: the pictures after each turn, (R, T, 3, H, W) uint8, and what
            it added, (R, T, K) 0 or 1.

    Returns:
        For each number of objects (G, 2) float64: sum of distances of the pairs of each group, and their number.
    """
    groups: dict[tuple[int, tuple[float, ...]], list[Tensor]] = {}
    for pictures, objects in real:
        for scene, first, turns in zip(pictures, objects[:, 0].argmax(1), objects.cummax(1).values, strict=True):
            for picture, asked in zip(scene, turns.tolist(), strict=True):
                groups.setdefault((int(first), tuple(asked)), []).append(picture)
    found: dict[int, list[tuple[float, int]]] = {}
    for (_, asked), group in groups.items():
        if len(group) > 1:
            count = len(group) * (len(group) - 1) // 2
            total = count * metrics.diversity(from_uint8(torch.stack(group)))
            found.setdefault(int(sum(asked)), []).append((total, count))
    return {size: torch.tensor(of_lists, dtype=torch.float64) for size, of_lists in found.items()}


def _aims(sizes: Tensor, of_lists: dict[int, Tensor], resamples: int = 2000) -> tuple[Tensor, Score]:
    """Real diversity for the size of each list, (L,), and its mean; the interval resamples the real lists of a size."""
    rng = torch.Generator().manual_seed(0)
    aims, means = torch.zeros(len(sizes), dtype=torch.float64), torch.zeros(resamples, dtype=torch.float64)
    for size in sizes.unique().tolist():
        real = of_lists[size]
        aims[sizes == size] = real[:, 0].sum() / real[:, 1].sum()
        totals, pairs = real[torch.randint(len(real), (resamples, len(real)), generator=rng)].sum(1).unbind(1)
        means += totals / pairs * (sizes == size).double().mean()
    unsure = _middle_95(means) if all(len(of_lists[size]) > 1 for size in sizes.tolist()) else None
    return aims, Score(float(aims.mean()), unsure, len(aims))


def scene_features(pictures: Mapping[str, Tensor], training: Tensor) -> dict[str, Tensor]:
    """What :func:`looks` compares, of several sets of scenes.

    Args:
        pictures: (S, T, 3, H, W) uint8 each, the pictures after each turn.
        training: (R, T, 3, H, W) uint8, real ones, the first :data:`SCALE_SCENES` of which set the scale.

    Returns:
        (S, T, D) float32 each.
    """
    scale = fit_scale(picture_features(training[:SCALE_SCENES].flatten(0, 1)))
    return {
        name: scale.standardise(picture_features(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        for name, x in pictures.items()
    }


def looks(drawn: Tensor, real: Tensor, *, intervals: bool = True) -> dict[str, Score]:
    """Distances of drawn pictures to real ones in features, and neighbourhoods of both.

    Args:
        drawn: (S, T, D) features of the pictures after each turn of S scenes, on the scale of real pictures.
        real: likewise, of as many scenes.
        intervals: whether there are intervals by jackknife and by halves, which take 20 and 10 times as long as the
            scores; that of the kernel distance costs nothing.

    Returns:
        ``frechet_distance`` and ``kernel_distance`` of all pictures; ``precision``, ``recall``, ``density`` and
        ``coverage`` of each scene's last. Fewer than three scenes have the first only, without an interval; a
        single picture has none. Neighbourhoods have intervals where half of the scenes can fill one.
    """

    def distance(samples: Sequence[Tensor]) -> list[float]:
        return [metrics.frechet_distance(samples[0].flatten(0, 1), samples[1].flatten(0, 1))]

    def neighbours(samples: Sequence[Tensor]) -> list[float]:
        drawn, real = (sample[:, -1] for sample in samples)
        return [float(x.mean()) for x in metrics.neighbour_scores(real, drawn, k=min(NEIGHBOURS, len(real) - 1))]

    num_scenes, turns, _ = drawn.shape
    pictures = num_scenes * turns
    if pictures < 2:
        return {}
    samples = drawn, real
    interval = jackknife(distance, samples)[0] if intervals and num_scenes > 2 else None
    scores = {"frechet_distance": Score(distance(samples)[0], interval, pictures)}
    if num_scenes < 3:
        return scores
    kernel = metrics.kernel_distance(drawn.flatten(0, 1), real.flatten(0, 1), group_size=turns)
    near, far = max(kernel.with_noise - 1.96 * kernel.standard_error, 0.0), 1.96 * kernel.standard_error
    scores["kernel_distance"] = Score(kernel.with_noise, (near, kernel.with_noise + far), pictures)
    for name, value in zip(metrics.NeighbourScores._fields, neighbours(samples), strict=True):
        scores[name] = Score(value, None, num_scenes)
    if intervals and num_scenes // 2 > NEIGHBOURS:
        for name, (low, high) in zip(metrics.NeighbourScores._fields, by_halves(neighbours, samples), strict=True):
            scores[name] = scores[name]._replace(ci95=(low, high if name == "density" else min(high, 1.0)))
    return scores


def memorisation(drawn: Tensor, held_out: Tensor) -> dict[str, Score]:
    """Whether pictures are nearer to the training pictures than held-out real ones are.

    Args:
        drawn: (S,) distances to the nearest training picture (:func:`condgan.features.copy_distances`).
        held_out: (R,) the same of held-out real pictures.

    Warns:
        UserWarning: half of the held-out pictures are training pictures; then nothing is measured.
    """
    if float(held_out.median()) < metrics.SAME_DISTANCE:
        warnings.warn(
            "half of the held-out pictures are among the training pictures: what is near to those cannot be told from "
            "a copy, and memorisation is not measured. Look at how the splits were made",
            stacklevel=5,  # past evaluate
        )
        return dict.fromkeys(("memorisation_ratio", "memorisation_nearer", "memorisation_p"), NOTHING)
    found, several = metrics.memorisation(drawn, held_out, rng_seed=0), min(len(drawn), len(held_out)) > 1
    return {
        "memorisation_ratio": Score(found.ratio, found.ratio_ci95 if several else None, len(drawn)),
        "memorisation_nearer": Score(found.nearer, found.nearer_ci95 if several else None, len(drawn)),
        "memorisation_p": Score(found.p_value, None, len(drawn)),
    }


def jackknife(
    function: Callable[[Sequence[Tensor]], Sequence[float]], samples: Sequence[Tensor], blocks: int = 20
) -> list[Interval]:
    """95 % intervals of smooth functions of several samples of scenes, by leaving out a block of scenes at a time.

    For what a bootstrap would distort: distances of distributions grow when scenes are repeated, and a repeated
    scene is its own neighbour.

    Args:
        function: of samples such as those given; its numbers are not negative.
        samples: tensors whose first axis is scenes.
        blocks: parts that every sample is divided into, or as many as the smallest has scenes.

    Source: Shao and Wu 1989, "A general theory for jackknife variance estimation"; normal interval.
    """
    blocks = min(blocks, *map(len, samples))
    values = []
    for block in range(blocks):
        rest = [torch.cat([x for i, x in enumerate(sample.tensor_split(blocks)) if i != block]) for sample in samples]
        values.append(function(rest))
    found = torch.tensor(values, dtype=torch.float64)  # (blocks, numbers)
    return _about(function(samples), ((blocks - 1) / blocks * (found - found.mean(0)).square().sum(0)).sqrt())


def by_halves(
    function: Callable[[Sequence[Tensor]], Sequence[float]], samples: Sequence[Tensor], halves: int = 40
) -> list[Interval]:
    """95 % intervals of functions of several samples of scenes that are not smooth, from random halves of each.

    Halves differ among themselves as much as the whole does from what is sampled. Of shares of neighbourhoods, which
    jump when a scene is left out, a jackknife says too much.

    Args:
        function: of samples such as those given; its numbers are not negative, and vary with samples of half the size
            about as those of the whole do but for the factor that the size has.
        samples: tensors whose first axis is scenes, two at least.
        halves: how many.

    Source: half-samples of McCarthy 1969, "Pseudo-replication: half samples", at random; normal interval.
    """
    rng = torch.Generator().manual_seed(0)

    def half(sample: Tensor) -> Tensor:
        return sample[torch.randperm(len(sample), generator=rng)[: len(sample) // 2]]

    found = torch.tensor([function([*map(half, samples)]) for _ in range(halves)], dtype=torch.float64)
    return _about(function(samples), found.std(0))


def _about(values: Sequence[float], errors: Tensor) -> list[Interval]:
    """Normal 95 % intervals of values that are not negative, with their standard errors (V,) float64."""
    whole = torch.tensor(values, dtype=torch.float64)
    low, high = (whole - 1.96 * errors).clamp(min=0), whole + 1.96 * errors
    return list(zip(low.tolist(), high.tolist(), strict=True))
