"""correction.py: only first turns, at fixed pixels, and nothing before it was measured."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from tiny import COMPACT, REFERENCE, lively_generator

from condgan import IterativeGenerator
from condgan.correction import LEAST_LIKENESS, FirstTurnCorrection, products_of


def filled(num_objects: int = 3, condition_dim: int = 4) -> FirstTurnCorrection:
    correction = FirstTurnCorrection(num_objects, condition_dim, 8)
    correction.conditions.copy_(5 * torch.eye(num_objects, condition_dim))
    correction.offsets.copy_(torch.randn(correction.offsets.shape))
    return correction


def test_a_fresh_correction_adds_nothing() -> None:
    assert FirstTurnCorrection(3, 4, 8)(torch.randn(2, 4)) is None


def test_each_object_gets_its_own_offset_whatever_the_length_of_the_condition() -> None:
    correction = filled()
    torch.testing.assert_close(correction(torch.eye(3, 4) * torch.tensor([[1.0], [5.0], [9.0]])), correction.offsets)


def test_light_adds_its_answers_in_the_middle() -> None:
    correction = FirstTurnCorrection(3, 4, 8, light_inputs=2, answer_size=4, num_answers=2)
    light = torch.tensor([[0.5, -2.0]]).expand(3, 2)
    assert correction(torch.eye(3, 4), light) is None, "a fresh one adds nothing"
    offsets, answers, shares = torch.randn(3, 3, 8, 8), torch.randn(2, 5, 4, 4), torch.randn(3, 3, 2)
    correction.conditions.copy_(torch.eye(3, 4))
    correction.set_(offsets, answers, shares)
    known = torch.tensor([0.5, -2.0, 0.5**2 - 1, 0.5 * -2.0, (-2.0) ** 2 - 1])
    expected = offsets.clone()
    expected[:, :, 2:6, 2:6] += torch.einsum("kcr,f,rfhw->kchw", shares, known, answers)
    torch.testing.assert_close(correction(torch.eye(3, 4), light), expected)
    torch.testing.assert_close(correction(torch.eye(3, 4)), offsets)
    correction.clear_()
    assert not correction(torch.eye(3, 4), light).any()


def test_products_have_mean_0_and_do_not_correlate() -> None:
    light = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    products = products_of(light)
    assert products.shape == (200_000, 6)
    known = torch.cat((light, products), 1)
    expected = torch.diag(torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 2.0]))
    torch.testing.assert_close(known.T.cov(), expected, atol=0.04, rtol=0)
    torch.testing.assert_close(known.mean(0), torch.zeros(9), atol=0.02, rtol=0)


def test_the_place_beside_the_usual_one_counts_as_numbers_do() -> None:
    correction = FirstTurnCorrection(2, 4, 8, light_inputs=1, places=True, answer_size=4, num_answers=2)
    correction.conditions.copy_(torch.eye(2, 4))
    usual, spread = torch.tensor([[3.0, 4.0], [5.0, 2.0]]), torch.tensor([[0.5, 0.1], [0.2, 0.4]])
    correction.put_(usual, spread, reach=9.0)
    light, place = torch.tensor([[0.5], [1e6]]), usual + spread * torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    numbers = torch.tensor([[0.5, 2.0, -1.0], [4.0, 0.5, 3.0]])  # no scene has such a light
    torch.testing.assert_close(correction.read(torch.tensor([0, 1]), light, place), numbers)
    rng = torch.Generator().manual_seed(0)
    answers, shares = torch.randn(2, 9, 4, 4, generator=rng), torch.randn(2, 3, 2, generator=rng)
    correction.set_(torch.zeros(2, 3, 8, 8), answers, shares)
    known = torch.cat((numbers, products_of(numbers)), 1)
    expected = torch.einsum("ncr,nf,rfhw->nchw", shares, known, answers)
    drawn = correction(torch.eye(2, 4), light, place)
    assert drawn is not None
    torch.testing.assert_close(drawn[:, :, 2:6, 2:6], expected)
    assert not drawn[:, :, :2].any()


def test_conditions_unlike_those_of_first_turns_get_nothing() -> None:
    correction = filled()
    angle = torch.acos(torch.tensor(LEAST_LIKENESS))
    near, far = torch.zeros(2, 4)
    near[0], near[3] = torch.cos(angle / 2), torch.sin(angle / 2)
    far[0], far[3] = torch.cos(1.01 * angle), torch.sin(1.01 * angle)
    factor = 1 - (1 - torch.cos(angle / 2)) / (1 - LEAST_LIKENESS)
    both = correction(torch.stack((near, far)))
    assert both is not None
    torch.testing.assert_close(both[0], factor * correction.offsets[0])
    assert not both[1].any()
    assert correction(far[None]) is None


def test_first_turns_are_corrected_at_their_usual_places_only() -> None:
    correction = filled()
    conditions = torch.eye(3, 4)[:1].expand(4, 4)
    place = torch.tensor([[3.0, 4.0], [3.0, 5.0], [4.5, 4.0], [3.0, 7.0]])  # 0, 1, 1.5 and 3 pixels away
    everywhere = correction.offsets[:1].expand(4, -1, -1, -1)
    torch.testing.assert_close(correction(conditions, None, place), everywhere)
    usual = torch.tensor([[3.0, 4.0], [torch.nan, torch.nan], [9.0, 9.0]])
    correction.put_(usual, torch.ones(3, 2), reach=1.0)
    share = torch.tensor([1, 1, 0.5, 0])[:, None, None, None]
    torch.testing.assert_close(correction(conditions, None, place), share * everywhere)
    assert correction(conditions[3:], None, place[3:]) is None
    elsewhere = correction(torch.eye(3, 4)[1:2], None, torch.tensor([[7.0, 7.0]]))
    torch.testing.assert_close(elsewhere, correction.offsets[1:2])  # its usual place is not known


def test_no_gradient_reaches_the_condition_and_no_optimizer_the_offsets() -> None:
    correction = filled()
    assert not correction(torch.eye(3, 4, requires_grad=True)).requires_grad
    assert not [*correction.parameters()]


def test_a_generator_adds_it_to_first_turns_at_the_pixels_where_it_was_measured() -> None:
    generator = lively_generator(replace(COMPACT, condition_dim=64))
    assert generator.correction is not None
    generator.correction.clear_()
    offset = torch.zeros(3, 64, 64)
    offset[:, 12, 14] = 0.25
    kind = torch.eye(24)[:1]
    condition, hidden = generator.encoder(kind)
    later, _ = generator.encoder(torch.eye(24)[5:6], hidden)
    assert F.cosine_similarity(condition, later).item() < LEAST_LIKENESS
    generator.correction.conditions.copy_(generator.encoder(torch.eye(24))[0])
    arguments = torch.randn(1, generator.z_dim), torch.zeros(1, 3, 64, 64)

    def added(condition: torch.Tensor, place: list[float]) -> torch.Tensor:
        pictures = []
        for value in (torch.zeros_like(offset), offset):
            generator.correction.offsets[0] = value
            with torch.no_grad():
                pictures.append(generator(arguments[0], condition, arguments[1], torch.tensor([place])))
        return pictures[1] - pictures[0]

    torch.testing.assert_close(added(condition, [20.0, 20.0])[0], offset)
    torch.testing.assert_close(added(condition, [26.0, 15.0])[0], offset)  # the window moves, the offset does not
    assert not added(condition, [55.0, 55.0]).any(), "outside the window nothing changes"
    assert not added(later, [20.0, 20.0]).any()


def test_without_windows_it_is_added_to_the_whole_picture_which_stays_in_range() -> None:
    generator = lively_generator(replace(REFERENCE, correction=True))
    assert isinstance(generator, IterativeGenerator)
    assert generator.correction is not None
    generator.correction.offsets.fill_(10.0)
    condition, _ = generator.encoder(torch.eye(24)[:2])
    drawn = generator(torch.randn(2, generator.z_dim), condition, torch.zeros(2, 3, 64, 64))
    torch.testing.assert_close(drawn, torch.ones(2, 3, 64, 64))
