"""Measures of a few scenes, worked out by hand; whole evaluations are in test_evaluation.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from condgan import metrics
from condgan.measures import (
    NOTHING,
    Score,
    by_halves,
    diversity,
    importance_like,
    jackknife,
    looks,
    memorisation,
    place_errors,
    quantile,
    quotient,
    ratio,
    real_diversity,
    retention,
    rightness,
    surroundings,
)
from condgan.scenes import Scenes

SEEN, UNSEEN = 5.0, -5.0


def scenes_of(objects: list[list[int]], num_objects: int = 4, size: int = 16) -> Scenes:
    """Black pictures of scenes whose turns add these objects; -1 is no turn."""
    added = torch.zeros(len(objects), len(objects[0]), num_objects)
    for scene, turns in zip(added, objects, strict=True):
        for turn, object_id in zip(scene, turns, strict=True):
            if object_id >= 0:
                turn[object_id] = 1
    return Scenes(torch.zeros(len(objects), len(objects[0]) + 1, 3, size, size, dtype=torch.uint8), added)


def test_scenes_know_what_is_asked_after_every_turn() -> None:
    scenes = scenes_of([[2, 0, -1], [1, 1, 3]])
    assert scenes.present.tolist() == [[True, True, False], [True, True, True]]
    assert scenes.asked[0].tolist() == [[0, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0]]
    assert scenes.asked[1, -1].tolist() == [0, 1, 0, 1]


def test_ratio_is_of_sums_and_leaves_out_groups_without_weight() -> None:
    score = ratio(torch.tensor([1, 2, 0, 0, 3, 0]), torch.tensor([2, 2, 0, 0, 3, 1]), groups=3)
    assert score.value == pytest.approx(6 / 8)
    assert score.samples == 8
    assert score.ci95 == metrics.bootstrap_interval(torch.tensor([3.0, 3]), torch.tensor([4.0, 4]), rng_seed=0)
    of_share = ratio(torch.tensor([1, 2, 0, 0, 3, 0]), torch.tensor([2, 2, 0, 0, 3, 1]), groups=3, share=True)
    assert of_share.ci95 == metrics.share_interval(torch.tensor([3.0, 3]), torch.tensor([4.0, 4]))
    assert of_share[::2] == score[::2]
    assert ratio(torch.zeros(4), torch.zeros(4), groups=2) == NOTHING
    assert ratio(torch.ones(4), torch.ones(4), groups=2, samples=9).samples == 9
    assert ratio(torch.tensor([1, 0, 0, 0]), torch.tensor([1, 1, 0, 0]), groups=2) == Score(0.5, None, 2)


def test_a_quotient_is_as_unsure_as_both_scores() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = 6 + 0.9 * torch.randn(20000, generator=rng), 3 + 0.5 * torch.randn(20000, generator=rng)
    first, second = (Score(m, (m - 1.96 * s, m + 1.96 * s), 5) for m, s in ((6.0, 0.9), (3.0, 0.5)))
    found = quotient(first, second)
    low, high = (a / b).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert (found.value, found.samples) == (2, 5)
    assert found.ci95 == (pytest.approx(low, rel=0.03), pytest.approx(high, rel=0.03))
    sure = Score(3.0, (3.0, 3.0), 9)
    assert quotient(first, sure).ci95 == (pytest.approx((6 - 1.764) / 3), pytest.approx((6 + 1.764) / 3))
    assert quotient(first, Score(3.0, None, 9)) == Score(2, None, 5)
    assert quotient(Score(6.0, None, 5), second) == Score(2, None, 5)
    assert quotient(first, Score(3.0, (0.0, 5.0), 9)) == Score(2, None, 5)
    assert quotient(first, Score(3.0, (1.0, 6.0), 9)) == Score(2, None, 5)
    assert quotient(first, Score(0.0, (0.0, 1.0), 9)) == quotient(NOTHING, second) == NOTHING


def test_quantile_is_of_all_values_with_an_interval_over_scenes() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, math.nan], [math.nan, math.nan], [4.0, 5.0]])
    score = quantile(values, 0.5)
    assert (score.value, score.samples) == (3, 5)
    low, high = score.ci95 or (math.nan, math.nan)
    assert 1.5 <= low < 3 < high <= 4.5
    assert quantile(torch.full((2, 2), math.nan), 0.5) == NOTHING
    assert quantile(values[:1], 0.5) == Score(1.5, None, 2)
    sure = quantile(torch.arange(1000.0)[:, None], 0.95)
    assert sure.value == pytest.approx(949, abs=1)
    low, high = sure.ci95 or (math.nan, math.nan)
    # about two standard errors of an order statistic: sqrt(0.95 x 0.05 / 1000) of 1000 values
    assert high - low == pytest.approx(4 * math.sqrt(0.95 * 0.05 / 1000) * 1000, rel=0.2)


def test_rightness_by_hand() -> None:
    asked = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0]])
    logits = torch.tensor([[SEEN, UNSEEN, SEEN + 1, UNSEEN - 1], [UNSEEN, UNSEEN, SEEN, UNSEEN]])
    scores = rightness(logits, asked, torch.tensor([2, 2]), torch.tensor([2, 1]), groups=2)
    values = {name: score.value for name, score in scores.items()}
    assert values == pytest.approx(
        {
            "accuracy": 2 / 3,  # of the two highest of the first picture one is asked
            "exact": 1 / 2,
            "object_precision": 2 / 3,
            "object_recall": 2 / 3,
            "object_f1": 4 / 6,
            "count_accuracy": 1 / 2,  # three of one kind pass where a classifier sees the set it should
        }
    )
    assert [score.samples for score in scores.values()] == [3, 2, 3, 3, 3, 2]
    micro = metrics.object_scores(logits, asked)
    assert (values["object_precision"], values["object_recall"], values["object_f1"]) == pytest.approx(micro)
    twice = rightness(logits, asked, torch.tensor([2, 2]), torch.tensor([2, 2]), groups=2)
    assert twice["count_accuracy"].value == 1, "an object that was asked twice is to be there twice"


def test_pictures_count_as_often_as_lists_with_as_many_objects() -> None:
    lengths, lists = torch.tensor([1, 2, 3, 1, 2, 3]), torch.tensor([1, 3, 3, 3])
    importance = importance_like(lengths, lists)
    assert importance is not None
    assert importance.tolist() == [0.75, 0, 2.25, 0.75, 0, 2.25]
    asked = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]] * 2)
    logits = torch.where(asked > 0, SEEN, UNSEEN)
    logits[2, 2] = 2 * UNSEEN  # one object of one of the two pictures with three
    logits[4] = -logits[4]  # what no list is like does not matter
    scores = rightness(logits, asked, torch.tensor([1, 2, 3, 1, 2, 2]), lengths, 2, importance)
    assert scores["accuracy"].value == pytest.approx((2 * 0.75 + 2.25 * 5) / (2 * 0.75 + 2.25 * 6))
    assert scores["exact"].value == pytest.approx((2 * 0.75 + 2.25) / 6)
    assert scores["count_accuracy"].value == pytest.approx((2 * 0.75 + 2.25) / 6)
    assert (scores["accuracy"].samples, scores["exact"].samples) == (12, 6)
    assert importance_like(lengths, torch.tensor([1, 4])) is None
    assert importance_like(lengths, torch.tensor([1, 5, 2])) is None


def test_retention_is_of_what_was_found_before() -> None:
    scenes = scenes_of([[0, 1, 2], [3, 0, -1]])
    logits = torch.full((2, 3, 4), UNSEEN)
    logits[0, 0, 0] = logits[0, 1, 1] = SEEN  # object 0 is lost in turn 2, and object 1 in turn 3
    logits[0, 0, 2] = SEEN  # not asked yet: not found, whatever the judge sees
    logits[1, 0, 3] = logits[1, 1, 3] = SEEN  # kept; the padding after it loses nothing
    score = retention(logits, scenes, groups=2)
    assert (score.value, score.samples) == (pytest.approx(1 / 3), 3)
    assert retention(torch.full((2, 3, 4), UNSEEN), scenes, groups=2) == NOTHING


def test_place_errors_are_distances_in_pixels() -> None:
    scenes = scenes_of([[0, 1], [0, -1]])
    scenes.pictures[0, 1:, :, 4:7, 8:11] = 200  # centre (9, 5); the second turn does nothing
    scenes.pictures[1, 1:, :, 0:2, 0:2] = 200
    errors = place_errors(scenes, torch.tensor([[[9.0, 5.0], [3.0, 3.0]], [[3.5, 4.5], [0.0, 0.0]]]))
    expected = torch.tensor([[0.0, 16 * math.sqrt(2)], [5.0, math.nan]])
    torch.testing.assert_close(errors, expected, equal_nan=True)


def test_surroundings_of_scenes_of_one_turn_are_nothing() -> None:
    assert surroundings(scenes_of([[0], [1]]), groups=2) == {"preservation": NOTHING, "changed_area": NOTHING}


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=rng, dtype=torch.float64) + 5

    def means(samples: list[Tensor]) -> list[float]:
        return [float(samples[0].mean()), float(samples[0].square().mean())]

    (low, high), of_squares = jackknife(means, [values], blocks=200)
    square = values.square()
    spread = 1.96 * float(square.std()) / math.sqrt(2000)
    assert of_squares == pytest.approx((float(square.mean()) - spread, float(square.mean()) + spread), abs=spread / 4)
    assert (low + high) / 2 == pytest.approx(float(values.mean()))
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(2000), rel=0.2)


def test_intervals_by_halves_of_shares_of_neighbourhoods_are_as_wide_as_these_vary() -> None:
    """A jackknife of the same is half as wide again."""
    rng = torch.Generator().manual_seed(0)

    def coverage(samples: Sequence[Tensor]) -> list[float]:
        first, second = samples
        return [float(metrics.neighbour_scores(first, second, k=5).coverage.mean())]

    pairs = [(torch.randn(100, 8, generator=rng), torch.randn(100, 8, generator=rng)) for _ in range(60)]
    values = torch.tensor([coverage(pair)[0] for pair in pairs])
    widths = torch.tensor([by_halves(coverage, pair)[0] for pair in pairs[:10]]).diff(dim=1)
    wide = torch.tensor([jackknife(coverage, pair)[0] for pair in pairs[:10]]).diff(dim=1)
    assert float(widths.mean()) == pytest.approx(2 * 1.96 * float(values.std()), rel=0.3)
    assert wide.mean() > 1.3 * widths.mean()


def test_pictures_that_count_unequally_say_less() -> None:
    """As much as those that count at all, where the others count nothing."""
    asked = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]] * 8)
    logits, lengths = torch.where(asked > 0, SEEN, UNSEEN), asked.sum(1).long()
    importance = importance_like(lengths, torch.tensor([2]))
    weighted = rightness(logits, asked, lengths, lengths, 8, importance)
    alone = rightness(logits[1::2], asked[1::2], lengths[1::2], lengths[1::2], 8)
    for name, score in alone.items():
        assert weighted[name].ci95 == pytest.approx(score.ci95), name


def test_real_pairs_of_diversity_have_one_order() -> None:
    """The first object stands in the middle: where another one does, real pictures are farther apart than draws."""
    scenes = scenes_of([[0, 1], [1, 0], [0, 1], [2, 3], [3, 2]])
    for number, grey in enumerate((10, 90, 30, 50, 0)):
        scenes.pictures[number, 1:] = grey
    final, objects = torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8), torch.tensor([[1.0, 1, 0, 0]])
    score = diversity(final, objects, real_diversity([(scenes.pictures[:, 1:], scenes.objects)]))["diversity_real"]
    assert score.value == pytest.approx(20)
    parts = [(scenes.pictures[rows, 1:], scenes.objects[rows]) for rows in (slice(2), slice(2, None))]
    assert diversity(final, objects, real_diversity(parts))["diversity_real"] == score, "pairs are of all parts"
    assert set(diversity(final, objects, real_diversity([]))) == {"diversity"}


def test_a_single_picture_has_no_look() -> None:
    assert looks(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)) == {}
    assert looks(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)).keys() == {"frechet_distance"}


@pytest.mark.parametrize(("scenes", "sure"), [(3, False), (11, False), (12, True)])
def test_few_scenes_have_neighbourhoods_without_intervals(scenes: int, sure: bool) -> None:
    drawn, real = torch.randn(2, scenes, 2, 4, generator=torch.Generator().manual_seed(0))
    scores = looks(drawn, real)
    for name in metrics.NeighbourScores._fields:
        value, interval, _ = scores[name]
        assert value is not None
        assert (interval is not None) == sure
        if interval is not None:
            assert 0 <= interval[0] <= value <= interval[1], name
            assert interval[1] <= 1 or name == "density"


def test_diversity_by_real_pairs_is_as_unsure_as_few_lists_make_it() -> None:
    """Real pictures of many lists of one object, each with two pictures; and of one list of two."""
    rng = torch.Generator().manual_seed(0)
    objects = [[i, -1] for i in range(12) for _ in range(2)] + [[0, 1], [0, 1]]
    scenes = scenes_of(objects, num_objects=12)
    real = [(scenes.pictures[:, 1:], scenes.objects)]
    scenes.pictures[:, 1:] = torch.randint(256, (len(objects), 1, 3, 16, 16), generator=rng, dtype=torch.uint8)
    scenes.pictures[0:8, 1:] //= 2  # four lists are darker and vary less
    final = torch.randint(256, (10, 3, 3, 16, 16), generator=rng, dtype=torch.uint8)
    one, two = torch.eye(12)[:10], torch.eye(12)[:10] + torch.eye(12)[1:11]
    scores = diversity(final, one, real_diversity(real))
    low, high = scores["diversity_real"].ci95 or (0, 0)
    assert 0.8 < low / (scores["diversity_real"].value or 0) < 0.9 < 1.1 < high / (scores["diversity_real"].value or 0)
    low, high = scores["diversity_ratio"].ci95 or (0, 0)
    assert high - low > 0.25, "draws vary alike: what is unsure is how real pictures do"
    of_one_list = diversity(final, two, real_diversity(real))
    assert of_one_list["diversity_ratio"].value is not None
    assert of_one_list["diversity_ratio"].ci95 is None
    scenes.pictures[:] = 0
    assert "diversity_ratio" not in diversity(final, one, real_diversity(real))


def test_memorisation_is_not_measured_where_held_out_pictures_are_training_pictures() -> None:
    drawn, held_out = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([2e-7, 4e-7, 6.0])
    with pytest.warns(UserWarning, match="half of the held-out pictures are among the training pictures"):
        scores = memorisation(drawn, held_out)
    assert scores.keys() == memorisation(drawn, held_out + 1).keys()
    assert set(scores.values()) == {NOTHING}
