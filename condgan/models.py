"""The networks: condition RNN, iterative generator, difference discriminator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from condgan import drawing
from condgan import images as pictures
from condgan.canvas import Canvas
from condgan.correction import FirstTurnCorrection
from condgan.drawing import Redraw
from condgan.flow import ConditionalFlow
from condgan.functional import crop, local_mean, paste, place_map, window_corners
from condgan.hub import PretrainedModel, added_later
from condgan.layers import NEGATIVE_SLOPE, ConditionProjector, DisBlock, GenBlock, normalised
from condgan.light import SceneLight
from condgan.requests import Place
from condgan.results import Drawing, Turn
from condgan.vocab import ICLEVR_OBJECTS, Vocabulary

IMAGE_SIZES = (32, 64, 128)
NOISE_ENCODER_SLOPE = 0.1
MAX_WIDTH_FACTOR = 16
"""No feature map is wider than this many times ``width``."""


@dataclass(frozen=True)
class GeneratorConfig:
    """Architecture of an :class:`IterativeGenerator`; the defaults are the reference's."""

    image_size: int = 64
    """Side of the pictures in pixels: 32, 64 or 128."""
    width: int = 64
    """Channels of the last block's output; at 64 pixels the first block's input has 16 times as many."""
    z_dim: int = 100
    """Length of the noise of one turn."""
    condition_dim: int = 256
    """Length of the RNN's state and of its output."""
    objects: tuple[str, ...] = ICLEVR_OBJECTS
    """The vocabulary: names in the order of their ids."""
    num_turns: int = 3
    """Turns a scene had in training; more are drawn with a warning."""
    output: Literal["tanh", "blend"] = "tanh"
    """``tanh``: the whole picture is drawn; ``blend``: it is mixed with the previous picture by a predicted mask,
    and every resolution sees the previous picture's features."""
    places: bool = False
    """Whether the place of the new object is an input; if so, a model of free places is part of the generator."""
    window: int | None = None
    """Side in pixels of the square around the place that a turn may change, a multiple of 8, for models with
    ``places``; None is the whole picture."""
    noise_in_norm: bool = False
    """Whether the noise conditions every norm layer too, beside the first linear one."""
    mapping: bool = False
    """Whether the noise is first mapped to a code that suits the object and its place (:class:`NoiseMapping`)."""
    correction: bool = added_later(False)
    """Whether the mean error of first turns is taken off (:class:`condgan.correction.FirstTurnCorrection`)."""
    light_components: int = 0
    """Directions in which the light of the empty scene varies; 0 starts every scene on one fixed canvas."""
    light_inputs: int = added_later(0)
    """Numbers that tell the norm layers and the mapping how the scene is lit (:class:`condgan.light.SceneLight`); 0: a
    turn knows the light of its window only."""

    def __post_init__(self) -> None:
        _check_image_size(self.image_size)
        _check_at_least(1, width=self.width, condition_dim=self.condition_dim, num_turns=self.num_turns)
        _check_at_least(0, z_dim=self.z_dim, light_components=self.light_components, light_inputs=self.light_inputs)
        if self.light_inputs and not self.light_components:
            raise ValueError(f"light_inputs={self.light_inputs} needs light that varies: light_components is 0")
        if self.output not in ("tanh", "blend"):
            raise ValueError(f"output must be 'tanh' or 'blend', got {self.output!r}")
        _check_window(self.window, self.image_size, self.places)
        if self.mapping and self.z_dim < 2:
            raise ValueError(f"mapping needs a z_dim of at least 2, got {self.z_dim}")


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Architecture of a :class:`DiffDiscriminator`; the defaults are the reference's."""

    image_size: int = 64
    """Side of the pictures in pixels: 32, 64 or 128."""
    width: int = 64
    """Channels of the first block; at 64 pixels the last has 16 times as many."""
    condition_dim: int = 256
    """Length of the condition."""
    objects: tuple[str, ...] = ICLEVR_OBJECTS
    """The vocabulary: names in the order of their ids."""
    places: bool = False
    """Whether the place of the new object is an input."""
    window: int | None = None
    """Side in pixels of the square around the place that is judged, as in :class:`GeneratorConfig`."""
    spectral_norm: bool = True
    """Whether every layer has spectral normalisation; without it the gradient penalties must hold it."""
    light_inputs: int = added_later(0)
    """Numbers that say how the scene is lit, as in :class:`GeneratorConfig`. They are a bias on the difference of the
    features, without spectral normalisation."""

    def __post_init__(self) -> None:
        _check_image_size(self.image_size)
        _check_at_least(1, width=self.width, condition_dim=self.condition_dim)
        _check_at_least(0, light_inputs=self.light_inputs)
        _check_window(self.window, self.image_size, self.places)


@dataclass(frozen=True)
class NoiseEncoderConfig:
    """Architecture of a :class:`NoiseEncoder`; the defaults fit the default generator."""

    image_size: int = 64
    """Side of the pictures in pixels: 32, 64 or 128."""
    width: int = 32
    """Channels of the first stage; the third and last has four times as many."""
    z_dim: int = 100
    """Length of the noise."""
    places: bool = False
    """Whether the place of the object is an input."""
    window: int | None = None
    """Side in pixels of the square around the place that is read, as in :class:`GeneratorConfig`."""

    def __post_init__(self) -> None:
        _check_image_size(self.image_size)
        _check_at_least(1, width=self.width, z_dim=self.z_dim)
        _check_window(self.window, self.image_size, self.places)


def _check_window(window: int | None, image_size: int, places: bool) -> None:
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int) or window % 8 or not 16 <= window <= image_size:
        raise ValueError(f"window must be a multiple of 8 from 16 to image_size, which is {image_size}, got {window!r}")
    if not places:
        raise ValueError(f"window is a square around a place: it needs places=True, got window={window}, places=False")


def _check_image_size(image_size: int) -> None:
    if not isinstance(image_size, int) or image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size must be one of {IMAGE_SIZES}, got {image_size!r}")


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _widths(count: int, width: int) -> list[int]:
    """``count`` channel numbers: width, 2 width, 4 width, ... up to the widest allowed."""
    return [width * min(2**i, MAX_WIDTH_FACTOR) for i in range(count)]


def _check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


def _check_place(places: bool, place: Tensor | None, n: int) -> None:
    if places and (place is None or place.shape != (n, 2)):
        raise ValueError(f"place must be ({n}, 2) pixels (x, y), got {None if place is None else tuple(place.shape)}")
    if not places and place is not None:
        raise ValueError("place was given, but this model does not know places (its config has places=False)")


def _coarsest(size: int) -> int:
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


def _view(images: Sequence[Tensor], place: Tensor | None, window: int | None) -> View:
    if place is None:
        return View([*images], [], [], None)
    size = images[0].shape[-1]
    if window is None:
        return View([*images], [], [place_map(place, size)], None)
    corners = window_corners(place, size, window)
    inside = corners[:, :, None] + torch.arange(window, device=place.device)  # (N, 2, window) pixels (x, y)
    x, y = (inside * (2 / (size - 1)) - 1).unbind(1)
    coordinates = torch.stack((x[:, None, :].expand(-1, window, -1), y[:, :, None].expand(-1, -1, window)), 1)
    crops = [crop(image, corners, window) for image in images]
    details = [10 * (image - local_mean(image, 3)) for image in crops]
    return View(crops, details, [place_map(place - corners, window), coordinates], corners)


class ConditionRNN(nn.Module):
    """Reads the condition sequence one turn at a time.

    Embedding of the turn's objects (their sum, so their order does not matter), GRU cell, layer norm on the output.

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

    def __init__(self, num_objects: int, condition_dim: int) -> None:
        super().__init__()
        self.num_objects = num_objects
        self.embedding = nn.Embedding(num_objects, condition_dim)
        self.gru = nn.GRUCell(condition_dim, condition_dim)
        self.norm = nn.LayerNorm(condition_dim)

    def forward(self, objects: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if objects.ndim != 2 or objects.shape[1] != self.num_objects:
            raise ValueError(f"objects must be (N, {self.num_objects}), got {tuple(objects.shape)}")
        if hidden is not None:
            _check_shape("hidden", hidden, len(objects), self.gru.hidden_size)
        hidden = self.gru(objects.to(self.embedding.weight.dtype) @ self.embedding.weight, hidden)
        return self.norm(hidden), hidden


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


class PlaceModel(nn.Module):
    """Where a new object may stand: a mixture over cells of 2x2 pixels, given the picture and the condition.

    Every cell has a probability, and x and y in the cell have Kumaraswamy distributions, from uniform (a fresh model)
    to a peak: in i-CLEVR a first object's place is known to a fraction of a pixel, a later one's hardly at all.

    Shape:
        image: (N, 3, H, W) in [-1, 1].
        condition: (N, D).
        output: logits (N, H / 2, W / 2), one softmax over all cells; and log a and log b, (N, 2, H / 2, W / 2) each, of
            the distributions of x and y in each cell, which goes from 0 to 1.

    Source: mixture density networks, Bishop 1994; Kumaraswamy 1980, "A generalized probability density function for
    double-bounded random processes".
    """

    cell = 2
    """Side of a cell in pixels."""

    def __init__(self, image_size: int, condition_dim: int, channels: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 4, 2, 1)
        self.conv2 = nn.Conv2d(channels, channels, 4, 2, 1)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=2, dilation=2)
        self.condition = nn.Linear(condition_dim, channels)
        self.conv4 = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.conv5 = nn.Conv2d(channels, 1, 1)
        self.point = nn.Conv2d(channels, 4, 1)
        for parameter in self.point.parameters():
            nn.init.zeros_(parameter)
        self.prior = nn.Parameter(torch.zeros(image_size // self.cell, image_size // self.cell))

    def forward(self, image: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self._read(image, condition)
        log_a, log_b = self._log_shapes(x)
        return self._logits(x), log_a, log_b

    def _read(self, image: Tensor, condition: Tensor) -> Tensor:
        """Features (N, channels, H / 2, W / 2) of every cell."""
        fine = F.relu(self.conv1(image))  # (N, channels, H/2, W/2)
        coarse = F.relu(self.conv2(fine))  # (N, channels, H/4, W/4)
        coarse = coarse + F.relu(self.conv3(coarse) + self.condition(condition)[:, :, None, None])
        x = torch.cat((fine, F.interpolate(coarse, scale_factor=2, mode="nearest")), 1)
        return F.relu(self.conv4(x))

    def _logits(self, x: Tensor) -> Tensor:
        return self.conv5(x)[:, 0] + self.prior

    def _log_shapes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log a and log b, (N, 2, h, w) each, of cells with features (N, channels, h, w)."""
        log_a, log_b = self.point(x).clamp(-1, 6).chunk(2, 1)
        return log_a, log_b

    def loss(self, image: Tensor, condition: Tensor, place: Tensor) -> Tensor:
        """Negative log-likelihood (N,) in nats of true places (N, 2), in pixels, against uniform ones in a cell."""
        _check_shape("place", place, len(image), 2)
        logits, log_a, log_b = self(image, condition)
        corner = (place / self.cell).long().clamp(0, logits.shape[-1] - 1)  # (N, 2)
        cell = corner[:, 1] * logits.shape[-1] + corner[:, 0]
        log_a, log_b = self._of_cell(log_a, cell), self._of_cell(log_b, cell)
        point = (place / self.cell - corner).clamp(1e-3, 1 - 1e-3)  # (N, 2)
        a, b = log_a.exp(), log_b.exp()
        density = log_a + log_b + (a - 1) * point.log() + (b - 1) * torch.log1p(-(point**a))
        return F.cross_entropy(logits.flatten(1), cell, reduction="none") - density.sum(1)

    def sample(self, image: Tensor, condition: Tensor, uniform: Tensor) -> Tensor:
        """Places (N, 2) in pixels, from (N, 3) uniform numbers in [0, 1): one for the cell, two for the point."""
        _check_shape("uniform", uniform, len(image), 3)
        x = self._read(image, condition)
        logits = self._logits(x)
        total = logits.flatten(1).double().softmax(1).cumsum(1)
        cell = torch.searchsorted(total, uniform[:, :1].double() * total[:, -1:], right=True)
        cell = cell.clamp(max=total.shape[1] - 1)
        corner = torch.cat((cell % logits.shape[-1], cell // logits.shape[-1]), 1)
        a, b = (
            log[:, :, 0, 0].float().exp() for log in self._log_shapes(self._of_cell(x, cell[:, 0])[:, :, None, None])
        )
        point = (1 - (1 - uniform[:, 1:]) ** (1 / b)) ** (1 / a)  # the inverse of the distribution function
        return ((corner + point) * self.cell).clamp(max=image.shape[-1] - 1)

    @staticmethod
    def _of_cell(x: Tensor, cell: Tensor) -> Tensor:
        """(N, C, h, w) and numbers of cells (N,) to (N, C)."""
        return x.flatten(2)[torch.arange(len(cell), device=cell.device), :, cell]


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


class IterativeGenerator(PretrainedModel):
    """Draws one more object into a picture; a scene is drawn by repeating this from an empty one.

    One turn (:meth:`forward`): the noise and the projected condition become a 4x4 map, four blocks (at 64 pixels) bring
    it to full size, and features of the previous picture join at 8x8. With ``config.window`` all this is done in a
    square around the place of the new object, and what is outside stays as it was, bit for bit; of what is outside only
    the light is seen, with ``config.light_inputs``. Scenes are drawn by :meth:`generate`.

    Args:
        config: the architecture; None is the reference's, 64x64 and 24 objects.

    Shape:
        z: (N, z_dim), standard normal.
        condition: (N, condition_dim), output of ``encoder``.
        prev_image: (N, 3, H, W) in [-1, 1].
        place: (N, 2) centre of the new object in pixels (x, y), if ``config.places``; else None.
        output: (N, 3, H, W) in [-1, 1], dtype of ``prev_image``, which may be finer than the network's.

    Raises:
        ValueError: an input does not have the shape above.

    Source: the report of May 2020 that docs/architecture.md describes; SNGAN-projection blocks of Miyato and Koyama
    2018, arXiv:1802.05637; blended output after Pumarola et al. 2018, arXiv:1807.09251.

    Example:
        >>> generator = IterativeGenerator(GeneratorConfig(width=4)).eval()
        >>> condition, hidden = generator.encoder(torch.eye(24)[:2])
        >>> generator(torch.randn(2, 100), condition, torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 3, 64, 64])
    """

    config_class: ClassVar[type] = GeneratorConfig
    default_pretrained: ClassVar[str | None] = "iclevr-64"
    config: GeneratorConfig

    def __init__(self, config: GeneratorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GeneratorConfig()
        self.vocabulary = Vocabulary(config.objects)
        self.encoder = ConditionRNN(len(self.vocabulary), config.condition_dim)
        size = config.window or config.image_size
        self.coarsest = _coarsest(size)
        num_blocks = int(log2(size // self.coarsest))
        widths = [*reversed(_widths(num_blocks + 1, config.width))]  # of the coarsest map and of each block's output
        skips = config.output == "blend"
        channels = widths[-2:0:-1]  # of the previous picture's features: as many as the generator has there
        if config.window is None:  # the reference's: fewer, but for the last
            channels = [*_widths(num_blocks - 1, config.width)[:-1], 8 * config.width]
        known = 3 + sum(View.channels(config))
        self.prev_encoder = PreviousImageEncoder(known, channels)
        joined = [*reversed(channels)]  # from the second resolution up
        joined = joined if skips else [joined[0], *(0 for _ in joined[1:])]
        norm_dim = config.condition_dim + (config.z_dim if config.noise_in_norm else 0) + config.light_inputs

        self.c_proj = nn.Linear(config.condition_dim, config.condition_dim)
        self.l0 = nn.Linear(config.z_dim + config.condition_dim, widths[0] * self.coarsest**2)
        # The largest weight, read once a picture: with the inputs' rows one after the other in a third of the time.
        self.l0.weight = nn.Parameter(self.l0.weight.detach().T.contiguous().T)
        for i, extra in enumerate([0, *joined]):
            setattr(self, f"block{i + 1}", GenBlock(widths[i] + extra, widths[i + 1], norm_dim))
        self.num_blocks = num_blocks
        self.bn = nn.BatchNorm2d(widths[-1])
        self.ac = nn.LeakyReLU(NEGATIVE_SLOPE)
        self.conv = nn.Conv2d(widths[-1] + (known if skips else 0), 4 if skips else 3, 3, padding=1)
        if skips:  # a fresh generator keeps most of the previous picture
            nn.init.constant_(self.conv.get_parameter("bias")[3:], -2.0)
        self.tanh = nn.Tanh()

        self.canvas = Canvas(config.image_size, config.light_components)
        self.light = SceneLight(config.light_inputs) if config.light_inputs else None
        self.place_model = PlaceModel(config.image_size, config.condition_dim) if config.places else None
        self.mapping = NoiseMapping(config) if config.mapping else None
        self.correction = None
        if config.correction:
            sizes = len(self.vocabulary), config.condition_dim, config.image_size, config.light_inputs
            self.correction = FirstTurnCorrection(*sizes, config.window or config.image_size)

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.config.image_size

    @property
    def z_dim(self) -> int:
        """Length of the noise of one turn."""
        return self.config.z_dim

    @property
    def num_turns(self) -> int:
        """Turns of the scenes that the model was trained on."""
        return self.config.num_turns

    def forward(self, z: Tensor, condition: Tensor, prev_image: Tensor, place: Tensor | None = None) -> Tensor:
        self._check_turn(z, condition, prev_image, place)
        light = self.read_light(prev_image)
        code = z if self.mapping is None else self.mapping(z, condition, place, light)
        return self._turn(code, condition, prev_image, place, light)

    def read_light(self, prev_image: Tensor) -> Tensor | None:
        """How the picture so far is lit, (N, light_inputs); None for models that do not ask."""
        return None if self.light is None else self.light(prev_image)

    def synthesis(self, code: Tensor, condition: Tensor, prev_image: Tensor, place: Tensor | None = None) -> Tensor:
        """:meth:`forward` after the mapping: what draws with a code that a :class:`NoiseEncoder` found.

        Args:
            code: (N, z_dim); for models without a mapping the noise itself.
            condition: as in :meth:`forward`, like all that follow.
            prev_image: the picture so far.
            place: where the object goes.

        Returns:
            As :meth:`forward`.
        """
        self._check_turn(code, condition, prev_image, place)
        return self._turn(code, condition, prev_image, place, self.read_light(prev_image))

    def _turn(
        self, code: Tensor, condition: Tensor, prev_image: Tensor, place: Tensor | None, light: Tensor | None
    ) -> Tensor:
        view = _view([prev_image], place, self.config.window)
        known = torch.cat((*view.images, *view.maps, *view.details), 1).to(condition.dtype)
        known = known.contiguous(memory_format=torch.channels_last)  # convolutions are much faster so
        drawn = self._draw(code, condition, view.images[0], known, light)
        if self.correction is not None:
            offset = self.correction(condition, light)
            if offset is not None and view.corners is not None:
                offset = crop(offset, view.corners, drawn.shape[-1])
            if offset is not None:
                drawn = (drawn + offset.to(drawn.dtype)).clamp(-1, 1)
        return drawn if view.corners is None else paste(prev_image, drawn, view.corners)

    def _check_turn(self, z: Tensor, condition: Tensor, prev_image: Tensor, place: Tensor | None) -> None:
        size = self.config.image_size
        if prev_image.shape[1:] != (3, size, size):
            raise ValueError(f"prev_image must be (N, 3, {size}, {size}), got {tuple(prev_image.shape)}")
        _check_shape("z", z, len(prev_image), self.config.z_dim)
        _check_shape("condition", condition, len(prev_image), self.config.condition_dim)
        _check_place(self.config.places, place, len(prev_image))

    def _draw(self, code: Tensor, condition: Tensor, prev_image: Tensor, known: Tensor, light: Tensor | None) -> Tensor:
        """The turn inside the window: ``known`` is ``prev_image`` (N, 3, h, w) with the maps of its place."""
        features = self.prev_encoder(known)[::-1]  # from the second resolution up
        norm_condition = torch.cat((condition, code), 1) if self.config.noise_in_norm else condition
        if light is not None:
            norm_condition = torch.cat((norm_condition, light.to(condition.dtype)), 1)

        x = self.l0(torch.cat((code, self.c_proj(condition)), 1)).unflatten(1, (-1, self.coarsest, self.coarsest))
        x = x.contiguous(memory_format=torch.channels_last)
        for i in range(self.num_blocks):
            if i == 1 or (i > 1 and self.config.output == "blend"):
                x = torch.cat((x, features[i - 1]), 1)
            x = self.get_submodule(f"block{i + 1}")(x, norm_condition)  # twice as high and wide
        x = self.ac(self.bn(x))  # (N, width, H, W)
        if self.config.output == "tanh":
            return self.tanh(self.conv(x)).to(prev_image.dtype)
        x = self.conv(torch.cat((x, known), 1))
        x = x.to(prev_image.dtype)  # blended at full precision: what stays, stays exact
        mask = torch.sigmoid(x[:, 3:])  # (N, 1, H, W)
        return torch.lerp(prev_image, self.tanh(x[:, :3]), mask)

    def generate(
        self,
        conditions: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        num_images: int = 1,
        seed: int | None = None,
        at: Sequence[Place | None] | Sequence[Sequence[Place | None] | None] | None = None,
        best_of: int = 1,
        redraw: Redraw = "picture",
    ) -> Drawing:
        """Draw scenes.

        Args:
            conditions: the objects of one scene in the order they are added, such as ``["red cube", "blue sphere"]``;
                or a list of such lists; or one name.
            num_images: draws of each scene.
            seed: of the first picture; the others get seed + 1, seed + 2, ... None is a fresh one. A picture depends
                on its conditions, places and seed only, not on what else is drawn.
            at: for each object the centre in pixels (x, y), or None to have it drawn; for a batch a list of such lists.
            best_of: draw so many candidates of each picture and keep the one the bundled verifier likes best; its seed
                and score are in the result. Costs as many times more.
            redraw: what ``best_of`` is about: ``"picture"`` as above; ``"turn"`` draws only those turns again, on the
                same picture, after which the verifier does not find the objects asked so far, up to ``best_of`` times
                (:data:`condgan.drawing.GOOD_TURN`). Where the first draw is right that costs next to nothing:
                ``result.draws`` says what it took.

        Returns:
            A :class:`condgan.Drawing`.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a list is empty, a name unknown, a place outside the picture, the model knows no places, or
                ``redraw`` is something else.

        Warns:
            UserWarning: a scene has more objects than those the model was trained on.

        Example:
            >>> IterativeGenerator(GeneratorConfig(width=4)).generate(["red cube"], num_images=2, seed=7).seeds
            [7, 8]
        """
        return drawing.draw(self, conditions, num_images=num_images, seed=seed, at=at, best_of=best_of, redraw=redraw)

    def add(
        self,
        image: Image.Image | str | Path | np.ndarray | Tensor,
        conditions: str | Sequence[str],
        *,
        num_images: int = 1,
        seed: int | None = None,
        at: Sequence[Place | None] | None = None,
        best_of: int = 1,
        redraw: Redraw = "picture",
    ) -> Drawing:
        """Add objects to a picture from anywhere.

        Args:
            image: a PIL picture of any mode and size, a path, a uint8 array (H, W[, 3 or 4]), or a tensor (3, H, W),
                uint8 or floating point in [-1, 1]. It is resized to the model's size.
            conditions: the objects to add, as in :meth:`generate`, like all that follow.
            num_images: draws of each scene.
            seed: of the first picture.
            at: for each object its centre in pixels of the model's size, or None to have it drawn.
            best_of: candidates of each picture, or of each turn.
            redraw: which of the two.

        Returns:
            As :meth:`generate`.
        """
        start = pictures.load_image(image, self.config.image_size)
        return drawing.draw(
            self, conditions, num_images=num_images, seed=seed, at=at, best_of=best_of, redraw=redraw, start=start
        )

    def stream(
        self, conditions: str | Sequence[str], *, seed: int | None = None, at: Sequence[Place | None] | None = None
    ) -> Iterator[Turn]:
        """Draw one scene and hand out every turn as it is done; arguments as in :meth:`generate`.

        Yields:
            :class:`condgan.Turn`: ``image``, ``added``, ``difference``, ``place``.
        """
        return drawing.stream(self, conditions, seed=seed, at=at)


class DiscriminatorOutput(NamedTuple):
    """What the discriminator says of N pairs of pictures."""

    logits: Tensor
    """(N,) unbounded, positive means real."""
    object_logits: Tensor
    """(N, K): which object was added."""


class DiffDiscriminator(PretrainedModel):
    """Judges the difference between two pictures: is it a real object, and the one that was asked for?

    Both pictures pass the first three blocks, their features are subtracted, and the difference goes on.

    Args:
        config: the architecture; None is the reference's, 64x64 and 24 objects.

    Shape:
        prev_image: (N, 3, H, W) in [-1, 1], the picture before the turn.
        image: (N, 3, H, W) in [-1, 1], the picture after the turn, to be judged.
        condition: (N, condition_dim).
        place: (N, 2) asked centre of the object in pixels (x, y), if ``config.places``; else None.
        output: :class:`DiscriminatorOutput`.

    Raises:
        ValueError: an input does not have the shape above.

    Source: the report of May 2020 that docs/architecture.md describes; projection after Miyato and Koyama 2018,
    arXiv:1802.05637; auxiliary head after Odena et al. 2017, arXiv:1610.09585.

    Example:
        >>> discriminator = DiffDiscriminator(DiscriminatorConfig(width=4))
        >>> before, after = torch.zeros(2, 2, 3, 64, 64)
        >>> discriminator(before, after, torch.randn(2, 256)).logits.shape
        torch.Size([2])
    """

    config_class: ClassVar[type] = DiscriminatorConfig
    config: DiscriminatorConfig

    def __init__(self, config: DiscriminatorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DiscriminatorConfig()
        self.vocabulary = Vocabulary(config.objects)
        self.num_blocks = int(log2((config.window or config.image_size) // 2))
        widths = [3 + sum(View.channels(config)), *_widths(self.num_blocks, config.width)]
        for i in range(self.num_blocks):
            setattr(self, f"block{i + 1}", DisBlock(widths[i], widths[i + 1], i > 0, config.spectral_norm))
        self.light = SceneLight(config.light_inputs) if config.light_inputs else None
        if config.light_inputs:  # a fresh one disregards it
            self.light_bias = nn.Linear(config.light_inputs, widths[3], bias=False)
            nn.init.zeros_(self.light_bias.weight)
        num_features = widths[-1]
        hidden = max(num_features // 4, 1)
        self.l6 = normalised(nn.Linear(num_features, 1), config.spectral_norm)
        self.condition_projector = ConditionProjector(config.condition_dim, num_features, config.spectral_norm)
        self.aux_objective = nn.Sequential(
            normalised(nn.Linear(num_features, hidden), config.spectral_norm),
            nn.ReLU(),
            normalised(nn.Linear(hidden, len(self.vocabulary)), config.spectral_norm),
        )

    def compare(
        self, prev_image: Tensor, images: Sequence[Tensor], condition: Tensor, place: Tensor | None = None
    ) -> list[DiscriminatorOutput]:
        """Judge several pictures that follow the same previous one, in one pass: each as :meth:`forward` does."""
        n, size = len(prev_image), self.config.image_size
        if not images:
            raise ValueError("images is empty: give at least one picture to judge")
        for name, image in (("prev_image", prev_image), *(("image", image) for image in images)):
            _check_shape(name, image, n, 3, size, size)
        _check_shape("condition", condition, n, self.config.condition_dim)
        _check_place(self.config.places, place, n)
        view = _view([prev_image, *images], place, self.config.window)
        maps = [map_.to(prev_image.dtype).repeat(1 + len(images), 1, 1, 1) for map_ in view.maps]
        details = [torch.cat(view.details)] if view.details else []
        x = torch.cat((torch.cat(view.images), *maps, *details), 1)
        x = x.contiguous(memory_format=torch.channels_last)
        for i in range(3):
            x = self.get_submodule(f"block{i + 1}")(x)
        before, *after = x.chunk(1 + len(images))
        x = torch.cat([features - before for features in after])  # nothing but zeros where nothing changed
        if self.light is not None:  # what changed must fit it
            x = x + self.light_bias(self.light(prev_image).to(x.dtype)).repeat(len(images), 1)[:, :, None, None]
        for i in range(3, self.num_blocks):
            x = self.get_submodule(f"block{i + 1}")(x)
        features = F.leaky_relu(x, NEGATIVE_SLOPE).sum((2, 3))
        logits = self.l6(features)[:, 0] + self.condition_projector(features, condition.repeat(len(images), 1))
        outputs = zip(logits.chunk(len(images)), self.aux_objective(features).chunk(len(images)), strict=True)
        return [DiscriminatorOutput(*output) for output in outputs]

    def forward(
        self, prev_image: Tensor, image: Tensor, condition: Tensor, place: Tensor | None = None
    ) -> DiscriminatorOutput:
        return self.compare(prev_image, [image], condition, place)[0]


class NoiseEncoder(PretrainedModel):
    """Finds the code with which a generator would draw a given turn: the pose of a cube, for example.

    It is trained together with the generator, which must draw the real picture from it; without it nothing would tell
    the generator which code stands for which pose. Over a batch every number of the code has mean 0 and, once it tells
    pictures apart, variance 1, by a batch norm without parameters. For a generator with a :class:`NoiseMapping` that is
    where :meth:`IterativeGenerator.synthesis` starts; for others it is the noise.

    Args:
        config: the architecture; None is the default generator's.

    Shape:
        prev_image: (N, 3, H, W) in [-1, 1], the picture before the turn.
        image: (N, 3, H, W) in [-1, 1], the picture after it.
        place: (N, 2) centre of the new object in pixels (x, y), if ``config.places``; else None.
        output: (N, z_dim), of mean 0 and variance 1 over all turns.

    Modes: training normalises with the statistics of the batch, of at least two turns; eval with the running ones.

    Source: the encoder of Zhu et al. 2017 (BicycleGAN), arXiv:1711.11586, section 3.3, with the batch norm of Zhu et
    al. 2020 (BN-VAE), arXiv:2004.12585, in place of a Kullback-Leibler term.

    Example:
        >>> before, after = torch.rand(2, 4, 3, 64, 64) * 2 - 1
        >>> NoiseEncoder(NoiseEncoderConfig(width=4, z_dim=6))(before, after).shape
        torch.Size([4, 6])
    """

    config_class: ClassVar[type] = NoiseEncoderConfig
    config: NoiseEncoderConfig

    def __init__(self, config: NoiseEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NoiseEncoderConfig()
        sizes = [6 + View.channels(config)[1], *_widths(3, config.width)]
        self.stages = nn.Sequential()
        for i, o in pairwise(sizes):
            self.stages.append(nn.Sequential(nn.Conv2d(i, o, 4, 2, 1), nn.LeakyReLU(NOISE_ENCODER_SLOPE)))
            self.stages.append(nn.Sequential(nn.Conv2d(o, o, 3, 1, 1), nn.LeakyReLU(NOISE_ENCODER_SLOPE)))
        self.linear = nn.Linear(2 * sizes[-1], config.z_dim)
        self.norm = nn.BatchNorm1d(config.z_dim, affine=False)

    def forward(self, prev_image: Tensor, image: Tensor, place: Tensor | None = None) -> Tensor:
        n, size = len(prev_image), self.config.image_size
        for name, picture in (("prev_image", prev_image), ("image", image)):
            _check_shape(name, picture, n, 3, size, size)
        _check_place(self.config.places, place, n)
        view = _view([prev_image, image], place, self.config.window)
        before, after = view.images
        x = torch.cat((after, after - before, *view.maps), 1)
        x = self.stages(x.contiguous(memory_format=torch.channels_last))
        return self.norm(self.linear(torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)).float())
