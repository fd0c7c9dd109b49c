"""Layouts of scenes whose objects are known: rectangles, and cubes rendered at known rotations with CLEVR's camera."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from condgan.layout import (
    Layout,
    TwoSampleTest,
    adjusted_for_many,
    compare_layouts,
    cube_rotation,
    energy_test,
    ks_test,
    measure_layout,
)

SIZE = 64
Box = tuple[int, int, int, int]
"""Left, top, width and height of a rectangle in pixels."""


def scene(boxes: Sequence[Box], turns: int | None = None) -> Tensor:
    """The empty scene and the picture after each turn, (T + 1, 3, H, W); each rectangle is brighter than the last."""
    pictures = [torch.full((3, SIZE, SIZE), -0.5)]
    for turn, (left, top, width, height) in enumerate(boxes):
        picture = pictures[-1].clone()
        picture[:, top : top + height, left : left + width] = 0.3 * (turn + 1)
        pictures.append(picture)
    pictures += pictures[-1:] * ((turns or len(boxes)) - len(boxes))
    return torch.stack(pictures)


def test_places_sizes_and_overlaps_are_those_drawn() -> None:
    boxes = [(20, 30, 10, 8), (26, 30, 8, 8), (60, 0, 4, 5)]
    layout = measure_layout(scene(boxes)[None])
    torch.testing.assert_close(layout.place, torch.tensor([[[24.5, 33.5], [29.5, 33.5], [61.5, 2.0]]]))
    assert layout.area.tolist() == [[80, 64, 20]]
    assert layout.width.tolist() == [[10, 8, 4]]
    assert layout.height.tolist() == [[8, 8, 5]]
    assert layout.out_of_view.tolist() == [[0, 0, 1]]
    hidden = 4 * 8
    torch.testing.assert_close(layout.overlap, torch.tensor([[math.nan, hidden / 80, 0]]), equal_nan=True)
    torch.testing.assert_close(layout.visible, torch.tensor([[1 - hidden / 80, 1, math.nan]]), equal_nan=True)
    assert layout.rotation.isnan().all()


def test_overlap_is_with_all_earlier_turns_and_what_is_visible_outlives_all_later_ones() -> None:
    boxes = [(10, 10, 10, 10), (18, 10, 10, 10), (8, 10, 4, 10)]  # the second and third each cover 20 of the first
    layout = measure_layout(scene(boxes)[None])
    torch.testing.assert_close(layout.overlap, torch.tensor([[math.nan, 20 / 100, 20 / 180]]), equal_nan=True)
    torch.testing.assert_close(layout.visible, torch.tensor([[60 / 100, 1, math.nan]]), equal_nan=True)


def test_what_is_no_turn_has_no_layout_and_an_idle_turn_has_no_place() -> None:
    images = torch.stack([scene([(5, 5, 4, 4)], turns=2), scene([(5, 5, 4, 4), (0, 0, 0, 0)])])
    layout = measure_layout(images, torch.tensor([1, 2]))
    assert all(field[0, 1].isnan().all() for field in layout)
    assert layout.visible[:, 0].isnan().tolist() == [True, False]  # the first scene has no turn that could cover it
    assert layout.place[1, 1].isnan().all()
    assert (layout.area[1, 1], layout.width[1, 1], layout.height[1, 1], layout.out_of_view[1, 1]) == (0, 0, 0, 0)


def test_size_reaches_from_the_first_to_the_last_line_that_changed() -> None:
    images = scene([(5, 5, 4, 4)])
    images[1, :, 50, 30] = 1.0
    layout = measure_layout(images[None])
    assert (layout.width.item(), layout.height.item(), layout.area.item()) == (26, 46, 17)


@pytest.mark.parametrize(
    ("images", "lengths", "cubes", "message"),
    [
        ((2, 1, 3, 8, 8), None, None, r"images must be \(S, T \+ 1, 3, H, W\).*\(2, 1, 3, 8, 8\)"),
        ((2, 3, 3, 8, 8), (3,), None, r"lengths must be \(2,\), got \(3,\)"),
        ((2, 3, 3, 8, 8), None, (2, 3), r"cubes must be \(2, 2\), got \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    images: tuple[int, ...], lengths: tuple[int, ...] | None, cubes: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure_layout(
            torch.zeros(images),
            None if lengths is None else torch.ones(lengths),
            None if cubes is None else torch.ones(cubes, dtype=torch.bool),
        )


# --- rotation -----------------------------------------------------------------------------------------------------

CAMERA = np.array([7.4, -6.9, 5.0])
FORWARD = -CAMERA / np.linalg.norm(CAMERA)
RIGHT = np.cross(FORWARD, [0, 0, 1]) / np.linalg.norm(np.cross(FORWARD, [0, 0, 1]))
UP = np.cross(RIGHT, FORWARD)


def project(point: Sequence[float]) -> tuple[float, float]:
    """Pixels of CLEVR's 320x240 pictures."""
    ray = np.asarray(point) - CAMERA
    depth = ray @ FORWARD
    return 160 + 350 * (ray @ RIGHT) / depth, 120 - 350 * (ray @ UP) / depth


def render_cube(degrees: float, x: float, y: float, rng: torch.Generator, light: float = 0.0) -> Tensor:
    """A red cube on a gray floor, (3, 64, 64): turned so far about the vertical as seen from the camera."""
    towards = math.atan2(CAMERA[1] - y, CAMERA[0] - x)
    yaw = math.radians(degrees) + towards
    half, side = 0.495, 0.99
    cos, sin = math.cos(yaw), math.sin(yaw)
    corners = [
        (x + half * (cos * a - sin * b), y + half * (sin * a + cos * b))
        for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]
    picture = Image.new("RGB", (320, 240), (128, 128, 128))
    draw = ImageDraw.Draw(picture)
    lamp = -0.6 * RIGHT - 0.5 * FORWARD + np.array([0, 0, 0.6])
    lamp /= np.linalg.norm(lamp)

    def face(points: list[tuple[float, float, float]], normal: np.ndarray) -> None:
        shade = 0.35 + 0.65 * max(float(normal @ lamp), 0) + light
        draw.polygon([project(point) for point in points], fill=tuple(round(c * shade) for c in (173, 35, 35)))

    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        normal = np.array([by - ay, ax - bx, 0]) / side
        if normal @ (CAMERA - np.array([(ax + bx) / 2, (ay + by) / 2, half])) > 0:
            face([(ax, ay, 0), (bx, by, 0), (bx, by, side), (ax, ay, side)], normal)
    face([(a, b, side) for a, b in corners], np.array([0, 0, 1]))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    small = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", align_corners=False)[0]
    return (small + 1.5 * torch.randn(small.shape, generator=rng)) / 127.5 - 1


def turned_apart(first: Tensor, second: Tensor) -> Tensor:
    """Degrees between rotations with a period of 90."""
    return ((first - second + 45) % 90 - 45).abs()


@pytest.fixture(scope="module")
def cubes() -> tuple[Tensor, Tensor]:
    """Known rotations (N,) of cubes anywhere on the floor, and their pictures (N, 3, H, W)."""
    rng, places = torch.Generator().manual_seed(0), np.random.default_rng(0)
    degrees = places.uniform(0, 90, 90)
    pictures = [render_cube(angle, *places.uniform(-2.5, 2.5, 2), rng) for angle in degrees]
    return torch.from_numpy(degrees).float(), torch.stack(pictures)


def test_rotation_of_rendered_cubes_is_found(cubes: tuple[Tensor, Tensor]) -> None:
    degrees, pictures = cubes
    floor = torch.full_like(pictures, 128 / 127.5 - 1)
    found = cube_rotation(floor, pictures)
    error = turned_apart(found, degrees)
    assert error.median() < 6
    assert error.quantile(0.9) < 16
    assert turned_apart(found, degrees.roll(1)).median() > 15  # what chance gives


def test_a_mirrored_cube_is_turned_the_other_way(cubes: tuple[Tensor, Tensor]) -> None:
    pictures = cubes[1][:12]
    floor = torch.full_like(pictures, 128 / 127.5 - 1)
    found, mirrored = cube_rotation(floor, pictures), cube_rotation(floor, pictures.flip(3))
    assert turned_apart(mirrored, -found).median() <= 5


def test_rotation_is_of_cubes_only_and_only_where_something_changed(cubes: tuple[Tensor, Tensor]) -> None:
    picture = cubes[1][0]
    floor = torch.full_like(picture, 128 / 127.5 - 1)
    images = torch.stack([floor, picture, picture])[None].expand(2, -1, -1, -1, -1)
    layout = measure_layout(images, cubes=torch.tensor([[True, True], [False, False]]))
    assert layout.rotation.isnan().tolist() == [[False, True], [True, True]]
    with pytest.raises(ValueError, match="square pictures"):
        cube_rotation(torch.zeros(1, 3, 8, 16), torch.ones(1, 3, 8, 16))


# --- two-sample tests ---------------------------------------------------------------------------------------------


def test_ks_distance_by_hand() -> None:
    first, second = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[3.0], [4.0], [5.0]])
    result = ks_test(first, second, rng_seed=0)
    assert result.distance == pytest.approx(1 / 2)  # below 3 lies half of the first sample, none of the second
    assert result[2:] == (4, 3)
    ties = ks_test(torch.tensor([[1.0, 1.0], [1.0, math.nan]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]]), rng_seed=0)
    assert ties.distance == pytest.approx(1 / 2)
    assert ties[2:] == (3, 4)


def test_energy_distance_by_hand() -> None:
    first, second = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]]]), torch.tensor([[[0.0, 0.0]], [[math.nan, 1.0]]])
    # mean |X - Y| is 2.5, mean |X - X'| over all four pairs 2.5, mean |Y - Y'| 0
    assert energy_test(first, second, rng_seed=0).distance == pytest.approx((5 - 2.5) / 5)
    assert energy_test(second, second, rng_seed=0) == TwoSampleTest(0, 1, 1, 1)


@pytest.mark.parametrize("test", [ks_test, energy_test])
def test_p_values_tell_chance_from_difference(test: Callable[..., TwoSampleTest]) -> None:
    rng = torch.Generator().manual_seed(1)
    dims = (2,) if test is energy_test else ()
    p_values = []
    for _ in range(40):
        first, second = torch.randn(30, 2, *dims, generator=rng), torch.randn(40, 2, *dims, generator=rng)
        p_values.append(test(first, second, rng_seed=0, permutations=99).p_value)
    assert sum(p <= 0.1 for p in p_values) <= 10  # 4 are expected
    assert sum(p > 0.5 for p in p_values) >= 10
    first, second = torch.randn(30, 2, *dims, generator=rng) + 1, torch.randn(40, 2, *dims, generator=rng)
    shifted = test(first, second, rng_seed=0)
    assert shifted.p_value <= 0.01
    assert shifted == test(first, second, rng_seed=0)


def test_scenes_are_permuted_not_values() -> None:
    """Values that repeat within a scene are no more evidence than one value a scene."""
    rng = torch.Generator().manual_seed(3)
    first, second = torch.randn(12, 1, generator=rng) + 0.8, torch.randn(12, 1, generator=rng)
    once = ks_test(first, second, rng_seed=0)
    often = ks_test(first.expand(-1, 50), second.expand(-1, 50), rng_seed=0)
    assert often[:2] == once[:2]


@pytest.mark.parametrize("test", [ks_test, energy_test])
def test_pairs_see_what_their_scenes_have_not_in_common(test: Callable[..., TwoSampleTest]) -> None:
    """Scenes differ by much more than the two scenes of a pair."""
    rng = torch.Generator().manual_seed(2)
    dims = (2,) if test is energy_test else ()
    common = 5 * torch.randn(60, 2, *dims, generator=rng)

    def pairs(shift: float) -> tuple[Tensor, Tensor]:
        first, second = (common + 0.5 * torch.randn(common.shape, generator=rng) for _ in range(2))
        return first + shift, second

    first, second = pairs(0.7)
    paired = test(first, second, rng_seed=0, paired=True)
    unpaired = test(first, second, rng_seed=0)
    assert paired.distance == unpaired.distance
    assert paired.p_value <= 0.01 < 0.2 < unpaired.p_value
    p_values = [test(*pairs(0.0), rng_seed=0, permutations=99, paired=True).p_value for _ in range(40)]
    assert sum(p <= 0.1 for p in p_values) <= 10  # 4 are expected
    assert sum(p > 0.5 for p in p_values) >= 10
    with pytest.raises(ValueError, match="paired: first and second must have as many scenes, got 60 and 59"):
        test(first, second[1:], rng_seed=0, paired=True)


@pytest.mark.parametrize("test", [ks_test, energy_test])
def test_divisions_that_leave_a_sample_empty_do_not_speak_against_chance(test: Callable[..., TwoSampleTest]) -> None:
    """Of one value in each sample half of the divisions put both into one."""
    dims = (1,) if test is energy_test else ()
    first, second = (torch.full((40, 1, *dims), math.nan) for _ in range(2))
    first[0], second[0] = 0.0, 1.0
    assert test(first, second, rng_seed=0) == TwoSampleTest(1, 1, 1, 1)
    assert test(first, second, rng_seed=0, paired=True) == TwoSampleTest(1, 1, 1, 1)


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(scenes, turns\) and alike, got \(2,\)"):
        ks_test(torch.zeros(2), torch.zeros(2), rng_seed=0)
    with pytest.raises(ValueError, match=r"\(scenes, turns, D\) and alike"):
        energy_test(torch.zeros(2, 1, 2), torch.zeros(2, 1, 3), rng_seed=0)
    with pytest.raises(ValueError, match="second has no value"):
        ks_test(torch.zeros(2, 1), torch.full((2, 1), math.nan), rng_seed=0)


def layout_of(rng: np.random.Generator, num_scenes: int, shift: int = 0, side: int = 6) -> Layout:
    images = []
    for _ in range(num_scenes):
        boxes = [(29, 29, 6, 6)]
        boxes += [(int(rng.integers(2, 40)) + shift, int(rng.integers(2, 50)), side, side) for _ in range(2)]
        images.append(scene(boxes))
    return measure_layout(torch.stack(images))


def test_layouts_are_compared_statistic_by_statistic() -> None:
    rng = np.random.default_rng(0)
    real, other, same = (layout_of(rng, 60) for _ in range(3))
    alike = compare_layouts(same, real, other, rng_seed=0)
    assert alike.keys() == {
        *(f"{field}_{when}" for field in ("place", "area", "width", "height") for when in ("first", "later")),
        *("overlap", "visible", "out_of_view"),  # and no rotation: there is no cube
    }
    assert min(comparison.p_value for comparison in alike.values()) > 0.01
    assert (alike["place_later"].drawn, alike["place_later"].real, alike["place_first"].drawn) == (120, 120, 60)
    shifted = compare_layouts(layout_of(rng, 60, shift=18), real, other, rng_seed=0)
    assert shifted["place_later"].p_value <= 0.002
    assert shifted["place_later"].distance > 5 * shifted["place_later"].floor
    assert shifted["width_later"].p_value > 0.05
    larger = compare_layouts(layout_of(rng, 60, side=9), real, other, rng_seed=0)
    assert larger["area_later"].distance > 0.9
    assert larger["area_first"].distance == 0
    assert larger["area_later"].floor == pytest.approx(alike["area_later"].floor)
    adjusted = adjusted_for_many([comparison.p_value for comparison in shifted.values()])
    assert [comparison.adjusted_p for comparison in shifted.values()] == adjusted
    near = compare_layouts(real._replace(place=real.place + 0.5), real, other, rng_seed=0)
    assert near["place_later"].p_value <= 0.002, "a drawn scene is held against its own real one"
    assert near["place_later"].distance < near["place_later"].floor


def test_p_among_many_tests_is_holms() -> None:
    assert adjusted_for_many([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])  # 3 x; 2 x; not below that
    assert adjusted_for_many([0.5, 0.4]) == pytest.approx([0.8, 0.8])
    assert adjusted_for_many([0.9, 0.6]) == [1.0, 1.0]
    assert adjusted_for_many([0.2]) == [0.2]
    assert adjusted_for_many([]) == []
