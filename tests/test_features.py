"""Filter statistics against a slow plain version, what they see and what they leave alone, and copies found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condgan import features, metrics
from condgan.features import FEATURE_GROUPS, copy_distances, fit_scale, picture_features
from tests.scenes import draw_scene

EDGES, LIGHT = FEATURE_GROUPS["edges"], FEATURE_GROUPS["light"]


def _pictures(count: int, seed: int, size: int = 64) -> Tensor:
    """Final pictures of scenes of three objects on a floor with grain, (N, 3, size, size) uint8."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng, (size, size)) for _ in range(count)]
    return torch.stack([torch.from_numpy(np.array(scene.pictures[-1])) for scene in scenes]).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return _pictures(160, seed=0)


def _rounded(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _blurred(pixels: Tensor, sigma: float) -> Tensor:
    weights = torch.exp(-(torch.arange(-3.0, 4) ** 2) / (2 * sigma**2))
    mask = torch.outer(weights, weights) / weights.sum() ** 2
    padded = F.pad(pixels.float(), (3, 3, 3, 3), mode="reflect")
    return _rounded(F.conv2d(padded, mask.expand(3, 1, 7, 7), groups=3))


# ---- features ------------------------------------------------------------------------------------------------------


def _plain_features(picture: Tensor) -> Tensor:
    """The definition, for one picture (3, H, W): masks of 3x3 written out, one response at a time, in float64."""
    red, green, blue = (picture.double() - 127.5).numpy()
    level = [
        (red + green + blue) / 3**0.5,
        (red - green) / 2**0.5,
        (red + green - 2 * blue) / 6**0.5,
    ]
    rows = [np.array(row) / np.linalg.norm(row) for row in ([1, 2, 1], [-1, 0, 1], [-1, 2, -1])]
    masks = [np.outer(down, across) for across in rows for down in rows][1:]
    grain, edges = [], []
    for number in range(3):
        if number:
            binomial = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
            level = [_plain_correlation(np.pad(colour, 2, mode="reflect"), binomial)[::2, ::2] for colour in level]
        for mask in masks:
            for colour in level:
                response = _plain_correlation(colour, mask)
                grain.append(np.log(response**2 + 1).mean() / 2)
                edges.append(np.log((response**4).mean() + 1) / 4)
    cells = [
        cell.mean() / 10
        for colour in level
        for band in np.split(colour, 4, axis=0)
        for cell in np.split(band, 4, axis=1)
    ]
    return torch.tensor([*grain, *edges, *cells])


def _plain_correlation(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(values, mask.shape)
    return np.asarray((windows * mask).sum((-2, -1)))


@pytest.mark.parametrize("size", [(64, 64), (32, 48), (16, 16)])
def test_features_are_those_of_the_definition(size: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, *size), generator=rng, dtype=torch.uint8)
    found = picture_features(pixels)
    assert found.shape == (2, 192)
    assert found.dtype == torch.float32
    for picture, row in zip(pixels, found, strict=True):
        torch.testing.assert_close(row.double(), _plain_features(picture), atol=1e-4, rtol=1e-4)


def test_groups_hold_every_feature_once() -> None:
    columns = [column for part in FEATURE_GROUPS.values() for column in range(192)[part]]
    assert columns == list(range(192))


def test_features_of_a_batch_are_those_of_its_pictures(pictures: Tensor) -> None:
    some = pictures[: features.CHUNK + 3]  # more than one chunk, the last one smaller
    alone = torch.cat([picture_features(picture[None]) for picture in some])
    torch.testing.assert_close(picture_features(some), alone, atol=1e-5, rtol=1e-5)
    assert picture_features(some[:0]).shape == (0, 192)


def test_a_plain_grey_picture_has_light_and_nothing_else() -> None:
    found = picture_features(torch.full((1, 3, 64, 64), 150, dtype=torch.uint8))[0]
    torch.testing.assert_close(found[: LIGHT.start], torch.zeros(144), atol=1e-5, rtol=0)
    brightness = torch.full((16,), 22.5 * 3**0.5 / 10)
    torch.testing.assert_close(found[LIGHT], torch.cat([brightness, torch.zeros(32)]), atol=1e-5, rtol=1e-5)


def test_even_light_moves_light_only_and_a_mirror_keeps_details(pictures: Tensor) -> None:
    before = picture_features(pictures[:8])
    lighter = picture_features(pictures[:8].clamp(max=250) + 5) - picture_features(pictures[:8].clamp(max=250))
    assert lighter[:, : LIGHT.start].abs().max() < 1e-3
    torch.testing.assert_close(lighter[:, LIGHT][:, :16], torch.full((8, 16), 5 * 3**0.5 / 10), atol=1e-4, rtol=0)
    mirrored = picture_features(pictures[:8].flip(3))
    for finest in (slice(0, 24), slice(EDGES.start, EDGES.start + 24)):
        torch.testing.assert_close(mirrored[:, finest], before[:, finest], atol=1e-4, rtol=0)
    assert (mirrored - before)[:, LIGHT].abs().max() > 0.1  # where the light comes from is seen


def test_distances_on_features_see_what_makes_pictures_unreal(pictures: Tensor) -> None:
    """Other drawn scenes are near; each fault is far, for all features and for the group that should see it."""
    scale = fit_scale(picture_features(_pictures(80, seed=5)))
    reference, others = pictures[:80], pictures[80:]
    light = others.float().mean((1, 3), keepdim=True)  # of each row
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(1))
    sets = {
        "others": others,
        "grain": _rounded(others.float() + noise),
        "edges": _blurred(others, 0.5),
        "light": _rounded(others.float() - light + light.mean(0)),
        "reference": reference,
    }
    found = {name: scale.standardise(picture_features(pixels)) for name, pixels in sets.items()}

    def kernel(name: str, part: slice) -> metrics.KernelDistance:
        return metrics.kernel_distance(found[name][:, part], found["reference"][:, part])

    everything = slice(None)
    for group, part in FEATURE_GROUPS.items():
        floor, fault = kernel("others", part), kernel(group, part)
        assert abs(floor.distance) < 2 * floor.standard_error, group
        assert fault.distance > 2 * fault.standard_error, group
        assert kernel(group, everything).with_noise > 3 * kernel("others", everything).with_noise, group
        frechet = {name: metrics.frechet_distance(found[name], found["reference"]) for name in (group, "others")}
        assert frechet[group] > 2 * frechet["others"], group
    assert abs(kernel("grain", LIGHT).distance - kernel("others", LIGHT).distance) < 0.01  # which grain hardly moves


def test_pictures_that_do_not_fit_are_refused() -> None:
    for function in (picture_features, lambda pixels: copy_distances(pixels, pixels)):
        with pytest.raises(TypeError, match=r"pixels must be uint8, got torch.float32.*to_uint8"):
            function(torch.zeros(1, 3, 64, 64))
        for shape in ((3, 64, 64), (1, 1, 64, 64), (2, 3, 3, 64, 64), (1, 3, 64, 15)):
            with pytest.raises(ValueError, match=r"pixels must be \(N, 3, H, W\)"):
                function(torch.zeros(shape, dtype=torch.uint8))


# ---- scale ---------------------------------------------------------------------------------------------------------


def test_scale_is_mean_and_softened_deviation() -> None:
    scale = fit_scale(torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
    assert scale.mean.tolist() == [2, 7]
    assert scale.deviation.tolist() == [pytest.approx((2 + 0.05**2) ** 0.5), pytest.approx(0.05)]
    # what never varies in real pictures counts, but without bound it would count alone
    assert scale.standardise(torch.tensor([[2.0, 7.1]])).tolist() == [[0, pytest.approx(2, rel=1e-5)]]


def test_scale_refuses_what_does_not_fit() -> None:
    for bad in (torch.zeros(1, 4), torch.zeros(4), torch.full((3, 4), torch.nan)):
        with pytest.raises(ValueError, match="features must be finite"):
            fit_scale(bad)
    with pytest.raises(ValueError, match=r"\(N, 4\), got \(2, 5\)"):
        fit_scale(torch.rand(3, 4)).standardise(torch.zeros(2, 5))


# ---- copies --------------------------------------------------------------------------------------------------------


def test_copy_distance_is_the_difference_of_light() -> None:
    grey = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)
    references = torch.cat([grey + 50, grey + 7])
    assert copy_distances(grey, references).tolist() == [pytest.approx(7, abs=1e-5)]
    red = grey.clone()
    red[:, 0] += 6  # one channel of three
    assert copy_distances(red, grey).tolist() == [pytest.approx((36 / 3) ** 0.5, abs=1e-5)]


def test_copies_are_nearer_than_new_pictures_even_mirrored_shifted_and_with_other_grain(pictures: Tensor) -> None:
    train, new = pictures[:120], pictures[120:]
    nearest_new = copy_distances(new, train).min()
    source = train[:6]
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(2))
    copies = {
        "exact": source,
        "mirrored": source.flip(3),
        "grain": _rounded(source.float() + noise),
        "shifted": source.roll((4, -2), (2, 3)),
        "all": _rounded(source.float() + noise).flip(3).roll(2, 3),
        "between the shifts tried": source.roll(3, 3),
    }
    for name, pixels in copies.items():
        assert copy_distances(pixels, train).max() < nearest_new, name
    for name in ("exact", "mirrored", "shifted"):
        assert copy_distances(copies[name], train).max() < 1e-4, name


def test_copies_among_drawn_pictures_are_found(pictures: Tensor) -> None:
    """The control of the measure: a few copies among new pictures are told, new pictures alone are not."""
    train, drawn, held_out = pictures[:40], pictures[40:80], pictures[80:120]
    far = copy_distances(held_out, train)
    assert not metrics.memorisation(copy_distances(drawn, train), far, rng_seed=0).found
    with_copies = torch.cat([train[:8].flip(3), drawn[8:]])
    assert metrics.memorisation(copy_distances(with_copies, train), far, rng_seed=0).found


def test_copy_distances_refuse_no_pictures() -> None:
    one = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for pair in ((one[:0], one), (one, one[:0])):
        with pytest.raises(ValueError, match="must not be empty"):
            copy_distances(*pair)


def test_copy_distances_refuse_pictures_of_two_sizes() -> None:
    with pytest.raises(ValueError, match="one size"):
        copy_distances(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
