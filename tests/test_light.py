"""light.py: numbers that say how a scene is lit, whatever stands in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from condgan.light import FAR, TOLERANCE, SceneLight


def empty_scenes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures (S, 3, 64, 64) that two lamps light from left and from above, and how bright each lamp is, (S, 2)."""
    rng = torch.Generator().manual_seed(seed)
    lamps = torch.randn(count, 2, generator=rng)
    ramp = torch.linspace(1, -1, 64)
    left, above = ramp.expand(3, 64, 64), ramp[:, None].expand(3, 64, 64)
    lit = torch.einsum("sk,kchw->schw", lamps, torch.stack((0.06 * left, 0.03 * above)))
    return -0.1 + lit + 0.005 * torch.randn(count, 3, 64, 64, generator=rng), lamps


@pytest.fixture
def light() -> SceneLight:
    light = SceneLight(2)
    light.fit(empty_scenes(400)[0])
    return light


def test_a_fresh_one_says_nothing() -> None:
    assert torch.equal(SceneLight(3)(torch.randn(2, 3, 64, 64)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="light_inputs must be from 1 to 192, as many as colours are looked at, got"):
        SceneLight(193)


def test_it_finds_the_lamps_in_order_of_what_they_do_each_of_variance_1(light: SceneLight) -> None:
    images, lamps = empty_scenes(300, seed=1)
    found = light(images)
    together = torch.corrcoef(torch.cat((found, lamps), 1).T)
    assert together[0, 2].abs() > 0.99 and together[1, 3].abs() > 0.99, together
    assert together[0, 1].abs() < 0.2
    torch.testing.assert_close(found.var(0), torch.ones(2), atol=0.3, rtol=0)


def test_objects_and_shadows_do_not_matter(light: SceneLight) -> None:
    images, _ = empty_scenes(50, seed=2)
    alone = light(images)
    images[:, :, 20:40, 8:30] = 0.8
    images[:, :, 40:48, 8:40] -= 4 * TOLERANCE  # within what lamps do, so only the second look finds it
    assert 4 * TOLERANCE < FAR * 0.03
    assert (light(images) - alone).abs().mean() < 0.25
    assert (light(torch.full_like(images, -0.1)) - alone).abs().mean() > 0.5, "other light would be noticed"


def test_where_no_floor_is_seen_the_light_is_the_usual_one(light: SceneLight) -> None:
    assert torch.equal(light(torch.ones(2, 3, 64, 64)), torch.zeros(2, 2))


def test_a_picture_does_not_depend_on_its_batch(light: SceneLight) -> None:
    images, _ = empty_scenes(5, seed=3)
    torch.testing.assert_close(light(images)[2:3], light(images[2:3]), atol=1e-5, rtol=0)


def test_it_is_exact_under_autocast_and_runs_at_half_precision(light: SceneLight) -> None:
    images, _ = empty_scenes(20, seed=4)
    expected = light(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(light(images), expected)
    found = light.bfloat16()(images.bfloat16())
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.1


def test_no_gradient_and_nothing_to_optimise(light: SceneLight) -> None:
    assert not light(torch.zeros(1, 3, 64, 64, requires_grad=True)).requires_grad
    assert not [*light.parameters()]
