"""grain.py: noise of the right colours in the right rings, where a turn left the picture alone, and its measurement."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import COMPACT, REFERENCE, lively_generator
from torch import Tensor, nn

from condgan import GeneratorConfig, IterativeGenerator
from condgan.calibration import measure_turn_grain
from condgan.functional import window_corners
from condgan.grain import RINGS, TurnGrain, rings
from condgan.images import LEVEL, dithered, to_uint8

SIZE, WINDOW = 64, 40
COVARIANCE = torch.tensor([[0.5, 0.45, 0.0], [0.45, 0.5, 0.0], [0.0, 0.0, 0.1]])
"""Of a yellow object, in levels squared."""


def yellow_grain(ring: int) -> TurnGrain:
    """Two objects, of which the second lays grain in one ring."""
    grain = TurnGrain(2, SIZE, WINDOW)
    grain.mix[1, ring] = torch.linalg.cholesky(COVARIANCE) * LEVEL
    return grain


def lay(grain: TurnGrain, places: Tensor, kind: int, change: Tensor | None = None) -> Tensor:
    """What is added to gray pictures, (N, 3, H, W)."""
    before = torch.zeros(len(places), 3, SIZE, SIZE)
    drawn = before if change is None else before + change
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    objects = torch.eye(2)[kind].expand(len(places), 2)
    return grain(drawn, before, objects, places, noise) - drawn


def copying_generator(objects: tuple[str, ...] = ("gray cube", "yellow cube")) -> IterativeGenerator:
    """Draws nothing: every turn leaves the picture as it is."""
    config = GeneratorConfig(
        width=4, z_dim=2, condition_dim=8, objects=objects, output="blend", places=True, window=WINDOW, turn_grain=True
    )
    generator = IterativeGenerator(config).eval()
    assert generator.conv.bias is not None
    nn.init.zeros_(generator.conv.weight)
    generator.conv.bias.data[3] = -100
    return generator


def test_rings_are_two_pixels_wide_and_the_last_has_no_end() -> None:
    ring = rings(torch.tensor([[10.0, 20.0], [63.0, 63.0]]), SIZE)
    assert ring[0, 20, 10:18].tolist() == [0, 0, 1, 1, 2, 2, 3, 3], "along x"
    assert ring[0, 20:24, 10].tolist() == [0, 0, 1, 1], "along y"
    assert ring[0, 23, 14] == 2, "at a distance of 5"
    assert ring[1, 0, 0] == ring[1, 0, 20] == RINGS - 1


def test_grain_has_the_covariance_of_its_object_and_ring() -> None:
    places = torch.rand(200, 2, generator=torch.Generator().manual_seed(1)) * 30 + 17
    added = lay(yellow_grain(5), places, kind=1)
    there = rings(places, SIZE) == 5
    values = added.permute(0, 2, 3, 1)[there] / LEVEL  # (P, 3)
    torch.testing.assert_close(values.T @ values / len(values), COVARIANCE, rtol=0, atol=0.01)
    assert values.mean(0).abs().max() < 0.02
    assert not added.permute(0, 2, 3, 1)[~there].any(), "in no other ring"
    assert not lay(yellow_grain(5), places, kind=0).any(), "nor around another object"


def test_grain_stays_in_the_window_and_off_what_was_drawn() -> None:
    places = torch.tensor([[32.0, 30.0], [5.0, 5.0]])
    change = torch.zeros(2, 3, SIZE, SIZE)
    change[:, 0, :, 30:40] = 0.5
    grain = TurnGrain(2, SIZE, WINDOW)
    grain.mix += torch.eye(3) * LEVEL
    added = lay(grain, places, 1, change).abs().sum(1) > 0  # (2, H, W)
    expected = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    for row, (x, y) in zip(expected, window_corners(places, SIZE, WINDOW).tolist(), strict=True):
        row[y : y + WINDOW, x : x + WINDOW] = True
    expected[:, :, 30:40] = False
    assert torch.equal(added, expected)


def test_pictures_stay_in_range_and_fresh_grain_adds_nothing() -> None:
    places = torch.tensor([[32.0, 32.0]])
    white, noise, objects = torch.ones(1, 3, SIZE, SIZE), torch.ones(1, 3, SIZE, SIZE), torch.eye(2)[:1]
    fresh = TurnGrain(2, SIZE, WINDOW)
    assert torch.equal(fresh(white, white, objects, places, noise), white)
    fresh.mix += 1
    assert torch.equal(fresh(white, white, objects, places, noise), white)


def test_only_turns_on_a_picture_lay_grain() -> None:
    generator = copying_generator()
    assert generator.turn_grain is not None
    generator.turn_grain.mix[1] = torch.eye(3) * LEVEL
    scene = generator.generate(["yellow cube", "gray cube", "yellow cube"], seed=3)
    canvas, *turns = scene.trajectory[0]
    assert torch.equal(turns[0], canvas), "the canvas has the grain of first objects"
    assert torch.equal(turns[1], turns[0]), "gray objects have none"
    assert 0.3 < (turns[2] != turns[1]).any(0).float().mean() < 0.5, "in the window"
    again = generator.generate(["yellow cube", "gray cube", "yellow cube"], seed=3)
    assert torch.equal(again.tensor, scene.tensor)
    added = generator.add(canvas, ["yellow cube"], seed=3)
    assert (added.tensor[0] != canvas).any(), "a picture from elsewhere is no canvas"
    best = generator.generate(["yellow cube", "yellow cube"], seed=3, best_of=2, redraw="turn")
    assert (best.trajectory[0, 2] != best.trajectory[0, 1]).any(), "what the verifier sees has its grain too"


def test_the_grain_of_real_turns_is_found() -> None:
    scenes, generator = 400, copying_generator()
    assert generator.turn_grain is not None
    rng = torch.Generator().manual_seed(0)
    places = torch.rand(scenes, 2, 2, generator=rng) * 30 + 17
    objects = torch.randint(2, (scenes, 2), generator=rng)
    floor = 0.005 * torch.randn(scenes, 3, SIZE, SIZE, generator=rng)
    teacher = yellow_grain(5)
    noise = torch.randn(floor.shape, generator=rng)
    after = teacher(floor, floor, torch.eye(2)[objects[:, 1]], places[:, 1], noise)
    first, last = (to_uint8(dithered(x, torch.rand(x.shape, generator=rng))) for x in (floor, after))
    pixels = torch.stack((first, first, last), 1)
    measure_turn_grain(generator, pixels, objects, places, progress=False)
    mix = generator.turn_grain.mix / LEVEL
    found = mix @ mix.mT  # (2, RINGS, 3, 3)
    torch.testing.assert_close(found[1, 5], COVARIANCE, rtol=0, atol=0.05)
    others = torch.cat((found[0], found[1, :5], found[1, 6:]))
    assert others.abs().max() < 0.05
    assert others.diagonal(dim1=1, dim2=2).mean() < 0.01


@pytest.mark.parametrize("config", [replace(COMPACT, turn_grain=False), REFERENCE])
def test_a_model_without_grain_has_nothing_to_measure(config: GeneratorConfig) -> None:
    generator = lively_generator(config)
    assert generator.turn_grain is None
    with pytest.raises(ValueError, match="generator: its configuration has turn_grain=False"):
        measure_turn_grain(generator, torch.zeros(1, 3, 3, 64, 64), torch.zeros(1, 2), torch.zeros(1, 2, 2))


def test_grain_needs_places() -> None:
    with pytest.raises(ValueError, match="turn_grain is grain around a place: it needs places=True"):
        GeneratorConfig(turn_grain=True)
