"""Training: configuration, the two optimizer steps, exponential moving average, checkpoints that resume exactly."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from condgan import images as pictures
from condgan.datasets import SceneDataset
from condgan.drawing import Drawing, draw_turns, iterate_turns
from condgan.functional import changed_region, crop, crop_corners, place_of_change, roll_conditions, rollout
from condgan.losses import OBJECTIVES
from condgan.models import (
    DiffDiscriminator,
    DiscriminatorConfig,
    DiscriminatorOutput,
    GeneratorConfig,
    IterativeGenerator,
)

CHECKPOINT = "checkpoint.safetensors"
COUNTERS = ("step", "images", "skipped", "skipped_in_a_row")
LOG_INTERVAL = 20
"""Steps between two lines of the log."""
MAX_SKIPPED_IN_A_ROW = 5


class TrainingDiverged(RuntimeError):
    """Several steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. One *picture* is one turn of one scene, seen once by the generator."""

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    objective: str = "reference"
    """Name in :data:`condgan.losses.OBJECTIVES`."""
    images: int = 140 * 16_206
    """Pictures to train on, over both stages; a longer run may go on from a shorter one."""
    reconstruction_images: int = 0
    """Length of the first stage, in pictures: weighted L1 to the real next picture, no discriminator."""
    batch_scenes: int = 11
    """Scenes a step; every turn of a scene is one picture."""
    lr_generator: float = 1e-4
    lr_discriminator: float = 4e-4
    lr_encoder: float = 1e-3
    beta2: float = 0.9
    """Adam's second coefficient in the adversarial stage; the first is 0."""
    lr_reconstruction: float = 1e-3
    """Generator and encoder in the first stage."""
    preservation_weight: float = 0.0
    """Adversarial stage: weight of the mean absolute change outside the crop that the discriminator sees."""
    changed_weight: float = 5.0
    """Weight of a changed pixel in the L1 loss, where an unchanged one has 1."""
    candidates: int = 1
    """Draws a picture, of which the L1 loss takes the nearest (implicit maximum likelihood, arXiv:1811.12373)."""
    penalty_interval: int = 1
    """Gradient penalties every so many steps, multiplied by as much."""
    own_pictures: float = 0.0
    """Share of scenes, at the end of the run, whose turns start from the model's own picture; grows from 0."""
    ema_halflife_images: int = 10_000
    """Pictures after which a weight has half its influence on the averaged model."""
    init_generator: str | None = None
    """Name, folder or hub id of a generator to start from; None starts afresh."""
    init_discriminator: str | None = None
    """Name, folder or hub id of a discriminator to start from; None starts afresh."""
    bf16: bool = True
    """Autocast to bfloat16; weights, penalties and optimizer stay float32."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {sorted(OBJECTIVES)}, got {self.objective!r}")
        for name in ("batch_scenes", "candidates", "penalty_interval", "ema_halflife_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("places", "condition_dim", "objects"):
            ours, theirs = getattr(self.generator, name), getattr(self.discriminator, name)
            if ours != theirs:
                raise ValueError(f"generator and discriminator must agree on {name}, got {ours!r} and {theirs!r}")
        if self.crops and not (self.generator.places and self.discriminator.image_size < self.generator.image_size):
            raise ValueError(
                f"a discriminator of {self.discriminator.image_size} pixels beside a generator of "
                f"{self.generator.image_size} judges crops around places: it must be smaller, and both need places=True"
            )

    @property
    def crops(self) -> bool:
        """Whether the discriminator judges a crop around the object's place: its ``image_size`` is smaller."""
        return self.discriminator.image_size != self.generator.image_size


PRESETS: dict[str, TrainConfig] = {
    "reference": TrainConfig(),
    "reference-code": TrainConfig(objective="reference-code", lr_encoder=3e-4),
    "compact": TrainConfig(
        generator=GeneratorConfig(
            width=16, z_dim=16, output="blend", places=True, noise_in_norm=True, light_components=16
        ),
        discriminator=DiscriminatorConfig(image_size=32, width=32, places=True, spectral_norm=False),
        objective="relativistic",
        images=300_000,
        reconstruction_images=20_000,
        batch_scenes=5,
        lr_generator=3e-4,
        lr_discriminator=5e-4,
        lr_encoder=2e-4,
        beta2=0.99,
        preservation_weight=1.0,
        candidates=3,
        penalty_interval=4,
        own_pictures=0.5,
    ),
}


class Batch(NamedTuple):
    """The turns of a few scenes, flattened: N = scenes x turns, scene by scene."""

    prev_images: Tensor
    """(N, 3, H, W) in [-1, 1]."""
    images: Tensor
    """(N, 3, H, W) in [-1, 1]: what the turn made of it."""
    objects: Tensor
    """(scenes, turns, K) multi-hot."""
    places: Tensor | None
    """(N, 2) pixels, for models that know places."""


class TrainingScenes:
    """The train split with an empty scene before every first turn and the place of every object.

    Args:
        data: scenes of the train split.
        generator: its canvas is fitted to them, unless it was before.
        fit_canvas: whether to fit it.
    """

    def __init__(self, data: SceneDataset, generator: IterativeGenerator, fit_canvas: bool = True) -> None:
        first = data.pixels[:, 0].float() / 127.5 - 1
        if fit_canvas:
            generator.canvas.fit(first)
        if generator.config.light_components:
            empty = generator.canvas.remove_objects(first)
        else:
            empty = generator.canvas.mean.expand_as(first)
        self.pixels = torch.cat((pictures.to_uint8(empty)[:, None], data.pixels), 1)  # (S, T + 1, 3, H, W)
        self.objects = data.objects  # (S, T) ids
        self.names = data.vocabulary.names
        self.num_objects = len(self.names)
        self.places = None
        if generator.config.places:
            self.places = torch.stack([self._places(turn) for turn in range(data.pixels.shape[1])], 1)  # (S, T, 2)

    def _places(self, turn: int) -> Tensor:
        chunks = self.pixels[:, turn : turn + 2].split(512)
        pairs = (pictures.from_uint8(chunk).unbind(1) for chunk in chunks)
        places = torch.cat([place_of_change(before, after) for before, after in pairs])
        middle = (self.pixels.shape[-1] - 1) / 2
        return places.nan_to_num(middle)  # a hidden object: nothing visible changed

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The scenes of one step: every epoch is a permutation, a function of seed and step only."""
        wanted = torch.arange(step * size, (step + 1) * size)
        scenes = []
        for position in wanted.tolist():
            epoch, offset = divmod(position, len(self.pixels))
            scenes.append(int(self._permutation(epoch, seed)[offset]))
        images = self.pixels[scenes].float() / 127.5 - 1
        objects = F.one_hot(self.objects[scenes], self.num_objects).float()
        places = None if self.places is None else self.places[scenes].flatten(0, 1)
        return Batch(images[:, :-1].flatten(0, 1), images[:, 1:].flatten(0, 1), objects, places)

    def _permutation(self, epoch: int, seed: int) -> Tensor:
        if getattr(self, "_epoch", None) != (epoch, seed):
            self._epoch = (epoch, seed)
            self._order = torch.randperm(len(self.pixels), generator=_step_rng(seed, epoch, "order"))
        return self._order


def _step_rng(seed: int, step: int, purpose: str) -> torch.Generator:
    """A random source of its own for every step and purpose, so that resuming needs no random state."""
    salt = sum(ord(letter) * 257**i for i, letter in enumerate(purpose))
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_000_033 + salt % 1_000_033)


class Trainer:
    """Networks, optimizers and averaged model of one run; :func:`train` drives it.

    Args:
        config: the run.
        scenes: the train split.
        generator: networks that are trained in place.
        discriminator: likewise.
    """

    def __init__(
        self,
        config: TrainConfig,
        scenes: TrainingScenes,
        generator: IterativeGenerator,
        discriminator: DiffDiscriminator,
    ) -> None:
        self.config = config
        self.scenes = scenes
        self.objective = OBJECTIVES[config.objective]
        self.device = next(generator.parameters()).device
        self.generator = generator.to(memory_format=torch.channels_last).train()
        self.discriminator = discriminator.to(memory_format=torch.channels_last).train()
        self.ema_generator = copy.deepcopy(generator).eval().requires_grad_(False)
        encoder = list(generator.encoder.parameters())
        others = [p for name, p in generator.named_parameters() if not name.startswith("encoder.")]
        betas = (0.0, config.beta2)
        self.optimizers = {
            "reconstruction": torch.optim.Adam([*encoder, *others], config.lr_reconstruction, (0.0, 0.99)),
            "generator": torch.optim.Adam(others, config.lr_generator, betas),
            "encoder": torch.optim.Adam(encoder, config.lr_encoder, betas),
            "discriminator": torch.optim.Adam(discriminator.parameters(), config.lr_discriminator, betas),
        }
        self.step = 0
        self.images = 0
        self.skipped = 0
        self.skipped_in_a_row = 0

    @property
    def adversarial(self) -> bool:
        """Whether the first stage, reconstruction, is over."""
        return self.images >= self.config.reconstruction_images

    def train_step(self) -> dict[str, float]:
        """One step of the current stage; returns the losses by name, as plain numbers."""
        batch = self.scenes.batch(self.step, self.config.batch_scenes, self.config.seed)
        batch = Batch(*(None if t is None else t.to(self.device) for t in batch))  # type: ignore[arg-type]
        batch = self._mix_own_pictures(batch)
        losses = self._adversarial_step(batch) if self.adversarial else self._reconstruction_step(batch)
        self._update_average(len(batch.images))
        self.step += 1
        self.images += len(batch.images)
        return losses

    def _mix_own_pictures(self, batch: Batch) -> Batch:
        """Let some scenes go on from what the averaged model drew; what a turn adds stays the same."""
        start = self.config.reconstruction_images
        progress = max(0.0, (self.images - start) / max(1, self.config.images - start))
        rng = _step_rng(self.config.seed, self.step, "own")
        turns = batch.objects.shape[1]
        own = torch.rand(len(batch.objects), generator=rng) < self.config.own_pictures * progress
        if not own.any():
            return batch
        count = int(own.sum())
        own = own.to(self.device)
        rows = own.repeat_interleave(turns)
        prev_images = batch.prev_images.clone()
        images = batch.images.clone()
        z = torch.randn(count, turns, self.config.generator.z_dim, generator=rng).to(self.device)
        places = None if batch.places is None else batch.places[rows].unflatten(0, (count, turns))
        start_images = prev_images[rows].unflatten(0, (count, turns))[:, 0]
        with torch.no_grad(), self._autocast():
            drawn = rollout(self.ema_generator, batch.objects[own], z, start_images, places).float()
        before = torch.cat((start_images[:, None], drawn[:, :-1]), 1).flatten(0, 1)
        changed = changed_region(prev_images[rows], images[rows])[:, None]
        images[rows] = torch.where(changed, images[rows], before)
        prev_images[rows] = before
        return batch._replace(prev_images=prev_images, images=images)

    def _conditions(self, objects: Tensor) -> Tensor:
        return roll_conditions(self.generator.encoder, objects)[0].flatten(0, 1)  # (N, D)

    def _noise(self, batch: Batch, purpose: str) -> Tensor:
        rng = _step_rng(self.config.seed, self.step, purpose)
        return torch.randn(len(batch.images), self.config.generator.z_dim, generator=rng).to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    def _reconstruction_errors(self, fake: Tensor, batch: Batch) -> Tensor:
        """Weighted L1 to the real next picture, (N,)."""
        changed = changed_region(batch.prev_images, batch.images)[:, None]
        weight = 1 + (self.config.changed_weight - 1) * changed
        return (weight * (fake.float() - batch.images).abs()).mean((1, 2, 3))

    def _nearest_noise(self, batch: Batch, conditions: Tensor) -> Tensor:
        """Of ``candidates`` draws a picture, the noise of the one nearest to the real picture."""
        draws = [self._noise(batch, f"candidate {i}") for i in range(self.config.candidates)]
        if len(draws) == 1:
            return draws[0]
        with torch.no_grad(), self._autocast():
            errors = [
                self._reconstruction_errors(self.generator(z, conditions, batch.prev_images, batch.places), batch)
                for z in draws
            ]
        nearest = torch.stack(errors).argmin(0)
        return torch.stack(draws)[nearest, torch.arange(len(nearest), device=nearest.device)]

    def _place_loss(self, batch: Batch, conditions: Tensor) -> Tensor:
        if self.generator.place_model is None or batch.places is None:
            return torch.zeros((), device=self.device)
        return self.generator.place_model.loss(batch.prev_images, conditions.detach().float(), batch.places).mean()

    def _reconstruction_step(self, batch: Batch) -> dict[str, float]:
        with self._autocast():
            conditions = self._conditions(batch.objects)
            z = self._nearest_noise(batch, conditions.detach())
            fake = self.generator(z, conditions, batch.prev_images, batch.places)
        reconstruction = self._reconstruction_errors(fake, batch).mean()
        place = self._place_loss(batch, conditions)
        self._optimize(reconstruction + 0.01 * place, "reconstruction")
        return {"reconstruction": reconstruction.item(), "place": place.item()}

    def _adversarial_step(self, batch: Batch) -> dict[str, float]:
        objects = batch.objects.flatten(0, 1)
        with self._autocast():
            conditions = self._conditions(batch.objects)
            fake = self.generator(self._noise(batch, "z"), conditions, batch.prev_images, batch.places)
        fake = fake.float()
        seen = conditions.detach()
        places, prev_view, real_view, fake_view = self._views(batch, fake)

        # Discriminator
        penalised = self.step % self.config.penalty_interval == 0
        real_input, fake_input = (x.detach().clone().requires_grad_(penalised) for x in (real_view, fake_view))
        real, judged = self._judge(prev_view, [real_input, fake_input], seen, places)
        loss = self.objective.discriminator(
            real_logits=real.logits,
            fake_logits=judged.logits,
            real_object_logits=real.object_logits,
            fake_object_logits=judged.object_logits,
            objects=objects,
        ).mean()
        losses = {"discriminator": loss.item(), "gap": (real.logits - judged.logits).mean().item()}
        if penalised:
            penalty = self.objective.penalty(
                real_logits=real.logits, real=real_input, fake_logits=judged.logits, fake=fake_input
            ).mean()
            losses["penalty"] = penalty.item()
            loss = loss + self.config.penalty_interval * penalty
        self._optimize(loss, "discriminator")

        # Generator
        self.discriminator.requires_grad_(False)
        (judged,) = self._judge(prev_view, [fake_view], seen, places)
        self.discriminator.requires_grad_(True)
        loss = self.objective.generator(
            real_logits=real.logits.detach(),  # of this step's discriminator before its update, which saves a pass
            fake_logits=judged.logits,
            fake_object_logits=judged.object_logits,
            objects=objects,
        ).mean()
        losses["generator"] = loss.item()
        if self.config.crops:
            change = (fake - batch.prev_images).abs().sum() - (fake_view - prev_view).abs().sum()
            preservation = change / fake.numel()
            losses["preservation"] = preservation.item()
            loss = loss + self.config.preservation_weight * preservation
        place = self._place_loss(batch, conditions)
        losses["place"] = place.item()
        self._optimize(loss + 0.01 * place, "generator", "encoder")
        return losses

    def _views(self, batch: Batch, fake: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """What the discriminator sees: places, previous, real and fake pictures; whole, or crops around the places."""
        views = (batch.prev_images, batch.images, fake)
        if not self.config.crops or batch.places is None:
            return (batch.places, *views)
        size = self.config.discriminator.image_size
        corners = crop_corners(batch.places, self.config.generator.image_size, size)
        prev_view, real_view, fake_view = (crop(images, corners, size) for images in views)
        return batch.places - corners, prev_view, real_view, fake_view

    def _judge(
        self, prev_view: Tensor, views: list[Tensor], conditions: Tensor, places: Tensor | None
    ) -> list[DiscriminatorOutput]:
        with self._autocast():
            outputs = self.discriminator.compare(prev_view, views, conditions, places)
        return [DiscriminatorOutput(o.logits.float(), o.object_logits.float()) for o in outputs]

    def _optimize(self, loss: Tensor, *names: str) -> None:
        """One step of the named optimizers, unless the loss or a gradient is not finite."""
        optimizers = [self.optimizers[name] for name in names]
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        grads = [p.grad for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
        if not torch.stack([loss.detach(), *torch._foreach_norm(grads)]).isfinite().all():
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise TrainingDiverged(
                    f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite, "
                    f"the last one at picture {self.images}: lower the learning rate or raise the penalty's weight"
                )
            return
        self.skipped_in_a_row = 0
        for optimizer in optimizers:
            optimizer.step()

    @torch.no_grad()
    def _update_average(self, num_images: int) -> None:
        halflife = min(self.config.ema_halflife_images, 0.05 * (self.images + num_images))  # short memory of the start
        decay = 0.5 ** (num_images / halflife)
        source, target = self.generator.state_dict(), self.ema_generator.state_dict()
        floats = [name for name, value in target.items() if value.is_floating_point()]
        torch._foreach_lerp_([target[n] for n in floats], [source[n] for n in floats], 1 - decay)

    def export(self) -> IterativeGenerator:
        """A copy of the averaged model with batch norm statistics of its own free-running scenes, in eval mode."""
        generator = copy.deepcopy(self.ema_generator)
        recalibrate(generator, F.one_hot(self.scenes.objects, self.scenes.num_objects).float())
        return generator

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on; whole or not at all."""
        tensors = {f"{name}.{key}": value for name, net in self._networks() for key, value in net.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{name}.{index}.{key}": value for key, value in state.items()}
        counters = {name: getattr(self, name) for name in COUNTERS}
        metadata = {"config": json.dumps(dataclasses.asdict(self.config)), "counters": json.dumps(counters)}
        partial = path.with_name(path.name + ".partial")
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial, metadata)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Go on from :meth:`save`: the steps that follow give the numbers they would have given.

        Raises:
            ValueError: the checkpoint is of another run; the message names the settings that differ.
        """
        metadata, tensors = _read_checkpoint(path)
        _check_same_run(json.loads(metadata["config"]), self.config, path)
        for name, network in self._networks():
            prefix = f"{name}."
            network.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        for name, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            prefix = f"optimizer.{name}."
            for key, value in tensors.items():
                if key.startswith(prefix):
                    index, field_name = key[len(prefix) :].split(".")
                    state.setdefault(int(index), {})[field_name] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for name, value in json.loads(metadata["counters"]).items():
            setattr(self, name, value)

    def _networks(self) -> list[tuple[str, nn.Module]]:
        return [(name, getattr(self, name)) for name in ("generator", "discriminator", "ema_generator")]


def _read_checkpoint(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): delete it to start the run again") from None


def _check_same_run(stored: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """A run may be lengthened; nothing else may change between its parts."""
    current = json.loads(json.dumps(dataclasses.asdict(config)))
    differing = [name for name in current if name != "images" and current[name] != stored.get(name)]
    if differing:
        changes = ", ".join(f"{name} was {stored.get(name)!r} and is {current[name]!r}" for name in differing)
        raise ValueError(f"{str(path)!r} is of another run: {changes}; choose another folder or the same settings")


@torch.no_grad()
def recalibrate(generator: IterativeGenerator, objects: Tensor, batches: int = 8, batch_size: int = 32) -> None:
    """Set the running statistics of every batch norm to those of scenes that the generator draws by itself.

    Averaged weights do not fit averaged statistics, and training sees real previous pictures where drawing sees the
    generator's own. The generator is left in eval mode.

    Args:
        generator: changed in place.
        objects: (S, T, K) multi-hot objects of scenes to draw from.
        batches: number of batches that the statistics are averaged over.
        batch_size: scenes a batch.

    Source: precise batch norm, Wu and Johnson 2021, arXiv:2105.07576, section 3.
    """
    norms = [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    generator.train()
    rng = torch.Generator().manual_seed(0)
    for batch in range(batches):
        chosen = objects[torch.randint(len(objects), (batch_size,), generator=rng)]
        rngs = [torch.Generator().manual_seed(batch * batch_size + i) for i in range(batch_size)]
        for _ in iterate_turns(generator, chosen, rngs, [[]] * batch_size, None):
            pass
    generator.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def train(
    data: str | Path,
    out: str | Path,
    config: TrainConfig,
    *,
    device: str | None = None,
    checkpoint_seconds: float = 180,
    progress: bool = True,
) -> IterativeGenerator:
    """Train a generator, or go on with a run that was interrupted.

    The folder ``out`` gets ``log.jsonl``, ``checkpoint.safetensors`` (from which a run goes on to the very same numbers
    on the CPU), ``model/`` and ``discriminator/`` (the averaged generator and its opponent, for ``from_pretrained``)
    and ``pictures/`` (drawings), all but the log anew with every checkpoint; and ``tensorboard/`` if it is installed.

    Args:
        data: packed file of ``condgan prepare``, or the folder that holds it; its train split is used.
        out: folder of the run.
        config: what to train; :data:`PRESETS` holds some.
        device: such as ``cuda``; None takes a GPU if there is one.
        checkpoint_seconds: time between checkpoints.
        progress: show a progress bar on stderr.

    Returns:
        The averaged model, in eval mode.

    Raises:
        DatasetError: the data cannot be read.
        ValueError: ``out`` holds another run, or the data does not fit the configuration.
        TrainingDiverged: several steps in a row were not finite; the last checkpoint is good.
    """
    out = Path(out)
    dataset = SceneDataset(data, "train")
    _check_data(dataset, config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"out: cannot make the folder {str(out)!r} ({error.strerror}): choose another") from None
    checkpoint = out / CHECKPOINT
    resuming = checkpoint.exists()
    generator, discriminator = _fresh_networks(config)
    if resuming:
        tensors = _read_checkpoint(checkpoint)[1]
        for name, buffer in generator.canvas.named_buffers():
            buffer.copy_(tensors[f"generator.canvas.{name}"])
    scenes = TrainingScenes(dataset, generator, fit_canvas=not resuming and config.init_generator is None)
    trainer = Trainer(config, scenes, generator.to(device), discriminator.to(device))
    if resuming:
        trainer.load(checkpoint)
    with (
        RunLog(out, trainer.images) as log,
        tqdm(
            total=config.images, initial=trainer.images, unit="img", desc=str(out), disable=not progress, smoothing=0.05
        ) as bar,
    ):
        saved = time.monotonic()
        try:
            while trainer.images < config.images:
                before = trainer.images
                losses = trainer.train_step()
                bar.update(trainer.images - before)
                log.add(trainer.step, trainer.images, trainer.skipped, losses)
                if trainer.step % LOG_INTERVAL == 0:
                    bar.set_postfix_str(" ".join(f"{name} {value:.3f}" for name, value in losses.items()))
                if time.monotonic() - saved > checkpoint_seconds:
                    _save_run(trainer, out)
                    saved = time.monotonic()
        except TrainingDiverged as error:
            kept = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
            raise TrainingDiverged(f"{error}; {kept}") from None
        except KeyboardInterrupt:
            _save_run(trainer, out)
            raise
        return _save_run(trainer, out)


def _fresh_networks(config: TrainConfig) -> tuple[IterativeGenerator, DiffDiscriminator]:
    """The networks before the first step; global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        generator, discriminator = IterativeGenerator(config.generator), DiffDiscriminator(config.discriminator)
    for name, network in (("init_generator", generator), ("init_discriminator", discriminator)):
        source = getattr(config, name)
        if source is None:
            continue
        pretrained = type(network).from_pretrained(source)
        if pretrained.config != network.config:
            raise ValueError(f"{name}: {source!r} has the configuration {pretrained.config}, the run {network.config}")
        network.load_state_dict(pretrained.state_dict())
    return generator, discriminator


def _check_data(dataset: SceneDataset, config: TrainConfig) -> None:
    if len(dataset) == 0:
        raise ValueError("data: the train split has no scenes")
    size, objects = config.generator.image_size, config.generator.objects
    if dataset.pixels.shape[-1] != size:
        raise ValueError(
            f"data: pictures are {dataset.pixels.shape[-1]} pixels wide, the configuration asks for {size}; "
            f"run `condgan prepare DATA_DIR --image-size {size}`"
        )
    if dataset.vocabulary.names != objects:
        raise ValueError(f"data: its objects are {dataset.vocabulary.names}, the configuration names {objects}")


def _save_run(trainer: Trainer, out: Path) -> IterativeGenerator:
    """Checkpoint, model and a sheet of drawings."""
    trainer.save(out / CHECKPOINT)
    generator = trainer.export()
    generator.save_pretrained(out / "model")
    trainer.discriminator.save_pretrained(out / "discriminator")
    names = [[trainer.scenes.names[i] for i in row] for row in trainer.scenes.objects[:24].tolist()]
    sheet = Drawing(names, list(range(len(names))), None, draw_turns(generator, names, range(len(names))).images)
    (out / "pictures").mkdir(exist_ok=True)
    sheet.grid(columns=6).save(out / "pictures" / f"{trainer.images:09d}.png")
    return generator


class RunLog:
    """``log.jsonl``: mean losses every few steps; the same to TensorBoard if it is installed.

    Args:
        folder: of the run.
        images: where the run goes on; later lines, of a part that was lost, are dropped.
    """

    def __init__(self, folder: Path, images: int) -> None:
        path = folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["images"] <= images]
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._sums: dict[str, list[float]] = {}
        self._writer: Any = None
        self._since = (time.monotonic(), images)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=images)

    def add(self, step: int, images: int, skipped: int, losses: dict[str, float]) -> None:
        """Take the losses of one step; write a line every :data:`LOG_INTERVAL` steps."""
        for name, value in losses.items():
            self._sums.setdefault(name, []).append(value)
        if step % LOG_INTERVAL:
            return
        means = {name: sum(values) / len(values) for name, values in self._sums.items()}
        now, (then, images_then) = time.monotonic(), self._since
        line = {"step": step, "images": images, "skipped": skipped, **means}
        line["images_per_second"] = (images - images_then) / (now - then)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in means.items():
                self._writer.add_scalar(name, value, images)
        self._sums, self._since = {}, (now, images)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()
