"""The grain that a new object lays over the floor around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from condgan.functional import changed_region, window_corners

RINGS = 15
"""Rings around a place; the last has no end."""
RING_WIDTH = 2
"""Width of a ring in pixels."""


class TurnGrain(nn.Module):
    """Noise around a new object, of its colours and the stronger the nearer.

    A renderer finds the light that an object throws on the floor by chance, ray by ray, so around a yellow cube the
    floor has yellow grain: between three objects its variance is twice that of the empty scene. A generator whose
    turns copy what they do not draw on leaves the floor too smooth, which tells its pictures from real ones. So the
    grain is measured after training (:func:`condgan.calibration.measure_turn_grain`): white in space, with a covariance
    of the three colours for each object and each ring of 2 pixels around its place. It is added to what a turn left
    alone of its window.

    Turns on a canvas of the model's own need none: first objects stand at the same pixels in all scenes, their grain is
    always the same, and the canvas has it.

    All weights are buffers: the optimizer of a larger model leaves them alone. Fresh, it adds nothing.

    Args:
        num_objects: size K of the vocabulary.
        image_size: side of the pictures in pixels.
        window: side in pixels of the square around a place that a turn may change.

    Shape:
        drawn: (N, 3, H, W) in [-1, 1], what the turn made of the picture.
        before: likewise, the picture that it drew on.
        objects: (N, K) multi-hot, what the turn added.
        place: (N, 2) in pixels (x, y), where.
        noise: (N, 3, H, W), standard normal.
        output: (N, 3, H, W) in [-1, 1].

    Source: ours; the noise is that of path tracing, Kajiya 1986, "The rendering equation".
    """

    mix: Tensor

    def __init__(self, num_objects: int, image_size: int, window: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.window = window
        self.register_buffer("mix", torch.zeros(num_objects, RINGS, 3, 3))  # square roots of the covariances

    def forward(self, drawn: Tensor, before: Tensor, objects: Tensor, place: Tensor, noise: Tensor) -> Tensor:
        pixel = torch.arange(self.image_size, device=place.device)
        from_corner = pixel - window_corners(place, self.image_size, self.window)[:, :, None]  # (N, 2, size) (x, y)
        columns, rows = ((from_corner >= 0) & (from_corner < self.window)).unbind(1)
        left_alone = rows[:, :, None] & columns[:, None] & ~changed_region(before, drawn)
        mixes = torch.tensordot(objects.to(self.mix.dtype), self.mix, 1)  # (N, RINGS, 3, 3)
        number = torch.arange(len(place), device=place.device)[:, None, None]
        mix = mixes[number, rings(place, self.image_size)]  # (N, H, W, 3, 3)
        grain = (mix * noise.permute(0, 2, 3, 1)[..., None, :]).sum(-1).where(left_alone[..., None], 0)
        return (drawn + grain.permute(0, 3, 1, 2).to(drawn.dtype)).clamp(-1, 1)

    def extra_repr(self) -> str:
        return f"{len(self.mix)}, image_size={self.image_size}, window={self.window}"


def rings(place: Tensor, image_size: int) -> Tensor:
    """In which ring around its place (N, 2) each pixel is: (N, H, W) int64 from 0 to RINGS - 1."""
    x, y = (torch.arange(image_size, device=place.device) - place[:, :, None]).unbind(1)
    distance = torch.hypot(x[:, None], y[:, :, None])
    return (distance / RING_WIDTH).long().clamp(max=RINGS - 1)
