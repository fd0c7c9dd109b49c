"""The plain way: the reference written straight down, with the same weights.

Float32, default layout, one turn at a time, the previous picture read again by every pass of the discriminator, the
gradient penalty in every step. Upsampling and the convolution after it are two operations, as in the paper.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condgan import DiffDiscriminator, IterativeGenerator
from condgan.layers import enlarging_weight
from condgan.losses import OBJECTIVES

STEPS = (
    "the 1x1 shortcut before upsampling",
    "upsampling and convolution as one transposed convolution",
    "channels last, each norm one scale and one shift",
    "bfloat16",
)
"""What was done to draw faster, each on top of the one before."""


def _norm(layer: Any, x: Tensor, condition: Tensor) -> Tensor:
    scale, shift = layer.fc(condition)[:, :, None, None].chunk(2, 1)
    return layer.bn(x) * (1 + scale) + shift


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _gen_block(block: Any, x: Tensor, condition: Tensor, steps: int) -> Tensor:
    shortcut = block.c0(_upsample(x)) if steps < 1 else _upsample(block.c0(x))
    x = F.leaky_relu(_norm(block.cbn1, x, condition), 0.01)
    if steps < 2:
        x = block.c1(_upsample(x))
    else:
        x = F.conv_transpose2d(x, enlarging_weight(block.c1.weight), block.c1.bias, stride=2, padding=1)
    return block.c2(F.leaky_relu(_norm(block.cbn2, x, condition), 0.01)) + shortcut


def turn(generator: IterativeGenerator, z: Tensor, condition: Tensor, prev_image: Tensor, steps: int = 0) -> Tensor:
    """One turn of a generator of the reference's architecture, like ``IterativeGenerator.forward``.

    ``steps`` says how many of the first two steps of :data:`STEPS` away from the plain way are taken.
    """
    features = generator.prev_encoder(prev_image)[-1]  # (N, 8 width, 8, 8)
    x = generator.l0(torch.cat((z, generator.c_proj(condition)), 1)).unflatten(1, (-1, 4, 4))
    for i in range(4):
        if i == 1:
            x = torch.cat((x, features), 1)
        x = _gen_block(generator.get_submodule(f"block{i + 1}"), x, condition, steps)
    return torch.tanh(generator.conv(F.leaky_relu(generator.bn(x), 0.01)))


def _dis_block(block: Any, x: Tensor) -> Tensor:
    shortcut = F.avg_pool2d(block.c0(x), 2)
    if block.preactivate:
        x = F.leaky_relu(x, 0.01)
    return F.avg_pool2d(block.c2(F.leaky_relu(block.c1(x), 0.01)), 2) + shortcut


def judge(
    discriminator: DiffDiscriminator, prev_image: Tensor, image: Tensor, condition: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (N,) and object logits (N, K) of a discriminator of the reference's architecture."""
    blocks = [discriminator.get_submodule(f"block{i + 1}") for i in range(5)]
    before, after = prev_image, image
    for block in blocks[:3]:
        before, after = _dis_block(block, before), _dis_block(block, after)
    x = _dis_block(blocks[4], _dis_block(blocks[3], after - before))
    features = F.leaky_relu(x, 0.01).sum((2, 3))
    logits = discriminator.l6(features)[:, 0] + discriminator.condition_projector(features, condition)
    return logits, discriminator.aux_objective(features)


class PlainTraining:
    """The two updates of a training step, one network after the other, each scene's turns one by one.

    Args:
        generator: of the reference's architecture, trained in place.
        discriminator: likewise.
        images: (S, T + 1, 3, H, W) in [-1, 1], the empty scene first.
        objects: (S, T, K) one-hot.
    """

    def __init__(
        self, generator: IterativeGenerator, discriminator: DiffDiscriminator, images: Tensor, objects: Tensor
    ) -> None:
        self.generator, self.discriminator = generator.train(), discriminator.train()
        self.images, self.objects = images, objects
        self.objective = OBJECTIVES["reference"]
        self.optimizers = [
            torch.optim.Adam(discriminator.parameters(), 4e-4, (0.0, 0.9)),
            torch.optim.Adam(generator.parameters(), 1e-4, (0.0, 0.9)),
        ]
        self.average = {name: value.clone() for name, value in generator.state_dict().items()}

    def step(self) -> None:
        """One update of both networks for every turn."""
        hidden = None
        for i in range(self.objects.shape[1]):
            condition, hidden = self.generator.encoder(self.objects[:, i], hidden)
            self._turn(self.images[:, i], self.images[:, i + 1], self.objects[:, i], condition)
            hidden = hidden.detach()
        for name, value in self.generator.state_dict().items():
            self.average[name].copy_(value if not value.is_floating_point() else self.average[name].lerp(value, 0.001))

    def _turn(self, before: Tensor, after: Tensor, objects: Tensor, condition: Tensor) -> None:
        update_discriminator, update_generator = self.optimizers
        z = torch.randn(len(before), self.generator.z_dim)
        fake = turn(self.generator, z, condition, before)
        real = after.clone().requires_grad_()
        real_logits, real_objects = judge(self.discriminator, before, real, condition.detach())
        fake_logits, _ = judge(self.discriminator, before, fake.detach(), condition.detach())
        loss = self.objective.discriminator(
            real_logits=real_logits, fake_logits=fake_logits, real_object_logits=real_objects, objects=objects
        )
        loss = loss + self.objective.penalty(real_logits=real_logits, real=real)
        update_discriminator.zero_grad()
        loss.mean().backward()
        update_discriminator.step()
        fake_logits, _ = judge(self.discriminator, before, fake, condition.detach())
        update_generator.zero_grad()
        self.objective.generator(fake_logits=fake_logits, objects=objects).mean().backward()
        update_generator.step()
