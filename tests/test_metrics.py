"""Measures against cases whose answer is known on paper, and against slow plain versions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from condgan import metrics
from condgan.metrics import Gaussian


def _grey(level: float, size: int = 64) -> Tensor:
    """A picture of one grey level, (3, H, W) in [-1, 1]."""
    return torch.full((3, size, size), level / 127.5 - 1)


# ---- objects -------------------------------------------------------------------------------------------------------


def test_top_k_found_by_hand() -> None:
    logits = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.9, 0.1, 0.8, 0.2], [0.9, 0.1, 0.8, 0.2], [4.0, 3.0, 2.0, 1.0]])
    objects = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1]])
    assert metrics.top_k_found(logits, objects).tolist() == [2, 1, 0, 2]
    assert metrics.multilabel_accuracy(logits, objects) == 5 / 8  # not the mean of 1, 1/2, 0 and 2/3


def test_top_k_found_is_the_loop_of_the_definition() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 24, generator=rng)
    objects = (torch.rand(50, 24, generator=rng) < 0.15).float()
    expected = []
    for scores, asked in zip(logits.tolist(), objects.tolist(), strict=True):
        wanted = {i for i, value in enumerate(asked) if value}
        highest = sorted(range(24), key=lambda i: -scores[i])[: len(wanted)]
        expected.append(len(wanted & set(highest)))
    assert metrics.top_k_found(logits, objects).tolist() == expected
    assert metrics.top_k_found(logits.sigmoid(), objects).tolist() == expected


def test_perfect_outputs_score_one_and_outputs_of_other_pictures_score_low() -> None:
    rng = torch.Generator().manual_seed(1)
    objects = torch.zeros(400, 24).scatter_(1, torch.rand(400, 24, generator=rng).argsort(1)[:, :3], 1.0)
    logits = objects * 10 - 5
    assert metrics.multilabel_accuracy(logits, objects) == 1
    assert metrics.exact_set(logits, objects).all()
    assert metrics.object_scores(logits, objects) == (1, 1, 1)
    shuffled = objects.roll(1, 0)
    assert metrics.multilabel_accuracy(logits, shuffled) == pytest.approx(3 / 24, abs=0.03)  # chance
    assert metrics.exact_set(logits, shuffled).float().mean() < 0.02


def test_constant_outputs_earn_nothing_from_ties() -> None:
    objects = torch.eye(24)
    assert metrics.multilabel_accuracy(torch.zeros(24, 24), objects) == 1 / 24


def test_exact_set_refuses_one_too_many_and_one_too_few() -> None:
    objects = torch.tensor([[1.0, 1, 0, 0]])
    right = torch.tensor([[2.0, 2, -2, -2]])
    more = torch.tensor([[2.0, 2, -2, 2]])
    less = torch.tensor([[2.0, -2, -2, -2]])
    assert [metrics.exact_set(logits, objects).item() for logits in (right, more, less)] == [True, False, False]
    assert [metrics.top_k_found(logits, objects).item() for logits in (right, more, less)] == [2, 2, 2]
    just_seen = torch.tensor([[2.0, math.log(3) + 0.01, -2, -2]])  # probability a little above 3/4
    assert metrics.exact_set(just_seen, objects, threshold=0.75).item()
    assert not metrics.exact_set(just_seen, objects, threshold=0.76).item()


def test_object_scores_by_hand() -> None:
    objects = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1]])
    logits = torch.tensor([[1.0, -1, -1, 1], [-1, -1, -1, 1]])  # seen 3, asked 4, both 2
    precision, recall, f1 = metrics.object_scores(logits, objects)
    assert (precision, recall, f1) == (2 / 3, 1 / 2, 4 / 7)
    assert f1 == pytest.approx(2 / (1 / precision + 1 / recall))
    assert metrics.object_scores(torch.full((1, 4), -9.0), objects[:1]) == (0, 0, 0)


def test_object_measures_refuse_what_does_not_fit() -> None:
    for function in (metrics.top_k_found, metrics.exact_set, metrics.object_scores, metrics.multilabel_accuracy):
        with pytest.raises(ValueError, match=r"\(2, 24\) and \(3, 24\)"):
            function(torch.zeros(2, 24), torch.ones(3, 24))
        with pytest.raises(ValueError, match="NaN"):
            function(torch.full((2, 24), math.nan), torch.ones(2, 24))
    with pytest.raises(ValueError, match="asks for nothing"):
        metrics.multilabel_accuracy(torch.zeros(2, 24), torch.zeros(2, 24))


def test_accuracy_of_batches_is_accuracy_of_all() -> None:
    logits, objects = torch.randn(30, 24), (torch.rand(30, 24) < 0.1).float()
    objects[:, 0] = 1
    accuracy = metrics.MultilabelAccuracy()
    with pytest.raises(ValueError, match="update"):
        accuracy.compute()
    accuracy.update(torch.zeros(1, 24), torch.ones(1, 24))
    accuracy.reset()
    for chunk in (slice(0, 7), slice(7, 8), slice(8, 30)):
        accuracy.update(logits[chunk], objects[chunk])
    assert accuracy.compute() == metrics.multilabel_accuracy(logits, objects)


# ---- interval ------------------------------------------------------------------------------------------------------


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = torch.Generator().manual_seed(0)
    truth = 0.7
    weights = torch.arange(60) % 3 + 1.0
    trials = 200
    covered = 0
    for trial in range(trials):
        found = torch.binomial(weights, torch.full((60,), truth), generator=rng)
        low, high = metrics.bootstrap_interval(found, weights, rng_seed=trial, resamples=400)
        covered += low <= truth <= high
    assert 0.89 < covered / trials < 0.99  # nominal 0.95, standard error 0.015


def test_interval_has_the_width_of_the_normal_approximation() -> None:
    values = torch.arange(400) % 4 < 3  # 0.75
    low, high = metrics.bootstrap_interval(values, torch.ones(400), rng_seed=0, resamples=4000)
    half_width = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half_width, abs=0.006)
    assert high == pytest.approx(0.75 + half_width, abs=0.006)
    narrow_low, narrow_high = metrics.bootstrap_interval(values, torch.ones(400), rng_seed=0, level=0.5)
    assert low < narrow_low < 0.75 < narrow_high < high


def test_interval_does_not_shrink_with_draws_of_the_same_prompts() -> None:
    found = (torch.arange(32) % 2).float()
    once = metrics.bootstrap_interval(found, torch.ones(32), rng_seed=3)
    often = metrics.bootstrap_interval(found[:, None].repeat(1, 50), torch.ones(32, 50), rng_seed=3)
    assert once == often
    assert once[1] - once[0] > 0.2


def test_interval_weighs_prompts_by_what_they_asked() -> None:
    """One prompt of 1000 objects, all found, and one of 1, not found: half of the resamples hold both."""
    low, high = metrics.bootstrap_interval(
        torch.tensor([1000.0, 0.0]), torch.tensor([1000.0, 1.0]), rng_seed=0, level=0.4
    )
    assert low == pytest.approx(1000 / 1001)
    assert high == pytest.approx(1000 / 1001)


def test_interval_is_seeded_and_leaves_the_global_random_state_alone() -> None:
    values, weights = torch.rand(20), torch.ones(20)
    state = torch.get_rng_state()
    first = metrics.bootstrap_interval(values, weights, rng_seed=1)
    assert first == metrics.bootstrap_interval(values, weights, rng_seed=1)
    assert first != metrics.bootstrap_interval(values, weights, rng_seed=2)
    assert torch.equal(state, torch.get_rng_state())


def test_interval_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        metrics.bootstrap_interval(torch.ones(3), torch.ones(4), rng_seed=0)
    with pytest.raises(ValueError, match="not empty"):
        metrics.bootstrap_interval(torch.ones(0), torch.ones(0), rng_seed=0)
    with pytest.raises(ValueError, match="weights must be positive"):
        metrics.bootstrap_interval(torch.ones(3), torch.tensor([1.0, 0.0, 1.0]), rng_seed=0)
    with pytest.raises(ValueError, match=r"level .* 95"):
        metrics.bootstrap_interval(torch.ones(3), torch.ones(3), rng_seed=0, level=95)


def _scenarios() -> list[tuple[int, int, float, float | None]]:
    """Prompts, draws of each, true share, and how alike prompts are: Beta's a + b, None being all alike."""
    return [
        (256, 1, 0.995, None),
        (256, 1, 0.002, None),
        (32, 64, 0.998, None),
        (32, 64, 0.998, 20.0),
        (32, 64, 0.9998, 20.0),
        (317, 3, 0.99, 5.0),
        (84, 8, 0.5, 2.0),
        (2, 64, 0.5, 9.0),
        (4, 64, 0.8, 9.0),
        (8, 64, 0.5, 9.0),
    ]


@pytest.mark.parametrize(("prompts", "draws", "truth", "alike"), _scenarios())
def test_share_interval_holds_the_truth_near_the_ends_too(
    prompts: int, draws: int, truth: float, alike: float | None
) -> None:
    rng = np.random.default_rng(0)
    asked = torch.full((prompts,), float(draws))
    covered = 0
    for _ in range(300):
        share = truth if alike is None else rng.beta(truth * alike, (1 - truth) * alike, prompts)
        found = torch.from_numpy(np.atleast_1d(rng.binomial(draws, share, prompts)).astype(float))
        low, high = metrics.share_interval(found, asked)
        covered += low <= truth <= high
    assert covered / 300 > 0.9  # nominal 0.95, standard error 0.013


def test_share_interval_by_hand() -> None:
    low, high = metrics.share_interval(torch.tensor([1.0] * 8 + [0.0] * 2), torch.ones(10))
    # Wilson: 10 objects, one a prompt, would vary by 0.8 * 0.2 / 10; prompts do by 1 / 9 of that more
    z = 1.959964
    n = 9 * (z / 2.2621572) ** 2  # and ten of them know that less well: Student's t with 9 degrees of freedom
    middle, spread = 0.8 + z**2 / (2 * n), z * math.sqrt(0.16 / n + z**2 / (4 * n**2))
    expected = ((middle - spread) / (1 + z**2 / n), (middle + spread) / (1 + z**2 / n))
    assert (low, high) == pytest.approx(expected, rel=1e-4)
    equal = metrics.share_interval(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))
    n = 12 * (z / 4.3026527) ** 2  # of 12 objects, no more
    assert equal == pytest.approx((0.5 - (half := z * math.sqrt(1 / (4 * (n + z**2)))), 0.5 + half), rel=1e-4)
    assert metrics.share_interval(torch.ones(4, 9), torch.ones(4, 9)) == (pytest.approx(12 / (12 + z**2)), 1)
    assert metrics.share_interval(torch.zeros(4, 9), torch.ones(4, 9)) == (0, pytest.approx(z**2 / (12 + z**2)))


def test_share_interval_does_not_shrink_with_draws_that_are_alike() -> None:
    found = (torch.arange(32) % 2).float()
    once = metrics.share_interval(found, torch.ones(32))
    assert metrics.share_interval(found[:, None].repeat(1, 50), torch.ones(32, 50)) == pytest.approx(once)
    narrow = metrics.share_interval(found, torch.ones(32), level=0.5)
    assert once[0] < narrow[0] < 0.5 < narrow[1] < once[1]


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (15, 2.13145), (316, 1.96750)]
)
def test_quantiles_of_the_t_distribution(freedom: int, quantile: float) -> None:
    """Of any table."""
    assert metrics._t_quantile(0.975, freedom) == pytest.approx(quantile, rel=2e-3)


def test_share_interval_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="two prompts or more"):
        metrics.share_interval(torch.ones(1), torch.ones(1))
    for found in (torch.tensor([2.0, 1.0]), torch.tensor([-1.0, 1.0])):
        with pytest.raises(ValueError, match="from 0 to asked"):
            metrics.share_interval(found, torch.ones(2))
    with pytest.raises(ValueError, match=r"level .* 95"):
        metrics.share_interval(torch.ones(3), torch.ones(3), level=95)
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        metrics.share_interval(torch.ones(3), torch.ones(4))


# ---- Fréchet distance ----------------------------------------------------------------------------------------------


def _gaussian(mean: list[float], covariance: list[list[float]]) -> Gaussian:
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64))


def test_frechet_distance_of_gaussians_known_on_paper() -> None:
    a = _gaussian([0, 0], [[4, 0], [0, 9]])
    b = _gaussian([3, 4], [[1, 0], [0, 1]])
    # |(3, 4)|^2 + (2 - 1)^2 + (3 - 1)^2
    assert metrics.gaussian_frechet_distance(a, b) == pytest.approx(25 + 1 + 4, abs=1e-12)
    turned = _gaussian([0, 0], [[2.5, 1.5], [1.5, 2.5]])  # eigenvalues 4 and 1 at 45 degrees
    upright = _gaussian([0, 0], [[1, 0], [0, 1]])
    assert metrics.gaussian_frechet_distance(turned, upright) == pytest.approx(1, abs=1e-12)  # (2 - 1)^2
    assert metrics.gaussian_frechet_distance(turned, turned) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    """Against eigenvalues of the product A B, which are those of A^1/2 B A^1/2."""
    rng = torch.Generator().manual_seed(0)
    roots = torch.randn(2, 5, 5, dtype=torch.float64, generator=rng)
    first, second = roots @ roots.mT
    cross = torch.linalg.eigvals(first @ second).real.sqrt().sum()
    zero = torch.zeros(5, dtype=torch.float64)
    expected = float(first.trace() + second.trace() - 2 * cross)
    there = metrics.gaussian_frechet_distance(Gaussian(zero, first), Gaussian(zero, second))
    back = metrics.gaussian_frechet_distance(Gaussian(zero, second), Gaussian(zero, first))
    assert there == pytest.approx(expected, rel=1e-9)
    assert there == pytest.approx(back, rel=1e-9)


def test_frechet_distance_of_samples_approaches_that_of_their_gaussians() -> None:
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 2, generator=rng) * torch.tensor([2.0, 3.0])
    b = torch.randn(20000, 2, generator=rng) + torch.tensor([3.0, 4.0])
    assert metrics.frechet_distance(a, b) == pytest.approx(30, abs=0.5)


def test_frechet_distance_moves_with_a_shift_and_not_with_a_common_one_or_a_rotation() -> None:
    rng = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 40, 6, dtype=torch.float64, generator=rng)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=rng))[0]
    distance = metrics.frechet_distance(a, b)
    assert distance > 0
    assert metrics.frechet_distance(a @ rotation + 5, b @ rotation + 5) == pytest.approx(distance, rel=1e-9)
    assert metrics.frechet_distance(a, a + 2) == pytest.approx(6 * 2**2, rel=1e-9)
    assert metrics.frechet_distance(a, a[torch.randperm(40, generator=rng)]) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_with_fewer_samples_than_features() -> None:
    rng = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 10, 64, generator=rng)
    distance = metrics.frechet_distance(a, b)
    assert math.isfinite(distance)
    # two subspaces of 9 random dimensions of 64: the cross term is positive, so less than all traces and means
    bound = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    assert 0.3 * bound < distance < bound
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_features_in_batches_give_mean_and_covariance_of_all() -> None:
    features = torch.randn(50, 4) * 0.01 + 1000
    statistics = metrics.FeatureStatistics()
    with pytest.raises(ValueError, match="two rows"):
        statistics.compute()
    statistics.update(torch.randn(3, 9))
    statistics.reset()
    for chunk in features.split([1, 0, 30, 19]):
        statistics.update(chunk)
    assert statistics.count == 50
    mean, covariance = statistics.compute()
    torch.testing.assert_close(mean, features.double().mean(0), atol=1e-9, rtol=0)
    torch.testing.assert_close(covariance, features.double().T.cov(), atol=1e-12, rtol=1e-7)
    for streamed, at_once in zip((mean, covariance), metrics.fit_gaussian(features), strict=True):
        torch.testing.assert_close(streamed, at_once)


def test_features_that_do_not_fit_are_refused() -> None:
    statistics = metrics.FeatureStatistics()
    statistics.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"\(N, 5\), got \(2, 6\)"):
        statistics.update(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"\(N, D\), got \(2, 3, 4\)"):
        metrics.fit_gaussian(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="not finite"):
        metrics.fit_gaussian(torch.full((2, 3), math.inf))
    with pytest.raises(ValueError, match="two rows"):
        metrics.fit_gaussian(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="5 and 6 features"):
        metrics.frechet_distance(torch.zeros(2, 5), torch.zeros(2, 6))


# ---- kernel distance ---------------------------------------------------------------------------------------------


def _plain_kernel_distance(a: Tensor, b: Tensor, group_size: int) -> tuple[float, float]:
    """Unbiased and plain distance, pair by pair."""

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum(float((x @ y / len(x) + 1) ** 3) for x, y in pairs) / len(pairs)

    def different(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        count = range(len(rows))
        return [(rows[i], rows[j]) for i in count for j in count if i // group_size != j // group_size]

    across = mean([*itertools.product(a, b)])
    unbiased = mean(different(a)) + mean(different(b)) - 2 * across
    return unbiased, mean([*itertools.product(a, a)]) + mean([*itertools.product(b, b)]) - 2 * across


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_kernel_distance_is_that_of_all_pairs_and_its_error_that_of_leaving_groups_out(group_size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(12, 4, dtype=torch.float64, generator=rng)
    b = torch.randn(18, 4, dtype=torch.float64, generator=rng) + 0.5
    found = metrics.kernel_distance(a, b, group_size=group_size)
    unbiased, plain = _plain_kernel_distance(a, b, group_size)
    assert found.distance == pytest.approx(unbiased, rel=1e-9)
    assert found.with_noise == pytest.approx(plain, rel=1e-9)

    def left_out(rows: Tensor) -> list[Tensor]:
        starts = range(0, len(rows), group_size)
        return [torch.cat([rows[:start], rows[start + group_size :]]) for start in starts]

    variance = 0.0
    for distances in (
        [_plain_kernel_distance(rows, b, group_size)[0] for rows in left_out(a)],
        [_plain_kernel_distance(a, rows, group_size)[0] for rows in left_out(b)],
    ):
        centre = sum(distances) / len(distances)
        variance += (len(distances) - 1) / len(distances) * sum((x - centre) ** 2 for x in distances)
    assert found.standard_error == pytest.approx(variance**0.5, rel=1e-9)


def test_kernel_distance_by_hand() -> None:
    """In one dimension with rows at 0 the kernel is 1; of two rows at 1 it is 2^3."""
    zeros, ones = torch.zeros(3, 1), torch.ones(4, 1)
    assert metrics.kernel_distance(zeros, ones) == (1 + 8 - 2, 0, 7)


def test_kernel_distance_is_unbiased_and_its_error_is_how_much_it_varies() -> None:
    rng = torch.Generator().manual_seed(1)
    for shift in (0.0, 0.7):
        trials = [
            metrics.kernel_distance(torch.randn(40, 3, generator=rng), torch.randn(60, 3, generator=rng) + shift)
            for _ in range(200)
        ]
        distances = torch.tensor([trial.distance for trial in trials])
        error = float(distances.std())
        mean = float(distances.mean())
        assert (abs(mean) < 4 * error / 200**0.5) == (shift == 0)
        claimed = float(torch.tensor([trial.standard_error for trial in trials]).mean())
        assert 0.9 < claimed / error < (1.7 if shift == 0 else 1.15)
        assert all(trial.with_noise > max(0, trial.distance) for trial in trials)


def test_kernel_distance_counts_rows_that_are_copies_of_each_other_once() -> None:
    rng = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 20, 5, generator=rng)
    once = metrics.kernel_distance(a, b)
    thrice = metrics.kernel_distance(a.repeat_interleave(3, 0), b.repeat_interleave(3, 0), group_size=3)
    assert thrice == pytest.approx(once, rel=1e-9)
    ungrouped = metrics.kernel_distance(a.repeat_interleave(3, 0), b.repeat_interleave(3, 0))
    assert ungrouped.distance > once.distance + 0.01  # copies look like a difference
    assert ungrouped.standard_error < once.standard_error  # and like more samples


def test_kernel_distance_has_no_direction_and_no_order() -> None:
    rng = torch.Generator().manual_seed(3)
    a, b = torch.randn(10, 4, generator=rng), torch.randn(15, 4, generator=rng)
    assert metrics.kernel_distance(a, b) == pytest.approx(metrics.kernel_distance(b, a), rel=1e-9)
    assert metrics.kernel_distance(a.flip(0), b) == pytest.approx(metrics.kernel_distance(a, b), rel=1e-9)
    assert metrics.kernel_distance(a, a).with_noise == pytest.approx(0, abs=1e-9)


def test_kernel_distance_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"features_b must be \(N, D\).*\(6, 4\), \(6, 5\)"):
        metrics.kernel_distance(torch.zeros(6, 4), torch.zeros(6, 5))
    with pytest.raises(ValueError, match="features_a is not finite"):
        metrics.kernel_distance(torch.full((6, 4), math.nan), torch.zeros(6, 4))
    for rows, group_size in ((8, 3), (6, 3), (2, 1)):
        with pytest.raises(ValueError, match=f"features_b must hold at least three whole groups of {group_size} rows"):
            metrics.kernel_distance(torch.zeros(9, 4), torch.zeros(rows, 4), group_size=group_size)
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        metrics.kernel_distance(torch.zeros(9, 4), torch.zeros(9, 4), group_size=0)


# ---- neighbours ----------------------------------------------------------------------------------------------------


def test_neighbour_scores_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # to the nearest other: 1, 1, 2 and 7
    fake = torch.tensor([[0.5], [4.0], [30.0]])  # 3.5, 3.5 and 26
    scores = metrics.neighbour_scores(real, fake, k=1)
    # 0.5 is in the balls of 0 and 1 only; 4 in those of 3 and of 10; 30 in none
    assert scores.density.tolist() == [2, 2, 0]
    assert scores.precision.tolist() == [1, 1, 0]
    assert scores.coverage.tolist() == [1, 1, 1, 1]
    # the ball of 0.5 holds 0, 1 and 3, that of 30 holds 10
    assert scores.recall.tolist() == [1, 1, 1, 1]
    near = metrics.neighbour_scores(real, torch.tensor([[0.5], [0.6], [0.7]]), k=1)
    assert near.recall.tolist() == [0, 0, 0, 0]
    assert near.coverage.tolist() == [1, 1, 0, 0]


def test_neighbour_scores_are_the_loops_of_their_definitions() -> None:
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(30, 3, dtype=torch.float64, generator=rng)
    fake = torch.randn(20, 3, dtype=torch.float64, generator=rng) + 0.6
    k = 4

    def inside(rows: Tensor, points: Tensor) -> list[list[bool]]:
        """For every point, whether it is in the ball of each row."""
        radii = [sorted(float((row - other).norm()) for other in rows)[k] for row in rows]
        return [
            [float((row - point).norm()) <= radius for row, radius in zip(rows, radii, strict=True)] for point in points
        ]

    in_real, in_fake = inside(real, fake), inside(fake, real)
    scores = metrics.neighbour_scores(real, fake, k=k)
    assert scores.precision.tolist() == [any(row) for row in in_real]
    assert scores.recall.tolist() == [any(row) for row in in_fake]
    assert scores.density.tolist() == pytest.approx([sum(row) / k for row in in_real])
    assert scores.coverage.tolist() == [any(column) for column in zip(*in_real, strict=True)]


def test_neighbour_scores_tell_good_varied_and_far_pictures_apart() -> None:
    rng = torch.Generator().manual_seed(1)
    real, same = torch.randn(2, 300, 4, generator=rng)
    scores = metrics.neighbour_scores(real, same)
    assert all(0.85 < float(values.mean()) <= 1.1 for values in scores)
    own = metrics.neighbour_scores(real, real)
    assert all(values.min() >= 1 / 5 for values in own)  # each is in its own ball
    assert own.density.mean() == pytest.approx(6 / 5)  # k others are in each ball, and itself
    collapsed = metrics.neighbour_scores(real, 0.1 * same)  # always the same good picture
    assert collapsed.precision.mean() == 1
    assert collapsed.recall.mean() < 0.1
    assert collapsed.coverage.mean() < 0.5
    far = metrics.neighbour_scores(real, same + 50)
    assert all(values.sum() == 0 for values in far)


def test_one_odd_real_picture_moves_precision_but_not_density() -> None:
    """The reason for density and coverage (Naeem et al. 2020, figure 3): an outlier's ball holds everything."""
    rng = torch.Generator().manual_seed(2)
    real, bad = torch.randn(2, 100, 2, generator=rng)
    bad = bad + 8
    odd = torch.cat([real, torch.full((1, 2), 14.0)])
    assert metrics.neighbour_scores(real, bad).precision.mean() < 0.05
    scores = metrics.neighbour_scores(odd, bad)
    assert scores.precision.mean() > 0.95
    assert scores.density.mean() < 0.25
    assert scores.coverage.mean() < 0.05


def test_neighbour_scores_refuse_what_does_not_fit() -> None:
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"got {k} of 5 and 3"):
            metrics.neighbour_scores(torch.rand(5, 2), torch.rand(3, 2), k=k)
    with pytest.raises(ValueError, match="fake must be"):
        metrics.neighbour_scores(torch.rand(9, 2), torch.rand(9, 3))


# ---- copies --------------------------------------------------------------------------------------------------------


def test_nearest_distances_are_those_of_the_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    features, references = torch.randn(7, 5, generator=rng), torch.randn(23, 5, generator=rng)
    expected = [min(float((row - other).norm()) for other in references) for row in features]
    for chunk in (1, 10, 23, 1024):
        assert metrics.nearest_distances(features, references, chunk=chunk).tolist() == pytest.approx(
            expected, rel=1e-5
        )
    same = metrics.nearest_distances(references[:3] + 1000, references + 1000)
    assert same.max() < 1e-5  # far from the origin too
    with pytest.raises(ValueError, match="references must be"):
        metrics.nearest_distances(features, references[:0])


def test_chance_of_nearer_pictures_is_that_of_shuffling() -> None:
    """All orders of 3 drawn and 4 held-out distances, counted."""
    for rank in (1, 2, 4):
        counts = []
        for places in itertools.combinations(range(7), 3):  # of the drawn ones
            limit = [place for place in range(7) if place not in places][rank - 1]
            counts.append(sum(place < limit for place in places))
        for least in range(4):
            share = sum(count >= least for count in counts) / len(counts)
            assert metrics._chance_of_nearer(least, 3, rank, 4) == pytest.approx(share, rel=1e-12)


def test_memorisation_by_hand() -> None:
    held_out = torch.arange(1.0, 201)  # the second smallest is 2
    drawn = torch.cat([torch.full((5,), 1.5), torch.full((95,), 50.25)])
    found = metrics.memorisation(drawn, held_out, rng_seed=0)
    assert found.ratio == pytest.approx(50.25 / 100.5)
    assert found.nearer == 0.05
    assert found.nearer_ci95[0] <= 0.05 <= found.nearer_ci95[1]
    assert found.ratio_ci95[0] < 0.5 < found.ratio_ci95[1]
    assert found == metrics.memorisation(3 * drawn, 3 * held_out, rng_seed=0)  # no unit


def test_memorisation_finds_five_percent_of_copies_and_seldom_what_is_not_there() -> None:
    rng = torch.Generator().manual_seed(0)
    alarms = found = 0
    for trial in range(150):
        drawn, held_out = torch.randn(2, 300, generator=rng).exp()
        alarms += metrics.memorisation(drawn, held_out, rng_seed=trial, resamples=1).found
        drawn[:15] *= 0.001
        result = metrics.memorisation(drawn, held_out, rng_seed=trial, resamples=1)
        found += result.found
        assert result.ratio == pytest.approx(1, abs=0.5)  # which the median hardly shows
    assert alarms <= 5  # 1 or 2 expected
    assert found >= 147


def test_memorisation_shows_when_all_pictures_are_near() -> None:
    rng = torch.Generator().manual_seed(1)
    drawn, held_out = torch.rand(2, 200, generator=rng) + 1
    low, high = metrics.memorisation(drawn, held_out, rng_seed=0).ratio_ci95
    assert low < 1 < high
    assert high - low < 0.2
    assert metrics.memorisation(drawn / 2, held_out, rng_seed=0).ratio_ci95[1] < 0.6


def test_memorisation_is_finite_where_some_held_out_pictures_are_training_pictures() -> None:
    drawn, held_out = torch.ones(20), torch.cat((torch.zeros(9), torch.ones(11)))
    low, high = metrics.memorisation(drawn, held_out, rng_seed=0).ratio_ci95
    assert (low, high) == (1, pytest.approx(1 / metrics.SAME_DISTANCE)), "no bound that says anything, but a number"


def test_memorisation_is_seeded_and_refuses_what_does_not_fit() -> None:
    drawn, held_out = torch.rand(2, 50)
    state = torch.get_rng_state()
    assert metrics.memorisation(drawn, held_out, rng_seed=1) == metrics.memorisation(drawn, held_out, rng_seed=1)
    assert torch.equal(state, torch.get_rng_state())
    for bad in (torch.zeros(0), torch.rand(2, 3), torch.tensor([-1.0]), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="drawn must be finite distances"):
            metrics.memorisation(bad, held_out, rng_seed=0)
    for distance in (0.0, 4e-7):  # as rounding leaves it of pictures that are the same
        with pytest.raises(ValueError, match="among the training pictures"):
            metrics.memorisation(drawn, torch.full((9,), distance), rng_seed=0)


# ---- pictures ------------------------------------------------------------------------------------------------------


def test_preservation_counts_the_drift_outside_the_new_object_only() -> None:
    before = _grey(100)
    after = _grey(103)  # everything drifts by 3 grey levels
    after[:, 20:30, 40:50] = _grey(250)[:, :10, :10]  # and an object appears
    assert metrics.preservation(torch.stack([before, after])[None]).tolist() == [[pytest.approx(3, abs=1e-4)]]


def test_preservation_ignores_what_lies_within_six_pixels_of_the_change() -> None:
    before = _grey(100)
    after = before.clone()
    after[:, 32, 32] = 1.0
    near, far = after.clone(), after.clone()
    near[:, 26, 38] += 20 / 127.5  # six pixels up and to the right: a shadow
    far[:, 25, 32] += 20 / 127.5  # seven pixels up
    images = torch.stack([torch.stack([before, near]), torch.stack([before, far])])
    outside = 64 * 64 - 13 * 13
    torch.testing.assert_close(metrics.preservation(images), torch.tensor([[0.0], [20 / outside]]))
    torch.testing.assert_close(metrics.changed_area(images), torch.full((2, 1), 13 * 13 / 64**2))


def test_preservation_is_a_mean_over_channels_and_of_every_turn() -> None:
    images = torch.stack([_grey(100), _grey(100), _grey(100), _grey(106)])[None]
    images[0, 1, 0] += 12 / 127.5  # one channel of three
    values = metrics.preservation(images)
    torch.testing.assert_close(values, torch.tensor([[4.0, 4.0, 6.0]]), atol=1e-4, rtol=0)
    assert metrics.changed_area(images).tolist() == [[0, 0, 0]]


def test_a_change_counts_as_the_object_from_26_grey_levels_in_one_channel() -> None:
    before = _grey(100)
    little, much = before.clone(), before.clone()
    little[1] += 24 / 127.5
    much[1] += 26 / 127.5
    images = torch.stack([torch.stack([before, little]), torch.stack([before, much])])
    assert metrics.changed_area(images).tolist() == [[0], [1]]
    # a turn that changes the whole picture preserved nothing: it does not escape the measure
    torch.testing.assert_close(metrics.preservation(images), torch.tensor([[8.0], [26 / 3]]), atol=1e-4, rtol=0)


def test_preservation_of_a_batch_is_that_of_its_scenes() -> None:
    images = torch.rand(3, 4, 3, 16, 12) * 2 - 1
    images[:, :, :, :, :3] = images[:, :1, :, :, :3]
    whole = metrics.preservation(images)
    assert whole.shape == (3, 3)
    torch.testing.assert_close(whole, torch.cat([metrics.preservation(scene[None]) for scene in images]))
    with pytest.raises(ValueError, match=r"images must be \(N, T, 3, H, W\)"):
        metrics.preservation(images[:, :1])
    with pytest.raises(ValueError, match=r"images must be \(N, T, 3, H, W\)"):
        metrics.changed_area(images[0])
    for measure in (metrics.preservation, metrics.changed_area):
        with pytest.raises(
            TypeError, match=r"images must be floating point in \[-1, 1\], got torch\.uint8; see images"
        ):
            measure(images.byte())


def test_diversity_by_hand_and_by_the_loop_of_the_definition() -> None:
    assert metrics.diversity(torch.stack([_grey(50)] * 5)) == 0
    assert metrics.diversity(torch.stack([_grey(10), _grey(20), _grey(40)])) == pytest.approx(
        (10 + 30 + 20) / 3, rel=1e-5
    )
    images = torch.rand(5, 3, 8, 6) * 2 - 1
    distances = [((a - b) * 127.5).square().mean().sqrt().item() for a, b in itertools.combinations(images, 2)]
    assert metrics.diversity(images) == pytest.approx(sum(distances) / len(distances), rel=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.diversity(images[:1])
    with pytest.raises(TypeError, match=r"images must be floating point in \[-1, 1\], got torch\.uint8; see images"):
        metrics.diversity(images.byte())
