"""What a user would pick instead: a diffusion model of about the same size, drawn from with DDIM in 50 steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

STEPS = 50
MISSING = "the peer is skipped: `pip install diffusers` to have it measured"


def is_installed() -> bool:
    """Whether diffusers can be imported."""
    return importlib.util.find_spec("diffusers") is not None


def diffusion(
    parameters: int,
    image_size: int = 64,
    batch_size: int = 1,
    runtime: Literal["as it is", "compiled", "ONNX Runtime"] = "as it is",
) -> tuple[Callable[[], object], int]:
    """A case that draws a batch, and the parameters of its network, as near to ``parameters`` as a width allows.

    ``runtime`` runs the network: PyTorch, PyTorch after compiling it with the first batch, or ONNX Runtime, with as
    many threads as PyTorch.
    """
    from diffusers import DDIMScheduler, UNet2DModel

    def network(width: int) -> nn.Module:
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
    if runtime == "compiled":
        unet.compile()
    predict = _by_onnx_runtime(unet) if runtime == "ONNX Runtime" else lambda x, t: unet(x, t).sample

    @torch.no_grad()
    def draw() -> None:
        x = torch.randn(batch_size, 3, image_size, image_size)
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t), t, x).prev_sample

    return draw, sizes[width]


class _Noise(nn.Module):
    """What a network of diffusers says of pictures at a time, as a tensor."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t, return_dict=False)[0]


def _by_onnx_runtime(unet: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The same for single pictures, by ONNX Runtime."""
    import onnxruntime

    example = torch.zeros(1, 3, unet.config.sample_size, unet.config.sample_size), torch.tensor(0)
    with torch.no_grad():
        program = torch.onnx.export(_Noise(unet), example, input_names=["x", "t"], dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda x, t: torch.from_numpy(session.run(None, {"x": x.numpy(), "t": t.numpy()})[0])
