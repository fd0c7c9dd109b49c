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
from condgan.functional import place_map
from condgan.hub import PretrainedModel
from condgan.layers import NEGATIVE_SLOPE, ConditionProjector, DisBlock, GenBlock, normalised
from condgan.requests import Place
from condgan.results import Drawing, Turn
from condgan.vocab import ICLEVR_OBJECTS, Vocabulary

IMAGE_SIZES = (32, 64, 128)
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
    noise_in_norm: bool = False
    """Whether the noise conditions every norm layer too, beside the first linear one."""
    light_components: int = 0
    """Directions in which the light of the empty scene varies; 0 starts every scene on one fixed canvas."""

    def __post_init__(self) -> None:
        _check_image_size(self.image_size)
        _check_at_least(1, width=self.width, condition_dim=self.condition_dim, num_turns=self.num_turns)
        _check_at_least(0, z_dim=self.z_dim, light_components=self.light_components)
        if self.output not in ("tanh", "blend"):
            raise ValueError(f"output must be 'tanh' or 'blend', got {self.output!r}")


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
    spectral_norm: bool = True
    """Whether every layer has spectral normalisation; without it the gradient penalties must hold it."""

    def __post_init__(self) -> None:
        _check_image_size(self.image_size)
        _check_at_least(1, width=self.width, condition_dim=self.condition_dim)


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
    """Features of the picture so far: 4x4 convolutions of stride 2 down to 8x8, each with batch norm and ReLU.

    Shape:
        image: (N, in_channels, H, W).
        output: list of feature maps from half the resolution down to (N, 8 width, 8, 8).
    """

    def __init__(self, in_channels: int, image_size: int, width: int) -> None:
        super().__init__()
        count = int(log2(image_size // 8))
        self.channels = [*_widths(count, width)[:-1], 8 * width]
        sizes = [in_channels, *self.channels]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1, bias=False) for i, o in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in self.channels)

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
        fine = F.relu(self.conv1(image))  # (N, channels, H/2, W/2)
        coarse = F.relu(self.conv2(fine))  # (N, channels, H/4, W/4)
        coarse = coarse + F.relu(self.conv3(coarse) + self.condition(condition)[:, :, None, None])
        x = torch.cat((fine, F.interpolate(coarse, scale_factor=2, mode="nearest")), 1)
        x = F.relu(self.conv4(x))  # (N, channels, H/2, W/2)
        log_a, log_b = self.point(x).clamp(-1, 6).chunk(2, 1)
        return self.conv5(x)[:, 0] + self.prior, log_a, log_b

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
        logits, log_a, log_b = self(image, condition)
        total = logits.flatten(1).double().softmax(1).cumsum(1)
        cell = torch.searchsorted(total, uniform[:, :1].double() * total[:, -1:], right=True)
        cell = cell.clamp(max=total.shape[1] - 1)
        corner = torch.cat((cell % logits.shape[-1], cell // logits.shape[-1]), 1)
        a, b = (self._of_cell(log, cell[:, 0]).float().exp() for log in (log_a, log_b))
        point = (1 - (1 - uniform[:, 1:]) ** (1 / b)) ** (1 / a)  # the inverse of the distribution function
        return ((corner + point) * self.cell).clamp(max=image.shape[-1] - 1)

    @staticmethod
    def _of_cell(x: Tensor, cell: Tensor) -> Tensor:
        """(N, 2, h, w) and numbers of cells (N,) to (N, 2)."""
        return x.flatten(2)[torch.arange(len(cell), device=cell.device), :, cell]


class IterativeGenerator(PretrainedModel):
    """Draws one more object into a picture; a scene is drawn by repeating this from an empty one.

    One turn (:meth:`forward`): the noise and the projected condition become a 4x4 map, four blocks (at 64 pixels) bring
    it to full size, and features of the previous picture join at 8x8. Scenes are drawn by :meth:`generate`.

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
        num_blocks = int(log2(config.image_size // 4))
        widths = [*reversed(_widths(num_blocks + 1, config.width))]  # of the 4x4 map and of each block's output
        skips = config.output == "blend"
        self.prev_encoder = PreviousImageEncoder(3 + config.places, config.image_size, config.width)
        joined = [*reversed(self.prev_encoder.channels)]  # from 8x8 up
        joined = joined if skips else [joined[0], *(0 for _ in joined[1:])]
        norm_dim = config.condition_dim + (config.z_dim if config.noise_in_norm else 0)

        self.c_proj = nn.Linear(config.condition_dim, config.condition_dim)
        self.l0 = nn.Linear(config.z_dim + config.condition_dim, widths[0] * 4 * 4)
        for i, extra in enumerate([0, *joined]):
            setattr(self, f"block{i + 1}", GenBlock(widths[i] + extra, widths[i + 1], norm_dim))
        self.num_blocks = num_blocks
        self.bn = nn.BatchNorm2d(widths[-1])
        self.ac = nn.LeakyReLU(NEGATIVE_SLOPE)
        full_size = 3 + config.places if skips else 0
        self.conv = nn.Conv2d(widths[-1] + full_size, 4 if skips else 3, 3, padding=1)
        if skips:  # a fresh generator keeps most of the previous picture
            nn.init.constant_(self.conv.get_parameter("bias")[3:], -2.0)
        self.tanh = nn.Tanh()

        self.canvas = Canvas(config.image_size, config.light_components)
        self.place_model = PlaceModel(config.image_size, config.condition_dim) if config.places else None

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
        size = self.config.image_size
        if prev_image.shape[1:] != (3, size, size):
            raise ValueError(f"prev_image must be (N, 3, {size}, {size}), got {tuple(prev_image.shape)}")
        _check_shape("z", z, len(prev_image), self.config.z_dim)
        _check_shape("condition", condition, len(prev_image), self.config.condition_dim)
        _check_place(self.config.places, place, len(prev_image))
        known = prev_image.to(condition.dtype)
        if place is not None:
            known = torch.cat((known, place_map(place, size).to(known.dtype)), 1)
        features = self.prev_encoder(known)[::-1]  # from 8x8 up
        norm_condition = torch.cat((condition, z), 1) if self.config.noise_in_norm else condition

        x = self.l0(torch.cat((z, self.c_proj(condition)), 1)).unflatten(1, (-1, 4, 4))
        x = x.contiguous(memory_format=torch.channels_last)
        for i in range(self.num_blocks):
            if i == 1 or (i > 1 and self.config.output == "blend"):
                x = torch.cat((x, features[i - 1]), 1)  # from 8x8 up
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

        Returns:
            A :class:`condgan.Drawing`.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a list is empty, a name unknown, a place outside the picture, or the model knows no places.

        Warns:
            UserWarning: a scene has more objects than those the model was trained on.

        Example:
            >>> IterativeGenerator(GeneratorConfig(width=4)).generate(["red cube"], num_images=2, seed=7).seeds
            [7, 8]
        """
        return drawing.draw(self, conditions, num_images=num_images, seed=seed, at=at, best_of=best_of)

    def add(
        self,
        image: Image.Image | str | Path | np.ndarray | Tensor,
        conditions: str | Sequence[str],
        *,
        num_images: int = 1,
        seed: int | None = None,
        at: Sequence[Place | None] | None = None,
        best_of: int = 1,
    ) -> Drawing:
        """Add objects to a picture from anywhere.

        Args:
            image: a PIL picture of any mode and size, a path, a uint8 array (H, W[, 3 or 4]), or a tensor (3, H, W),
                uint8 or floating point in [-1, 1]. It is resized to the model's size.
            conditions: the objects to add, as in :meth:`generate`, like all that follow.
            num_images: draws of each scene.
            seed: of the first picture.
            at: for each object its centre in pixels of the model's size, or None to have it drawn.
            best_of: candidates of each picture.

        Returns:
            As :meth:`generate`.
        """
        start = pictures.load_image(image, self.config.image_size)
        return drawing.draw(self, conditions, num_images=num_images, seed=seed, at=at, best_of=best_of, start=start)

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
        self.num_blocks = int(log2(config.image_size // 2))
        widths = [3 + config.places, *_widths(self.num_blocks, config.width)]
        for i in range(self.num_blocks):
            setattr(self, f"block{i + 1}", DisBlock(widths[i], widths[i + 1], i > 0, config.spectral_norm))
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
        x = torch.cat((prev_image, *images))
        if place is not None:
            blob = place_map(place, size).to(x.dtype)
            x = torch.cat((x, blob.repeat(1 + len(images), 1, 1, 1)), 1)
        x = x.contiguous(memory_format=torch.channels_last)
        for i in range(3):
            x = self.get_submodule(f"block{i + 1}")(x)
        before, *after = x.chunk(1 + len(images))
        x = torch.cat([features - before for features in after])  # nothing but zeros where nothing changed
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
