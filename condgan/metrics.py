"""Measures of drawn pictures: are the objects there, does the rest stay, do they vary, look real, or copy.

Functions first; :class:`MultilabelAccuracy` and :class:`FeatureStatistics` add up batches and give the same numbers.
No measure here reads a network: logits and features come in, so that it is always clear whose they are.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from condgan.functional import changed_region, symmetric_root

GREY_LEVELS = 127.5
"""Grey levels (0-255) in one unit of [-1, 1]."""
DILATION = 6
"""Pixels by which a changed region is grown: soft shadows and edges belong to the change."""
NEAR_SHARE = 0.01
"""Share of held-out pictures that count as suspiciously near to a training picture."""
SAME_DISTANCE = 1e-3
"""Two pictures less than this apart are one (:func:`nearest_distances`): rounding alone makes distances of 1e-7."""


def _check_logits(logits: Tensor, objects: Tensor) -> None:
    if logits.ndim != 2 or logits.shape != objects.shape:
        raise ValueError(
            f"logits and objects must be (N, K) of one shape, got {tuple(logits.shape)} and {tuple(objects.shape)}"
        )
    if logits.isnan().any():
        raise ValueError("logits has NaN: the classifier was given pictures that are not finite")


def top_k_found(logits: Tensor, objects: Tensor) -> Tensor:
    """How many of the asked objects are among the k highest outputs, k being how many were asked.

    Args:
        logits: (N, K), any monotone score: logits and probabilities give the same. Of equal scores the lower id wins.
        objects: (N, K) multi-hot, the objects asked; k may differ from row to row.

    Returns:
        (N,) int64 in [0, k].

    Raises:
        ValueError: the shapes differ, or ``logits`` has NaN.

    Source: the evaluator of the course that the i-CLEVR task comes from.
    """
    _check_logits(logits, objects)
    asked = objects > 0.5
    order = logits.argsort(dim=1, descending=True, stable=True)
    among_k_highest = torch.arange(logits.shape[1], device=logits.device) < asked.sum(1, keepdim=True)
    return (asked.gather(1, order) & among_k_highest).sum(1)


def multilabel_accuracy(logits: Tensor, objects: Tensor) -> float:
    """The course's measure: objects found by :func:`top_k_found` / objects asked, over all pictures together.

    A picture of three objects therefore counts three times as much as a picture of one. Shapes as there.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: no object is asked, the shapes differ, or ``logits`` has NaN.
    """
    asked = int((objects > 0.5).sum())
    if asked == 0:
        raise ValueError("objects asks for nothing: accuracy needs at least one object")
    return int(top_k_found(logits, objects).sum()) / asked


def exact_set(logits: Tensor, objects: Tensor, threshold: float = 0.5) -> Tensor:
    """Whether the set of objects seen equals the set asked: nothing missing and nothing more.

    Stricter than :func:`top_k_found`, which is told how many objects to look for.

    Args:
        logits: (N, K), before the sigmoid.
        objects: (N, K) multi-hot, the objects asked.
        threshold: an object is seen where its probability is above this.

    Returns:
        (N,) bool.

    Raises:
        ValueError: the shapes differ, or ``logits`` has NaN.
    """
    _check_logits(logits, objects)
    return ((logits.sigmoid() > threshold) == (objects > 0.5)).all(1)


class ObjectScores(NamedTuple):
    """Precision, recall and F1 over all objects of all pictures, each in [0, 1]."""

    precision: float
    recall: float
    f1: float


def object_scores(logits: Tensor, objects: Tensor, threshold: float = 0.5) -> ObjectScores:
    """Micro-averaged precision, recall and F1 of objects seen against objects asked.

    With S objects seen (probability above ``threshold``), A asked and B both, added up over all pictures: precision
    B / S, recall B / A, F1 2 B / (S + A). Zero where the divisor is zero. Arguments and errors as in :func:`exact_set`.
    """
    _check_logits(logits, objects)
    seen, asked = logits.sigmoid() > threshold, objects > 0.5
    num_seen, num_asked, num_both = int(seen.sum()), int(asked.sum()), int((seen & asked).sum())
    return ObjectScores(
        precision=num_both / max(num_seen, 1),
        recall=num_both / max(num_asked, 1),
        f1=2 * num_both / max(num_seen + num_asked, 1),
    )


def bootstrap_interval(
    values: Tensor, weights: Tensor, *, rng_seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Interval of ``sum(values) / sum(weights)`` by resampling prompts with replacement.

    Draws of one prompt are alike, so the prompt with all its draws is what is resampled: more draws make the score
    of these prompts surer, but only more prompts tell about others. Percentile interval.

    Args:
        values: (P,) or (P, D) what was found for each of P prompts, in each of D draws.
        weights: same shape, what was asked; positive.
        rng_seed: of the resampling; the same seed gives the same interval.
        level: share of resamples within the interval.
        resamples: how often P prompts are drawn from the P.

    Returns:
        Low and high end.

    Raises:
        ValueError: shapes differ, a weight is not positive, there is no prompt, or ``level`` is not in (0, 1).

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    found, asked = _sums_of_prompts(level, values=values, weights=weights)
    rng = torch.Generator().manual_seed(rng_seed)
    prompts = torch.randint(len(found), (resamples, len(found)), generator=rng)
    statistic = found[prompts].sum(1) / asked[prompts].sum(1)  # (resamples,)
    low, high = statistic.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def share_interval(found: Tensor, asked: Tensor, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share, ``sum(found) / sum(asked)``, that can be trusted near 0 and 1 too.

    There a bootstrap is too narrow: where everything was found, so it was in all resamples. This is Wilson's interval
    for n objects that were found or not independently of each other, n being ``sum(asked)`` divided by how much more
    the prompts differ than such objects would (the design effect; at least 1), and less by as much as few prompts say
    little of that. Where all or nothing was found, the prompts do not say how alike the draws of one prompt are; then
    n is between the number of prompts and that of objects, their geometric mean.

    Args:
        found: (P,) or (P, D) what was found for each of P prompts, in each of D draws; P at least 2.
        asked: same shape, what was asked; positive, and not less than ``found``.
        level: share of such intervals that hold the truth.

    Returns:
        Low and high end.

    Raises:
        ValueError: shapes differ, ``asked`` is not positive or less than ``found``, there is one prompt or none, or
            ``level`` is not in (0, 1).

    Source: Wilson 1927; with the effective number of observations after Korn and Graubard 1998, Survey Methodology 24,
    as compared by Dean and Pagano 2015, doi:10.1093/jssam/smv024; the geometric mean is ours.
    """
    found, asked = _sums_of_prompts(level, found=found, asked=asked)
    if len(found) < 2 or bool(((found < 0) | (found > asked)).any()):
        raise ValueError("found must be from 0 to asked, of two prompts or more: one says nothing of others")
    prompts, count = len(found), float(asked.sum())
    share, z = float(found.sum()) / count, NormalDist().inv_cdf((1 + level) / 2)
    if share in (0, 1):
        n = math.sqrt(prompts * count)
    else:
        variance = prompts / (prompts - 1) * float((found - share * asked).square().sum()) / count**2
        n = share * (1 - share) / max(variance, share * (1 - share) / count)
        n *= (z / _t_quantile((1 + level) / 2, prompts - 1)) ** 2
    middle, spread = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = (middle - spread) / (1 + z**2 / n), (middle + spread) / (1 + z**2 / n)
    return low if share > 0 else 0.0, high if share < 1 else 1.0


def _t_quantile(level: float, freedom: int) -> float:
    """Quantile of Student's t distribution: exact for one and two degrees of freedom, else to 0.2 % up to 0.975.

    Source: Abramowitz and Stegun 1964, eq. 26.7.5.
    """
    if freedom == 1:
        return math.tan(math.pi * (level - 0.5))
    if freedom == 2:
        return (2 * level - 1) * math.sqrt(2 / (1 - (2 * level - 1) ** 2))
    z = NormalDist().inv_cdf(level)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def _sums_of_prompts(level: float, **given: Tensor) -> tuple[Tensor, Tensor]:
    """Both (P,) float64 on the CPU, over all draws of each prompt; raises ValueError unless an interval can be made."""
    (first, values), (second, weights) = given.items()
    if values.shape != weights.shape or values.ndim not in (1, 2) or values.numel() == 0:
        raise ValueError(
            f"{first} and {second} must be (P,) or (P, D), not empty and of one shape, "
            f"got {tuple(values.shape)} and {tuple(weights.shape)}"
        )
    if not (weights > 0).all():
        raise ValueError(f"{second} must be positive: every prompt asks for something")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    found, asked = (x.cpu().double().reshape(len(x), -1).sum(1) for x in (values, weights))
    return found, asked


class Gaussian(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor


def fit_gaussian(features: Tensor) -> Gaussian:
    """Mean and unbiased covariance of features (N, D), N at least 2; computed in float64.

    Raises:
        ValueError: ``features`` is not (N, D), has fewer than two rows, or is not finite.
    """
    statistics = FeatureStatistics()
    statistics.update(features)
    return statistics.compute()


def gaussian_frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians.

    ``|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2)`` in float64. The last trace is the sum of the
    singular values of ``A^1/2 B^1/2``, with square roots by symmetric eigendecomposition: no complex numbers, no
    added diagonal, and covariances without full rank are fine.

    Returns:
        A number that is not negative, in squared units of the features.

    Raises:
        ValueError: the two Gaussians differ in their number of features.

    Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. 6.
    """
    if a.covariance.shape != b.covariance.shape:
        raise ValueError(f"the two Gaussians have {len(a.mean)} and {len(b.mean)} features: compare like with like")
    cross = torch.linalg.svdvals(symmetric_root(a.covariance) @ symmetric_root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to two sets of features, (N, D) and (M, D); see the function above.

    It is *the* FID only with the Inception features of the paper, and with others we never call it one. The features
    of our own classifier are nearly blind to texture and light, so a small distance of them does not mean that
    pictures look real; those of :mod:`condgan.features` see both. It falls with the number of samples: compare only
    distances of equal N and M, and show beside it the distance of two sets of real pictures.

    Raises:
        ValueError: features are not (N, D) with N of at least 2, not finite, or of different D.

    Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6.
    """
    return gaussian_frechet_distance(fit_gaussian(features_a), fit_gaussian(features_b))


class KernelDistance(NamedTuple):
    """How far apart the distributions behind two sets of features are."""

    distance: float
    """Unbiased estimate: about zero, and below it as often as above, where both come from one distribution."""
    standard_error: float
    """Of ``distance``, over groups of rows; too large by about a half where both come from one distribution."""
    with_noise: float
    """The plain distance of the two sets as they are, never below zero. Like a Fréchet distance it falls with the
    number of samples and has a floor, so that drawn / real-against-real is a ratio that means something."""


def kernel_distance(features_a: Tensor, features_b: Tensor, *, group_size: int = 1) -> KernelDistance:
    """Squared maximum mean discrepancy under the kernel ``(x . y / D + 1)^3`` of KID, in float64.

    It is *the* KID only with the Inception features of the paper. Unlike there, the estimate is from all pairs, not
    from random subsets, and its standard error is that of the two-sample jackknife over groups.

    Args:
        features_a: (N, D), about standardised: the kernel grows with the sixth power of their length.
        features_b: (M, D), standardised alike.
        group_size: so many rows in turn are of one scene and alike. ``distance`` compares no two rows of one group,
            and groups, not rows, count as observations of the standard error.

    Raises:
        ValueError: features are not finite (N, D) of one D, or not whole groups, at least three of them.

    Source: Gretton et al. 2012, JMLR 13, eq. 3 and 5; Binkowski et al. 2018, arXiv:1801.01401, section 4; jackknife:
    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11.
    """
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    a, b = _feature_sets(features_a=features_a, features_b=features_b)
    for name, rows in (("features_a", a), ("features_b", b)):
        if len(rows) % group_size or len(rows) < 3 * group_size:
            raise ValueError(f"{name} must hold at least three whole groups of {group_size} rows, got {len(rows)} rows")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        """Sums over pairs of groups, (groups of x, groups of y)."""
        values = (x @ y.T / x.shape[1] + 1) ** 3
        return values.unflatten(1, (-1, group_size)).sum(2).unflatten(0, (-1, group_size)).sum(1)

    within_a, within_b, across = (
        kernel(a, a) / group_size**2,
        kernel(b, b) / group_size**2,
        kernel(a, b) / group_size**2,
    )

    def between_groups(sums: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over pairs of different groups, and the same with each group left out."""
        count, total = len(sums), sums.sum() - sums.trace()
        left_out = total - 2 * (sums.sum(1) - sums.diagonal())
        return total / (count * (count - 1)), left_out / ((count - 1) * (count - 2))

    mean_a, mean_a_left_out = between_groups(within_a)
    mean_b, mean_b_left_out = between_groups(within_b)
    total = across.sum()
    without_a = mean_a_left_out + mean_b - 2 * (total - across.sum(1)) / ((len(within_a) - 1) * len(within_b))
    without_b = mean_a + mean_b_left_out - 2 * (total - across.sum(0)) / (len(within_a) * (len(within_b) - 1))
    variance = sum((len(x) - 1) * x.var(correction=0) for x in (without_a, without_b))
    return KernelDistance(
        distance=float(mean_a + mean_b - 2 * across.mean()),
        standard_error=float(variance) ** 0.5,
        with_noise=float(within_a.mean() + within_b.mean() - 2 * across.mean()),
    )


def _feature_sets(**features: Tensor) -> list[Tensor]:
    """Float64 copies on the CPU of sets of features, checked under their names."""
    wanted = next(iter(features.values())).shape[-1:]
    for name, rows in features.items():
        if rows.ndim != 2 or len(rows) == 0 or rows.shape[1:] != wanted:
            shapes = ", ".join(str(tuple(other.shape)) for other in features.values())
            raise ValueError(f"{name} must be (N, D), not empty, with one D for all sets; the shapes are {shapes}")
        if not rows.isfinite().all():
            raise ValueError(f"{name} is not finite: the pictures that made it are broken")
    return [rows.detach().cpu().double() for rows in features.values()]


class NeighbourScores(NamedTuple):
    """Drawn pictures against real ones, picture by picture; the mean of each tensor is the score of the papers.

    Float64, so that each can be averaged and resampled as it is.
    """

    precision: Tensor
    """(M,) 1 where a drawn picture lies among the real ones: are the pictures good?"""
    recall: Tensor
    """(N,) 1 where a real picture lies among the drawn ones: is everything drawn?"""
    density: Tensor
    """(M,) in how many real neighbourhoods a drawn picture lies, / k: as precision, unmoved by single odd real
    pictures; its mean may be above 1."""
    coverage: Tensor
    """(N,) 1 where a real picture has a drawn one in its neighbourhood: as recall, unmoved by single odd drawings."""


def neighbour_scores(real: Tensor, fake: Tensor, k: int = 5) -> NeighbourScores:
    """Precision, recall, density and coverage in neighbourhoods: balls that reach to the k-th nearest of one's own set.

    Give one picture a scene: turns of one scene are each other's nearest neighbours, and their balls far too small.
    All four depend on N, M and k, and even for real against real precision, recall and coverage stay below 1: show
    them beside those of other real pictures, as many of them.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        k: which neighbour a ball reaches to, the picture itself not counted; less than N and M.

    Raises:
        ValueError: features are not finite (N, D) of one D, or there are too few.

    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2 (with k = 3 there); Naeem et al. 2020,
    arXiv:2002.09797, eq. 3 and 5.
    """
    real, fake = _feature_sets(real=real, fake=fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            f"k must be at least 1 and less than the number of rows, got {k} of {len(real)} and {len(fake)}"
        )

    def radius(rows: Tensor) -> Tensor:
        return _distances(rows, rows).kthvalue(k + 1, dim=1).values  # its own distance of zero is the first

    distance = _distances(real, fake)  # (N, M)
    near_real, near_fake = distance <= radius(real)[:, None], distance <= radius(fake)
    return NeighbourScores(
        precision=near_real.any(0).double(),
        recall=near_fake.any(1).double(),
        density=near_real.double().sum(0) / k,
        coverage=near_real.any(1).double(),
    )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N, M) from differences, not products: equal rows are at exactly zero."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def nearest_distances(features: Tensor, references: Tensor, *, chunk: int = 1024) -> Tensor:
    """Distance of each row to the nearest reference.

    Args:
        features: (N, D).
        references: (M, D), at least one.
        chunk: references compared at once; has no part in the results.

    Returns:
        (N,) float64, Euclidean; zero, up to 1e-6 of the length of the rows, where a reference is the same.

    Raises:
        ValueError: features are not finite (N, D) of one D, or a set is empty.
    """
    rows, others = _feature_sets(features=features, references=references)
    centre = others.mean(0)
    nearest = [torch.cdist(rows - centre, part - centre).amin(1) for part in others.split(chunk)]
    return torch.stack(nearest).amin(0)


class Memorisation(NamedTuple):
    """Whether drawn pictures lie nearer to training pictures than real pictures that were held out do."""

    ratio: float
    """Median distance drawn / held out: 1 is as far as new real pictures are; well below 1, drawings are copies."""
    ratio_ci95: tuple[float, float]
    """Its 95 % interval; the divisor counts as :data:`SAME_DISTANCE` at least."""
    nearer: float
    """Share of drawn pictures nearer than the nearest 1 % of held-out ones: about 0.01 if none is a copy."""
    nearer_ci95: tuple[float, float]
    """Its 95 % interval."""
    p_value: float
    """How likely at least as many nearer ones are if drawn and held-out pictures are equally near; exact."""

    @property
    def found(self) -> bool:
        """Whether there are copies beyond reasonable doubt: ``p_value`` is below 0.01."""
        return self.p_value < 0.01


def memorisation(drawn: Tensor, held_out: Tensor, *, rng_seed: int, resamples: int = 2000) -> Memorisation:
    """Compare distances to the nearest training picture, of drawn and of held-out real pictures of equal lists.

    A few copies do not move the median; they do move ``nearer``. With x of S drawn pictures nearer than the r-th
    nearest of R held-out ones, r being 1 % of R or 1, ``p_value`` is the chance of x or more: x is beta-binomial with
    parameters S, r and R + 1 - r, whatever the distances are distributed like. With 300 pictures a side, 5 % of
    copies are always found; copies are found where there are none at most once in a hundred times.

    Args:
        drawn: (S,) as of :func:`nearest_distances`; one picture a scene, because turns of one scene are alike.
        held_out: (R,), distances to the same training pictures.
        rng_seed: of the resampling; the same seed gives the same intervals.
        resamples: how often both sets are drawn from themselves with replacement; percentile intervals.

    Raises:
        ValueError: distances are not finite (S,) and (R,), negative or none, or half of those held out are none
            (below :data:`SAME_DISTANCE`).

    Source: ours, after the copying test of Meehan et al. 2020, arXiv:2004.05675; the distribution: Wilks 1942,
    Statistical prediction with special reference to the problem of tolerance limits.
    """
    for name, values in (("drawn", drawn), ("held_out", held_out)):
        if values.ndim != 1 or len(values) == 0 or not (values.isfinite() & (values >= 0)).all():
            raise ValueError(f"{name} must be finite distances (S,), none negative, got {tuple(values.shape)}")
    near, far = drawn.detach().cpu().double(), held_out.detach().cpu().double()
    if far.quantile(0.5) < SAME_DISTANCE:
        raise ValueError("held_out has a median of zero: these pictures are among the training pictures")
    rank = max(1, round(NEAR_SHARE * len(far)))

    def compare(a: Tensor, b: Tensor) -> Tensor:
        """Ratio and share for each row of distances (B, S) and (B, R)."""
        nearer = (a < b.kthvalue(rank, dim=1, keepdim=True).values).double().mean(1)
        return torch.stack([a.quantile(0.5, dim=1) / b.quantile(0.5, dim=1).clamp(min=SAME_DISTANCE), nearer])

    rng = torch.Generator().manual_seed(rng_seed)
    a, b = (x[torch.randint(len(x), (resamples, len(x)), generator=rng)] for x in (near, far))
    ends = compare(a, b).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)  # (2, ratio and share)
    (ratio_low, share_low), (ratio_high, share_high) = ends.tolist()
    ratio, nearer = compare(near[None], far[None])[:, 0].tolist()
    return Memorisation(
        ratio=ratio,
        ratio_ci95=(ratio_low, ratio_high),
        nearer=nearer,
        nearer_ci95=(share_low, share_high),
        p_value=_chance_of_nearer(round(nearer * len(near)), len(near), rank, len(far)),
    )


def _chance_of_nearer(count: int, drawn: int, rank: int, held_out: int) -> float:
    """Chance that ``count`` or more of ``drawn`` values are below the ``rank``-th of ``held_out`` alike ones."""

    def ways(x: int) -> int:
        """Orders of all values in which x drawn ones come before that held-out one."""
        return math.comb(x + rank - 1, x) * math.comb(drawn - x + held_out - rank, drawn - x)

    orders = math.comb(drawn + held_out, drawn)
    return (orders - sum(ways(x) for x in range(count))) / orders


def _check_floating(images: Tensor) -> None:
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [-1, 1], got {images.dtype}; see images.from_uint8")


def _touched(images: Tensor) -> tuple[Tensor, Tensor]:
    """Change (N, T-1, H, W) in grey levels, and the dilated region (N, T-1, H, W) where a turn changed something."""
    if images.ndim != 5 or images.shape[1] < 2:
        raise ValueError(f"images must be (N, T, 3, H, W) with T of at least 2, got {tuple(images.shape)}")
    _check_floating(images)
    before, after = images[:, :-1].flatten(0, 1), images[:, 1:].flatten(0, 1)
    region = changed_region(before, after)[:, None].to(images.dtype)
    region = F.max_pool2d(region, 2 * DILATION + 1, stride=1, padding=DILATION).squeeze(1) > 0
    change = (after - before).abs().mean(1) * GREY_LEVELS
    shape = (images.shape[0], images.shape[1] - 1)
    return change.unflatten(0, shape), region.unflatten(0, shape)


def preservation(images: Tensor) -> Tensor:
    """How much a turn changes what it should leave alone: zero is perfect.

    Mean absolute change from one turn to the next, over the channels of all pixels outside the changed region. That
    region holds the pixels of which a channel moves by more than 25 grey levels
    (:func:`condgan.functional.changed_region`), dilated by a square of 6 pixels to each side. Where it covers the
    whole picture, nothing was left alone, and the mean is over all pixels.

    A pixel that changes a lot is never counted, so read this beside :func:`changed_area`: a turn that redraws an old
    object scores well here and badly there.

    Args:
        images: (N, T, 3, H, W) in [-1, 1], the picture after every turn.

    Returns:
        (N, T-1) in grey levels of 0 to 255.

    Raises:
        TypeError: ``images`` are whole numbers.
        ValueError: they are not of the shape above.

    Source: ours.
    """
    change, region = _touched(images)
    outside = ~region | region.all(-1, keepdim=True).all(-2, keepdim=True)
    return (change * outside).sum((-2, -1)) / outside.sum((-2, -1))


def changed_area(images: Tensor) -> Tensor:
    """Share of the picture in the changed region of :func:`preservation`: (N, T, 3, H, W) to (N, T-1) in [0, 1]."""
    return _touched(images)[1].float().mean((-2, -1))


def diversity(images: Tensor) -> float:
    """Mean distance of all pairs of pictures: zero when all draws of a list are the same picture.

    The distance of two pictures is the root of the mean squared difference over all channels and pixels.

    Args:
        images: (N, 3, H, W) in [-1, 1], at least two: the draws of one list, or real pictures of one list.

    Returns:
        Mean over the N (N - 1) / 2 pairs, in grey levels of 0 to 255.

    Raises:
        TypeError: ``images`` are whole numbers.
        ValueError: they are not of the shape above.

    Source: ours; as mean pairwise distances of draws in Zhu et al. 2017, arXiv:1711.11586, but in pixels.
    """
    if images.ndim != 4 or len(images) < 2:
        raise ValueError(f"images must be (N, 3, H, W) with N of at least 2, got {tuple(images.shape)}")
    _check_floating(images)
    flat = images.flatten(1)
    return float(F.pdist(flat).mean()) / math.sqrt(flat.shape[1]) * GREY_LEVELS


class MultilabelAccuracy:
    """Adds up :func:`multilabel_accuracy` over batches.

    Example:
        >>> accuracy = MultilabelAccuracy()
        >>> accuracy.update(torch.tensor([[3.0, -1.0, 2.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
        >>> accuracy.compute()
        0.5
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.found = 0
        self.asked = 0

    def update(self, logits: Tensor, objects: Tensor) -> None:
        """Add a batch; arguments and errors as in :func:`top_k_found`."""
        self.found += int(top_k_found(logits, objects).sum())
        self.asked += int((objects > 0.5).sum())

    def compute(self) -> float:
        """Objects found / objects asked since the last reset.

        Raises:
            ValueError: no object has been asked.
        """
        if self.asked == 0:
            raise ValueError("no object has been asked: call update() before compute()")
        return self.found / self.asked


class FeatureStatistics:
    """Adds up mean and covariance of features over batches, without keeping the features.

    Sums are kept about the running mean, so that large means do not eat the digits of small covariances.

    Source: Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance.

    Example:
        >>> statistics = FeatureStatistics()
        >>> statistics.update(torch.tensor([[0.0], [2.0]]))
        >>> statistics.update(torch.tensor([[4.0]]))
        >>> statistics.compute().covariance.item()
        4.0
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add a batch of features (N, D).

        Raises:
            ValueError: ``features`` is not (N, D) with the D of the batches before, or is not finite.
        """
        if features.ndim != 2 or (self.count and features.shape[1] != len(self._mean)):
            wanted = f"(N, {len(self._mean)})" if self.count else "(N, D)"
            raise ValueError(f"features must be {wanted}, got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError("features is not finite: the pictures that made it are broken")
        if len(features) == 0:
            return
        batch = features.detach().cpu().double()
        mean = batch.mean(0)
        scatter = (batch - mean).T @ (batch - mean)
        if self.count:
            total = self.count + len(batch)
            step = mean - self._mean
            scatter = self._scatter + scatter + torch.outer(step, step) * (self.count * len(batch) / total)
            mean = self._mean + step * (len(batch) / total)
        self.count += len(batch)
        self._mean, self._scatter = mean, scatter

    def compute(self) -> Gaussian:
        """Mean and unbiased covariance since the last reset.

        Raises:
            ValueError: fewer than two rows have been added.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two rows of features, got {self.count}")
        return Gaussian(self._mean, self._scatter / (self.count - 1))
