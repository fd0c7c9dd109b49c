"""Where the objects of a scene are, how large, how turned, what they hide; and whether drawn scenes differ in it.

Everything is read off pairs of pictures, before and after a turn, so that drawn and real scenes are measured alike and
nothing needs labels beyond the names of the objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from condgan.functional import changed_region, place_of_change

CAMERA_DISTANCE, CAMERA_HEIGHT = math.hypot(7.4, 6.9), 5.0
"""Of CLEVR's camera from the middle of the floor, in its units; it looks at that middle."""
FOCAL_LENGTH = 35 / 32
"""Of CLEVR's camera, in widths of the picture."""
ASPECT = 4 / 3
"""Width of CLEVR's pictures by their height, before they are made square."""
CUBE_SIDE = 0.99
"""Of i-CLEVR's cubes, in CLEVR's units."""
NUM_ROTATIONS = 18
"""Rotations that :func:`cube_rotation` tries, in 90 degrees."""


class Layout(NamedTuple):
    """What each turn of S scenes put into the picture, (S, T) float32; NaN after a scene's last turn.

    A turn's region is where it changed the picture (:func:`condgan.functional.changed_region`).
    """

    place: Tensor
    """(S, T, 2) centroid of the region in pixels (x, y); NaN where nothing changed."""
    area: Tensor
    """Pixels in the region."""
    width: Tensor
    """Columns from the region's first to its last."""
    height: Tensor
    """Rows from the region's first to its last."""
    overlap: Tensor
    """Share of the regions of all earlier turns together that this turn's region covers; NaN in the first turn."""
    visible: Tensor
    """Share of the region that no later turn covers; NaN in a scene's last turn and where nothing changed."""
    out_of_view: Tensor
    """1 where the region touches the border of the picture, else 0."""
    rotation: Tensor
    """Degrees of the cubes (:func:`cube_rotation`); NaN for what is no cube."""


def measure_layout(images: Tensor, lengths: Tensor | None = None, cubes: Tensor | None = None) -> Layout:
    """Measure the objects of scenes.

    Args:
        images: (S, T + 1, 3, H, W) in [-1, 1]: the empty scene, then the picture after each turn.
        lengths: (S,) turns of each scene; None is T for all.
        cubes: (S, T) bool, which turns added a cube; None is none.

    Raises:
        ValueError: ``images`` is not of the shape above, or ``lengths`` or ``cubes`` does not fit it.
    """
    if images.ndim != 5 or images.shape[1] < 2:
        raise ValueError(f"images must be (S, T + 1, 3, H, W) with T of at least 1, got {tuple(images.shape)}")
    shape = (images.shape[0], images.shape[1] - 1)
    for name, tensor, wanted in (("lengths", lengths, shape[:1]), ("cubes", cubes, shape)):
        if tensor is not None and tensor.shape != wanted:
            raise ValueError(f"{name} must be {wanted}, got {tuple(tensor.shape)}")
    before, after = images[:, :-1].flatten(0, 1), images[:, 1:].flatten(0, 1)
    region = changed_region(before, after).unflatten(0, shape)  # (S, T, H, W)
    turn = torch.arange(shape[1])
    present = turn < (torch.full(shape[:1], shape[1]) if lengths is None else lengths)[:, None]  # (S, T)
    earlier, later = torch.zeros_like(region), torch.zeros_like(region)
    for t in range(1, shape[1]):
        earlier[:, t] = earlier[:, t - 1] | region[:, t - 1]
        later[:, -1 - t] = later[:, -t] | region[:, -t]  # a turn that is padding changes nothing
    area = region.sum((2, 3))
    border = torch.ones(region.shape[2:], dtype=torch.bool)
    border[1:-1, 1:-1] = False
    has_next = F.pad(present[:, 1:], (0, 1))
    rotation = torch.full(shape, math.nan)
    if cubes is not None and bool((cubes & present).any()):
        chosen = (cubes & present).flatten()
        rotation.view(-1)[chosen] = cube_rotation(before[chosen], after[chosen])

    def where(condition: Tensor, values: Tensor) -> Tensor:
        return values.float().masked_fill(~condition, math.nan)

    return Layout(
        place=where(present[:, :, None], place_of_change(before, after).unflatten(0, shape)),
        area=where(present, area),
        width=where(present, _extent(region.any(2))),
        height=where(present, _extent(region.any(3))),
        overlap=where(present & (turn > 0), (region & earlier).sum((2, 3)) / earlier.sum((2, 3))),
        visible=where(has_next, 1 - (region & later).sum((2, 3)) / area),
        out_of_view=where(present, (region & border).any(3).any(2)),
        rotation=rotation,
    )


def _extent(occupied: Tensor) -> Tensor:
    """Lines from the first to the last that is occupied: (..., L) bool to (...) int64, 0 where none is."""
    before, after = occupied.cummax(-1).values, occupied.flip(-1).cummax(-1).values.flip(-1)
    return (before & after).sum(-1)


def cube_rotation(before: Tensor, after: Tensor) -> Tensor:
    """How far cubes are turned about the vertical, seen from the camera.

    The change of the picture is fitted with a box of three flat faces, each of a colour of its own, as CLEVR's camera
    would show it at that height in the picture: 18 rotations, three sizes and 25 small shifts are tried, and the
    rotation that explains most of the squared change wins. At 0 and 90 degrees one looks at a face, at 45 at an edge;
    below 45 the left face is the narrow one. A cube looks the same after every 90 degrees.

    Args:
        before: (N, 3, H, W) in [-1, 1], the pictures before the turn that added a cube; H equals W.
        after: (N, 3, H, W) in [-1, 1], the pictures after it.

    Returns:
        (N,) float32 degrees in (0, 90), multiples of 5 less 2.5; NaN where nothing changed.

    Raises:
        ValueError: the pictures are not of one such shape.

    Source: ours; the geometry is that of Johnson et al. 2017, arXiv:1612.06890, with i-CLEVR's square pictures.
    """
    places = place_of_change(before, after)
    size = after.shape[-1]
    if after.shape[-2] != size:
        raise ValueError(f"before and after must be square pictures, got {tuple(after.shape)}")
    reach = size // 4
    side = 2 * reach + 1
    centre = places.nan_to_num(size / 2).round().long()
    change = F.pad(after - before, (reach,) * 4)
    patches = [x[:, row : row + side, column : column + side] for x, (column, row) in zip(change, centre, strict=True)]
    row_step = max(size // 16, 1)  # boxes are made for every fourth row of 64: the view changes slowly
    rows = (centre[:, 1] / row_step).round() * row_step
    rotation = torch.full((len(after),), math.nan)
    for row in rows.unique():
        chosen = rows == row
        faces = _boxes(float(row), size, reach)  # (A, B, 3, P)
        unit = faces / faces.sum(-1, keepdim=True).clamp(min=1).sqrt()
        patch = torch.stack([p for p, c in zip(patches, chosen.tolist(), strict=True) if c]).flatten(2)  # (n, 3, P)
        explained = torch.einsum("ncp,abfp->ncabf", patch, unit).square().sum((1, 4))  # (n, A, B)
        rotation[chosen] = (explained.amax(2).argmax(1) + 0.5) * (90 / NUM_ROTATIONS)
    return rotation.masked_fill(places.isnan().any(1), math.nan)


def _boxes(row: float, size: int, reach: int) -> Tensor:
    """Faces of boxes around a pixel in a row: (A, B, 3, P) of 0 and 1; A rotations, B sizes and shifts.

    The faces are the top, the left and the right one; P are the pixels of a square of ``reach`` to each side.
    """
    half_height = 0.5 / (FOCAL_LENGTH * ASPECT)  # tangent of the angle from the picture's middle to its upper edge
    elevation = math.atan2(CAMERA_HEIGHT, CAMERA_DISTANCE) + math.atan((2 * row / (size - 1) - 1) * half_height)
    elevation = max(elevation, 0.1)  # the horizon is above the picture, all but for the highest rows
    distance = (CAMERA_HEIGHT - CUBE_SIDE / 2) / math.sin(elevation)
    side = CUBE_SIDE * FOCAL_LENGTH * size / distance  # in pixels
    angle = (torch.arange(NUM_ROTATIONS) + 0.5) * (math.pi / 2 / NUM_ROTATIONS)
    rise = ASPECT * math.sin(elevation)
    # From the nearest upper corner: the edges to the left and to the right, (A, 2) each, and the one down.
    left = torch.stack((-angle.sin(), -angle.cos() * rise), 1)
    right = torch.stack((angle.cos(), -angle.sin() * rise), 1)
    down = torch.tensor([0.0, ASPECT * math.cos(elevation)]).expand_as(left)
    shifts = torch.cartesian_prod(
        torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]) * size / 64, torch.arange(-2.0, 3.0) * size / 64
    )
    axis = torch.arange(-reach, reach + 1.0)
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)  # (P, 2)
    boxes = []
    for scale in (0.85 * side, side, 1.15 * side):
        edges = [edge[:, None, None] * scale for edge in (left, right, down)]  # (A, 1, 1, 2)
        corner = shifts[:, None] - (edges[0] + edges[1] + edges[2]) / 2  # (A, 25, 1, 2): a box is centred in its middle
        faces = [_inside(pixels - corner, edges[i], edges[j]) for i, j in ((0, 1), (0, 2), (1, 2))]  # (A, 25, P)
        boxes.append(torch.stack(faces, 2))
    return torch.cat(boxes, 1).float()


def _inside(points: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Whether points (..., 2) lie in the parallelogram of two edges (..., 2) from the origin, (...) bool."""

    def cross(a: Tensor, b: Tensor) -> Tensor:
        return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]

    area = cross(first, second)
    along_first, along_second = cross(points, second) / area, cross(first, points) / area
    return (along_first >= 0) & (along_first < 1) & (along_second >= 0) & (along_second < 1)


# --- two-sample tests ---------------------------------------------------------------------------------------------


class TwoSampleTest(NamedTuple):
    """How far two samples are apart, and whether chance does that."""

    distance: float
    """In [0, 1]: 0 where the samples are distributed alike, 1 where they have nothing in common."""
    p_value: float
    """Share of random divisions of the scenes that are as far apart, or in which one half has no value; small where
    chance does not explain it."""
    num_first: int
    """Values of the first sample."""
    num_second: int
    """Values of the second sample."""


def ks_test(
    first: Tensor, second: Tensor, *, rng_seed: int, permutations: int = 999, paired: bool = False
) -> TwoSampleTest:
    """Kolmogorov-Smirnov test: the largest distance of two distribution functions.

    Whole scenes are permuted, not values, since objects of one scene depend on each other. Ties are counted at once.

    Args:
        first: (S, T) values of S scenes; NaN is no value.
        second: (R, T) those of R other scenes.
        rng_seed: of the permutations.
        permutations: random divisions of all scenes into S and R; p is at least 1 / (permutations + 1).
        paired: whether scene i of both samples has the same objects. Then only the two scenes of a pair change places:
            how scenes of other objects differ would else hide how the samples do.

    Raises:
        ValueError: the samples are not of such shapes, or one has no value.

    Source: Smirnov 1948; permutation p-value after Phipson and Smyth 2010, eq. 2.
    """

    def distances(values: Tensor, labels: Tensor) -> Tensor:
        ordered, order = values[:, 0].sort()
        last_of_ties = F.pad(ordered[1:] != ordered[:-1], (0, 1), value=True)
        share = [x[order].cumsum(0) / x.sum(0) for x in (labels, 1 - labels)]
        return (share[0] - share[1])[last_of_ties].abs().amax(0)

    _check_samples(first, second, 2, paired)
    return _permutation_test(first[:, :, None], second[:, :, None], distances, rng_seed, permutations, paired)


def energy_test(
    first: Tensor, second: Tensor, *, rng_seed: int, permutations: int = 999, paired: bool = False
) -> TwoSampleTest:
    """Energy distance of points: (2 E|X - Y| - E|X - X'| - E|Y - Y'|) / 2 E|X - Y|.

    Args:
        first: (S, T, D) points of S scenes; a point with NaN is none.
        second: (R, T, D) those of R other scenes.
        rng_seed: of the permutations.
        permutations: as in :func:`ks_test`.
        paired: as in :func:`ks_test`.

    Raises:
        ValueError: the samples are not of such shapes, or one has no point.

    Source: Szekely and Rizzo 2013, "Energy statistics", section 4; the quotient is their coefficient of inhomogeneity.
    """

    def distances(values: Tensor, labels: Tensor) -> Tensor:
        apart = torch.cdist(values, values)
        other = 1 - labels
        to_first, to_second = apart @ labels, apart @ other
        num_first, num_second = labels.sum(0), other.sum(0)
        across = (other * to_first).sum(0) / (num_first * num_second)
        within = (labels * to_first).sum(0) / num_first**2 + (other * to_second).sum(0) / num_second**2
        return torch.where(across == 0, 0, 1 - within / (2 * across)).clamp(min=0)

    _check_samples(first, second, 3, paired)
    return _permutation_test(first, second, distances, rng_seed, permutations, paired)


def _check_samples(first: Tensor, second: Tensor, ndim: int, paired: bool) -> None:
    wanted = "(scenes, turns)" if ndim == 2 else "(scenes, turns, D)"
    if first.ndim != ndim or second.ndim != ndim or first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"first and second must be {wanted} and alike, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if paired and len(first) != len(second):
        raise ValueError(f"paired: first and second must have as many scenes, got {len(first)} and {len(second)}")
    for name, sample in (("first", first), ("second", second)):
        if not len(sample) or bool(sample.reshape(len(sample), -1).isnan().all()):
            raise ValueError(f"{name} has no value: nothing can be compared")


def _permutation_test(
    first: Tensor,
    second: Tensor,
    distances: Callable[[Tensor, Tensor], Tensor],
    rng_seed: int,
    permutations: int,
    paired: bool,
) -> TwoSampleTest:
    """Test points (S, T, D) and (R, T, D).

    ``distances`` takes points (n, D) and labels (n, B), 1 for the first sample, and returns (B,), one for each
    column of labels, or NaN where a sample is empty.
    """
    values = torch.cat((first, second)).double()  # (S + R, T, D)
    is_value = ~values.isnan().any(2)
    rng = torch.Generator().manual_seed(rng_seed)
    scenes = torch.zeros(len(values), permutations + 1, dtype=torch.float64)
    scenes[: len(first), 0] = 1
    if paired:
        stays = torch.rand(len(first), permutations, generator=rng) < 0.5
        scenes[:, 1:] = torch.cat((stays, ~stays))
    else:
        for column in range(1, permutations + 1):
            scenes[torch.randperm(len(values), generator=rng)[: len(first)], column] = 1
    labels = scenes[:, None].expand(-1, values.shape[1], -1)[is_value]  # (n, permutations + 1)
    found = distances(values[is_value], labels)
    as_far = int((~(found[1:] < found[0] - 1e-12)).sum())
    num_first = int(labels[:, 0].sum())
    return TwoSampleTest(float(found[0]), (1 + as_far) / (1 + permutations), num_first, len(labels) - num_first)


class Comparison(NamedTuple):
    """One statistic of drawn scenes against real ones."""

    distance: float
    """Of drawn scenes to real ones (:class:`TwoSampleTest`)."""
    p_value: float
    """Of that distance, if drawn and real scenes were alike."""
    adjusted_p: float
    """The same among all statistics that were tested (:func:`adjusted_for_many`)."""
    floor: float
    """Distance of other real scenes to the same real ones."""
    drawn: int
    """Values of drawn scenes."""
    real: int
    """Values of real scenes."""


def compare_layouts(drawn: Layout, real: Layout, other_real: Layout, *, rng_seed: int) -> dict[str, Comparison]:
    """Two-sample tests of every statistic, where all three have values.

    Places and sizes are tested apart for first turns, which stand at the centre in i-CLEVR, and for later ones. Places
    are compared by :func:`energy_test`, rotations too, as points on a circle; all else by :func:`ks_test`. A drawn
    scene has the objects of its real one, so the tests are paired.

    With many scenes any difference becomes significant, so look at ``distance`` too. ``floor`` is a little high beside
    it, as other real scenes have other objects.

    Args:
        drawn: of drawn scenes, each of the same objects in the same order as the real scene of its number.
        real: of real scenes.
        other_real: of other real scenes, for the floor.
        rng_seed: of the permutations.

    Returns:
        Comparisons under ``place_first``, ``place_later``, ``area_first``, ... ``overlap``, ``visible``,
        ``out_of_view`` and ``rotation``.

    Raises:
        ValueError: there are not as many drawn scenes as real ones.
    """
    turns = {"first": slice(0, 1), "later": slice(1, None)}
    samples: dict[str, list[Tensor]] = {}
    layouts = (drawn, real, other_real)
    for field in ("place", "area", "width", "height"):
        for when, part in turns.items():
            samples[f"{field}_{when}"] = [getattr(layout, field)[:, part] for layout in layouts]
    for field in ("overlap", "visible", "out_of_view"):
        samples[field] = [getattr(layout, field) for layout in layouts]
    samples["rotation"] = [_on_circle(layout.rotation) for layout in layouts]
    found, floors = {}, {}
    for name, (of_drawn, of_real, of_other) in samples.items():
        if any(bool(sample.isnan().all()) for sample in (of_drawn, of_real, of_other)):
            continue
        test = energy_test if of_real.ndim == 3 else ks_test
        found[name] = test(of_drawn, of_real, rng_seed=rng_seed, paired=True)
        floors[name] = test(of_other, of_real, rng_seed=rng_seed, permutations=0).distance
    adjusted = adjusted_for_many([test.p_value for test in found.values()])
    return {
        name: Comparison(test.distance, test.p_value, p, floors[name], test.num_first, test.num_second)
        for (name, test), p in zip(found.items(), adjusted, strict=True)
    }


def adjusted_for_many(p_values: Sequence[float]) -> list[float]:
    """The p of each test among all of them: at most, the chance that any comes out so small if nothing is there.

    Where the smallest of many is looked at, this is the one to hold against 0.05. It holds however the tests depend on
    each other.

    Args:
        p_values: of tests that are looked at together, each from 0 to 1.

    Returns:
        One for each, in the same order; none smaller than its own p.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    count, largest = len(p_values), 0.0
    adjusted = [1.0] * count
    for rank, number in enumerate(sorted(range(count), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (count - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def _on_circle(degrees: Tensor) -> Tensor:
    """Rotations with a period of 90 degrees, (...) to points (..., 2)."""
    radians = degrees * (2 * math.pi / 90)
    return torch.stack((radians.cos(), radians.sin()), -1)
