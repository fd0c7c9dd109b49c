"""Slow plain versions of what the library computes, written down from the formulas: loops and elementary operations.

They read the weights of the library's modules and nothing else of them. And :func:`randomise`, without which weights
that start at zero would hide what they do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from condgan.layers import ConditionalBatchNorm2d, ConditionProjector, DisBlock, GenBlock
from condgan.light import SceneLight
from condgan.models import DiffDiscriminator, IterativeGenerator, NoiseEncoder
from condgan.parts import ConditionRNN, NoiseMapping, PlaceModel, PreviousImageEncoder


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and running statistic away from where it starts; returns the module, in eval mode."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=rng) / parameter[0].numel() ** 0.5
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean += 0.3 * torch.randn(part.running_mean.shape, generator=rng)
            part.running_var *= 0.5 + torch.rand(part.running_var.shape, generator=rng)
        if isinstance(part, SceneLight):
            part.components += 0.1 * torch.randn(part.components.shape, generator=rng)
    return module.eval()


def leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, x, slope * x)


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Row by row: the weight times the row, plus the bias."""
    return torch.stack([plain_weight(layer) @ row for row in x]) + layer.bias


def convolution(layer: nn.Module, x: Tensor) -> Tensor:
    """Cross-correlation with zeros around the picture, one position of the kernel after the other."""
    weight = plain_weight(layer)
    (stride, _), (padding, _), (dilation, _) = layer.stride, layer.padding, layer.dilation
    n, channels, height, width = x.shape
    padded = x.new_zeros(n, channels, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = x
    reach = dilation * (weight.shape[-1] - 1)
    rows = range(0, padded.shape[2] - reach, stride)
    columns = range(0, padded.shape[3] - reach, stride)
    out = x.new_zeros(n, len(weight), len(rows), len(columns))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            seen = padded[:, :, [row + i * dilation for row in rows]][
                ..., [column + j * dilation for column in columns]
            ]
            out = out + torch.einsum("oc,nchw->nohw", weight[:, :, i, j], seen)
    return out if layer.bias is None else out + layer.bias[:, None, None]


def plain_weight(layer: nn.Module) -> Tensor:
    """The weight that a layer applies; under spectral normalisation W / (u' W v), with the vectors as they are."""
    if not hasattr(layer, "parametrizations"):
        return layer.weight
    (norm,) = layer.parametrizations.weight
    original = layer.parametrizations.weight.original
    return original / (norm._u @ original.flatten(1) @ norm._v)


def upsample(x: Tensor) -> Tensor:
    """Every pixel four times."""
    out = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            out[:, :, i, j] = x[:, :, i // 2, j // 2]
    return out


def average_pool(x: Tensor) -> Tensor:
    """The mean of every 2x2 pixels; an odd last row or column is left out."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    out = x.new_zeros(*x.shape[:2], height, width)
    for i in range(height):
        for j in range(width):
            out[:, :, i, j] = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
    return out


def batch_norm(bn: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Channel by channel; the affine part only where the layer has one."""
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        if bn.training:
            mean = values.mean()
            variance = ((values - mean) ** 2).mean()
        else:
            mean, variance = bn.running_mean[c], bn.running_var[c]
        out[:, c] = (values - mean) / torch.sqrt(variance + bn.eps)
        if bn.affine:
            out[:, c] = out[:, c] * bn.weight[c] + bn.bias[c]
    return out


def conditional_batch_norm(layer: ConditionalBatchNorm2d, x: Tensor, condition: Tensor) -> Tensor:
    """``batch_norm(x) * (1 + scale) + shift``, item by item and channel by channel."""
    normalised = batch_norm(layer.bn, x)
    out = torch.empty_like(x)
    channels = x.shape[1]
    for n in range(len(x)):
        prediction = layer.fc.weight @ condition[n] + layer.fc.bias  # (2C,): scales, then shifts
        for c in range(channels):
            out[n, c] = normalised[n, c] * (1 + prediction[c]) + prediction[channels + c]
    return out


def gen_block(block: GenBlock, x: Tensor, condition: Tensor) -> Tensor:
    """With the shortcut in the order of the paper: upsampling, then the 1x1 convolution."""
    main = upsample(leaky_relu(conditional_batch_norm(block.cbn1, x, condition)))
    main = convolution(block.c1, main)
    main = convolution(block.c2, leaky_relu(conditional_batch_norm(block.cbn2, main, condition)))
    return main + convolution(block.c0, upsample(x))


def dis_block(block: DisBlock, x: Tensor, first: bool) -> Tensor:
    """``first``: the input is a picture, which is not rectified."""
    main = convolution(block.c1, x if first else leaky_relu(x))
    main = average_pool(convolution(block.c2, leaky_relu(main)))
    return main + convolution(block.c0, average_pool(x))


def condition_projection(projector: ConditionProjector, features: Tensor, condition: Tensor) -> Tensor:
    embedded = linear(projector.l2, relu(linear(projector.l1, condition)))
    return torch.stack([torch.dot(a, b) for a, b in zip(features, embedded, strict=True)])


def gru_cell(cell: nn.GRUCell, x: Tensor, hidden: Tensor) -> Tensor:
    """Cho et al. 2014, arXiv:1406.1078, with the reset gate after the matrix product."""
    size = cell.hidden_size
    reset_x, update_x, new_x = (x @ cell.weight_ih.T + cell.bias_ih).split(size, 1)
    reset_h, update_h, new_h = (hidden @ cell.weight_hh.T + cell.bias_hh).split(size, 1)
    reset, update = sigmoid(reset_x + reset_h), sigmoid(update_x + update_h)
    return (1 - update) * torch.tanh(new_x + reset * new_h) + update * hidden


def condition_rnn(rnn: ConditionRNN, turns: Sequence[set[int]]) -> tuple[list[Tensor], Tensor]:
    """One scene: the ids of every turn to the conditions (D,) of every turn and the last hidden (D,)."""
    hidden = torch.zeros_like(rnn.embedding.weight[:1])
    outputs = []
    for ids in turns:
        embedded = sum((rnn.embedding.weight[i] for i in sorted(ids)), torch.zeros_like(hidden))
        hidden = gru_cell(rnn.gru, embedded, hidden)
        mean = hidden.mean()
        deviation = torch.sqrt(((hidden - mean) ** 2).mean() + rnn.norm.eps)
        outputs.append(((hidden - mean) / deviation * rnn.norm.weight + rnn.norm.bias)[0])
    return outputs, hidden[0]


def previous_image_features(encoder: PreviousImageEncoder, image: Tensor) -> list[Tensor]:
    features = []
    for conv, norm in zip(encoder.convs, encoder.norms, strict=True):
        image = relu(batch_norm(norm, convolution(conv, image)))
        features.append(image)
    return features


def place_map(places: Sequence[Sequence[float]], image_size: int, sigma: float = 3.0) -> Tensor:
    out = torch.zeros(len(places), 1, image_size, image_size, dtype=torch.float64)
    for n, (x, y) in enumerate(places):
        for row in range(image_size):
            for column in range(image_size):
                out[n, 0, row, column] = math.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * sigma**2))
    return out


def place_of_change(prev_image: Tensor, image: Tensor, threshold: float) -> tuple[float, float]:
    """The centroid of one pair of pictures (3, H, W); NaN where nothing changed."""
    pixels = [
        (x, y)
        for y in range(image.shape[1])
        for x in range(image.shape[2])
        if max(abs(image[c, y, x].item() - prev_image[c, y, x].item()) for c in range(3)) > threshold
    ]
    if not pixels:
        return math.nan, math.nan
    return sum(x for x, _ in pixels) / len(pixels), sum(y for _, y in pixels) / len(pixels)


def place_logits(model: PlaceModel, image: Tensor, condition: Tensor, light: Tensor) -> Tensor:
    fine = relu(convolution(model.conv1, image))
    coarse = relu(convolution(model.conv2, fine))
    coarse = coarse + relu(convolution(model.conv3, coarse) + linear(model.condition, condition)[:, :, None, None])
    assert model.light is not None
    x = convolution(model.conv4, torch.cat((fine, upsample(coarse)), 1))
    x = relu(x + torch.einsum("nl,cl->nc", light, model.light.weight)[:, :, None, None])
    return convolution(model.conv5, x)[:, 0] + model.prior  # the points in the cells: tests/test_models.py


class Window(NamedTuple):
    """A square of one picture."""

    left: int
    top: int
    square: Tensor
    """(3, S, S), as it is in the picture."""
    detail: Tensor
    """(3, S, S): ten times the distance of every pixel to the mean of the nine around it; the border is repeated."""
    maps: Tensor
    """(3, S, S): the place as a blob, x and y from -1 to 1 over the whole picture."""


def window_corner(place: Sequence[float], image_size: int, window: int) -> tuple[int, int]:
    """Left and top of the square whose middle is the place, a little below it, or as near as the picture allows."""
    x, y = place
    left, top = round(x - (window - 1) / 2), round(y + image_size / 16 - (window - 1) / 2)
    return min(max(left, 0), image_size - window), min(max(top, 0), image_size - window)


def window_of(picture: Tensor, place: Sequence[float], window: int) -> Window:
    image_size = picture.shape[-1]
    left, top = window_corner(place, image_size, window)
    square = picture[:, top : top + window, left : left + window]
    inside = [min(max(i, 0), window - 1) for i in range(-1, window + 1)]
    framed = square[:, inside][:, :, inside]  # (3, S + 2, S + 2)
    steps = range(3)
    around = sum(framed[:, row : row + window, column : column + window] for row in steps for column in steps)
    coordinates = picture.new_empty(2, window, window)
    for i in range(window):
        coordinates[0, :, i] = 2 * (left + i) / (image_size - 1) - 1
        coordinates[1, i, :] = 2 * (top + i) / (image_size - 1) - 1
    blob = place_map([(place[0] - left, place[1] - top)], window)[0].to(picture.dtype)
    return Window(left, top, square, 10 * (square - around / 9), torch.cat((blob, coordinates)))


def generate_turn(
    generator: IterativeGenerator, z: Tensor, condition: Tensor, prev_image: Tensor, place: Tensor | None = None
) -> Tensor:
    """One turn; with a window it is cut out of each picture, drawn, and put back."""
    size = generator.config.window
    light = z.new_zeros(len(z), 0) if generator.light is None else generator.light(prev_image).to(z.dtype)
    if generator.mapping is not None:
        where = place if place is None else 2 * place / (prev_image.shape[-1] - 1) - 1
        known = light if where is None else torch.cat((where, light), 1)
        z = torch.stack([map_noise(generator.mapping, *row) for row in zip(z, condition, known, strict=True)])
    if place is None:
        return draw(generator, z, condition, light, prev_image, prev_image)
    if size is None:
        blobs = place_map(place.tolist(), prev_image.shape[-1]).to(prev_image.dtype)
        return draw(generator, z, condition, light, prev_image, torch.cat((prev_image, blobs), 1))
    windows = [window_of(picture, xy, size) for picture, xy in zip(prev_image, place.tolist(), strict=True)]
    known = torch.stack([torch.cat((w.square, w.maps, w.detail)) for w in windows])
    drawn = draw(generator, z, condition, light, known[:, :3], known)
    out = prev_image.clone()
    for picture, patch, w in zip(out, drawn, windows, strict=True):
        picture[:, w.top : w.top + size, w.left : w.left + size] = patch
    return out


def map_noise(mapping: NoiseMapping, z: Tensor, condition: Tensor, known: Tensor) -> Tensor:
    """The code of one noise: coupling after coupling, the last one first, number by number."""
    context = torch.cat((mapping.context.weight @ condition + mapping.context.bias, known))
    x = z.clone()
    for number in reversed(range(len(mapping.flow.couplings))):
        k = len(x)
        kept = [[i % 2 == 0, i % 2 == 1, i < k // 2, i >= k // 2][number % 4] for i in range(k)]
        h = torch.cat((x * torch.tensor(kept), context))
        for layer in mapping.flow.couplings[number]:
            h = h * sigmoid(h) if isinstance(layer, nn.SiLU) else layer.weight @ h + layer.bias
        for i in range(k):
            if not kept[i]:
                x[i] = x[i] * torch.exp(3 * torch.tanh(h[k + i] / 3)) + h[i]
    return x


def draw(
    generator: IterativeGenerator, z: Tensor, condition: Tensor, light: Tensor, prev_image: Tensor, known: Tensor
) -> Tensor:
    """The networks of a turn: every block doubles the resolution, and all but the first may see what is there."""
    config = generator.config
    features = previous_image_features(generator.prev_encoder, known)
    norm_condition = torch.cat((condition, z, light) if config.noise_in_norm else (condition, light), 1)
    blend = config.output == "blend"
    side = known.shape[-1] // 2 ** (len(features) + 1)

    x = linear(generator.l0, torch.cat((z, linear(generator.c_proj, condition)), 1)).view(len(z), -1, side, side)
    x = gen_block(generator.block1, x, norm_condition)
    for number, feature in enumerate(reversed(features), 2):
        x = torch.cat((x, feature), 1) if blend or number == 2 else x
        x = gen_block(getattr(generator, f"block{number}"), x, norm_condition)
    x = leaky_relu(batch_norm(generator.bn, x))
    if not blend:
        return torch.tanh(convolution(generator.conv, x))
    x = convolution(generator.conv, torch.cat((x, known), 1))
    mask = sigmoid(x[:, 3:4])
    image = mask * torch.tanh(x[:, :3]) + (1 - mask) * prev_image + x[:, 4:] / 127.5
    return torch.clamp(image, -1, 1)


def discriminate(
    discriminator: DiffDiscriminator,
    prev_image: Tensor,
    image: Tensor,
    condition: Tensor,
    place: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (N,) and object logits (N, K), the two pictures one after the other."""
    size = discriminator.config.window
    features = []
    for pictures in (prev_image, image):
        x = pictures
        if place is not None and size is None:
            x = torch.cat((x, place_map(place.tolist(), x.shape[-1]).to(x.dtype)), 1)
        elif place is not None:
            windows = [window_of(picture, xy, size) for picture, xy in zip(pictures, place.tolist(), strict=True)]
            x = torch.stack([torch.cat((w.square, w.maps, w.detail)) for w in windows])
        x = dis_block(discriminator.block1, x, first=True)
        x = dis_block(discriminator.block2, x, first=False)
        features.append(dis_block(discriminator.block3, x, first=False))
    x = features[1] - features[0]
    if discriminator.light is not None:
        light = discriminator.light(prev_image).to(x.dtype)
        x = x + (light @ discriminator.light_bias.weight.T)[:, :, None, None]
    for name in ("block4", "block5", "block6"):
        x = dis_block(getattr(discriminator, name), x, first=False) if hasattr(discriminator, name) else x
    x = leaky_relu(x).sum((2, 3))
    logits = linear(discriminator.l6, x)[:, 0]
    logits = logits + condition_projection(discriminator.condition_projector, x, condition)
    first, _, second = discriminator.aux_objective
    return logits, linear(second, relu(linear(first, x)))


def find_noise(encoder: NoiseEncoder, prev_image: Tensor, image: Tensor, place: Tensor | None = None) -> Tensor:
    """The picture and what changed in it, through three stages of two convolutions; their mean and maximum to noise."""
    size = encoder.config.window
    inputs = []
    for n, (before, after) in enumerate(zip(prev_image, image, strict=True)):
        maps = [] if place is None else [place_map([place[n].tolist()], before.shape[-1])[0].to(before.dtype)]
        if place is not None and size is not None:
            before, after = (window_of(picture, place[n].tolist(), size) for picture in (before, after))
            before, after, maps = before.square, after.square, [after.maps]
        inputs.append(torch.cat((after, after - before, *maps)))
    x = torch.stack(inputs)
    for stage in encoder.stages:
        x = leaky_relu(convolution(stage[0], x), slope=0.1)
    maxima = torch.stack([channels.flatten(1).max(1).values for channels in x])
    pooled = torch.cat((x.sum((2, 3)) / x[0, 0].numel(), maxima), 1)
    return batch_norm(encoder.norm, linear(encoder.linear, pooled))
