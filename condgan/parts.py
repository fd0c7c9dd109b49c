"""Parts of the networks beside their blocks: what they look at, what they read, what is left to chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgan.configs import DiscriminatorConfig, GeneratorConfig, NoiseEncoderConfig
from condgan.flow import ConditionalFlow
from condgan.functional import crop, local_mean, place_map, window_corners
from condgan.precision import widest_float

MAX_WIDTH_FACTOR = 16
"""No feature map is wider than this many times ``width``."""
LEAST_LIKELY = 3e-3
"""A cell that is less likely than the likeliest one times this is never drawn."""
LEAST_SCALE = 0.001
"""Of a point's distribution in a cell, whose side is 1."""
FRESH_PEAKS = (-1.0, 0.0, 1.0)
"""Where the peaks of a cell are in a fresh place model, before the sigmoid: apart, or they would all learn the same."""


def widths_of(count: int, width: int) -> list[int]:
    """``count`` channel numbers: width, 2 width, 4 width, ... up to the widest allowed."""
    return [width * min(2**i, MAX_WIDTH_FACTOR) for i in range(count)]


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """Raise ValueError unless the argument of this name has this shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


def check_place(places: bool, place: Tensor | None, n: int) -> None:
    """Raise ValueError unless a model that knows ``places``, or does not, is given such for N pictures."""
    if places and (place is None or place.shape != (n, 2)):
        raise ValueError(f"place must be ({n}, 2) pixels (x, y), got {None if place is None else tuple(place.shape)}")
    if not places and place is not None:
        raise ValueError("place was given, but this model does not know places (its config has places=False)")


def coarsest(size: int) -> int:
    """What is left of a side of ``size`` pixels after halving it to 7 or less, if it can be: 4 of 64, 5 of 40."""
    while size > 7 and size % 2 == 0:
        size //= 2
    return size


class View(NamedTuple):
    """The part of N pictures that a turn is about: all of each, or a window around its place."""

    images: list[Tensor]
    """(N, 3, h, w) each."""
    details: list[Tensor]
    """In a window what is fine in each picture, (N, 3, h, w): ten times its distance to its 3x3 mean. Grain is less
    than a grey level and would drown beside the objects. Empty where the view is the whole picture."""
    maps: list[Tensor]
    """The place as a blob, (N, 1, h, w), for models that know places; in a window also the coordinates in the whole
    picture from -1 to 1, (N, 2, h, w) (Liu et al. 2018, arXiv:1807.03247)."""
    corners: Tensor | None
    """(N, 2) upper left pixels of the windows, None where the view is the whole picture."""

    @staticmethod
    def channels(config: GeneratorConfig | DiscriminatorConfig | NoiseEncoderConfig) -> tuple[int, int]:
        """Channels of a picture's detail, and of all maps."""
        return 0 if config.window is None else 3, 0 if not config.places else 1 if config.window is None else 3


def look(images: Sequence[Tensor], place: Tensor | None, window: int | None) -> View:
    """What a turn sees of its pictures, (N, 3, H, W) each, at its places (N, 2)."""
    if place is None:
        return View([*images], [], [], None)
    size = images[0].shape[-1]
    if window is None:
        return View([*images], [], [place_map(place, size)], None)
    corners = window_corners(place, size, window)
    inside = corners[:, :, None] + torch.arange(window, device=place.device)  # (N, 2, window) pixels (x, y)
    x, y = (inside.to(place.dtype) * (2 / (size - 1)) - 1).unbind(1)
    coordinates = torch.stack((x[:, None, :].expand(-1, window, -1), y[:, :, None].expand(-1, -1, window)), 1)
    crops = [crop(image, corners, window) for image in images]
    details = [10 * (image - local_mean(image, 3)) for image in crops]
    return View(crops, details, [place_map(place - corners, window), coordinates], corners)


class ConditionRNN(nn.Module):
    """Reads the condition sequence one turn at a time.

    Embedding of the turn's objects (their sum, so their order does not matter), GRU cell, layer norm on the output.

    Args:
        num_objects: size K of the vocabulary.
        condition_dim: length D of state and output.
        spelling: (K, W) of 0 and 1, which of W words each object's name has (:meth:`condgan.Vocabulary.spelling`); then
            an object's embedding is the sum of those of its words. None: each object has one of its own.

    Shape:
        objects: (N, K) multi-hot.
        hidden: (N, D), or None at the start.
        output: condition (N, D) and the next hidden (N, D).

    Raises:
        ValueError: ``objects`` or ``hidden`` does not have the shape above.

    Example:
        >>> condition, hidden = ConditionRNN(24, 256)(torch.eye(24)[:2])
        >>> condition.shape, hidden.shape
        (torch.Size([2, 256]), torch.Size([2, 256]))
    """

    spelling: Tensor | None

    def __init__(self, num_objects: int, condition_dim: int, spelling: Tensor | None = None) -> None:
        super().__init__()
        self.num_objects = num_objects
        self.embedding = nn.Embedding(num_objects if spelling is None else spelling.shape[1], condition_dim)
        self.register_buffer("spelling", None if spelling is None else spelling.to(self.embedding.weight.dtype))
        self.gru = nn.GRUCell(condition_dim, condition_dim)
        self.norm = nn.LayerNorm(condition_dim)

    def forward(self, objects: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if objects.ndim != 2 or objects.shape[1] != self.num_objects:
            raise ValueError(f"objects must be (N, {self.num_objects}), got {tuple(objects.shape)}")
        if hidden is not None:
            check_shape("hidden", hidden, objects.shape[0], self.gru.hidden_size)
        objects = objects.to(self.embedding.weight.dtype)
        known = objects if self.spelling is None else objects @ self.spelling
        hidden = self.gru(known @ self.embedding.weight, hidden)
        return self.norm(hidden), hidden

    if TYPE_CHECKING:
        __call__ = forward


class PreviousImageEncoder(nn.Module):
    """Features of the picture so far: 4x4 convolutions of stride 2, each with batch norm and ReLU.

    Shape:
        image: (N, in_channels, H, W).
        output: list of feature maps, one for each entry of ``channels``, each at half the resolution of the one before.
    """

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        sizes = [in_channels, *channels]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1, bias=False) for i, o in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            image = F.relu(norm(conv(image)))
            features.append(image)
        return features


class Points(NamedTuple):
    """How the point in a cell is distributed: a mixture of M peaks, in each x and y are logistic and end at 0 and 1.

    Of one cell of each of N pictures, (N, M), or of all their cells, (N, M, h, w).
    """

    share: Tensor
    """(N, M, ...): the logarithm of each peak's share."""
    peak: Tensor
    """(N, M, 2, ...): where it is, (x, y)."""
    scale: Tensor
    """(N, M, 2, ...): how wide it is."""

    @classmethod
    def of(cls, in_cell: Tensor) -> Points:
        """What the network says of cells, (N, 5 M, ...)."""
        share, peak, scale = in_cell.unflatten(1, (len(FRESH_PEAKS), 5)).split((1, 2, 2), 2)
        return cls(share[:, :, 0].log_softmax(1), peak.sigmoid(), F.softplus(scale) + LEAST_SCALE)

    def log_prob(self, point: Tensor) -> Tensor:
        """Log-density (N,) in nats of points (N, 2), of N cells."""
        steps = (point[:, None] - self.peak) / self.scale
        low, high = _edges(self.peak, self.scale)
        density = F.logsigmoid(steps) + F.logsigmoid(-steps) - (self.scale * (high - low)).log()  # (N, M, 2)
        return (self.share + density.sum(2)).logsumexp(1)

    def draw(self, which: Tensor, uniform: Tensor) -> Tensor:
        """Points (N, 2) of N cells; random numbers ``which`` (N, 1) choose the peaks, ``uniform`` (N, 2) x and y."""
        chosen = (which >= self.share.exp().cumsum(1)[:, :-1]).sum(1)
        row = torch.arange(chosen.shape[0], device=chosen.device)
        peak, scale = self.peak[row, chosen], self.scale[row, chosen]
        # The inverse of the distribution function.
        steps = torch.lerp(*_edges(peak, scale), uniform.to(peak.dtype)).logit()
        return torch.addcmul(peak, scale, steps).clamp(0, 1)


def _edges(peak: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of logistic distributions that peak between 0 and 1, the distribution functions there."""
    return (-peak / scale).sigmoid(), ((1 - peak) / scale).sigmoid()


class PlaceModel(nn.Module):
    """Where a new object may stand: a mixture over cells of 2x2 pixels, given the picture and the condition.

    Every cell has a probability, and x and y in the cell have a mixture of logistic distributions that end at its
    edges, from all but uniform ones (a fresh model) to narrow peaks: in i-CLEVR a first object's place is known to a
    tenth of a pixel, a later one's hardly at all.

    Cells that are hardly ever drawn are never drawn (Nguyen et al. 2025, "Min-p sampling", arXiv:2407.01082).

    Shape:
        image: (N, 3, H, W) in [-1, 1].
        condition: (N, D).
        uniform: (N, 3) in [0, 1): random numbers, one for the cell and the peak in it, two for the point around that.
        light: (N, light_inputs), how the picture is lit; None is the mean of all scenes.
        output: (N, 2) drawn places in pixels (x, y).

    Raises:
        ValueError: ``uniform`` is not (N, 3).

    Source: mixture density networks, Bishop 1994; mixtures of logistic distributions as in Salimans et al. 2017
    (PixelCNN++), arXiv:1701.05517, here continuous and cut off.
    """

    cell = 2
    """Side of a cell in pixels."""

    def __init__(self, image_size: int, condition_dim: int, light_inputs: int = 0, channels: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 4, 2, 1)
        self.conv2 = nn.Conv2d(channels, channels, 4, 2, 1)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=2, dilation=2)
        self.condition = nn.Linear(condition_dim, channels)
        self.light = nn.Linear(light_inputs, channels, bias=False) if light_inputs else None
        self.conv4 = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.conv5 = nn.Conv2d(channels, 1, 1)
        self.in_cell = nn.Conv2d(channels, 5 * len(FRESH_PEAKS), 1)
        nn.init.zeros_(self.in_cell.weight)
        fresh = torch.tensor([[0.0, peak, peak, 0.0, 0.0] for peak in FRESH_PEAKS])
        self.in_cell.bias = nn.Parameter(fresh.flatten())
        self.prior = nn.Parameter(torch.zeros(image_size // self.cell, image_size // self.cell))

    def forward(self, image: Tensor, condition: Tensor, uniform: Tensor, light: Tensor | None = None) -> Tensor:
        size = self.cell * len(self.prior)
        check_shape("image", image, image.shape[0], 3, size, size)
        check_shape("condition", condition, image.shape[0], self.condition.in_features)
        check_shape("uniform", uniform, image.shape[0], 3)
        x = self._read(image, condition, light)
        logits = self._logits(x)
        probability = _without_tail(logits.flatten(1).to(widest_float(logits.device))).softmax(1)
        total = probability.cumsum(1)
        drawn = uniform[:, :1].to(total) * total[:, -1:]
        cell = torch.searchsorted(total, drawn, right=True).clamp(max=total.shape[1] - 1)
        corner = torch.cat((cell % logits.shape[-1], cell // logits.shape[-1]), 1)
        # How far into the cell's probability the number fell is as good as a number of its own.
        further = 1 - (total.gather(1, cell) - drawn) / probability.gather(1, cell)
        point = self._points(x, cell[:, 0]).draw(further, uniform[:, 1:])
        return ((corner + point) * self.cell).clamp(max=image.shape[-1] - 1)

    def distribution(self, image: Tensor, condition: Tensor, light: Tensor | None = None) -> tuple[Tensor, Points]:
        """What places are drawn from: logits (N, H / 2, W / 2), one softmax over all cells, and the points in each."""
        x = self._read(image, condition, light)
        return self._logits(x), Points.of(self.in_cell(x))

    def _read(self, image: Tensor, condition: Tensor, light: Tensor | None) -> Tensor:
        """Features (N, channels, H / 2, W / 2) of every cell."""
        fine = F.relu(self.conv1(image))  # (N, channels, H/2, W/2)
        coarse = F.relu(self.conv2(fine))  # (N, channels, H/4, W/4)
        coarse = coarse + F.relu(self.conv3(coarse) + self.condition(condition)[:, :, None, None])
        x = self.conv4(torch.cat((fine, F.interpolate(coarse, scale_factor=2, mode="nearest")), 1))
        if self.light is not None and light is not None:
            x = x + self.light(light.to(x.dtype))[:, :, None, None]
        return F.relu(x)

    def _logits(self, x: Tensor) -> Tensor:
        return self.conv5(x)[:, 0] + self.prior

    def loss(self, image: Tensor, condition: Tensor, place: Tensor, light: Tensor | None = None) -> Tensor:
        """Negative log-likelihood (N,) in nats of true places (N, 2), in pixels, against uniform ones in a cell."""
        check_shape("place", place, image.shape[0], 2)
        x = self._read(image, condition, light)
        logits = self._logits(x)
        corner = (place / self.cell).long().clamp(0, logits.shape[-1] - 1)  # (N, 2)
        cell = corner[:, 1] * logits.shape[-1] + corner[:, 0]
        density = self._points(x, cell).log_prob(place / self.cell - corner)
        return F.cross_entropy(logits.flatten(1), cell, reduction="none") - density

    def _points(self, x: Tensor, cell: Tensor) -> Points:
        """In one cell of each picture, given features (N, channels, H / 2, W / 2) and numbers of cells (N,)."""
        features = x.flatten(2)[torch.arange(cell.shape[0], device=cell.device), :, cell]
        in_cell = F.linear(features, self.in_cell.weight.flatten(1), self.in_cell.bias)
        return Points.of(in_cell.to(torch.promote_types(in_cell.dtype, torch.float32)))


def _without_tail(logits: Tensor) -> Tensor:
    """Logits (N, P) without what is far less likely than the likeliest: all of it together would be drawn at times."""
    return logits.masked_fill(logits < logits.amax(1, keepdim=True) + math.log(LEAST_LIKELY), -math.inf)


class NoiseMapping(nn.Module):
    """Maps noise to a code that suits the object and its place: a cube's code says how it is turned, for example.

    Real turns use a small part of all codes, another one for every object and place, and a generator is good only
    there. The mapping learns the distribution of the codes that a :class:`NoiseEncoder` finds in real turns.

    Shape:
        z: (N, z_dim), standard normal.
        condition: (N, D).
        place: (N, 2) pixels (x, y), for models that know places; else None.
        light: (N, light_inputs), for models that know the light; else None.
        output: code (N, z_dim), about of mean 0 and variance 1 over all turns.

    Source: the mapping network of Karras et al. 2019 (StyleGAN), arXiv:1812.04948, here a normalizing flow
    (:class:`condgan.flow.ConditionalFlow`), so that it can be fitted to codes that were found.
    """

    context_dim = 32
    """What is left of the condition: mostly which object it is."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.scale = 2 / (config.image_size - 1)
        self.context = nn.Linear(config.condition_dim, self.context_dim)
        self.flow = ConditionalFlow(config.z_dim, self.context_dim + 2 * config.places + config.light_inputs)

    def forward(self, z: Tensor, condition: Tensor, place: Tensor | None = None, light: Tensor | None = None) -> Tensor:
        return self.flow(z, self._read(condition, place, light))

    def loss(self, code: Tensor, condition: Tensor, place: Tensor | None = None, light: Tensor | None = None) -> Tensor:
        """Negative log-likelihood (N,) in nats of codes (N, z_dim)."""
        return -self.flow.log_prob(code, self._read(condition, place, light))

    def _read(self, condition: Tensor, place: Tensor | None, light: Tensor | None) -> Tensor:
        context = [self.context(condition)]
        if place is not None:
            context.append(place * self.scale - 1)
        if light is not None:
            context.append(light)
        return torch.cat([x.to(context[0].dtype) for x in context], 1)
