"""What the tests start several of: ``python rank_program.py TASK ARGUMENTS``, with the variables that torchrun sets."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from tiny import RUN, shorten_fits
from torch import Tensor, nn

from condgan import DiscriminatorConfig, GeneratorConfig, IterativeGenerator, runs
from condgan import ranks as ranks_module
from condgan.batches import TrainingScenes
from condgan.datasets import SceneDataset
from condgan.models import DiffDiscriminator, NoiseEncoder
from condgan.presets import TrainConfig
from condgan.ranks import ALONE, GlobalBatchNorm, Ranks, joined
from condgan.training import Trainer

LONG = dataclasses.replace(RUN, images=100_000, reconstruction_images=90, own_pictures=0.0)
CONFIGS = {
    "compact": dataclasses.replace(RUN, images=45, reconstruction_images=18),
    "reference": TrainConfig(
        generator=GeneratorConfig(width=4, z_dim=6, condition_dim=8),
        discriminator=DiscriminatorConfig(width=4, condition_dim=8),
        images=45,
        batch_scenes=3,
        bf16=False,
    ),
}


def start_ranks(count: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """This file in so many processes, which find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    shared["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, arguments)],
            env=os.environ | {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def make_trainer(data: Path, config: TrainConfig, ranks: Ranks = ALONE, accumulate: int = 1) -> Trainer:
    torch.manual_seed(0)
    generator, discriminator = IterativeGenerator(config.generator), DiffDiscriminator(config.discriminator)
    noise_encoder = None if config.noise_encoder is None else NoiseEncoder(config.noise_encoder)
    scenes = TrainingScenes(SceneDataset(data, "train"), generator)
    return Trainer(config, scenes, generator, discriminator, noise_encoder, ranks, accumulate)


def trained(
    data: Path, config: TrainConfig, ranks: Ranks = ALONE, accumulate: int = 1, frozen: bool = False
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses and weights after all steps of a run, by gradient descent: Adam makes large steps of rounding errors."""
    trainer = make_trainer(data, config, ranks, accumulate)
    for name, optimizer in trainer.optimizers.items():
        trainer.optimizers[name] = torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.02)
    if frozen:
        for network in trainer.networks().values():
            network.eval()
    trainer._set_learning_rates = lambda: None  # type: ignore[method-assign]
    losses = []
    while trainer.images < config.images:
        losses.append(trainer.train_step())
    networks = trainer.networks().items()
    return losses, {f"{name}.{key}": value for name, net in networks for key, value in net.state_dict().items()}


def steps_skipped(data: Path, ranks: Ranks) -> list[int]:
    """After each of three steps, the second of which is not finite on the last rank."""
    trainer = make_trainer(data, dataclasses.replace(RUN, reconstruction_images=1000), ranks)
    errors, skipped = trainer._reconstruction_errors, []
    for step in range(3):
        factor = float("nan") if step == 1 and ranks.rank == ranks.count - 1 else 1.0
        trainer._reconstruction_errors = lambda *pair, by=factor: by * errors(*pair)  # type: ignore[method-assign]
        trainer.train_step()
        skipped.append(trainer.skipped)
    return skipped


def finished_alone(data: Path, out: Path, ranks: Ranks) -> bool:
    """Whether the end of a run on the first rank does not keep the others waiting; it waits for them here."""
    left = out / "left"

    def finish(trainer: Trainer, progress: bool) -> IterativeGenerator:
        deadline = time.monotonic() + 20
        while not left.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return trainer.ema_generator

    Trainer.finish = finish  # type: ignore[method-assign]
    generator = runs.train(data, out / "run", dataclasses.replace(RUN, images=9), device="cpu", progress=False)
    if ranks.leads:
        return left.exists() and (out / "run/model").is_dir()
    left.touch()
    return not generator.training


def batch_norm(norm: nn.Module, x: Tensor) -> list[Tensor]:
    """What a batch norm makes of x, the gradients of x and of its weights, and its buffers."""
    x = x.requires_grad_()
    y = norm(x)
    y.pow(3).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(parameter.grad for parameter in norm.parameters()), *norm.buffers()]


def normed_parts(ranks: Ranks | None) -> list[Tensor]:
    """Five pictures that vary little around large numbers: two on the first rank, three on the second."""
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double() * 0.5 + 20
    norm = nn.BatchNorm2d(4).double()
    with torch.no_grad():
        norm.weight += torch.arange(4)
    if ranks is None:
        return batch_norm(norm, x)
    return batch_norm(GlobalBatchNorm(norm), x[:2] if ranks.leads else x[2:])


def main() -> None:
    task, *arguments = sys.argv[1:]
    shorten_fits()
    if task == "compare":
        data, out = map(Path, arguments)
        ranks_module.LARGE = 1000  # for networks as small as these
        with joined("cpu") as ranks:
            results: dict[str, object] = {name: trained(data, config, ranks) for name, config in CONFIGS.items()}
            results |= {"norm": normed_parts(ranks), "skipped": steps_skipped(data, ranks)}
            results["finished alone"] = finished_alone(data, out, ranks)
            torch.save(results, out / f"{ranks.rank}.pt")
    elif task == "train":
        data, out = map(Path, arguments)
        runs.train(data, out, LONG, device="cpu", checkpoint_seconds=1, progress=False)


if __name__ == "__main__":
    main()
