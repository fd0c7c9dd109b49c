"""What the first turns of a generator have wrong on average in each light, measured once and taken off."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_LIKENESS = 0.9
"""Cosine between a condition and that of a first turn below which nothing is added. In the shipped model those of later
turns stay below 0.85."""


NO_LIMIT = 4.0
"""No change of a picture in [-1, 1] is larger."""
AXES = ((3**-0.5, 3**-0.5, 3**-0.5), (2**-0.5, -(2**-0.5), 0.0), (6**-0.5, 6**-0.5, -2 * 6**-0.5))
"""Rows: lightness, red against green and yellow against blue, the axes on which a change has limits."""


class Correction(NamedTuple):
    """What becomes of the change that N turns made. Each is (N, 3, H, W)."""

    offset: Tensor
    """What is added."""
    low: Tensor
    """The least that the sum may be on each of :data:`AXES`."""
    high: Tensor
    """The most."""

    def apply(self, change: Tensor) -> Tensor:
        """Correct a change (N, 3, H, W)."""
        return turned_back(turned(change + self.offset).clamp(self.low, self.high))


def turned(change: Tensor) -> Tensor:
    """Colours (N, 3, H, W) on :data:`AXES`."""
    return torch.einsum("ij,njhw->nihw", change.new_tensor(AXES), change)


def turned_back(change: Tensor) -> Tensor:
    """Colours (N, 3, H, W) from :data:`AXES`."""
    return torch.einsum("ji,njhw->nihw", change.new_tensor(AXES), change)


class FirstTurnCorrection(nn.Module):
    """What has to be added to a first turn, so that the mean over many is that of real ones, object by object.

    In i-CLEVR a first object always stands at the same pixels. There an error that all pictures of an object share
    gives away every one of them, though it is a single grey level: whoever looks at many sees the mean. Convolutions
    share their weights among all pixels, and adversarial training leaves such an error behind. The same holds for how
    an object answers to the light. So both are measured after training
    (:func:`condgan.calibration.correct_first_turns`): an offset for each object, and a slope for each number that says
    how the scene is lit, in a square at the middle. An outline that moves with the light is not linear in it, and next
    to an edge a slope may add the complement of the object's colour to the floor. So in the square a change has limits:
    the least and the largest that was met in data, object by object and pixel by pixel, of lightness and two opponent
    colours. A first turn is known by its condition, which depends on the object only; other turns are left alone, and
    so are first turns whose place was asked for and is not the usual one.

    All weights are buffers: the optimizer of a larger model leaves them alone. A fresh correction changes nothing.

    Args:
        num_objects: size K of the vocabulary.
        condition_dim: length D of the condition.
        image_size: side of the pictures in pixels.
        light_inputs: numbers L that say how a scene is lit.
        square: side in pixels of the square with slopes and limits; None is the whole picture.

    Shape:
        condition: (N, D); no gradient flows back to it.
        light: (N, L), or None without light.
        place: (N, 2) in pixels (x, y), or None for models that do not know it.
        output: a :class:`Correction` for pictures in [-1, 1]; or None, on a CPU, where no turn is a first one.

    Source: matching the means of real and drawn pictures is the feature matching of Salimans et al. 2016,
    arXiv:1606.03498, section 3.1, with the pixels as features and solved at once.
    """

    conditions: Tensor
    offsets: Tensor
    slopes: Tensor | None
    limits: Tensor
    places: Tensor
    reach: Tensor

    def __init__(
        self, num_objects: int, condition_dim: int, image_size: int, light_inputs: int = 0, square: int | None = None
    ) -> None:
        super().__init__()
        square = square or image_size
        self.register_buffer("conditions", torch.zeros(num_objects, condition_dim))
        self.register_buffer("offsets", torch.zeros(num_objects, 3, image_size, image_size))
        slopes = torch.zeros(num_objects, 3 * light_inputs, square, square) if light_inputs else None
        self.register_buffer("slopes", slopes)  # of rank 4, or a module cannot be channels_last
        limits = torch.full((num_objects, 6, square, square), NO_LIMIT)  # how far down, and how far up
        self.register_buffer("limits", limits)
        self.register_buffer("places", torch.zeros(num_objects, 2))
        self.register_buffer("reach", torch.full((num_objects,), 2.0 * image_size))  # so far from there all holds

    def forward(self, condition: Tensor, light: Tensor | None = None, place: Tensor | None = None) -> Correction | None:
        likeness = F.normalize(condition.detach()) @ F.normalize(self.conditions).T  # (N, K)
        likeness, nearest = likeness.max(1)
        share = F.relu((likeness - LEAST_LIKENESS) / (1 - LEAST_LIKENESS))
        if place is not None:
            away = (place - self.places[nearest]).norm(dim=1) - self.reach[nearest]
            share = share * (1 - away).clamp(0, 1)  # none a pixel further away
        can_look = share.device.type == "cpu" and not torch.compiler.is_compiling()  # a GPU would have to be waited for
        if can_look and not share.any():
            return None
        offset = self.offsets[nearest]
        if light is not None and self.slopes is not None:
            slopes = self.slopes[nearest].flatten(2)  # (N, 3 L, h w)
            slopes = slopes.unflatten(1, (light.shape[1], 3)).flatten(2)  # (N, L, 3 h w)
            answer = (light[:, None].to(slopes.dtype) @ slopes).view(-1, 3, *self.slopes.shape[2:])
            offset = offset + self._framed(answer, 0)
        share = share[:, None, None, None]
        limits = self.limits[nearest] + NO_LIMIT * (1 - share)
        down, up = self._framed(limits, NO_LIMIT).chunk(2, 1)
        return Correction(share * offset, -down, up)

    def _framed(self, squares: Tensor, value: float) -> Tensor:
        """Squares at the middle of pictures that have ``value`` elsewhere."""
        return F.pad(squares, ((self.offsets.shape[-1] - squares.shape[-1]) // 2,) * 4, value=value)

    def _square(self) -> slice:
        margin = (self.offsets.shape[-1] - self.limits.shape[-1]) // 2
        return slice(margin, margin + self.limits.shape[-1])

    def clear_(self) -> None:
        """Change nothing any more."""
        self.offsets.zero_()
        self.limits.fill_(NO_LIMIT)
        self.reach.fill_(2.0 * self.offsets.shape[-1])
        if self.slopes is not None:
            self.slopes.zero_()

    def put_(self, places: Tensor, reach: float) -> None:
        """Hold only within ``reach`` pixels of the usual places (K, 2); NaN where an object's is not known."""
        known = places.isfinite().all(1)
        self.places[known] = places[known]
        self.reach[known] = reach

    def limit_(self, low: Tensor, high: Tensor) -> None:
        """Take the least and the largest change on :data:`AXES`, (K, 3, H, W) each, for limits in the square."""
        inside = self._square()
        self.limits.copy_(torch.cat((-low, high), 1)[:, :, inside, inside])

    def add_(self, coefficients: Tensor) -> None:
        """Add offsets and, after them, slopes: (K, 1 + L, 3, H, W), of which slopes beyond the square are left out."""
        self.offsets += coefficients[:, 0]
        if self.slopes is not None:
            inside = self._square()
            self.slopes += coefficients[:, 1:, :, inside, inside].flatten(1, 2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        num_objects, condition_dim = self.conditions.shape
        image_size, square = self.offsets.shape[-1], self.limits.shape[-1]
        fresh = FirstTurnCorrection(num_objects, condition_dim, image_size, square=square)
        for name in ("limits", "places", "reach"):  # checkpoints of before there were limits
            state_dict.setdefault(f"{prefix}{name}", fresh.get_buffer(name))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        num_objects, condition_dim = self.conditions.shape
        return f"{num_objects}, {condition_dim}, image_size={self.offsets.shape[-1]}"
