"""What the first turns of a generator have wrong on average in each light, measured once and taken off."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ANSWERS = 2
"""Pictures in which objects of one shape answer to the light: what they cover and shade, and how they shine."""
FURTHEST = 4.0
"""Numbers further from 0 count as this: no scene has them, but a photo may."""
LEAST_SPREAD = 0.01
"""Pixels."""
LEAST_LIKENESS = 0.9
"""Cosine between a condition and that of a first turn below which nothing is added. In the shipped model those of later
turns stay below 0.85."""


def products_of(numbers: Tensor) -> Tensor:
    """Products of every two of L numbers of mean 0 and variance 1, (N, L) to (N, L (L + 1) / 2), of mean 0 too.

    Squares come less 1: Hermite polynomials, which for normal numbers do not correlate with each other.
    """
    rows, columns = torch.triu_indices(numbers.shape[1], numbers.shape[1], device=numbers.device)
    return numbers[:, rows] * numbers[:, columns] - (rows == columns).to(numbers)


def middle_of(image_size: int, size: int) -> slice:
    """Rows, or columns, of the square of this size in the middle of a picture."""
    return slice((image_size - size) // 2, (image_size + size) // 2)


class FirstTurnCorrection(nn.Module):
    """What has to be added to a first turn, so that the mean over many is that of real ones, object by object.

    In i-CLEVR a first object always stands at the same pixels. There an error that all pictures of an object share
    gives away every one of them, though it is a single grey level: whoever looks at many sees the mean. Convolutions
    share their weights among all pixels, and adversarial training leaves such an error behind. The same holds for how
    an object answers to the light, and to the parts of a pixel by which its place differs from the usual one, as the
    camera moves. So all three are measured after training (:func:`condgan.calibration.correct_first_turns`): an offset
    for each object, and in a square at the middle a slope for each of these numbers and a curve for each product of two
    of them. A first turn is known by its condition, which depends on the object
    only, and by its place; to other turns, and to objects that are put elsewhere, nothing is added.

    All weights are buffers: the optimizer of a larger model leaves them alone. A fresh correction adds nothing.

    Args:
        num_objects: size K of the vocabulary.
        condition_dim: length D of the condition.
        image_size: side of the pictures in pixels.
        light_inputs: numbers that say how a scene is lit.
        places: whether the place is known. The light and x and y are L numbers.
        slope_size: side in pixels of the square with slopes and curves.
        num_curves: answers C to products of these numbers, which objects share.

    Shape:
        condition: (N, D); no gradient flows back to it.
        light: (N, light_inputs), or None without light.
        place: (N, 2) in pixels (x, y), or None for models that do not know it.
        output: (N, 3, H, W), to be added to pictures in [-1, 1]; or None, on a CPU, where no turn is a first one.

    Source: matching the means of real and drawn pictures is the feature matching of Salimans et al. 2016,
    arXiv:1606.03498, section 3.1, with the pixels as features and solved at once.
    """

    conditions: Tensor
    offsets: Tensor
    slopes: Tensor | None
    place_slopes: Tensor | None
    curves: Tensor | None
    shares: Tensor | None
    places: Tensor
    spread: Tensor
    reach: Tensor

    def __init__(
        self,
        num_objects: int,
        condition_dim: int,
        image_size: int,
        light_inputs: int = 0,
        places: bool = False,
        slope_size: int = 0,
        num_curves: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("conditions", torch.zeros(num_objects, condition_dim))
        self.register_buffer("offsets", torch.zeros(num_objects, 3, image_size, image_size))
        self.num_inputs = numbers = light_inputs + 2 * places
        slopes = torch.zeros(
            num_objects, 3 * numbers, slope_size, slope_size
        )  # of rank 4: a module may be channels_last
        curves = torch.zeros(num_curves, numbers * (numbers + 1) // 2, slope_size, slope_size)
        self.register_buffer("slopes", slopes[:, : 3 * light_inputs].clone() if light_inputs else None)
        self.register_buffer("place_slopes", slopes[:, 3 * light_inputs :].clone() if places else None)
        self.register_buffer("curves", curves if numbers else None)
        self.register_buffer("shares", torch.zeros(num_objects, 3, num_curves) if numbers else None)
        self.register_buffer("places", torch.zeros(num_objects, 2))
        self.register_buffer("spread", torch.ones(num_objects, 2))
        self.everywhere = 2.0 * image_size  # a reach that no place is beyond
        self.register_buffer("reach", torch.full((num_objects,), self.everywhere))  # so far from there it is added

    def forward(self, condition: Tensor, light: Tensor | None = None, place: Tensor | None = None) -> Tensor | None:
        likeness = F.normalize(condition.detach()) @ F.normalize(self.conditions).T  # (N, K)
        likeness, nearest = likeness.max(1)
        share = F.relu((likeness - LEAST_LIKENESS) / (1 - LEAST_LIKENESS))
        if place is not None:
            beyond = (place - self.places[nearest]).norm(dim=1) - self.reach[nearest]
            share = share * (1 - beyond).clamp(0, 1)  # none a pixel further away
        can_look = share.device.type == "cpu" and not torch.compiler.is_compiling()  # a GPU would have to be waited for
        if can_look and not share.any():
            return None
        offset = self.offsets[nearest]
        if self.curves is not None and self.shares is not None:
            numbers = self.read(nearest, light, place).to(offset.dtype)
            slopes = torch.cat([x[nearest].flatten(2) for x in (self.slopes, self.place_slopes) if x is not None], 1)
            slopes = slopes.unflatten(1, (numbers.shape[1], 3)).flatten(2)  # (N, L, 3 h w)
            answer = (numbers[:, None] @ slopes).unflatten(2, (3, -1))[:, 0]  # (N, 3, h w)
            bent = products_of(numbers) @ self.curves.flatten(2)  # (C, N, h w)
            answer = answer + self.shares[nearest] @ bent.transpose(0, 1)
            answer = answer.unflatten(2, self.curves.shape[2:])
            margin = (offset.shape[-1] - answer.shape[-1]) // 2
            offset = offset + F.pad(answer, (margin,) * 4)
        return share[:, None, None, None] * offset

    def read(self, objects: Tensor, light: Tensor | None, place: Tensor | None) -> Tensor:
        """The numbers (N, L) that first turns answer to: the light, and the place beside the usual one of an object."""
        read = [] if light is None else [light]
        if place is not None:
            read.append((place - self.places[objects]) / self.spread[objects])
        return torch.cat(read, 1).clamp(-FURTHEST, FURTHEST)

    def clear_(self) -> None:
        """Add nothing any more."""
        self.offsets.zero_()
        self.reach.fill_(self.everywhere)
        for answers in (self.slopes, self.place_slopes, self.curves):
            if answers is not None:
                answers.zero_()

    def set_(self, offsets: Tensor, slopes: Tensor, curves: Tensor, shares: Tensor) -> None:
        """From now on add this, for models that know the light.

        Args:
            offsets: (K, 3, H, W), for each object.
            slopes: (K, 3 L, h, w), for each object and number (see :meth:`read`), in the square at the middle.
            curves: (C, L (L + 1) / 2, h, w), for each product of two numbers.
            shares: (K, 3, C), how much of each curve there is in each colour of an object.
        """
        assert self.curves is not None and self.shares is not None
        self.offsets.copy_(offsets)
        if self.slopes is not None:
            self.slopes.copy_(slopes[:, : self.slopes.shape[1]])
        if self.place_slopes is not None:
            self.place_slopes.copy_(slopes[:, -self.place_slopes.shape[1] :])
        self.curves.copy_(curves)
        self.shares.copy_(shares)

    def put_(self, places: Tensor, spread: Tensor, reach: float) -> None:
        """Add only within ``reach`` pixels of the usual places (K, 2), of standard deviation ``spread`` (K, 2).

        NaN where an object's are not known.
        """
        known = places.isfinite().all(1) & spread.isfinite().all(1)
        self.places[known] = places[known]
        self.spread[known] = spread[known].clamp(min=LEAST_SPREAD)
        self.reach[known] = reach

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        later = {
            "places": 0.0,
            "spread": 1.0,
            "reach": self.everywhere,
            "place_slopes": 0.0,
            "curves": 0.0,
            "shares": 0.0,
        }
        for name, fresh in later.items():  # checkpoints may be older
            buffer = getattr(self, name)
            if buffer is not None:
                state_dict.setdefault(f"{prefix}{name}", torch.full_like(buffer, fresh))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        num_objects, condition_dim = self.conditions.shape
        return f"{num_objects}, {condition_dim}, image_size={self.offsets.shape[-1]}"
