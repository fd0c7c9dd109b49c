"""What a picture looks like close up, as a vector: grain, edges and light, by fixed filters.

Features of a classifier see which objects there are and little else. These see how a picture is made: a blur of half
a pixel, missing grain, smooth cubes or constant light move them far, other objects at other places move them little.
Nothing in them is learned, so no generator has been trained or chosen on them and no classifier has a say.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from condgan.metrics import nearest_distances

LEVELS = 3
"""Levels of the pyramid: filters see details of about 3, 6 and 12 pixels."""
GRID = 4
"""Cells to each side in which the light is measured."""
THUMBNAIL_SIZE = 14
"""Side of a thumbnail in pixels: 4 pixels become one in pictures of 64 less the border."""
MAX_SHIFT = 4
"""Pixels by which a copy may be shifted: as far as :func:`condgan.datasets.augment_scene` shifts what is learned."""
SHIFT_STEP = 2
"""Pixels between the shifts tried: half a pixel of a thumbnail."""
MIN_SIZE = 16
"""Smallest side of a picture: its smallest level has 4 pixels."""
LIGHT_UNIT = 10.0
"""Grey levels in one unit of a light feature, so that one unit is as much of a change as in the others."""
SOFTENING = 0.05
"""Added to deviations: 5 % of a response, or half a grey level of light. What differs by less looks the same, however
alike real pictures are."""
CHUNK = 16
"""Pictures filtered at once, few enough to stay in the cache; has no part in the results."""

_FILTERS_PER_LEVEL = 3 * 8
FEATURE_GROUPS = {
    "grain": slice(0, LEVELS * _FILTERS_PER_LEVEL),
    "edges": slice(LEVELS * _FILTERS_PER_LEVEL, 2 * LEVELS * _FILTERS_PER_LEVEL),
    "light": slice(2 * LEVELS * _FILTERS_PER_LEVEL, 2 * LEVELS * _FILTERS_PER_LEVEL + 3 * GRID**2),
}
"""Columns of :func:`picture_features` by what they see: a distance on one group says what gives pictures away."""


_COLOUR_AXES = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]]) / torch.tensor([[3.0], [2], [6]]).sqrt()
"""Brightness, red against green, yellow against blue; each of unit norm."""


def picture_features(pixels: Tensor) -> Tensor:
    """Statistics of filter responses of pictures.

    Every picture is turned to brightness and two opponent colours and filtered at three levels of a Gaussian pyramid
    by the eight 3x3 masks of Laws that have mean zero: all products of average, edge and spot, but average by
    average. All filters have unit norm, so that grain of independent pixels keeps its deviation. A picture's features
    are, for each level, colour and filter, of the responses ``r`` in grey levels at all places,

    - grain: ``mean(log(r^2 + 1)) / 2``, the typical response, which small objects hardly move;
    - edges: ``log(mean(r^4) + 1) / 4``, the strongest responses, which grain hardly moves;

    and the light: the mean of each colour in each of 4x4 cells of the last level, in tens of grey levels. A
    difference of 0.1 thus is about 10 % of a response or one grey level of light.

    Args:
        pixels: (N, 3, H, W) uint8, sides of at least 16; as in a picture file, because rounding is seen too.

    Returns:
        (N, 192) float32 on the CPU; columns by group in :data:`FEATURE_GROUPS`.

    Raises:
        TypeError: ``pixels`` is not uint8.
        ValueError: ``pixels`` is not (N, 3, H, W), or too small.

    Source: ours. Filters: Laws 1980, Textured Image Segmentation. Marginal statistics of rectified responses at every
    level of a pyramid: Portilla and Simoncelli 2000, doi:10.1023/A:1026553619983; their logarithm: Bruna and Mallat
    2013, arXiv:1203.1513.

    Example:
        >>> picture_features(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([2, 192])
    """
    _check(pixels)
    return torch.cat([_chunk_features(chunk.cpu().float()) for chunk in pixels.split(CHUNK)])


def _check(pixels: Tensor) -> None:
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels must be uint8, got {pixels.dtype}: convert [-1, 1] pictures with images.to_uint8")
    if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[2:]) < MIN_SIZE:
        raise ValueError(
            f"pixels must be (N, 3, H, W) with sides of at least {MIN_SIZE}, got {tuple(pixels.shape)}; "
            "flatten turns into N"
        )


def _chunk_features(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) float32 in 0 to 255 to (N, 192)."""
    level = torch.einsum("kc,nchw->nkhw", _COLOUR_AXES, pictures - 127.5)
    grain, edges = [], []
    for number in range(LEVELS):
        if number:
            level = _half(level)
        for response in _responses(level):  # (N, 3, h, w)
            energy = response.square()
            edges.append((energy.square().mean((2, 3)) + 1).log() / 4)
            grain.append(energy.add_(1).log_().mean((2, 3)) / 2)
    light = F.adaptive_avg_pool2d(level, GRID).flatten(1) / LIGHT_UNIT
    return torch.cat([*grain, *edges, light], 1)


def _responses(pictures: Tensor) -> list[Tensor]:
    """The eight filters of pictures (N, C, H, W), each (N, C, H - 2, W - 2)."""
    across = _average_edge_spot(pictures[..., :-2], pictures[..., 1:-1], pictures[..., 2:])
    both = [_average_edge_spot(x[..., :-2, :], x[..., 1:-1, :], x[..., 2:, :]) for x in across]
    return [response for row in both for response in row][1:]


def _average_edge_spot(before: Tensor, here: Tensor, after: Tensor) -> list[Tensor]:
    """Masks [1 2 1], [-1 0 1] and [-1 2 -1] of unit norm along one axis."""
    sides = before + after
    return [(sides + 2 * here) / 6**0.5, (after - before) / 2**0.5, (2 * here - sides) / 6**0.5]


def _half(pictures: Tensor) -> Tensor:
    """The next level of the pyramid of Burt and Adelson 1983: a binomial blur of 5 pixels, every second pixel kept."""
    n, channels, height, width = pictures.shape
    mask = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    padded = F.pad(pictures.reshape(n * channels, 1, height, width), (2, 2, 2, 2), mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, mask.view(1, 1, 1, 5), stride=(1, 2)), mask.view(1, 1, 5, 1), stride=(2, 1))
    return blurred.unflatten(0, (n, channels)).squeeze(2)


class FeatureScale(NamedTuple):
    """Mean and deviation (D,) of the features of real pictures."""

    mean: Tensor
    deviation: Tensor

    def standardise(self, features: Tensor) -> Tensor:
        """Features (N, D) in deviations from the mean, float64.

        Raises:
            ValueError: ``features`` is not (N, D) with the D of the scale.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be (N, {len(self.mean)}), got {tuple(features.shape)}")
        return (features.double() - self.mean) / self.deviation


def fit_scale(features: Tensor) -> FeatureScale:
    """The scale on which distances of features are taken, from real pictures that no distance compares.

    The training split is the one to take: each feature then counts in units of how much real pictures vary in it,
    ``sqrt(variance + 0.05^2)``, and the pictures compared have no say in how they are compared.

    Args:
        features: (N, D) of :func:`picture_features`, N at least 2.

    Raises:
        ValueError: ``features`` is not (N, D), has fewer than two rows, or is not finite.
    """
    if features.ndim != 2 or len(features) < 2 or not features.isfinite().all():
        raise ValueError(f"features must be finite (N, D) with N of at least 2, got {tuple(features.shape)}")
    values = features.detach().cpu().double()
    return FeatureScale(values.mean(0), (values.var(0) + SOFTENING**2).sqrt())


def copy_distances(pixels: Tensor, references: Tensor) -> Tensor:
    """How far each picture is from the nearest reference, mirrored or shifted by up to 4 pixels as it may be.

    Pictures are held against references as thumbnails of 14x14, because grain is not what makes a copy. Shifts are
    tried in steps of 2 pixels to each side, and a border of 4 pixels is left out, so that every shift compares as many.

    Args:
        pixels: (N, 3, H, W) uint8, sides of at least 16: drawn pictures, or real ones that were held out.
        references: (M, 3, H, W) uint8, at least one: the training pictures, best only those of as many objects.

    Returns:
        (N,) float64, roots of mean squared differences in grey levels.

    Raises:
        TypeError: pictures are not uint8.
        ValueError: they are not (N, 3, H, W), too small, of different sizes, or none.

    Source: ours; what :func:`condgan.metrics.memorisation` compares.
    """
    _check(pixels)
    _check(references)
    if pixels.shape[2:] != references.shape[2:]:
        raise ValueError(
            f"pixels and references must be of one size, got {tuple(pixels.shape)} and {tuple(references.shape)}"
        )
    if not (len(pixels) and len(references)):
        raise ValueError(f"pixels and references must not be empty, got {len(pixels)} and {len(references)}")
    steps = range(-MAX_SHIFT, MAX_SHIFT + 1, SHIFT_STEP)
    shifted = torch.cat([_thumbnails(pixels, x, y) for y in steps for x in steps])  # (25 * N, D)
    both = torch.cat([_thumbnails(references), _thumbnails(references.flip(3))])
    return nearest_distances(shifted, both).unflatten(0, (-1, len(pixels))).amin(0)


def _thumbnails(pixels: Tensor, shift_x: int = 0, shift_y: int = 0) -> Tensor:
    """(N, 3, H, W) uint8 to (N, 588): the shifted inner window, averaged, one unit of distance a grey level."""
    height, width = (side - MAX_SHIFT for side in pixels.shape[2:])
    window = pixels[:, :, MAX_SHIFT + shift_y : height + shift_y, MAX_SHIFT + shift_x : width + shift_x]
    small = torch.cat([F.adaptive_avg_pool2d(chunk.cpu().float(), THUMBNAIL_SIZE) for chunk in window.split(CHUNK)])
    return small.flatten(1) / small[0].numel() ** 0.5
