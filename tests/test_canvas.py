"""canvas.py: the light of scenes that we drew ourselves is found again, and what stood in them is gone."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from condgan.canvas import RESIDUAL_THRESHOLD, Canvas

SIZE = 32
NUM_COMPONENTS = 3
GRAIN_STD = 0.006


class Scenes(NamedTuple):
    mean: Tensor
    """(3, H, W): the scenes in mean light."""
    components: Tensor
    """(3, 3, H, W): what a unit of each light adds."""
    clean: Tensor
    """(S, 3, H, W): empty scenes, each in its own light."""
    images: Tensor
    """(S, 3, H, W): the same with grain and one object."""
    occupied: Tensor
    """(S, 1, H, W) bool: where the object is."""


def draw_scenes(count: int, seed: int, centred: bool = True) -> Scenes:
    """Scenes of three smooth lights, each with a bright or dark box of its own size and colour."""
    rng = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, SIZE)
    x, y = axis[None].expand(SIZE, SIZE), axis[:, None].expand(SIZE, SIZE)
    tint = torch.tensor([1.0, 0.9, 0.8])[:, None, None]
    mean = (0.1 * x - 0.15 * y - 0.05) * tint
    components = torch.stack((0.12 * x * tint, 0.10 * x * y * tint.flip(0), 0.08 * torch.cos(2 * x + y) * tint))
    light = torch.randn(count, NUM_COMPONENTS, generator=rng)
    clean = mean + torch.einsum("nk,kchw->nchw", light, components)
    images = clean + GRAIN_STD * torch.randn(clean.shape, generator=rng)
    occupied = torch.zeros(count, 1, SIZE, SIZE, dtype=torch.bool)
    for image, box in zip(images, occupied, strict=True):
        half_height, half_width = torch.randint(2, 5, (2,), generator=rng).tolist()
        row, column = (16, 16) if centred else torch.randint(5, SIZE - 5, (2,), generator=rng).tolist()
        box[:, row - half_height : row + half_height, column - half_width : column + half_width] = True
        colour = (torch.randint(0, 2, (3, 1, 1), generator=rng) * 1.6 - 0.8).float()
        image[:] = torch.where(box, colour, image)
    return Scenes(mean, components, clean, images, occupied)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(240, seed=1)


@pytest.fixture(scope="module")
def canvas(scenes: Scenes) -> Canvas:
    canvas = Canvas(SIZE, NUM_COMPONENTS)
    canvas.fit(scenes.images)
    return canvas


def test_a_canvas_is_mean_plus_light_plus_grain() -> None:
    canvas = Canvas(2, 2)
    canvas.mean.fill_(0.1)
    canvas.components[0].fill_(0.2)
    canvas.components[1, 2].fill_(-0.3)  # blue only
    canvas.grain_std[0, 0, 1] = 0.01
    light = torch.tensor([[1.0, 0.0], [2.0, 1.0], [9.0, 0.0]])
    grain = torch.full((3, 3, 2, 2), 5.0)
    first, second, third = canvas(light, grain)
    torch.testing.assert_close(first[0], torch.tensor([[0.3, 0.35], [0.3, 0.3]]))
    torch.testing.assert_close(first[1:], torch.full((2, 2, 2), 0.3))
    torch.testing.assert_close(second[1:], torch.tensor([0.5, 0.2])[:, None, None].expand(2, 2, 2))
    assert (third == 1).all(), "the range is kept"


@pytest.mark.parametrize("num_components", [0, 4])
def test_a_fresh_canvas_is_mid_gray(num_components: int) -> None:
    drawn = Canvas(8, num_components)(torch.randn(2, num_components), torch.randn(2, 3, 8, 8))
    assert torch.equal(drawn, torch.zeros(2, 3, 8, 8))


def test_the_names_and_shapes_of_a_checkpoint_are_for_ever() -> None:
    state = Canvas(8, 2).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "mean": (3, 8, 8),
        "components": (2, 3, 8, 8),
        "grain_std": (3, 8, 8),
    }
    assert "image_size=8, num_components=2" in repr(Canvas(8, 2))


def test_the_mean_is_found_even_under_the_objects(scenes: Scenes, canvas: Canvas) -> None:
    always_hidden = scenes.occupied.all(0).expand(3, -1, -1)
    assert always_hidden.any()
    error = (canvas.mean - scenes.clean.mean(0)).abs()
    assert error.max() < 0.006
    assert error[always_hidden].max() < 0.006


def test_the_components_span_the_light_and_nothing_else(scenes: Scenes, canvas: Canvas) -> None:
    true_directions = torch.linalg.qr(scenes.components.flatten(1).T).Q
    found_directions = torch.linalg.qr(canvas.components.flatten(1).T).Q
    cosines = torch.linalg.svdvals(true_directions.T @ found_directions)
    assert cosines.min() > 0.99
    centred = (scenes.clean - scenes.clean.mean(0)).flatten(1)
    found = canvas.components.flatten(1)
    covariance = centred.T @ centred / len(centred)
    assert (found.T @ found - covariance).norm() / covariance.norm() < 0.05, "light is to be standard normal"


def test_grain_is_what_the_light_leaves(canvas: Canvas) -> None:
    assert canvas.grain_std.mean().item() == pytest.approx(GRAIN_STD, rel=0.1)
    assert canvas.grain_std.min() > GRAIN_STD / 2
    assert canvas.grain_std.max() < GRAIN_STD * 2


def test_scenes_drawn_from_a_fitted_canvas_vary_as_the_real_ones(scenes: Scenes, canvas: Canvas) -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = canvas(torch.randn(500, 3, generator=rng), torch.randn(500, 3, SIZE, SIZE, generator=rng))
    real = scenes.clean.std(0)
    torch.testing.assert_close(drawn.std(0), (real**2 + GRAIN_STD**2).sqrt(), rtol=0.15, atol=0.005)
    torch.testing.assert_close(drawn.mean(0), scenes.clean.mean(0), rtol=0, atol=0.03)


def test_a_canvas_is_fitted_the_same_way_each_time_and_leaves_the_random_state_alone(scenes: Scenes) -> None:
    fitted = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        canvas = Canvas(SIZE, 2)
        canvas.fit(scenes.images[:40], iterations=2)
        assert torch.equal(torch.random.get_rng_state(), before)
        fitted.append(canvas.state_dict())
    for name, tensor in fitted[0].items():
        assert torch.equal(tensor, fitted[1][name]), name


@pytest.mark.parametrize("centred", [True, False])
def test_objects_of_new_pictures_are_removed_and_the_rest_stays(canvas: Canvas, centred: bool) -> None:
    new = draw_scenes(60, seed=2, centred=centred)
    lit, occupied = canvas.estimate_light(new.images)
    assert occupied.shape == (60, 1, SIZE, SIZE)
    assert occupied.dtype == torch.bool
    in_shade = (new.images - new.clean).abs().amax(1, keepdim=True) < RESIDUAL_THRESHOLD  # too like the floor to see
    assert not (new.occupied & ~in_shade & ~occupied).any()
    assert (occupied & ~new.occupied).float().mean() < 0.05, "no more than a rim is taken for the object"
    assert (lit - new.clean).abs().mean() < 0.003
    removed = canvas.remove_objects(new.images)
    assert torch.equal(removed.where(~occupied, 0), new.images.where(~occupied, 0))
    assert torch.equal(removed.where(occupied, 0), lit.where(occupied, 0))
    assert (new.images - new.clean).abs().flatten(1).amax(1).min() > 0.5
    worst = (removed - new.clean).abs().flatten(1).amax(1)  # (60,)
    assert (worst < 0.03).float().mean() > 0.95, "a box in a corner may for once pass for light"


def test_one_picture_is_estimated_as_in_a_batch(scenes: Scenes, canvas: Canvas) -> None:
    batch, _ = canvas.estimate_light(scenes.images[:5])
    alone, _ = canvas.estimate_light(scenes.images[3:4])
    torch.testing.assert_close(alone[0], batch[3], rtol=0, atol=1e-4)


def test_specks_of_grain_are_no_objects(canvas: Canvas) -> None:
    image = canvas.mean.clone()
    image[:, 4, 4] += 0.2
    _, occupied = canvas.estimate_light(image[None])
    assert not occupied.any()


def test_without_components_the_canvas_is_one_fixed_picture(scenes: Scenes) -> None:
    canvas = Canvas(SIZE, 0)
    canvas.fit(scenes.images)
    first, second = canvas(torch.zeros(2, 0), torch.randn(2, 3, SIZE, SIZE))
    assert torch.equal(first, second)
    assert torch.equal(first, canvas.mean)
    assert (canvas.mean - scenes.clean.mean(0)).abs().max() < 0.03
    assert canvas.remove_objects(scenes.images[:2]).shape == (2, 3, SIZE, SIZE)


def test_too_few_pictures_are_refused(scenes: Scenes) -> None:
    with pytest.raises(ValueError, match="first_images must hold more than 3 pictures, got 3"):
        Canvas(SIZE, 3).fit(scenes.images[:3])
    with pytest.raises(ValueError, match="first_images must hold more than 0 pictures, got 0"):
        Canvas(SIZE, 0).fit(scenes.images[:0])


def test_few_pictures_are_enough_for_a_finite_canvas(scenes: Scenes) -> None:
    canvas = Canvas(SIZE, 2)
    canvas.fit(scenes.images[:4])  # no pixel is seen often enough for a grain of its own
    assert all(buffer.isfinite().all() for buffer in canvas.buffers())
    assert (canvas.grain_std == canvas.grain_std[0, 0, 0]).all()
