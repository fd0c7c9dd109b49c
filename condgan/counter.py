"""ObjectCounter: where objects stand in a picture and how many there are, whatever they are.

A classifier with one output an object cannot count: two red cubes, or half a thing that is nothing, look right to it.
The counter that ships is for evaluation only, as the judge is: it never trains a model, chooses one or picks a draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgan.fields import added_later, check_fields
from condgan.functional import evaluating
from condgan.hub import PretrainedModel
from condgan.images import check_colours, check_range, resize
from condgan.requests import parse_whole

STRIDE = 2
"""Side of a cell of the heat map in pixels."""


@dataclass(frozen=True)
class ObjectCounterConfig:
    """Architecture of an :class:`ObjectCounter` and the threshold it was fixed with."""

    widths: tuple[int, ...] = (16, 48, 96)
    """Channels of each stage; the first works at half the resolution of the picture, every other halves it again."""
    blocks: int = 1
    """Residual blocks in each stage."""
    threshold: float = 0.5
    """Heat, in 0 to 1, above which a local maximum is an object."""
    image_size: int = added_later(64)
    """Side in pixels of the pictures that it was trained on; :meth:`ObjectCounter.places` resizes others to it."""

    def __post_init__(self) -> None:
        if not self.widths or self.blocks < 1:
            raise ValueError(f"widths and blocks need at least one stage and block, got {self.widths}, {self.blocks}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")
        check_fields(self)
        if min(self.widths) < 1:
            raise ValueError(f"widths must be at least 1, got {self.widths}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")


class ObjectCounter(PretrainedModel):
    """Finds the centres of objects, as local maxima of a heat map; knows no names.

    The centre of an object is the one of :func:`condgan.functional.place_of_change`. For evaluation only: use it for
    nothing that a model is trained or chosen by, or its counts stop being fair.

    Shape:
        images: (N, 3, H, W), floating point in [-1, 1]; trained at 64x64.
        output: (N, 1, H/2, W/2) logits of the heat map, odd sizes rounded up; the cell (column i, row j) has its
            centre at the pixel (2i + 0.5, 2j + 0.5).

    Source: Zhou et al. 2019, "Objects as Points", arXiv:1904.07850, one class and no regression heads: a centre is
    refined to a part of a cell by the heat around it. Features: Lin et al. 2017, arXiv:1612.03144, summed into the
    finest level.

    Example:
        >>> ObjectCounter()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 1, 32, 32])
    """

    config_class: ClassVar[type] = ObjectCounterConfig
    default_pretrained: ClassVar[str | None] = "counter"
    config: ObjectCounterConfig

    def __init__(self, config: ObjectCounterConfig | None = None) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock, conv1x1  # slow to import, hence not at the top

        self.config = config = self.given_or_default(config)
        finest = channels = config.widths[0]
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, STRIDE, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.stages = nn.ModuleList()
        self.laterals = nn.ModuleList()
        for stage, width in enumerate(config.widths):
            shortcut = nn.Sequential(conv1x1(channels, width, 2), nn.BatchNorm2d(width)) if stage else None
            blocks = [BasicBlock(channels, width, 2 if stage else 1, shortcut)]
            blocks += [BasicBlock(width, width) for _ in range(config.blocks - 1)]
            self.stages.append(nn.Sequential(*blocks))
            self.laterals.append(nn.Conv2d(width, finest, 1))
            channels = width
        heat = nn.Conv2d(finest, 1, 1)
        self.head = nn.Sequential(
            nn.Conv2d(finest, finest, 3, 1, 1, bias=False), nn.BatchNorm2d(finest), nn.ReLU(), heat
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(heat.weight, std=0.01)
        nn.init.constant_(cast(Tensor, heat.bias), -2.19)  # a heat of 0.1 everywhere, as in the paper

    def forward(self, images: Tensor) -> Tensor:
        check_colours(images)
        x = self.stem(images)
        levels = []
        for stage, lateral in zip(self.stages, self.laterals, strict=True):
            x = stage(x)
            levels.append(lateral(x))
        merged = levels.pop()
        while levels:
            finer = levels.pop()
            merged = finer + F.interpolate(merged, finer.shape[-2:])
        return self.head(merged)

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def places(self, images: Tensor, batch_size: int = 256) -> list[Tensor]:
        """Centres of the objects in each picture, in eval mode.

        Args:
            images: (N, 3, H, W), floating point in [-1, 1], on any device.
            batch_size: pictures that pass the network at once.

        Returns:
            N tensors (n, 2) float32 of pixels (x, y), on the device of the counter, the surest first: x to the right
            and y down, pixel centres at whole numbers. n may be 0.

        Raises:
            TypeError: ``images`` is not a tensor.
            ValueError: it is not of this shape and kind, not finite or not in [-1, 1].
        """
        check_range("images", images)
        batch_size = parse_whole("batch_size", batch_size, 1)
        check_colours(images)
        weight, size = next(self.parameters()), self.config.image_size
        with evaluating(self):
            chunks = [self(resize(chunk.to(weight.device, weight.dtype), size)) for chunk in images.split(batch_size)]
        scale = torch.tensor([images.shape[3] / size, images.shape[2] / size]).to(weight.device, torch.float32)
        found = (centre for chunk in chunks for centre in find_centres(chunk, self.config.threshold))
        return [(centre + 0.5) * scale - 0.5 for centre in found]

    def count(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Number of objects in each picture, (N,) int64, on the device of the counter.

        Arguments and errors are those of :meth:`places`.
        """
        numbers = [len(places) for places in self.places(images, batch_size)]
        return torch.tensor(numbers, dtype=torch.int64, device=next(self.parameters()).device)


def find_centres(logits: Tensor, threshold: float) -> list[Tensor]:
    """Local maxima of heat maps, each moved to the centroid of the heat in the 3x3 cells around it.

    Args:
        logits: (N, 1, h, w) of :class:`ObjectCounter`.
        threshold: least heat of a maximum, in 0 to 1.

    Returns:
        N tensors (n, 2) float32 of pixels (x, y), the hottest first.
    """
    logits = logits.float()
    heat = logits.sigmoid()
    # maxima of logits, not of heat: two sure neighbours may both have a heat of exactly 1
    is_peak = (logits == F.max_pool2d(logits, 3, 1, 1)) & (heat > threshold)
    rows = torch.arange(heat.shape[2], device=heat.device)[:, None]
    columns = torch.arange(heat.shape[3], device=heat.device)
    around = F.avg_pool2d(torch.cat((heat * columns, heat * rows, heat), 1), 3, 1, 1)
    centroid = (around[:, :2] / around[:, 2:] + 0.5) * STRIDE - 0.5  # cells to pixels
    centres = []
    for places, peak, certainty in zip(centroid.permute(0, 2, 3, 1), is_peak[:, 0], logits[:, 0], strict=True):
        centres.append(places[peak][certainty[peak].argsort(descending=True)])
    return centres


def match_places(found: Tensor, wanted: Tensor, max_distance: float) -> Tensor:
    """Pair places one to one, the nearest two first.

    Of places that are more than twice ``max_distance`` apart, as objects are, no pairing has more pairs.

    Args:
        found: (n, 2) pixels.
        wanted: (m, 2) pixels.
        max_distance: largest distance of a pair in pixels.

    Returns:
        (p, 2) int64, a row a pair: index in ``found``, index in ``wanted``; the nearest pair first.

    Raises:
        ValueError: ``found`` or ``wanted`` is not (n, 2).

    Example:
        >>> match_places(torch.tensor([[9.0, 9.0], [30.0, 31.0]]), torch.tensor([[31.0, 31.0], [50.0, 9.0]]), 4.0)
        tensor([[1, 0]])
    """
    for name, places in (("found", found), ("wanted", wanted)):
        if places.ndim != 2 or places.shape[1] != 2:
            raise ValueError(f"{name} must be (n, 2), got {tuple(places.shape)}")
    distance = torch.cdist(found.float(), wanted.float(), compute_mode="donot_use_mm_for_euclid_dist").cpu()
    pairs: list[tuple[int, int]] = []
    while distance.numel() and distance.min() <= max_distance:
        i, j = divmod(int(distance.argmin()), distance.shape[1])
        pairs.append((i, j))
        distance[i], distance[:, j] = torch.inf, torch.inf
    return torch.tensor(pairs, dtype=torch.int64, device=found.device).view(-1, 2)
