"""What the first turns of a generator have wrong on average in each light, measured once and taken off."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_LIKENESS = 0.9
"""Cosine between a condition and that of a first turn below which nothing is added. In the shipped model those of later
turns stay below 0.85."""


class FirstTurnCorrection(nn.Module):
    """What has to be added to a first turn, so that the mean over many is that of real ones, object by object.

    In i-CLEVR a first object always stands at the same pixels. There an error that all pictures of an object share
    gives away every one of them, though it is a single grey level: whoever looks at many sees the mean. Convolutions
    share their weights among all pixels, and adversarial training leaves such an error behind. The same holds for how
    an object answers to the light. So both are measured after training
    (:func:`condgan.calibration.correct_first_turns`): an offset for each object, and a slope for each number that says
    how the scene is lit, in a square at the middle. A first turn is known by its condition, which depends on the object
    only, and by its place; to other turns, and to objects that are put elsewhere, nothing is added.

    All weights are buffers: the optimizer of a larger model leaves them alone. A fresh correction adds nothing.

    Args:
        num_objects: size K of the vocabulary.
        condition_dim: length D of the condition.
        image_size: side of the pictures in pixels.
        light_inputs: numbers L that say how a scene is lit.
        slope_size: side in pixels of the square with slopes.

    Shape:
        condition: (N, D); no gradient flows back to it.
        light: (N, L), or None without light.
        place: (N, 2) in pixels (x, y), or None for models that do not know it.
        output: (N, 3, H, W), to be added to pictures in [-1, 1]; or None, on a CPU, where no turn is a first one.

    Source: matching the means of real and drawn pictures is the feature matching of Salimans et al. 2016,
    arXiv:1606.03498, section 3.1, with the pixels as features and solved at once.
    """

    conditions: Tensor
    offsets: Tensor
    slopes: Tensor | None
    places: Tensor
    reach: Tensor

    def __init__(
        self, num_objects: int, condition_dim: int, image_size: int, light_inputs: int = 0, slope_size: int = 0
    ) -> None:
        super().__init__()
        self.register_buffer("conditions", torch.zeros(num_objects, condition_dim))
        self.register_buffer("offsets", torch.zeros(num_objects, 3, image_size, image_size))
        slopes = torch.zeros(num_objects, 3 * light_inputs, slope_size, slope_size) if light_inputs else None
        self.register_buffer("slopes", slopes)  # of rank 4, or a module cannot be channels_last
        self.register_buffer("places", torch.zeros(num_objects, 2))
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
        if light is not None and self.slopes is not None:
            slopes = self.slopes[nearest].flatten(2)  # (N, 3 L, h w)
            slopes = slopes.unflatten(1, (light.shape[1], 3)).flatten(2)  # (N, L, 3 h w)
            answer = (light[:, None].to(slopes.dtype) @ slopes).view(-1, 3, *self.slopes.shape[2:])
            margin = (offset.shape[-1] - answer.shape[-1]) // 2
            offset = offset + F.pad(answer, (margin,) * 4)
        return share[:, None, None, None] * offset

    def clear_(self) -> None:
        """Add nothing any more."""
        self.offsets.zero_()
        self.reach.fill_(self.everywhere)
        if self.slopes is not None:
            self.slopes.zero_()

    def add_(self, coefficients: Tensor) -> None:
        """Add offsets and, after them, slopes: (K, 1 + L, 3, H, W), of which slopes beyond the square are left out."""
        self.offsets += coefficients[:, 0]
        if self.slopes is not None:
            size = self.slopes.shape[-1]
            inside = slice((self.offsets.shape[-1] - size) // 2, (self.offsets.shape[-1] + size) // 2)
            self.slopes += coefficients[:, 1:, :, inside, inside].flatten(1, 2)

    def put_(self, places: Tensor, reach: float) -> None:
        """Add only within ``reach`` pixels of the usual places (K, 2); NaN where an object's is not known."""
        known = places.isfinite().all(1)
        self.places[known] = places[known]
        self.reach[known] = reach

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, fresh in (("places", 0.0), ("reach", self.everywhere)):
            buffer = torch.full_like(self.get_buffer(name), fresh)
            state_dict.setdefault(f"{prefix}{name}", buffer)  # checkpoints of before the places were known
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        num_objects, condition_dim = self.conditions.shape
        return f"{num_objects}, {condition_dim}, image_size={self.offsets.shape[-1]}"
