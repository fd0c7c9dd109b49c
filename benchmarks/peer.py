"""What a user would pick instead: a diffusion model of about the same size, drawn from with DDIM in 50 steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

STEPS = 50
MISSING = "the peer is skipped: `pip install diffusers` to have it measured"


def is_installed() -> bool:
    """Whether diffusers can be imported."""
    return importlib.util.find_spec("diffusers") is not None


def diffusion(
    parameters: int, image_size: int = 64, batch_size: int = 1, compiled: bool = False
) -> tuple[Callable[[], object], int]:
    """A case that draws a batch, and the parameters of its network, as near to ``parameters`` as a width allows.

    ``compiled``: the network is, with the first batch.
    """
    from diffusers import DDIMScheduler, UNet2DModel

    def network(width: int) -> torch.nn.Module:
        return UNet2DModel(
            sample_size=image_size,
            layers_per_block=1,
            block_out_channels=(width, 2 * width, 2 * width),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )

    sizes = {width: sum(p.numel() for p in network(width).parameters()) for width in range(16, 129, 16)}
    width = min(sizes, key=lambda width: abs(sizes[width] - parameters))
    unet, scheduler = network(width).eval(), DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    if compiled:
        unet.compile()

    @torch.no_grad()
    def draw() -> None:
        x = torch.randn(batch_size, 3, image_size, image_size)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample

    return draw, sizes[width]
