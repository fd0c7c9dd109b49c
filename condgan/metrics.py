"""Measures of drawn pictures: are the objects there, does the rest stay, do the pictures vary, do they look real.

Functions first; :class:`MultilabelAccuracy` and :class:`FeatureStatistics` add up batches and give the same numbers.
No measure here reads a network: logits and features come in, so that it is always clear whose they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from condgan.functional import changed_region

GREY_LEVELS = 127.5
"""Grey levels (0-255) in one unit of [-1, 1]."""
DILATION = 6
"""Pixels by which a changed region is grown: soft shadows and edges belong to the change."""


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
    if values.shape != weights.shape or values.ndim not in (1, 2) or values.numel() == 0:
        raise ValueError(
            f"values and weights must be (P,) or (P, D), not empty and of one shape, "
            f"got {tuple(values.shape)} and {tuple(weights.shape)}"
        )
    if not (weights > 0).all():
        raise ValueError("weights must be positive: every prompt asks for something")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    found, asked = (x.cpu().double().reshape(len(x), -1).sum(1) for x in (values, weights))  # (P,)
    rng = torch.Generator().manual_seed(rng_seed)
    prompts = torch.randint(len(found), (resamples, len(found)), generator=rng)
    statistic = found[prompts].sum(1) / asked[prompts].sum(1)  # (resamples,)
    low, high = statistic.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


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
    cross = torch.linalg.svdvals(_square_root(a.covariance) @ _square_root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def _square_root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to two sets of features, (N, D) and (M, D); see the function above.

    It is *the* FID only with the Inception features of the paper. On the features of our own classifier it is not
    comparable with any published FID, and we never call it one: such features are nearly blind to texture and light,
    so a small distance does not mean that pictures look real. It falls with the number of samples: compare only
    distances of equal N and M, and show beside it the distance of two sets of real pictures.

    Raises:
        ValueError: features are not (N, D) with N of at least 2, not finite, or of different D.

    Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6.
    """
    return gaussian_frechet_distance(fit_gaussian(features_a), fit_gaussian(features_b))


def _touched(images: Tensor) -> tuple[Tensor, Tensor]:
    """Change (N, T-1, H, W) in grey levels, and the dilated region (N, T-1, H, W) where a turn changed something."""
    if images.ndim != 5 or images.shape[1] < 2:
        raise ValueError(f"images must be (N, T, 3, H, W) with T of at least 2, got {tuple(images.shape)}")
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
        ValueError: ``images`` is not of the shape above.

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
        images: (N, 3, H, W) in [-1, 1], at least two: the draws of one list, or real pictures of one set of objects.

    Returns:
        Mean over the N (N - 1) / 2 pairs, in grey levels of 0 to 255.

    Raises:
        ValueError: ``images`` is not of the shape above.

    Source: ours; as mean pairwise distances of draws in Zhu et al. 2017, arXiv:1711.11586, but in pixels.
    """
    if images.ndim != 4 or len(images) < 2:
        raise ValueError(f"images must be (N, 3, H, W) with N of at least 2, got {tuple(images.shape)}")
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
