"""The empty scene that a first turn is drawn on.

In i-CLEVR the lights are moved a little from scene to scene and stay put within a scene. A generator that starts every
scene on one fixed canvas must invent the light together with the first object; here the light is drawn before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESIDUAL_THRESHOLD = 8 / 255
"""A pixel further than this from the light model belongs to an object or its shadow (4 grey levels, in [-1, 1])."""


class Canvas(nn.Module):
    """A linear model of empty scenes: mean + light @ components + grain.

    Probabilistic principal components: ``light`` is standard normal, ``grain`` is white noise with a standard
    deviation of its own at every pixel. Without components it is one fixed picture, and without grain. A fresh canvas
    is mid-gray.

    Args:
        image_size: side of the pictures in pixels.
        num_components: directions in which the light may vary.

    Shape:
        light: (N, num_components), standard normal.
        grain: (N, 3, H, W), standard normal.
        output: (N, 3, H, W) in [-1, 1].

    Source: Tipping and Bishop 1999, "Probabilistic principal component analysis".
    """

    mean: Tensor
    components: Tensor
    grain_std: Tensor

    def __init__(self, image_size: int = 64, num_components: int = 0) -> None:
        super().__init__()
        shape = (3, image_size, image_size)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("components", torch.zeros(num_components, *shape))
        self.register_buffer("grain_std", torch.zeros(shape))

    def forward(self, light: Tensor, grain: Tensor) -> Tensor:
        lit = self.mean + torch.einsum("nk,kchw->nchw", light, self.components)
        return (lit + grain * self.grain_std).clamp(-1, 1)

    def extra_repr(self) -> str:
        return f"image_size={self.mean.shape[-1]}, num_components={len(self.components)}"

    def estimate_light(self, images: Tensor, iterations: int = 4) -> tuple[Tensor, Tensor]:
        """Find the light of pictures with objects in them, by least squares on the pixels that it explains.

        Args:
            images: (N, 3, H, W) in [-1, 1].
            iterations: rounds of fitting the light and setting aside what it does not explain.

        Returns:
            The empty scene (N, 3, H, W) in that light, without grain; and (N, 1, H, W) bool, True at objects and
            shadows.
        """
        basis = self.components.flatten(1)  # (K, P)
        centred = (images - self.mean).flatten(1)  # (N, P)
        lit = self.mean.expand_as(images)
        occupied = _central_box(images.shape[-1]).to(images.device).expand(len(images), 1, -1, -1)
        for _ in range(iterations):
            weight = (~occupied).expand_as(images).flatten(1).float()
            normal = torch.einsum("kp,np,lp->nkl", basis, weight, basis)
            normal = normal + 1e-4 * torch.eye(len(basis), device=images.device)
            light = torch.linalg.solve(normal, (weight * centred) @ basis.T)
            lit = self.mean + (light @ basis).view_as(images)
            strange = ((images - lit).abs().amax(1, keepdim=True) > RESIDUAL_THRESHOLD).float()
            alone = F.avg_pool2d(strange, 3, 1, 1) < 0.3  # specks of grain are not objects
            occupied = F.max_pool2d(strange.masked_fill(alone, 0), 3, 1, 1) > 0
        return lit, occupied

    def remove_objects(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] with objects and shadows replaced by the estimated empty floor."""
        return torch.cat([torch.where(occupied, lit, chunk) for chunk, lit, occupied in self._estimates(images)])

    @torch.no_grad()
    def fit(self, first_images: Tensor, iterations: int = 5) -> None:
        """Learn the canvas from pictures with one object at the centre each: a data set's first turns.

        Alternates between principal components of the empty scenes and the empty scenes in the light of these
        components; what no scene shows, under every object, is interpolated from around it.

        Args:
            first_images: (S, 3, H, W) in [-1, 1], more than ``num_components`` of them.
            iterations: rounds of the alternation.

        Raises:
            ValueError: there are too few pictures.
        """
        count = len(self.components)
        if len(first_images) <= count:
            raise ValueError(f"first_images must hold more than {count} pictures, got {len(first_images)}")
        empty = _interpolate_box(first_images)
        rng = torch.Generator().manual_seed(0)
        basis = torch.randn(empty[0].numel(), count, generator=rng).to(empty.device)
        for _ in range(iterations):
            self.mean.copy_(empty.mean(0))
            if count:
                centred = (empty - self.mean).flatten(1)  # (S, P)
                for _ in range(4):  # subspace iteration
                    basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
                scores = centred @ basis
                _, values, rotation = torch.linalg.svd(scores, full_matrices=False)
                directions = rotation @ basis.T * (values / len(empty) ** 0.5)[:, None]
                self.components.copy_(directions.view_as(self.components))
            empty = self.remove_objects(first_images)
        if not count:  # one fixed picture: what varies is light that this canvas does not know, not grain
            self.grain_std.zero_()
            return
        squares = torch.zeros_like(self.mean)
        visible = torch.zeros_like(self.mean[:1])
        for images, lit, occupied in self._estimates(first_images):
            squares += (images - lit).square().masked_fill(occupied, 0).sum(0)
            visible += (~occupied).sum(0)
        typical = (squares.sum() / visible.sum() / 3).sqrt()
        self.grain_std.copy_(torch.where(visible > 30, (squares / visible.clamp(min=1)).sqrt(), typical))

    def _estimates(self, images: Tensor, batch_size: int = 128) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(chunk, *self.estimate_light(chunk)) for chunk in images.split(batch_size)]


def _central_box(size: int) -> Tensor:
    """(H, W) bool: where the first object and its shadow stand."""
    box = torch.zeros(size, size, dtype=torch.bool)
    box[size // 4 : size * 3 // 4, size // 4 : size * 3 // 4] = True
    return box


def _interpolate_box(images: Tensor) -> Tensor:
    """Replace the central box by a Coons patch of its surroundings, each side smoothed over 3 pixels."""
    images = images.clone()
    size = images.shape[-1]
    low, high = size // 4, size * 3 // 4
    smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    left, right = smooth[:, :, low:high, low - 1, None], smooth[:, :, low:high, high, None]
    top, bottom = smooth[:, :, low - 1, None, low:high], smooth[:, :, high, None, low:high]
    s = torch.linspace(0, 1, high - low, device=images.device)
    t = s[:, None]
    corners = (1 - t) * ((1 - s) * top[..., :1] + s * top[..., -1:]) + t * (
        (1 - s) * bottom[..., :1] + s * bottom[..., -1:]
    )
    images[:, :, low:high, low:high] = (1 - s) * left + s * right + (1 - t) * top + t * bottom - corners
    return images
