"""SceneClassifier: which of the vocabulary's objects stand in a picture.

Two trained ones ship: the *verifier*, which users, best-of-n and training may call, and the *judge*, which reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from condgan.building import Building
from condgan.fields import added_later, check_fields
from condgan.functional import evaluating
from condgan.hub import PretrainedModel
from condgan.images import check_colours, check_range, resize
from condgan.remote import CheckpointError
from condgan.requests import parse_whole
from condgan.vocab import ICLEVR_OBJECTS


@dataclass(frozen=True)
class SceneClassifierConfig:
    """Architecture of a :class:`SceneClassifier`; the defaults are torchvision's ``resnet18``."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each stage; every stage after the first halves the resolution."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Residual blocks in each stage."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """``imagenet``: 7x7 stride 2 and a max pool (1/4); ``small``: 3x3 stride 2 (1/2), for small objects."""
    pooling: Literal["average", "evidence"] = "average"
    """``average``: mean over space, then ``fc``; ``evidence``: ``fc`` at every cell, then log-sum-exp over cells."""
    objects: tuple[str, ...] = ICLEVR_OBJECTS
    """The vocabulary: names in the order of the output."""
    image_size: int = added_later(64)
    """Side in pixels of the pictures that it was trained on; others are resized to it."""

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.blocks):
            raise ValueError(f"widths and blocks need one entry a stage each, got {self.widths} and {self.blocks}")
        check_fields(self)
        if min(*self.widths, *self.blocks) < 1:
            raise ValueError(f"widths and blocks must be at least 1, got {self.widths} and {self.blocks}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks are one, wherever they were loaded from."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)


class SceneClassifier(PretrainedModel):
    """A ResNet with one logit an object, its parameters named as torchvision names them.

    Shape:
        images: (N, 3, H, W), floating point in [-1, 1]; resized to ``config.image_size``, 64 of those that ship.
        output: (N, K) logits, positive means present.

    Source: He et al. 2016, arXiv:1512.03385; ``evidence`` pooling is log-sum-exp multiple-instance pooling,
    Pinheiro and Collobert 2015, arXiv:1411.6228.

    Example:
        >>> SceneClassifier()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 24])
    """

    config_class: ClassVar[type] = SceneClassifierConfig
    default_pretrained: ClassVar[str | None] = "verifier"
    config: SceneClassifierConfig

    def __init__(self, config: SceneClassifierConfig | None = None) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock, conv1x1  # slow to import, hence not at the top

        self.config = config = self.given_or_default(config)
        channels = config.widths[0]
        imagenet = config.stem == "imagenet"
        self.conv1 = nn.Conv2d(3, channels, 7 if imagenet else 3, 2, 3 if imagenet else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        for stage, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
            stride = 1 if stage == 0 else 2
            shortcut = None
            if stride != 1 or channels != width:
                shortcut = nn.Sequential(conv1x1(channels, width, stride), nn.BatchNorm2d(width))
            blocks = [BasicBlock(channels, width, stride, shortcut)]
            blocks += [BasicBlock(width, width) for _ in range(count - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            channels = width
        self.fc = nn.Linear(channels, len(config.objects))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def feature_map(self, images: Tensor) -> Tensor:
        """Features of the last stage, (N, h, w, widths[-1]), of pictures in the size that they have."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        for stage in range(len(self.config.widths)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x.permute(0, 2, 3, 1)

    def features(self, images: Tensor) -> Tensor:
        """Features of the last stage averaged over space, (N, widths[-1])."""
        return self.feature_map(images).mean((1, 2))

    def forward(self, images: Tensor) -> Tensor:
        check_colours(images)
        images = resize(images, self.config.image_size)
        if self.config.pooling == "average":
            return self.fc(self.features(images))
        return self.fc(self.feature_map(images)).flatten(1, 2).logsumexp(1)

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def logits(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """What :meth:`forward` says, (N, K) float32, on the device of the classifier, in eval mode, without gradient.

        Args:
            images: (N, 3, H, W), floating point in [-1, 1], on any device.
            batch_size: pictures that pass the network at once.

        Raises:
            TypeError: ``images`` is not a tensor.
            ValueError: it is not of this shape and kind, not finite or not in [-1, 1].
        """
        check_range("images", images)
        batch_size = parse_whole("batch_size", batch_size, 1)
        weight = self.fc.weight
        with evaluating(self):
            chunks = [self(chunk.to(weight.device, weight.dtype)) for chunk in images.split(batch_size)]
        return torch.cat(chunks).float()

    def probabilities(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Probability of every object, (N, K) float32 in [0, 1]; arguments and errors are those of :meth:`logits`."""
        return self.logits(images, batch_size).sigmoid()

    @classmethod
    def from_course_checkpoint(cls, path: str | Path) -> SceneClassifier:
        """Load the checkpoint of the course's own evaluator: a pickled torchvision ``resnet18`` state.

        The one pickle that the library ever opens, with ``weights_only=True``, which builds tensors and nothing else.
        Its last layer is ``Sequential(Linear(512, 24), Sigmoid())``; the sigmoid is left out, outputs are logits.

        Args:
            path: the file, a state dict or a dict that holds one under ``"model"``.

        Raises:
            CheckpointError: there is no such file, or it holds something else.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}. Check the path.") from error
        except Exception as error:  # of any kind; its text would advise to load the file in a way that runs code
            raise CheckpointError(
                f"{str(path)!r} is not the course's evaluator: it is damaged or holds more than tensors "
                f"({type(error).__name__}). It was not run; get the file again."
            ) from error
        state = content.get("model", content) if isinstance(content, dict) else content
        with Building():
            model = cls(SceneClassifierConfig())
        try:
            model.load_state_dict({name.replace("fc.0.", "fc."): value for name, value in state.items()})
        except (AttributeError, RuntimeError) as error:  # no dict of names, or the tensors of another model
            raise CheckpointError(
                f"{str(path)!r} is not the course's evaluator, a resnet18 with {len(ICLEVR_OBJECTS)} outputs: "
                f"{' '.join(str(error).split()):.300}"
            ) from error
        return model.eval()
