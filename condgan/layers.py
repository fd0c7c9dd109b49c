"""The building blocks of the reference's two networks."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from condgan.derived import Derived

NEGATIVE_SLOPE = 0.01
"""Slope of every leaky rectifier below zero."""
EPS = 1e-5
"""Added to the variance by batch norms, in the unit of their input squared."""
ENLARGED_PIXELS = 512
"""In maps of fewer pixels, those of a batch together, adding up weights takes longer than the arithmetic that a
generator's block saves by it in training: a weight is added up once a batch, whatever the size of the maps."""
HALVED_PIXELS = 4096
"""The same for a discriminator's block."""
WEIGHTS_PER_PIXEL = 100_000
"""With more weights than this for every pixel of the maps, drawing takes as long as reading the weights, and those that
were added up are 16/9 as many."""


PLAIN_KINDS = (nn.Conv2d, nn.Linear)
LayerT = TypeVar("LayerT", bound=nn.Module)


def normalised(layer: LayerT, spectral: bool) -> LayerT:
    """``layer``, with spectral normalisation of its weight if ``spectral``. Source: arXiv:1802.05957."""
    if spectral:
        spectral_norm(layer)
    return layer


_making_weights = threading.RLock()


@contextmanager
def weights_made_once() -> Iterator[None]:
    """Inside the block a spectrally normalised weight is made once, by one step of the power iteration.

    PyTorch keeps one cache of them for all threads. So one thread at a time is in such a block: others would be handed
    weights without a gradient, or of a graph that is gone.
    """
    with nullcontext() if torch.compiler.is_compiling() else _making_weights, parametrize.cached():
        yield


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer does what its weights say, which may then be used without a call of it.

    A layer with hooks does not, nor one that another library has put in its place, such as an adapter.
    """
    kind = type(layer).__mro__[1] if parametrize.is_parametrized(layer) else type(layer)
    return kind in PLAIN_KINDS and not _is_watched(layer)


def _is_watched(layer: nn.Module) -> bool:
    """Whether a call of the layer does more than its class says: by hooks, or by a ``forward`` of its own."""
    hooks = layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks
    return bool(hooks) or "forward" in vars(layer) or _has_any_global_hook()


def _is_plain_3x3(conv: nn.Conv2d) -> bool:
    """Whether it is a plain 3x3 convolution that keeps the size of its maps, with zeros around them."""
    if not is_plain(conv):
        return False
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == 1 and conv.padding_mode == "zeros"


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm whose per-channel scale and shift are predicted from a condition.

    Computes ``batch_norm(x) * (1 + scale) + shift``. Both predictions start at zero, so a new layer
    equals ``nn.BatchNorm2d(num_features, affine=False)``.

    Args:
        num_features: channels C of the feature map.
        condition_dim: length D of the condition vector.

    Shape:
        x: (N, C, H, W), floating point, any range.
        condition: (N, D), dtype and device of ``x``.
        output: (N, C, H, W), dtype of ``x``.

    Modes: training normalises with batch statistics and updates the running ones; eval only reads them.

    Raises:
        ValueError: ``x`` is not (N, C, H, W), or ``condition`` not (N, D); the message shows the shapes.

    Source: de Vries et al. 2017, arXiv:1707.00683. Unlike the paper, one linear map, no hidden layer.

    Example:
        >>> layer = ConditionalBatchNorm2d(64, condition_dim=128)
        >>> layer(torch.randn(2, 64, 8, 8), torch.randn(2, 128)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, num_features: int, condition_dim: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.bn = nn.BatchNorm2d(num_features, affine=False, eps=EPS, momentum=0.1)
        self.fc = nn.Linear(condition_dim, 2 * num_features)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self._folded = Derived(_folded)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"x must be (N, {self.num_features}, H, W), got {tuple(x.shape)}")
        if condition.shape != (x.shape[0], self.fc.in_features):
            raise ValueError(
                f"condition must be (N, {self.fc.in_features}) for x of shape {tuple(x.shape)}, "
                f"got {tuple(condition.shape)}"
            )
        mean, variance = getattr(self.bn, "running_mean", None), getattr(self.bn, "running_var", None)
        if mean is None or variance is None or not self._folds():
            scale, shift = self.fc(condition)[:, :, None, None].chunk(2, dim=1)  # (N, C, 1, 1) each
            return torch.addcmul(shift, self.bn(x), 1 + scale)
        weight, bias = self._folded(self.fc.weight, self.fc.bias, mean, variance)
        affine = torch.addmm(bias, condition, weight).to(x.dtype)
        scale, shift = affine.view(x.shape[0], 2, self.num_features, 1, 1).unbind(1)
        return torch.addcmul(shift, x, scale)

    if TYPE_CHECKING:
        __call__ = forward

    def _folds(self) -> bool:
        """Whether both norms are one scale and shift: in eval mode, if neither part was replaced or is watched."""
        norm = self.bn
        if norm.training or type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or _is_watched(norm):
            return False
        return not norm.affine and norm.eps == EPS and is_plain(self.fc)

    def extra_repr(self) -> str:
        return f"{self.num_features}, condition_dim={self.fc.in_features}"


def _folded(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """The linear map that predicts one scale and shift for both norms: of (x - mean) / std * (1 + scale) + shift.

    ``weight`` (2C, D) and ``bias`` (2C,) are those of the conditional norm; the result's are (D, 2C) and (2C,).
    """
    inverse = torch.rsqrt(variance + EPS)
    (scale, shift), (scale_bias, shift_bias) = weight.chunk(2), bias.chunk(2)
    scale, scale_bias = inverse[:, None] * scale, inverse * (1 + scale_bias)
    shift, shift_bias = shift - mean[:, None] * scale, shift_bias - mean * scale_bias
    return torch.cat((scale, shift)).T, torch.cat((scale_bias, shift_bias))


def enlarging_weight(weight: Tensor) -> Tensor:
    """The transposed convolution that equals nearest upsampling by two and then a 3x3 convolution.

    Of the 3x3 pixels that a pixel of the large map sees, some are copies of one pixel of the small map. Adding up their
    weights first leaves 2x2 pixels, 4/9 of the arithmetic.

    Args:
        weight: (O, I, 3, 3) of a convolution with padding 1.

    Returns:
        (I, O, 4, 4), for ``stride=2, padding=1``.
    """
    return _summed_in_pairs(weight.transpose(0, 1).flip(2, 3), 1)


def halving_weight(weight: Tensor) -> Tensor:
    """The convolution that equals a 3x3 convolution and then average pooling of 2x2 pixels.

    A pixel of the small map is the mean of four sums over 3x3 pixels, which overlap. Adding up the weights of each
    pixel first leaves one sum over 4x4 pixels, 4/9 of the arithmetic.

    Args:
        weight: (O, I, 3, 3) of a convolution with padding 1.

    Returns:
        (O, I, 4, 4), for ``stride=2, padding=1``.
    """
    return _summed_in_pairs(weight, 1 / 4)


def _summed_in_pairs(weight: Tensor, factor: float) -> Tensor:
    """(A, B, 3, 3) and its copies moved by one pixel right, down and both, added up to (A, B, 4, 4), channels last.

    As a matrix product, which reads and writes large weights once.
    """
    one = torch.eye(3, dtype=weight.dtype, device=weight.device)
    pairs = F.pad(one, (0, 0, 0, 1)) + F.pad(one, (0, 0, 1, 0))  # (4, 3)
    sums = factor * torch.kron(pairs, pairs)  # (16, 9)
    return (sums @ weight.permute(0, 2, 3, 1).flatten(1, 2)).unflatten(1, (4, 4)).permute(0, 3, 1, 2)


class _RectifiedChange(torch.autograd.Function):
    """:func:`rectified_change`. Its derivatives are those of the rectifier at ``x + change`` and at ``x``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, change: Tensor) -> Tensor:
        negated = -x
        return torch.lerp(torch.maximum(change, negated).sub_(negated.relu_()), change, NEGATIVE_SLOPE)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (x, change), (moved, also) = ctx.saved_tensors, tangents
        after = torch.ops.aten.leaky_relu_backward(moved + also, x + change, NEGATIVE_SLOPE, False)
        return after - torch.ops.aten.leaky_relu_backward(moved, x, NEGATIVE_SLOPE, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, change = ctx.saved_tensors
        after = torch.ops.aten.leaky_relu_backward(grads[0], x + change, NEGATIVE_SLOPE, False)
        return after - torch.ops.aten.leaky_relu_backward(grads[0], x, NEGATIVE_SLOPE, False), after


def rectified_change(x: Tensor, change: Tensor) -> Tensor:
    """``leaky_relu(x + change) - leaky_relu(x)``, rounded as ``change`` is, not as ``x`` is.

    Subtracted from each other, the two would leave what rounding took from them, which in bfloat16 is more than a small
    change. Where no sign turns, a change passes as its half of the rectifier lets it; of a ReLU it is
    ``max(change, -x) - relu(-x)`` everywhere.

    Shape:
        x, change: of one shape.
        output: likewise.
    """
    rectified: Tensor = _RectifiedChange.apply(x, change)
    return rectified


def _convolved_changes(conv: nn.Conv2d, changes: Sequence[Tensor]) -> list[Tensor]:
    """Of the input of a convolution to those of its output, which its bias does not change."""
    weight = conv.weight
    return [F.conv2d(change, weight, padding=conv.padding) for change in changes]


def _pixels(x: Tensor) -> float:
    """Of maps (N, C, H, W) all together; infinite in a graph that is exported for any N, which are many."""
    return math.inf if isinstance(x.shape[0], torch.SymInt) else x.shape[0] * x.shape[2] * x.shape[3]


class GenBlock(nn.Module):
    """Residual block of the generator; doubles the resolution.

    Main path: conditional batch norm, leaky ReLU, nearest upsampling, 3x3 convolution, then the same without
    upsampling. Shortcut: 1x1 convolution and upsampling, in this order: the same map at a quarter of the work.
    Upsampling and the convolution after it are one transposed convolution (:func:`enlarging_weight`), but for small
    maps.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        condition_dim: length D of the condition.

    Shape:
        x: (N, in_channels, H, W).
        condition: (N, D).
        output: (N, out_channels, 2H, 2W).

    Raises:
        ValueError: an input does not have the shape above.

    Source: Miyato and Koyama 2018, arXiv:1802.05637 (figure 14), with leaky ReLU as in the reference.

    Example:
        >>> GenBlock(8, 4)(torch.randn(2, 8, 4, 4), torch.randn(2, 256)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, condition_dim: int = 256) -> None:
        super().__init__()
        self.cbn1 = ConditionalBatchNorm2d(in_channels, condition_dim)
        self.cbn2 = ConditionalBatchNorm2d(out_channels, condition_dim)
        self.c0 = nn.Conv2d(in_channels, out_channels, 1)
        self.c1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.c2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self._enlarging_weight = Derived(enlarging_weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        y = F.leaky_relu(self.cbn1(x, condition), NEGATIVE_SLOPE)
        if not _is_plain_3x3(self.c1) or self._is_small(y):
            y = self.c1(F.interpolate(y, scale_factor=2, mode="nearest"))  # (N, out_channels, 2H, 2W)
        else:
            y = F.conv_transpose2d(y, self._enlarging_weight(self.c1.weight), self.c1.bias, stride=2, padding=1)
        y = self.c2(F.leaky_relu(self.cbn2(y, condition), NEGATIVE_SLOPE))
        return y + F.interpolate(self.c0(x), scale_factor=2, mode="nearest")

    if TYPE_CHECKING:
        __call__ = forward

    def _is_small(self, x: Tensor) -> bool:
        """Whether the maps are too small for added weights to pay."""
        if torch.is_grad_enabled():
            return _pixels(x) < ENLARGED_PIXELS
        return _pixels(x) * WEIGHTS_PER_PIXEL < self.c1.weight.numel()


class DisBlock(nn.Module):
    """Residual block of the discriminator, with spectral normalisation unless told otherwise; halves the resolution.

    Main path: 3x3 convolution, leaky ReLU, 3x3 convolution, average pooling, after a leaky ReLU on the input unless it
    is a picture (``preactivate=False``). Shortcut: average pooling and a 1x1 convolution. The second 3x3 convolution
    and the pooling after it are one convolution (:func:`halving_weight`), but for small maps.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        preactivate: rectify the input of the main path; False for the first block, whose input is a picture.
        spectral: whether the convolutions have spectral normalisation.

    Shape:
        x: (N, in_channels, H, W), H and W at least 2.
        output: (N, out_channels, H // 2, W // 2).

    Raises:
        ValueError: ``x`` does not have the shape above.

    Source: Miyato et al. 2018, arXiv:1802.05957.

    Example:
        >>> DisBlock(3, 8)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, preactivate: bool = True, spectral: bool = True) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.preactivate = preactivate
        self.c0 = normalised(nn.Conv2d(in_channels, out_channels, 1), spectral)
        self.c1 = normalised(nn.Conv2d(in_channels, out_channels, 3, padding=1), spectral)
        self.c2 = normalised(nn.Conv2d(out_channels, out_channels, 3, padding=1), spectral)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        shortcut = self.c0(F.avg_pool2d(x, 2))
        if self.preactivate:
            x = F.leaky_relu(x, NEGATIVE_SLOPE)
        x = F.leaky_relu(self.c1(x), NEGATIVE_SLOPE)
        x = self._halve(x, self.c2.bias) if _is_plain_3x3(self.c2) else F.avg_pool2d(self.c2(x), 2)
        return x + shortcut

    @property
    def carries_changes(self) -> bool:
        """Whether :meth:`changes` gives what calls of the block would: its convolutions are its own, without hooks."""
        return is_plain(self.c0) and _is_plain_3x3(self.c1) and _is_plain_3x3(self.c2) and not _is_watched(self)

    def changes(self, x: Tensor, changes: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What the block makes of ``x``, and how ``x + change`` would change that, for each of ``changes``.

        The same as ``block(x + change) - block(x)``, but what rounding costs goes by the size of the changes. It uses
        the weights of the convolutions, and calls no hooks for the changes.

        Shape:
            x: as in :meth:`forward`; changes: likewise, each.
            output: as that of :meth:`forward`, and likewise for each change.
        """
        self._check(x)
        with weights_made_once():
            shortcuts = _convolved_changes(self.c0, [F.avg_pool2d(change, 2) for change in changes])
            inside = [rectified_change(x, change) for change in changes] if self.preactivate else changes
            before = self.c1(F.leaky_relu(x, NEGATIVE_SLOPE) if self.preactivate else x)
            inside = [rectified_change(before, change) for change in _convolved_changes(self.c1, inside)]
            inside = [self._halve(change, None) for change in inside]
            y = self._halve(F.leaky_relu(before, NEGATIVE_SLOPE), self.c2.bias) + self.c0(F.avg_pool2d(x, 2))
        return y, [change + shortcut for change, shortcut in zip(inside, shortcuts, strict=True)]

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] < 2 or x.shape[3] < 2:
            raise ValueError(f"x must be (N, {self.in_channels}, H, W), H and W at least 2, got {tuple(x.shape)}")

    def _halve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The second convolution and the pooling."""
        if _pixels(x) < HALVED_PIXELS:
            return F.avg_pool2d(F.conv2d(x, self.c2.weight, bias, padding=1), 2)
        return F.conv2d(x, halving_weight(self.c2.weight), bias, stride=2, padding=1)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"preactivate={self.preactivate}"


class ConditionProjector(nn.Module):
    """Inner product of image features with a learned map of the condition: how well the two fit.

    The map is Linear, ReLU, Linear, with spectral normalisation unless told otherwise.

    Args:
        condition_dim: length D of the condition.
        feature_dim: length F of the features.
        spectral: whether both layers have spectral normalisation.

    Shape:
        features: (N, F).
        condition: (N, D).
        output: (N,), any range, to be added to the logits.

    Raises:
        ValueError: the two inputs do not have the shapes above.

    Source: Miyato and Koyama 2018, arXiv:1802.05637, equation 3; the embedding is a two-layer map here.

    Example:
        >>> ConditionProjector(256, 16)(torch.randn(2, 16), torch.randn(2, 256)).shape
        torch.Size([2])
    """

    def __init__(self, condition_dim: int = 256, feature_dim: int = 1024, spectral: bool = True) -> None:
        super().__init__()
        self.l1 = normalised(nn.Linear(condition_dim, feature_dim), spectral)
        self.l2 = normalised(nn.Linear(feature_dim, feature_dim), spectral)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        n = features.shape[0]
        expected = ((n, self.l2.out_features), (n, self.l1.in_features))
        if (features.shape, condition.shape) != expected:
            raise ValueError(
                f"features and condition must be {expected[0]} and {expected[1]}, "
                f"got {tuple(features.shape)} and {tuple(condition.shape)}"
            )
        return (features * self.l2(F.relu(self.l1(condition)))).sum(1)

    if TYPE_CHECKING:
        __call__ = forward
