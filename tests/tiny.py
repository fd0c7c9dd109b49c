"""Models and runs small enough for tests, and what the tests of drawing share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from condgan import (
    DiffDiscriminator,
    GeneratorConfig,
    IterativeGenerator,
    NoiseEncoder,
    SceneClassifier,
    calibration,
    flow,
)
from condgan.batches import TrainingScenes
from condgan.datasets import SceneDataset
from condgan.presets import PRESETS, TrainConfig
from condgan.training import Trainer

PRESET = PRESETS["compact"]
COMPACT = replace(PRESET.generator, width=4, condition_dim=12, light_components=3, light_inputs=2)
REFERENCE = GeneratorConfig(width=4, z_dim=6, condition_dim=12)
SCENES = [
    ["red cube"],
    ["gray sphere", "blue cylinder"],
    ["cyan cube", "red cube", "green sphere"],
    ["yellow cylinder", "yellow cube", "brown sphere"],
    ["purple sphere"],
    ["blue cylinder", "gray sphere"],
    ["red cube", "green cube"],
]
RUN = TrainConfig(
    generator=replace(COMPACT, z_dim=4, condition_dim=8, window=32, light_components=2, light_inputs=2),
    discriminator=replace(PRESET.discriminator, width=4, condition_dim=8, window=32, light_inputs=2),
    objective="relativistic",
    images=72,
    reconstruction_images=36,
    batch_scenes=3,
    penalty_interval=2,
    own_pictures=1.0,
    history_dropout=0.3,
    reconstruction_weight=1.0,
    bf16=False,
)


def shorten_fits(assign: Callable[[object, str, object], None] = setattr) -> None:
    """What a run fits before its first step and after its last would take longer than the runs of tests."""
    assign(flow, "EPOCHS", 3)
    assign(flow, "ARRIVALS", 1024)
    assign(calibration, "PLACE_EPOCHS", 1)
    assign(calibration, "MAPPING_EPOCHS", 2)
    assign(calibration, "RECALIBRATION_BATCHES", 1)


def lively_generator(config: GeneratorConfig, seed: int = 0) -> IterativeGenerator:
    """A generator whose every part matters: no weight or statistic is that of a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = IterativeGenerator(config).eval()
        for parameter in generator.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for module in generator.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean += 0.1 * torch.randn_like(module.running_mean)
                module.running_var += 0.3 * torch.rand_like(module.running_var)
        assert generator.conv.bias is not None
        nn.init.zeros_(generator.conv.bias)  # half of each new picture is drawn, half of it is the previous one
        generator.canvas.mean += 0.3 * torch.randn_like(generator.canvas.mean)
        generator.canvas.components += 0.1 * torch.randn_like(generator.canvas.components)
        if generator.light is not None:
            generator.light.components += 0.05 * torch.randn_like(generator.light.components)
        generator.canvas.grain_mix += 0.05 * torch.eye(3)[:, :, None, None]
        if generator.canvas.flow is not None:
            for buffer in generator.canvas.flow.buffers():
                buffer += 0.1 * torch.randn_like(buffer)
        if generator.correction is not None:
            generator.correction.conditions += generator.encoder(torch.eye(len(config.objects)))[0].detach()
            correction = generator.correction
            for added in (correction.offsets, correction.responses, correction.shares):
                if added is not None:
                    added += 0.05 * torch.randn_like(added)
    return generator


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether more than a few pixels of two pictures differ by more than a grey level."""
    return ((first - second).abs() > 2 / 255).float().mean().item() > 0.05


def gradient_picture(size: tuple[int, int]) -> Image.Image:
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))


def assert_drawn_alike(images: torch.Tensor, others: torch.Tensor) -> None:
    """Pictures in [-1, 1] of whole levels are equal but for a few values, whose last bits decide on the level."""
    levels_off = 127.5 * (images - others).abs()
    assert levels_off.max() < 2
    assert (levels_off > 0.5).float().mean() < 1e-4


def make_trainer(
    data: Path,
    config: TrainConfig = RUN,
    verifier: SceneClassifier | None = None,
    device: torch.device | str = "cpu",
) -> Trainer:
    """Before the first step of a run on packed scenes."""
    torch.manual_seed(config.seed)
    generator, discriminator = IterativeGenerator(config.generator), DiffDiscriminator(config.discriminator)
    noise_encoder = None if config.noise_encoder is None else NoiseEncoder(config.noise_encoder)
    scenes = TrainingScenes(SceneDataset(data, "train"), generator)
    for network in (generator, discriminator, noise_encoder, verifier):
        if network is not None:
            network.to(device)
    return Trainer(config, scenes, generator, discriminator, noise_encoder, verifier=verifier)
