"""Measures against cases whose answer is known on paper, and against slow plain versions."""

from __future__ import annotations

import itertools
import math

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
