"""flow.py: numbers that depend on each other are learned and drawn again, and the density of codes is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from reference import randomise
from torch import Tensor

from condgan.flow import DISTRIBUTION, ConditionalFlow, ContinuousFlow

pytestmark = pytest.mark.whole_fits


def bend(count: int, seed: int) -> Tensor:
    """(count, 3) with mean 0 and std 1: a normal number, a curve of it, and a noisy sum of both."""
    rng = torch.Generator().manual_seed(seed)
    first, *noise = torch.randn(3, count, generator=rng)
    second = torch.cos(1.5 * first) + 0.3 * noise[0]
    third = first + second + 0.5 * noise[1]
    x = torch.stack((first, second, third), 1)
    return (x - x.mean(0)) / x.std(0, correction=0)


def lively_flow(dim: int) -> ContinuousFlow:
    """A flow with random weights and the wide bounds of a fresh one."""
    flow = ContinuousFlow(dim)
    rng = torch.Generator().manual_seed(0)
    for name, buffer in flow.named_buffers():
        if name not in DISTRIBUTION:
            buffer += 0.1 * torch.randn(buffer.shape, generator=rng)
    return flow


def normal_log_prob(x: Tensor) -> Tensor:
    return torch.distributions.Normal(0, 1).log_prob(x).sum(1)


def draw(flow: ContinuousFlow, count: int = 4000, scale: float = 1.0) -> Tensor:
    return flow(scale * torch.randn(count, flow.dim, generator=torch.Generator().manual_seed(5)))


def correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack((x, y)))[0, 1].item()


@pytest.fixture(scope="module")
def fitted() -> ContinuousFlow:
    flow = ContinuousFlow(3)
    flow.fit(bend(900, seed=1), epochs=200)
    return flow


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_a_fresh_flow_changes_nothing(dim: int) -> None:
    noise = 3 * torch.randn(50, dim, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ContinuousFlow(dim)(noise), noise)


def test_the_names_and_shapes_of_a_checkpoint_are_for_ever() -> None:
    state = ContinuousFlow(20).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "weight1": (80, 20),
        "time1": (80, 16),
        "bias1": (80,),
        "weight2": (80, 80),
        "bias2": (80,),
        "weight3": (80, 80),
        "bias3": (80,),
        "weight4": (20, 80),
        "bias4": (20,),
        "centre": (20,),
        "spread": (20,),
        "low": (20,),
        "high": (20,),
    }
    assert ContinuousFlow(3).state_dict()["weight1"].shape == (64, 3), "no network is narrower"
    assert list(ContinuousFlow(3).parameters()) == [], "no optimizer finds them"
    assert repr(ContinuousFlow(3)) == "ContinuousFlow(dim=3)"


def test_noise_follows_the_velocity_of_its_place_and_time() -> None:
    """One number that is carried along by 2 cos(pi t) + x, against 20,000 small steps."""
    flow = ContinuousFlow(1)
    flow.time1[0, 8] = 1e-3  # the first unit tells the cosine of pi t, the second x; silu is half of what is small
    flow.weight1[1, 0] = 1e-3
    flow.weight4[0, 0], flow.weight4[0, 1] = 2 / 0.5e-3, 1 / 0.5e-3
    noise = torch.tensor([[0.0], [0.5], [-1.0]])
    fine, steps = noise.double(), 20_000
    for i in range(steps):
        fine = fine + (2 * math.cos(math.pi * (i + 0.5) / steps) + fine) * (math.pi / 2 / steps)
    torch.testing.assert_close(flow(noise).double(), fine, rtol=0, atol=0.1)


def test_drawn_numbers_have_the_moments_of_the_fitted_ones(fitted: ContinuousFlow) -> None:
    drawn = draw(fitted, count=20_000)
    torch.testing.assert_close(drawn.mean(0), torch.zeros(3), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.std(0), torch.ones(3), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.corrcoef(drawn.T), torch.corrcoef(bend(4000, seed=2).T), rtol=0, atol=0.15)


def test_what_arrives_is_stretched_as_it_says(fitted: ContinuousFlow) -> None:
    """Without that, what comes of few vectors varies less than they do."""
    assert (fitted.spread < 0.97).any()
    still = ContinuousFlow(3)
    still.load_state_dict(fitted.state_dict() | {"centre": torch.zeros(3), "spread": torch.ones(3)})
    stretched = ((draw(still) - fitted.centre) / fitted.spread).clamp(fitted.low, fitted.high)
    inside = ((draw(still) > still.low) & (draw(still) < still.high)).all(1)
    assert inside.sum() > 3000
    torch.testing.assert_close(draw(fitted)[inside], stretched[inside])


def test_a_curve_is_learned_that_no_correlation_shows(fitted: ContinuousFlow) -> None:
    real, drawn = bend(4000, seed=2), draw(fitted)
    assert abs(correlation(real[:, 0], real[:, 1])) < 0.1
    assert correlation((1.5 * real[:, 0]).cos(), real[:, 1]) > 0.85
    assert correlation((1.5 * drawn[:, 0]).cos(), drawn[:, 1]) > 0.6


def test_drawn_numbers_stay_within_those_met_in_fitting(fitted: ContinuousFlow) -> None:
    low, high = bend(900, seed=1).aminmax(dim=0)
    drawn = draw(fitted, scale=10.0)
    assert (drawn >= low).all()
    assert (drawn <= high).all()
    assert (drawn.amin(0) < -1).all()
    assert (drawn.amax(0) > 1).all()


def test_a_flow_is_fitted_the_same_way_each_time_and_leaves_the_random_state_alone() -> None:
    x = bend(300, seed=3)
    copy = x.clone()
    used = lively_flow(3)
    fits = []
    for seed, flow in enumerate((ContinuousFlow(3), ContinuousFlow(3), used)):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        flow.fit(x, epochs=12)
        assert torch.equal(torch.random.get_rng_state(), before)
        fits.append(flow.state_dict())
    assert fits[0]["weight4"].any(), "something was learned"
    for name, tensor in fits[0].items():
        assert torch.equal(tensor, fits[1][name]), name
        assert torch.equal(tensor, fits[2][name]), f"{name}: an earlier fit is forgotten"
        assert not tensor.requires_grad
    assert torch.equal(x, copy)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_too_few_vectors_to_learn_from_leave_a_flow_as_it_was_fresh(count: int) -> None:
    x = bend(9, seed=4)[:count]
    flow = ContinuousFlow(3)
    flow.fit(x)
    for name, buffer in flow.named_buffers():
        assert name in DISTRIBUTION or not buffer.any(), name
    torch.testing.assert_close(flow(x), x)
    assert (draw(flow) >= x.amin(0)).all(), "but it keeps to what was met"
    assert (draw(flow) <= x.amax(0)).all()


def test_independent_normal_numbers_are_left_almost_alone() -> None:
    rng = torch.Generator().manual_seed(6)
    flow = ContinuousFlow(3)
    flow.fit(torch.randn(300, 3, generator=rng), epochs=10)
    new = torch.randn(1000, 3, generator=rng)
    assert (flow(new) - new).square().mean() < 0.1


# Conditional


def turned(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A context in [-1, 1], (count, 1), and points near a circle, (count, 2), at an angle that follows from it."""
    rng = torch.Generator().manual_seed(seed)
    context = torch.rand(count, 1, generator=rng) * 2 - 1
    angle = 2 * context[:, 0] + 0.2 * torch.randn(count, generator=rng)
    return context, 1.4 * torch.stack((angle.cos(), angle.sin()), 1) + 0.05 * torch.randn(count, 2, generator=rng)


def test_a_fresh_conditional_flow_changes_nothing() -> None:
    noise, context = torch.randn(5, 3), torch.randn(5, 4)
    flow = ConditionalFlow(3, 4)
    assert torch.equal(flow(noise, context), noise)
    torch.testing.assert_close(flow.log_prob(noise, context), normal_log_prob(noise))


def test_the_names_and_shapes_of_a_conditional_checkpoint_are_for_ever() -> None:
    state = ConditionalFlow(3, 4, hidden_dim=5, couplings=2).state_dict()
    shapes = {
        "0.weight": (5, 7),
        "0.bias": (5,),
        "2.weight": (5, 5),
        "2.bias": (5,),
        "4.weight": (6, 5),
        "4.bias": (6,),
    }
    expected = {f"couplings.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_a_conditional_flow_learns_what_follows_from_the_context() -> None:
    torch.manual_seed(0)
    flow = ConditionalFlow(2, 1, hidden_dim=32)
    context, x = turned(1000, seed=1)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(150):
        loss = -flow.log_prob(x, context).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        context, new = turned(1000, seed=2)
        drawn = flow(torch.randn(1000, 2), context)
        assert (flow.log_prob(new, context) - normal_log_prob(new)).mean() > 1.5, "nats"
        assert (flow.log_prob(new, context) - flow.log_prob(new, context.flip(0))).mean() > 1.5
    assert (drawn.norm(dim=1) - 1.4).abs().median() < 0.2, "on the circle, where normal numbers hardly are"
    wanted = torch.cat((torch.cos(2 * context), torch.sin(2 * context)), 1)
    assert F.cosine_similarity(drawn, wanted).median() > 0.95


def test_a_conditional_flow_draws_by_the_map_that_its_density_is_of_also_when_weights_change() -> None:
    flow = randomise(ConditionalFlow(3, 2, hidden_dim=4, couplings=4)).double()
    noise, context = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    for weight in flow.parameters():
        jacobian = torch.autograd.functional.jacobian(lambda z: flow(z, context).sum(0), noise).permute(1, 0, 2)
        with torch.no_grad():
            drawn = flow(noise, context)
            expected = normal_log_prob(noise) - torch.linalg.slogdet(jacobian).logabsdet
            torch.testing.assert_close(flow.log_prob(drawn, context), expected)
            weight.data[0] += 0.5
