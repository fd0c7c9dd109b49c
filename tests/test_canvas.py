"""canvas.py: the light of scenes that we drew ourselves is found again, and what stood in them is gone."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condgan.canvas import RESIDUAL_THRESHOLD, RIM, Canvas
from condgan.flow import ContinuousFlow
from condgan.images import from_uint8, to_uint8

pytestmark = pytest.mark.whole_fits

SIZE = 32
NUM_COMPONENTS = 3
GRAIN_MIX = torch.tensor([[0.006, 0.0, 0.0], [0.004, 0.005, 0.0], [-0.002, 0.001, 0.005]])
"""Grain of the three colours from independent noise, before the pictures are rounded to 8 bits."""
PATTERN_STD = 0.006
"""Of grain that is the same in every scene."""


class Scenes(NamedTuple):
    components: Tensor
    """(3, 3, H, W): what a unit of each light adds."""
    clean: Tensor
    """(S, 3, H, W): empty scenes without grain, each in its own light."""
    empty: Tensor
    """(S, 3, H, W): the same with grain."""
    images: Tensor
    """(S, 3, H, W): the same with one object, rounded to 8 bits."""
    occupied: Tensor
    """(S, 1, H, W) bool: where the object is."""
    objects: Tensor
    """(S,) which of 8 colours it has."""


def draw_scenes(count: int, seed: int, centred: bool = True) -> Scenes:
    """Scenes of three smooth lights, each with a bright or dark box of its own size and colour.

    The third light follows from the first, though they are uncorrelated. Each light has mean 0 and variance 1.
    """
    rng = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, SIZE)
    x, y = axis[None].expand(SIZE, SIZE), axis[:, None].expand(SIZE, SIZE)
    tint = torch.tensor([1.0, 0.9, 0.8])[:, None, None]
    pattern = PATTERN_STD * torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(9))
    mean = (0.1 * x - 0.15 * y - 0.05) * tint + pattern
    components = torch.stack((0.12 * x * tint, 0.10 * x * y * tint.flip(0), 0.08 * torch.cos(2 * x + y) * tint))
    u, v = 2 * torch.rand(2, count, generator=rng) - 1  # even between -1 and 1: no light is ever too bright
    light = torch.stack((3**0.5 * u, 3**0.5 * v, 5**0.5 * (1.5 * u.square() - 0.5)), 1)
    clean = mean + torch.einsum("nk,kchw->nchw", light, components)
    noise = torch.randn(clean.shape, generator=rng)
    empty = clean + torch.einsum("cd,ndhw->nchw", GRAIN_MIX, noise)
    images = empty.clone()
    occupied = torch.zeros(count, 1, SIZE, SIZE, dtype=torch.bool)
    colours = torch.randint(0, 2, (count, 3), generator=torch.Generator().manual_seed(seed + 100))
    for image, box, bright in zip(images, occupied, colours, strict=True):
        half_height, half_width = torch.randint(2, 5, (2,), generator=rng).tolist()
        row, column = (16, 16) if centred else torch.randint(5, SIZE - 5, (2,), generator=rng).tolist()
        box[:, row - half_height : row + half_height, column - half_width : column + half_width] = True
        image[:] = torch.where(box, bright[:, None, None] * 1.6 - 0.8, image)
    return Scenes(components, clean, empty, rounded(images), occupied, colours @ torch.tensor([4, 2, 1]))


def rounded(images: Tensor) -> Tensor:
    return from_uint8(to_uint8(images))


def smooth(images: Tensor) -> Tensor:
    """(N, C, H, W): what is left of pictures without grain and pattern."""
    return F.avg_pool2d(images, 5, 1, 2, count_include_pad=False)


def covariance(grain: Tensor) -> Tensor:
    """(3, 3) of the colours of pixels (3, P)."""
    return grain @ grain.T / grain.shape[1]


def ever_near_object(scenes: Scenes) -> Tensor:
    """(3, H, W) bool: pixels that some scene's object or its rim covers."""
    return F.max_pool2d(scenes.occupied.any(0).float(), 2 * RIM + 1, 1, RIM).expand(3, -1, -1) > 0


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(400, seed=1)


@pytest.fixture(scope="module")
def canvas(scenes: Scenes) -> Canvas:
    canvas = Canvas(SIZE, NUM_COMPONENTS)
    canvas.fit(scenes.images, scenes.objects)
    return canvas


def test_a_canvas_is_mean_plus_light_plus_grain() -> None:
    canvas = Canvas(2, 2)
    canvas.mean.fill_(0.1)
    canvas.components[0].fill_(0.2)
    canvas.components[1, 2].fill_(-0.3)  # blue only
    canvas.grain_mix[0, :, 0, 1] = torch.tensor([0.01, 0.02, 0.03])  # red, from the noise of all three
    light = torch.tensor([[1.0, 0.0], [2.0, 1.0], [9.0, 0.0]])
    grain = torch.tensor([1.0, 5.0, -1.0])[:, None, None].expand(3, 3, 2, 2)
    first, second, third = canvas(light, grain)
    torch.testing.assert_close(first[0], torch.tensor([[0.3, 0.38], [0.3, 0.3]]))
    torch.testing.assert_close(first[1:], torch.full((2, 2, 2), 0.3))
    torch.testing.assert_close(second[1:], torch.tensor([0.5, 0.2])[:, None, None].expand(2, 2, 2))
    assert (third == 1).all(), "the range is kept"


def test_light_goes_through_the_flow() -> None:
    canvas = Canvas(2, 1)
    canvas.components.fill_(0.1)
    assert canvas.flow is not None
    canvas.flow.high[0] = 2.0
    drawn = canvas(torch.tensor([[1.0], [5.0]]), torch.zeros(2, 3, 2, 2))
    torch.testing.assert_close(drawn[:, 0, 0, 0], torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("num_components", [0, 4])
def test_a_fresh_canvas_is_mid_gray(num_components: int) -> None:
    drawn = Canvas(8, num_components)(torch.randn(2, num_components), torch.randn(2, 3, 8, 8))
    assert torch.equal(drawn, torch.zeros(2, 3, 8, 8))


def test_the_names_and_shapes_of_a_checkpoint_are_for_ever() -> None:
    state = Canvas(8, 2).state_dict()
    flow = {f"flow.{name}": tuple(tensor.shape) for name, tensor in ContinuousFlow(2).state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "mean": (3, 8, 8),
        "components": (2, 3, 8, 8),
        "grain_mix": (3, 3, 8, 8),
        **flow,
    }
    assert set(Canvas(8, 0).state_dict()) == {"mean", "components", "grain_mix"}
    assert list(Canvas(8, 2).parameters()) == [], "no optimizer finds them"
    assert "image_size=8, num_components=2" in repr(Canvas(8, 2))


def test_the_mean_is_found_even_under_the_objects(scenes: Scenes, canvas: Canvas) -> None:
    hidden = ever_near_object(scenes)
    real = scenes.clean.mean(0)
    found, error = smooth(canvas.mean[None])[0], (canvas.mean - real).abs()
    assert error[~hidden].max() < 0.006
    assert (found - smooth(real[None])[0]).abs()[hidden].max() < 1.5 * PATTERN_STD, (
        "but for the pattern, which is hidden"
    )


def test_hidden_floor_has_a_pattern_like_the_floor_around_it(scenes: Scenes, canvas: Canvas) -> None:
    always_hidden = scenes.occupied.all(0)[0]
    around = F.max_pool2d(scenes.occupied.any(0).float(), 9, 1, 4)[0].bool() & ~scenes.occupied.any(0)[0]
    pattern = (canvas.mean - smooth(canvas.mean[None])[0])[:, always_hidden]
    ring = (canvas.mean - smooth(canvas.mean[None])[0])[:, around]
    assert pattern.std().item() == pytest.approx(ring.std().item(), rel=0.35)
    assert ring.std().item() == pytest.approx(PATTERN_STD, rel=0.1)
    real = (scenes.clean.mean(0) - smooth(scenes.clean.mean(0)[None])[0])[:, always_hidden]
    assert torch.corrcoef(torch.stack((pattern.flatten(), real.flatten())))[0, 1].abs() < 0.5, "it cannot be known"


def test_the_components_span_the_light_and_nothing_else(scenes: Scenes, canvas: Canvas) -> None:
    true_directions = torch.linalg.qr(scenes.components.flatten(1).T).Q
    found_directions = torch.linalg.qr(canvas.components.flatten(1).T).Q
    cosines = torch.linalg.svdvals(true_directions.T @ found_directions)
    assert cosines.min() > 0.99
    centred = (scenes.clean - scenes.clean.mean(0)).flatten(1)
    found = canvas.components.flatten(1)
    spread = centred.T @ centred / len(centred)
    assert (found.T @ found - spread).norm() / spread.norm() < 0.08, "light is to have a variance of 1"


def test_components_are_smooth_where_objects_end_and_elsewhere_as_they_were(scenes: Scenes, canvas: Canvas) -> None:
    speckled = copy.deepcopy(canvas)
    noise = 0.002 * torch.randn(canvas.components.shape, generator=torch.Generator().manual_seed(0))
    speckled.components += noise
    before = speckled.components.clone()
    hidden = torch.cat([found.occupied for _, found in speckled._estimates(scenes.images)]).float().mean(0)
    rim = (hidden > 0.05) & (hidden < 0.98)
    estimates = speckled.smooth_hidden(scenes.images)
    rough = noise.masked_fill(~rim, 0).square().sum()
    left = (speckled.components - smooth(canvas.components)).masked_fill(~rim, 0).square().sum()
    assert 50 < rim.sum() < 500
    assert left < 0.06 * rough
    assert torch.equal(speckled.components.masked_fill(rim, 0), before.masked_fill(rim, 0))
    assert torch.equal(estimates[0][1].lit, speckled.estimate_light(estimates[0][0]).lit)


def test_the_light_of_the_fitted_scenes_is_found_again(scenes: Scenes, canvas: Canvas) -> None:
    estimate = canvas.estimate_light(scenes.images)
    assert estimate.scores.shape == (len(scenes.images), NUM_COMPONENTS)
    torch.testing.assert_close(estimate.scores.mean(0), torch.zeros(3), rtol=0, atol=0.05)
    torch.testing.assert_close(estimate.scores.std(0), torch.ones(3), rtol=0, atol=0.05)
    lit = canvas.mean + torch.einsum("nk,kchw->nchw", estimate.scores, canvas.components)
    torch.testing.assert_close(estimate.lit, lit, rtol=0, atol=1e-5)


def test_grain_is_what_the_light_leaves_before_rounding(canvas: Canvas) -> None:
    found = torch.einsum("cdhw,edhw->cehw", canvas.grain_mix, canvas.grain_mix)
    true = GRAIN_MIX @ GRAIN_MIX.T
    torch.testing.assert_close(found.mean((2, 3)), true, rtol=0, atol=0.05 * true.max().item())
    variances = found.diagonal()  # (H, W, 3)
    assert (variances > true.diagonal() / 2).all()
    assert (variances < true.diagonal() * 2).float().mean() > 0.98, "more at the rim of objects"
    torch.testing.assert_close(canvas.grain_mix, canvas.grain_mix.transpose(0, 1))


def test_scenes_drawn_from_a_fitted_canvas_vary_as_the_real_ones(scenes: Scenes, canvas: Canvas) -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = canvas(torch.randn(500, 3, generator=rng), torch.randn(500, 3, SIZE, SIZE, generator=rng))
    grain = (GRAIN_MIX @ GRAIN_MIX.T).diagonal()[:, None, None]
    seen = ~ever_near_object(scenes)
    torch.testing.assert_close(drawn.std(0), (scenes.clean.var(0) + grain).sqrt(), rtol=0.25, atol=0.005)
    torch.testing.assert_close(drawn.mean(0)[seen], scenes.clean.mean(0)[seen], rtol=0, atol=0.03)


def test_lights_of_drawn_scenes_depend_on_each_other_as_those_of_real_ones(scenes: Scenes, canvas: Canvas) -> None:
    noise = torch.randn(500, NUM_COMPONENTS, generator=torch.Generator().manual_seed(0))
    drawn = canvas(noise, torch.zeros(500, 3, SIZE, SIZE)) - canvas.mean
    light = drawn.flatten(1) @ torch.linalg.pinv(scenes.components.flatten(1))  # (500, 3)
    assert torch.corrcoef(light.T)[0, 2].abs() < 0.2
    assert torch.corrcoef(torch.stack((light[:, 0].square(), light[:, 2])))[0, 1] > 0.8


def test_what_objects_throw_on_the_floor_is_not_drawn_as_light() -> None:
    """Bright red boxes redden the floor around them and the others do the opposite."""
    scenes = draw_scenes(400, seed=1)
    axis = torch.arange(SIZE) - 16
    near = (-(axis.square()[:, None] + axis.square()) / 72).exp()
    tint = 0.06 * torch.stack((near, -near, 0 * near))
    reddens = torch.where(scenes.objects >= 4, 1.0, -1.0)
    tinted = rounded(scenes.images + (reddens[:, None, None, None] * tint).where(~scenes.occupied, 0))
    canvas = Canvas(SIZE, NUM_COMPONENTS + 1)
    canvas.fit(tinted, scenes.objects)
    seen = ~ever_near_object(scenes)
    basis = torch.cat((scenes.components, tint[None]))[:, seen]

    def reddening(pictures: Tensor) -> Tensor:
        return (pictures - pictures.mean(0))[:, seen] @ torch.linalg.pinv(basis)[:, -1]

    found = canvas.estimate_light(tinted)
    assert torch.corrcoef(torch.stack((reddening(found.lit), reddens)))[0, 1] > 0.95, "it is in the pictures"
    rng = torch.Generator().manual_seed(0)
    drawn = canvas(torch.randn(500, NUM_COMPONENTS + 1, generator=rng), torch.zeros(500, 3, SIZE, SIZE))
    assert reddening(drawn).std() < 0.25 * reddening(found.lit).std()
    light = canvas.scene_light(tinted, scenes.objects)
    assert torch.equal(light, canvas.scene_light(tinted, scenes.objects + 3))
    off = reddening(canvas.in_light(light, torch.zeros_like(tinted)))
    assert (off * reddens).mean() < 0.12 * (reddening(found.lit) * reddens).mean(), "50 pictures of each are not many"
    true = scenes.clean - scenes.clean.mean(0)
    rest = canvas.in_light(light, torch.zeros_like(tinted)) - scenes.clean
    assert (rest - rest.mean(0))[:, seen].square().mean() < 0.05 * true[:, seen].square().mean(), "other light stays"


def test_pictures_without_a_floor_are_refused() -> None:
    noise = rounded(0.4 * torch.rand(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) - 0.2)
    with pytest.raises(ValueError, match=r"^first_images: no empty floor is found.* one fixed picture, set these"):
        Canvas(SIZE, NUM_COMPONENTS).fit(noise, torch.zeros(40, dtype=torch.long))
    fixed = Canvas(SIZE)
    fixed.fit(noise, torch.zeros(40, dtype=torch.long))
    assert fixed.mean.isfinite().all(), "as the error says"


def test_a_canvas_is_fitted_the_same_way_each_time_and_leaves_the_random_state_alone(scenes: Scenes) -> None:
    images = scenes.images[:60]
    fitted = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        canvas = Canvas(SIZE, 2)
        canvas.fit(images, scenes.objects[:60], iterations=2)
        removed = canvas.remove_objects(images)
        assert torch.equal(torch.random.get_rng_state(), before)
        fitted.append({**canvas.state_dict(), "removed": removed})
    for name, tensor in fitted[0].items():
        assert torch.equal(tensor, fitted[1][name]), name


@pytest.mark.parametrize("centred", [True, False])
def test_objects_of_new_pictures_are_removed_and_the_rest_stays(canvas: Canvas, centred: bool) -> None:
    new = draw_scenes(60, seed=2, centred=centred)
    lit, occupied, _ = canvas.estimate_light(new.images)
    assert occupied.shape == (60, 1, SIZE, SIZE)
    assert occupied.dtype == torch.bool
    in_shade = (new.images - new.clean).abs().amax(1, keepdim=True) < 2 * RESIDUAL_THRESHOLD  # too like the floor
    assert not (new.occupied & ~in_shade & ~occupied).any()
    with_rim = F.max_pool2d(new.occupied.float(), 2 * RIM + 1, 1, RIM) > 0
    assert (occupied & ~with_rim).float().mean() < 0.03, "no more than a rim is taken for the object"
    assert (smooth(lit) - smooth(new.clean)).abs().mean() < 0.003
    removed = canvas.remove_objects(new.images)
    assert torch.equal(removed.where(~occupied, 0), new.images.where(~occupied, 0))
    assert (new.images - new.clean).abs().flatten(1).amax(1).min() > 0.5
    worst = (removed - new.clean).abs().flatten(1).amax(1)  # (60,)
    assert (worst < 8 * PATTERN_STD).float().mean() > 0.9, "a box in a corner may for once pass for light"


def test_the_floor_under_objects_has_the_grain_of_the_canvas(canvas: Canvas) -> None:
    new = draw_scenes(60, seed=2)
    inside = -F.max_pool2d(-new.occupied.float(), 3, 1, 1) > 0
    grain = canvas.remove_objects(new.images) - canvas.estimate_light(new.images).lit
    true = GRAIN_MIX @ GRAIN_MIX.T
    found = covariance(grain.transpose(0, 1)[:, inside[:, 0]])
    torch.testing.assert_close(found, true, rtol=0, atol=0.1 * true.max().item())
    assert not torch.equal(grain[0, :, 15:17, 15:17], grain[1, :, 15:17, 15:17])


def test_a_soft_shadow_is_lifted_off_its_grain(canvas: Canvas) -> None:
    new = draw_scenes(20, seed=3)
    axis = torch.arange(SIZE, dtype=torch.float32)
    shadow = 0.12 * (-((axis[:, None] - 16).square() + (axis - 8).square()) / 72).exp()
    empty = rounded(new.empty)
    removed = canvas.remove_objects(rounded(new.empty - shadow))
    core = (shadow > 0.08).expand_as(removed)
    assert (removed - empty)[core].abs().mean() < 0.02, "some of the shadow passes for light"
    true, found = ((images - smooth(images))[core] for images in (empty - new.clean, removed - new.clean))
    assert torch.corrcoef(torch.stack((true, found)))[0, 1] > 0.5, "it was rounded at another level"


def test_the_edge_of_a_shadow_is_not_taken_for_grain(canvas: Canvas) -> None:
    new = draw_scenes(60, seed=3)
    shadow = torch.zeros(SIZE, SIZE)
    shadow[12:20, 10:22] = 0.15
    left = (canvas.remove_objects(rounded(new.empty - shadow)) - new.empty).mean((0, 1))  # grain averages out
    outside = F.max_pool2d(shadow[None], 5, 1, 2)[0] - shadow > 0
    inside = shadow + F.max_pool2d(-shadow[None], 5, 1, 2)[0] > 0
    assert (left[outside].mean() - left[inside].mean()).abs() < 0.004


def test_one_picture_is_estimated_as_in_a_batch(scenes: Scenes, canvas: Canvas) -> None:
    batch = canvas.estimate_light(scenes.images[:5])
    alone = canvas.estimate_light(scenes.images[3:4])
    torch.testing.assert_close(alone.lit[0], batch.lit[3], rtol=0, atol=1e-4)
    torch.testing.assert_close(alone.scores[0], batch.scores[3], rtol=0, atol=1e-3)


def test_specks_of_grain_are_no_objects(canvas: Canvas) -> None:
    image = canvas.mean.clone()
    image[:, 4, 4] += 0.2
    assert not canvas.estimate_light(image[None]).occupied.any()
    assert torch.equal(canvas.remove_objects(image[None])[0], image)


def test_without_components_the_canvas_is_one_fixed_picture(scenes: Scenes) -> None:
    canvas = Canvas(SIZE, 0)
    canvas.fit(scenes.images, scenes.objects)
    first, second = canvas(torch.zeros(2, 0), torch.randn(2, 3, SIZE, SIZE))
    assert torch.equal(first, second)
    assert torch.equal(first, canvas.mean)
    assert canvas.flow is None
    seen = ~ever_near_object(scenes)
    assert (canvas.mean - scenes.clean.mean(0))[seen].abs().max() < 0.03
    assert canvas.estimate_light(scenes.images[:2]).scores.shape == (2, 0)
    assert canvas.remove_objects(scenes.images[:2]).shape == (2, 3, SIZE, SIZE)


def test_too_few_pictures_are_refused(scenes: Scenes) -> None:
    with pytest.raises(ValueError, match="first_images must hold more than 3 pictures, got 3"):
        Canvas(SIZE, 3).fit(scenes.images[:3], scenes.objects[:3])
    with pytest.raises(ValueError, match="first_images must hold more than 0 pictures, got 0"):
        Canvas(SIZE, 0).fit(scenes.images[:0], scenes.objects[:0])


@pytest.mark.parametrize("count", [3, 4, 12])
def test_few_pictures_are_enough_for_a_finite_canvas(scenes: Scenes, count: int) -> None:
    canvas = Canvas(SIZE, 2)
    canvas.fit(scenes.images[:count], scenes.objects[:count])  # no pixel is seen often enough for a grain of its own
    assert all(buffer.isfinite().all() for buffer in canvas.buffers())
    assert (canvas.grain_mix == canvas.grain_mix[:, :, :1, :1]).all()
    assert canvas.remove_objects(scenes.images[:count]).isfinite().all()
