"""Losses against numbers worked out by hand, derivatives against finite differences, objectives against formulas."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from condgan import losses
from condgan.losses import (
    OBJECTIVES,
    Objective,
    auxiliary_loss,
    gradient_penalty,
    r1_penalty,
    r2_penalty,
    relativistic_generator_loss,
)

REAL_LOGITS = torch.tensor([2.0, 0.5, -1.0, 0.0])
FAKE_LOGITS = torch.tensor([-3.0, 0.5, 1.0, -0.5])


def _softplus(value: float) -> float:
    return math.log(1 + math.exp(value))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.wasserstein_discriminator_loss, [-5.0, 0.0, 2.0, -0.5]),
        (losses.wasserstein_generator_loss, [3.0, -0.5, -1.0, 0.5]),
        (losses.hinge_discriminator_loss, [0.0, 0.5 + 1.5, 2.0 + 2.0, 1.0 + 0.5]),
        (losses.hinge_generator_loss, [3.0, -0.5, -1.0, 0.5]),
        (losses.relativistic_discriminator_loss, [_softplus(v) for v in (-5.0, 0.0, 2.0, -0.5)]),
        (losses.relativistic_generator_loss, [_softplus(v) for v in (5.0, 0.0, -2.0, 0.5)]),
    ],
)
def test_losses_on_four_logits_are_the_numbers_worked_out_by_hand(
    loss: Callable[..., Tensor], expected: list[float]
) -> None:
    values = loss(real_logits=REAL_LOGITS, fake_logits=FAKE_LOGITS)
    torch.testing.assert_close(values, torch.tensor(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["wasserstein", "hinge", "relativistic"])
def test_each_player_gains_by_moving_logits_its_own_way(family: str) -> None:
    real = torch.tensor([0.3, -0.2], requires_grad=True)
    fake = torch.tensor([0.1, 0.4], requires_grad=True)
    discriminator_loss = getattr(losses, f"{family}_discriminator_loss")(real_logits=real, fake_logits=fake)
    up_for_real, up_for_fake = torch.autograd.grad(discriminator_loss.sum(), (real, fake))
    assert (up_for_real < 0).all()
    assert (up_for_fake > 0).all()
    generator_loss = getattr(losses, f"{family}_generator_loss")(real_logits=real, fake_logits=fake)
    (up_for_fake,) = torch.autograd.grad(generator_loss.sum(), fake)
    assert (up_for_fake < 0).all()


@pytest.mark.parametrize("family", ["wasserstein", "hinge", "relativistic"])
def test_losses_have_right_derivatives(family: str) -> None:
    real = REAL_LOGITS.double().add(0.1).requires_grad_()  # away from the kinks of the hinge
    fake = FAKE_LOGITS.double().add(0.1).requires_grad_()
    for player in ("discriminator", "generator"):
        loss = getattr(losses, f"{family}_{player}_loss")
        assert torch.autograd.gradcheck(lambda r, f, loss=loss: loss(real_logits=r, fake_logits=f), (real, fake))
        assert torch.autograd.gradgradcheck(lambda r, f, loss=loss: loss(real_logits=r, fake_logits=f), (real, fake))


@pytest.mark.parametrize("family", ["wasserstein", "hinge", "relativistic"])
def test_logits_that_would_broadcast_are_refused(family: str) -> None:
    loss = getattr(losses, f"{family}_discriminator_loss")
    with pytest.raises(ValueError, match=r"real_logits and fake_logits .*\(4,\) and \(4, 1\)"):
        loss(real_logits=REAL_LOGITS, fake_logits=FAKE_LOGITS[:, None])


def test_relativistic_losses_only_see_the_difference() -> None:
    for loss in (losses.relativistic_discriminator_loss, losses.relativistic_generator_loss):
        values = loss(real_logits=REAL_LOGITS, fake_logits=FAKE_LOGITS)
        shifted = loss(real_logits=REAL_LOGITS + 7, fake_logits=FAKE_LOGITS + 7)
        torch.testing.assert_close(values, shifted, atol=1e-5, rtol=1e-5)


def test_relativistic_generator_loss_asks_for_its_pairs() -> None:
    with pytest.raises(ValueError, match="pass real_logits"):
        losses.relativistic_generator_loss(fake_logits=FAKE_LOGITS)
    with pytest.raises(ValueError, match=r"\(4,\) and \(3,\)"):
        losses.relativistic_generator_loss(real_logits=REAL_LOGITS, fake_logits=FAKE_LOGITS[:3])


def test_auxiliary_loss_by_hand() -> None:
    object_logits = torch.tensor([[0.0, 0.0], [math.log(3), -math.log(3)]])  # probabilities 1/2, 1/2 and 3/4, 1/4
    objects = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([math.log(2), (math.log(4 / 3) + math.log(4)) / 2])
    torch.testing.assert_close(auxiliary_loss(object_logits, objects), expected, atol=1e-6, rtol=1e-6)


def test_auxiliary_loss_falls_when_the_asked_object_is_seen_and_refuses_other_shapes() -> None:
    objects = torch.eye(24)
    right = auxiliary_loss(objects * 8 - 4, objects)
    none = auxiliary_loss(torch.full((24, 24), -4.0), objects)
    wrong = auxiliary_loss(4 - objects * 8, objects)
    assert (right < none).all()
    assert (none < wrong).all()
    with pytest.raises(ValueError, match="object_logits and objects"):
        auxiliary_loss(torch.zeros(24), objects)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: auxiliary_loss(x, torch.eye(5, dtype=torch.float64)[:3]), (logits,))


class _LinearDiscriminator(nn.Module):
    """``images @ weight + bias`` over all values of a picture."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(values, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(images.flatten(1))
        return logits.squeeze(1)


@pytest.mark.parametrize("penalty", [gradient_penalty, r1_penalty, r2_penalty])
def test_penalty_of_a_linear_discriminator_is_its_squared_weight_norm(penalty: Callable[..., Tensor]) -> None:
    discriminator = _LinearDiscriminator(3 * 5 * 4)
    images = torch.randn(6, 3, 5, 4).requires_grad_()
    squared_norm = discriminator.linear.weight.square().sum()
    values = penalty(discriminator(images), images)
    torch.testing.assert_close(values, squared_norm.expand(6), atol=1e-6, rtol=1e-5)
    values.mean().backward()  # d |w|^2 / dw = 2 w
    torch.testing.assert_close(discriminator.linear.weight.grad, 2 * discriminator.linear.weight.detach())
    assert discriminator.linear.bias.grad is None or not discriminator.linear.bias.grad.any()


def test_penalty_is_a_number_of_each_sample() -> None:
    """The logit |x|^2 / 2 has gradient x, hence penalty |x|^2: different for every picture."""
    images = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    values = gradient_penalty(images.square().sum((1, 2, 3)) / 2, images)
    torch.testing.assert_close(values, images.detach().square().sum((1, 2, 3)))


def test_penalty_can_be_differentiated_twice() -> None:
    def penalty(images: Tensor, weight: Tensor) -> Tensor:
        return gradient_penalty(torch.tanh(images.flatten(1) @ weight), images)

    images = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, (images, weight))
    assert torch.autograd.gradgradcheck(penalty, (images, weight))


def test_penalty_of_half_precision_logits_is_summed_in_single_precision() -> None:
    images = torch.full((1, 3, 64, 64), 0.01, dtype=torch.bfloat16, requires_grad=True)
    values = gradient_penalty(images.float().square().sum((1, 2, 3)).bfloat16(), images)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, images.detach().float().mul(2).square().sum((1, 2, 3)), atol=0.0, rtol=0.02)


def test_penalty_says_what_is_missing() -> None:
    discriminator = _LinearDiscriminator(12)
    images = torch.randn(2, 3, 2, 2)
    with pytest.raises(ValueError, match="requires_grad_"):
        gradient_penalty(discriminator(images), images)
    images.requires_grad_()
    with pytest.raises(ValueError, match=r"logits must be \(N,\)"):
        gradient_penalty(discriminator(images)[:, None], images)


@dataclasses.dataclass
class _Step:
    """All that an objective may read in one step, from a small discriminator that depends on every part."""

    real: Tensor
    fake: Tensor
    real_logits: Tensor
    fake_logits: Tensor
    real_object_logits: Tensor
    fake_object_logits: Tensor
    objects: Tensor


@pytest.fixture
def step() -> _Step:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 25, dtype=torch.float64, generator=rng)
    real, fake = (torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=rng).requires_grad_() for _ in range(2))
    real_outputs, fake_outputs = (torch.tanh(images.flatten(1) @ weight) for images in (real, fake))
    objects = torch.eye(24, dtype=torch.float64)[[3, 0, 23, 7]]
    return _Step(real, fake, real_outputs[:, 0], fake_outputs[:, 0], real_outputs[:, 1:], fake_outputs[:, 1:], objects)


def _whole_loss(name: str, step: _Step) -> Tensor:
    """Discriminator's loss with penalties as a training step would put it together."""
    objective = OBJECTIVES[name]
    loss = objective.discriminator(
        real_logits=step.real_logits,
        fake_logits=step.fake_logits,
        real_object_logits=step.real_object_logits,
        objects=step.objects,
    )
    return loss + objective.penalty(
        real_logits=step.real_logits, real=step.real, fake_logits=step.fake_logits, fake=step.fake
    )


def _generator_loss(name: str, step: _Step) -> Tensor:
    return OBJECTIVES[name].generator(
        real_logits=step.real_logits,
        fake_logits=step.fake_logits,
        fake_object_logits=step.fake_object_logits,
        objects=step.objects,
    )


def _cross_entropy(object_logits: Tensor, objects: Tensor) -> Tensor:
    p = 1 / (1 + torch.exp(-object_logits))
    return -(objects * p.log() + (1 - objects) * (1 - p).log()).sum(1) / 24


def _squared_gradient(logits: Tensor, images: Tensor) -> Tensor:
    """One sample at a time, as the definition says."""
    rows = [torch.autograd.grad(logit, images, retain_graph=True)[0][i] for i, logit in enumerate(logits)]
    return torch.stack([(row * row).sum() for row in rows])


def test_reference_objective_is_the_formula_of_the_report(step: _Step) -> None:
    aux = _cross_entropy(step.real_object_logits, step.objects)
    expected = -step.real_logits + step.fake_logits + aux + _squared_gradient(step.real_logits, step.real)
    torch.testing.assert_close(_whole_loss("reference", step), expected)
    torch.testing.assert_close(_generator_loss("reference", step), -step.fake_logits)


def test_reference_code_objective_is_hinge_and_five_times_aux(step: _Step) -> None:
    zero = torch.zeros(())
    hinge = torch.maximum(zero, 1 - step.real_logits) + torch.maximum(zero, 1 + step.fake_logits)
    aux = 5 * _cross_entropy(step.real_object_logits, step.objects)
    expected = hinge + aux + _squared_gradient(step.real_logits, step.real)
    torch.testing.assert_close(_whole_loss("reference-code", step), expected)
    expected = -step.fake_logits + 5 * _cross_entropy(step.fake_object_logits, step.objects)
    torch.testing.assert_close(_generator_loss("reference-code", step), expected)


def test_relativistic_objective_is_written_out(step: _Step) -> None:
    difference = step.real_logits - step.fake_logits
    expected = torch.log(1 + torch.exp(-difference)) + _cross_entropy(step.real_object_logits, step.objects)
    expected = expected + 0.001 * _squared_gradient(step.real_logits, step.real)
    expected = expected + 0.001 * _squared_gradient(step.fake_logits, step.fake)
    torch.testing.assert_close(_whole_loss("relativistic", step), expected)
    expected = torch.log(1 + torch.exp(difference)) + _cross_entropy(step.fake_object_logits, step.objects)
    torch.testing.assert_close(_generator_loss("relativistic", step), expected)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_an_objective_names_itself_and_every_term_reaches_the_images(name: str, step: _Step) -> None:
    assert OBJECTIVES[name].name == name
    for images, loss in ((step.real, _whole_loss(name, step)), (step.fake, _generator_loss(name, step))):
        assert loss.shape == (4,)
        (gradient,) = torch.autograd.grad(loss.sum(), images, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient.abs().amax() > 0


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objective_reads_only_what_it_says(name: str, step: _Step) -> None:
    objective = OBJECTIVES[name]
    pairs = objective.generator_loss is relativistic_generator_loss
    real_logits = step.real_logits if pairs else None
    object_logits = step.fake_object_logits if objective.aux_weight_generator else None
    loss = objective.generator(
        real_logits=real_logits, fake_logits=step.fake_logits, fake_object_logits=object_logits, objects=step.objects
    )
    torch.testing.assert_close(loss, _generator_loss(name, step))
    if objective.aux_weight_generator:
        with pytest.raises(ValueError, match="pass fake_object_logits"):
            objective.generator(real_logits=real_logits, fake_logits=step.fake_logits, objects=step.objects)
    if pairs:
        with pytest.raises(ValueError, match="pass real_logits"):
            objective.generator(fake_logits=step.fake_logits, fake_object_logits=object_logits, objects=step.objects)


def test_penalties_without_weight_cost_nothing_and_those_with_weight_ask_for_their_tensors(step: _Step) -> None:
    free = dataclasses.replace(OBJECTIVES["reference"], r1_weight=0.0)
    assert free.penalty().item() == 0
    assert free.penalty(real_logits=torch.zeros(2, device="meta")).device.type == "meta", "it adds to other losses"
    r1_only = OBJECTIVES["reference"].penalty(real_logits=step.real_logits, real=step.real)
    torch.testing.assert_close(r1_only, _squared_gradient(step.real_logits, step.real))
    with pytest.raises(ValueError, match="pass fake_logits and fake"):
        OBJECTIVES["relativistic"].penalty(real_logits=step.real_logits, real=step.real)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_game_is_zero_sum_where_the_generated_pictures_losses_add_up_to_nothing(name: str, step: _Step) -> None:
    (theirs,) = torch.autograd.grad(_whole_loss(name, step).sum(), step.fake, retain_graph=True)
    (ours,) = torch.autograd.grad(_generator_loss(name, step).sum(), step.fake, retain_graph=True)
    assert OBJECTIVES[name].zero_sum == torch.allclose(theirs, -ours)
    assert OBJECTIVES[name].zero_sum == (name == "reference")


@pytest.mark.parametrize("weight", ["aux_weight_generator", "r2_weight"])
def test_a_game_whose_generated_pictures_count_otherwise_too_is_not_zero_sum(weight: str) -> None:
    assert not dataclasses.replace(OBJECTIVES["reference"], **{weight: 0.1}).zero_sum


def test_a_reversed_gradient_is_that_of_minus_the_loss() -> None:
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    reversed_ = losses.reverse_gradient(x)
    assert torch.equal(reversed_, x)
    reversed_.square().sum().backward()
    assert torch.equal(x.grad, -2 * x)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (1,), ()])
def test_an_objective_refuses_logits_that_would_broadcast(objective: Objective, shape: tuple[int, ...]) -> None:
    logits, objects, object_logits = torch.zeros(shape), torch.zeros(4, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"real_logits must be \(4,\), one for each row of objects, got"):
        objective.discriminator(
            real_logits=logits, fake_logits=logits, real_object_logits=object_logits, objects=objects
        )
    with pytest.raises(ValueError, match=r"logits must be \(4,\), one for each row of objects, got"):
        objective.generator(real_logits=logits, fake_logits=logits, fake_object_logits=object_logits, objects=objects)


def test_objects_of_whole_scenes_are_refused() -> None:
    turns = torch.zeros(4, 3, 24)
    with pytest.raises(ValueError, match=r"must be \(N, K\), got \(4, 3, 24\)"):
        auxiliary_loss(turns, turns)
