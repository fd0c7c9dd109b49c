"""The empty scene that a first turn is drawn on.

In i-CLEVR the lights are moved a little from scene to scene and stay put within a scene. A generator that starts every
scene on one fixed canvas must invent the light together with the first object; here the light is drawn before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgan.flow import ContinuousFlow
from condgan.functional import local_mean, symmetric_root

RESIDUAL_THRESHOLD = 8 / 255
"""A pixel further than this from the light model belongs to an object or its shadow (4 grey levels, in [-1, 1])."""
ASSUMED_NOISE = 1e-5
"""Variance of grain and rounding that the light is estimated with: 0.16 grey levels squared, in [-1, 1]."""
RIM = 3
"""Pixels around an object or a shadow that count as occupied too: their faint edges are below the threshold."""
SHADOW_THRESHOLD = 50 / 255
"""A pixel further than this from the light model belongs to an object, not to a soft shadow (25 grey levels)."""
EDGE_DEVIATIONS = 4
"""Detail in a shadow that is more standard deviations of grain and rounding from smooth than this is an edge."""
SMOOTH = 5
"""Side in pixels of the squares whose mean has no grain."""
SOMETIMES_HIDDEN = 0.05, 0.98
"""Shares of the pictures in which an object or a shadow hides a pixel, between which its components are smooth:
otherwise they would learn where the faint edges of shadows end."""
ROUNDING_VARIANCE = (2 / 255) ** 2 / 12
"""Variance that rounding to 8 bits adds to every value."""
TINT_RIDGE = 5
"""Of so many pictures of an object half of what they have in common is taken for its tint, of many nearly all."""


class LightEstimate(NamedTuple):
    """What light N pictures with objects in them were taken in."""

    lit: Tensor
    """(N, 3, H, W): the empty scene in that light, without grain."""
    occupied: Tensor
    """(N, 1, H, W) bool: True at objects and shadows."""
    scores: Tensor
    """(N, K): how much of each component the light has."""


class Canvas(nn.Module):
    """A model of empty scenes: mean + flow(light) @ components + grain.

    The components are principal ones. How much of each there is depends on the others, since lamps and camera have
    few ways to move, so a flow makes it from independent numbers. Grain is normal noise, white in space,
    with a covariance of the three colours at every pixel. It is what a picture has before rounding to 8 bits, so a
    drawn canvas has to be rounded, once, as a real one was. Without components it is one fixed picture, and without
    grain. A fresh canvas is mid-gray.

    Args:
        image_size: side of the pictures in pixels.
        num_components: directions in which the light may vary, K.

    Shape:
        light: (N, K), standard normal.
        grain: (N, 3, H, W), standard normal.
        output: (N, 3, H, W) in [-1, 1].

    Source: Tipping and Bishop 1999, "Probabilistic principal component analysis"; the flow is
    :class:`condgan.flow.ContinuousFlow`.
    """

    mean: Tensor
    components: Tensor
    grain_mix: Tensor

    def __init__(self, image_size: int = 64, num_components: int = 0) -> None:
        super().__init__()
        shape = (3, image_size, image_size)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("components", torch.zeros(num_components, *shape))
        self.register_buffer("grain_mix", torch.zeros(3, *shape))  # (3, 3, H, W): square root of the covariance
        self.flow = ContinuousFlow(num_components) if num_components else None

    def forward(self, light: Tensor, grain: Tensor) -> Tensor:
        return self.in_light(light if self.flow is None else self.flow(light), grain)

    def in_light(self, scores: Tensor, grain: Tensor) -> Tensor:
        """Empty scenes (N, 3, H, W) with so much of each component, (N, K), such as :meth:`estimate_light` finds."""
        lit = self.mean
        if self.flow is not None:
            lit = lit + torch.einsum("nk,kchw->nchw", scores, self.components)
        return (lit + self._coloured(grain)).clamp(-1, 1)

    def extra_repr(self) -> str:
        return f"image_size={self.mean.shape[-1]}, num_components={len(self.components)}"

    def estimate_light(self, images: Tensor, iterations: int = 4) -> LightEstimate:
        """Find the light of pictures with objects in them, by least squares on the pixels that it explains.

        Args:
            images: (N, 3, H, W) in [-1, 1].
            iterations: rounds of fitting the light and setting aside what it does not explain.
        """
        count, n = len(self.components), len(images)
        images, mean, basis = images.float(), self.mean.float(), self.components.float().flatten(2)  # (K, 3, P)
        products = torch.einsum("kcp,lcp->pkl", basis, basis).flatten(1)  # (P, K * K)
        centred = (images - mean).flatten(2)  # (N, 3, P)
        occupied = _central_box(images.shape[-1]).to(images.device).expand(n, 1, -1, -1)
        for _ in range(iterations):
            weight = (~occupied).flatten(2).float()  # (N, 1, P)
            normal = (weight[:, 0] @ products).view(n, count, count)
            normal = normal + ASSUMED_NOISE * torch.eye(count).to(basis)
            scores = torch.linalg.solve(normal, (weight * centred).flatten(1) @ basis.flatten(1).T)
            lit = mean + (scores @ basis.flatten(1)).view_as(images)
            strange = ((images - lit).abs().amax(1, keepdim=True) > RESIDUAL_THRESHOLD).float()
            alone = F.avg_pool2d(strange, 3, 1, 1) < 0.3  # specks of grain are not objects
            occupied = F.max_pool2d(strange.masked_fill(alone, 0), 2 * RIM + 1, 1, RIM) > 0
        return LightEstimate(lit, occupied, scores)

    def remove_objects(self, images: Tensor) -> Tensor:
        """The scenes without what stands in them: the empty floor in a picture's own light, with grain.

        What is not occupied stays as it is. Soft shadows are lifted off their grain: a floor keeps its grain when a
        shadow falls on it, so a picture and its empty scene must share it. Under objects and at the edges of shadows
        the grain comes from one fixed random source, in the order of the pictures.

        Args:
            images: (N, 3, H, W) in [-1, 1].
        """
        rng = torch.Generator().manual_seed(0)
        grain_std = (self.grain_mix.square().sum(1) + ROUNDING_VARIANCE).sqrt()  # (3, H, W)
        empty = []
        for chunk, estimate in self._estimates(images):
            rest = chunk - estimate.lit
            detail = rest - local_mean(rest, SMOOTH)
            edge = (rest.abs() > SHADOW_THRESHOLD) | (detail.abs() > EDGE_DEVIATIONS * grain_std)
            near_edge = F.max_pool2d(edge.any(1, keepdim=True).float(), SMOOTH, 1, SMOOTH // 2) > 0
            noise = torch.randn(chunk.shape, generator=rng, dtype=torch.float32).to(chunk.device)
            drawn = self._coloured(noise)
            floor = (estimate.lit + torch.where(near_edge, drawn, detail)).clamp(-1, 1)
            empty.append(torch.where(estimate.occupied, floor, chunk))
        return torch.cat(empty)

    @torch.no_grad()
    def fit(self, first_images: Tensor, objects: Tensor, iterations: int = 3, *, progress: bool = False) -> None:
        """Learn the canvas from pictures with one object at the centre each: a data set's first turns.

        Alternates between principal components of the empty scenes and the empty scenes in the light of these
        components; what no scene shows, under every object, is interpolated from around it, and where objects and
        shadows end the components are smooth (:meth:`smooth_hidden`). Then the grain and the distribution of the light
        (:meth:`fit_flow`) are learned from what was found.

        Args:
            first_images: (S, 3, H, W) in [-1, 1], of 8 bits, more than ``num_components`` of them.
            objects: (S,) ids of the objects in them.
            iterations: rounds of the alternation.
            progress: show a progress bar of the last part on stderr.

        Raises:
            ValueError: there are too few pictures, or no floor is found in them.
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
                basis = self._fit_components(empty, basis)
            estimates = self.smooth_hidden(first_images) if count else self._estimates(first_images)
            empty = torch.cat([chunk.where(~found.occupied, found.lit) for chunk, found in estimates])
        self.grain_mix.zero_()
        if self.flow is None:  # one fixed picture: what varies is light that this canvas does not know, not grain
            return
        self._fit_grain(estimates)
        self.fit_flow(first_images, objects, progress=progress)

    @torch.no_grad()
    def fit_flow(self, first_images: Tensor, objects: Tensor, *, progress: bool = False) -> None:
        """Learn how the light is distributed; the last part of :meth:`fit`. Needs components.

        Args:
            first_images: (S, 3, H, W) in [-1, 1], a data set's first turns.
            objects: (S,) ids of the objects in them.
            progress: show a progress bar on stderr.
        """
        assert self.flow is not None
        scores = self.scene_light(first_images, objects)
        centre, spread = scores.mean(0), scores.std(0, correction=0).clamp(min=1e-6)
        self.mean += torch.einsum("k,kchw->chw", centre, self.components)
        self.components *= spread[:, None, None, None]
        self.flow.fit((scores - centre) / spread, progress=progress)

    @torch.no_grad()
    def scene_light(self, first_images: Tensor, objects: Tensor) -> Tensor:
        """How much of each component the light of scenes has, without the tints of the objects in them.

        An object throws light of its colour on the floor around it, which :meth:`estimate_light` cannot tell from
        other light. What the pictures of an object have in common, and all pictures have not, is its tint.

        Args:
            first_images: (S, 3, H, W) in [-1, 1], with one object each.
            objects: (S,) ids of these.

        Returns:
            (S, K).

        Source: means of groups, shrunk as in ridge regression, Hoerl and Kennard 1970.
        """
        scores = torch.cat([found.scores for _, found in self._estimates(first_images)])
        kinds = F.one_hot(objects.to(scores.device)).to(scores)
        tints = kinds.T @ (scores - scores.mean(0)) / (kinds.sum(0) + TINT_RIDGE)[:, None]
        return scores - kinds @ tints

    @torch.no_grad()
    def smooth_hidden(self, first_images: Tensor) -> list[tuple[Tensor, LightEstimate]]:
        """Make the components smooth where objects sometimes hide the floor (:data:`SOMETIMES_HIDDEN`).

        There they mix floor that is seen with floor that was made up, and change from pixel to pixel as no light does.

        Args:
            first_images: (S, 3, H, W) in [-1, 1], a data set's first turns.

        Returns:
            The light of these pictures with the components as they now are, a batch at a time.
        """
        hidden = torch.cat([found.occupied for _, found in self._estimates(first_images)]).float().mean(0)  # (1, H, W)
        rarely, mostly = SOMETIMES_HIDDEN
        rim = (hidden > rarely) & (hidden < mostly)
        self.components.copy_(local_mean(self.components, SMOOTH).where(rim, self.components))
        return self._estimates(first_images)

    def _fit_components(self, empty: Tensor, basis: Tensor) -> Tensor:
        """Principal components of pictures around the mean, by subspace iteration from ``basis`` (P, K) to a new."""
        centred = (empty - self.mean).flatten(1)  # (S, P)
        for _ in range(4):
            basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
        _, values, rotation = torch.linalg.svd(centred @ basis, full_matrices=False)
        directions = rotation @ basis.T * (values / len(empty) ** 0.5)[:, None]
        self.components.copy_(directions.view_as(self.components))
        return basis

    def _fit_grain(self, estimates: list[tuple[Tensor, LightEstimate]]) -> None:
        """Learn what the light leaves: its mean at every pixel, and the covariance of its colours.

        A pixel that is seen in less than half of the pictures takes the mean covariance of the others.

        Raises:
            ValueError: no picture shows any floor.
        """
        sums = torch.zeros_like(self.mean)
        products = torch.zeros_like(self.grain_mix)
        visible = torch.zeros_like(self.mean[0])
        for images, found in estimates:
            rest = (images - found.lit).masked_fill(found.occupied, 0)
            sums += rest.sum(0)
            products += torch.einsum("nchw,ndhw->cdhw", rest, rest)
            visible += (~found.occupied).sum((0, 1))
        if not visible.any():
            raise ValueError(
                "first_images: no empty floor is found, since the pictures differ everywhere by more than light can "
                "explain (grain, texture or other backgrounds); to start from one fixed picture, set these fields of "
                "the run's config: `--set generator.light_components=0 --set generator.light_inputs=0 --set "
                "discriminator.light_inputs=0`"
            )
        scenes = sum(len(images) for images, _ in estimates)
        often = visible > max(30, scenes / 2)  # elsewhere faint shadows are left too
        seen = visible > max(30, scenes / 50)
        self.mean += torch.where(seen, sums / visible.clamp(min=1), 0)
        self._fill_pattern(seen)
        known = often if often.any() else visible > 0
        typical = products[:, :, known].sum(2) / visible[known].sum()
        covariance = torch.where(often, products / visible.clamp(min=1), typical[:, :, None, None])
        covariance = covariance.permute(2, 3, 0, 1) - ROUNDING_VARIANCE * torch.eye(3).to(covariance)
        self.grain_mix.copy_(symmetric_root(covariance).permute(2, 3, 0, 1))

    def _fill_pattern(self, seen: Tensor) -> None:
        """Give the floor that no picture shows a pattern like the one around it.

        Most of the grain is the same in every scene and so a part of the mean, which is smooth where objects stand.

        Args:
            seen: (H, W) bool, pixels whose pattern is known.
        """
        smooth = local_mean(self.mean[None], SMOOTH)[0]
        hidden = (~seen)[None].float()
        reach = SMOOTH // 2
        around = F.max_pool2d(hidden, 6 * reach + 1, 1, 3 * reach) - F.max_pool2d(hidden, SMOOTH, 1, reach) > 0
        known = (self.mean - smooth)[:, around[0]]  # (3, P)
        if known.shape[1] < 3:
            return
        covariance = known @ known.T / known.shape[1] * (SMOOTH**2 / (SMOOTH**2 - 1))
        noise = torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(0)).to(self.mean.device)
        pattern = torch.einsum("cd,dhw->chw", symmetric_root(covariance), noise)
        self.mean.copy_(torch.where(seen, self.mean, smooth + pattern))

    def _coloured(self, grain: Tensor) -> Tensor:
        return (self.grain_mix * grain[:, None]).sum(2)  # over the second colour; faster than an einsum

    def _estimates(self, images: Tensor, batch_size: int = 128) -> list[tuple[Tensor, LightEstimate]]:
        return [(chunk, self.estimate_light(chunk)) for chunk in images.split(batch_size)]


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
    smooth = local_mean(images, 3)
    left, right = smooth[:, :, low:high, low - 1, None], smooth[:, :, low:high, high, None]
    top, bottom = smooth[:, :, low - 1, None, low:high], smooth[:, :, high, None, low:high]
    s = torch.linspace(0, 1, high - low).to(images)
    t = s[:, None]
    corners = (1 - t) * ((1 - s) * top[..., :1] + s * top[..., -1:]) + t * (
        (1 - s) * bottom[..., :1] + s * bottom[..., -1:]
    )
    images[:, :, low:high, low:high] = (1 - s) * left + s * right + (1 - t) * top + t * bottom - corners
    return images
