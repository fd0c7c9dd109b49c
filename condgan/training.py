"""Training: configuration, the two optimizer steps, exponential moving average. Runs and their files: ``runs``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgan import images as pictures
from condgan.datasets import SceneDataset
from condgan.drawing import iterate_turns
from condgan.functional import changed_region, crop, crop_corners, place_of_change, roll_conditions, rollout
from condgan.losses import OBJECTIVES
from condgan.models import (
    DiffDiscriminator,
    DiscriminatorConfig,
    DiscriminatorOutput,
    GeneratorConfig,
    IterativeGenerator,
)

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
        preservation_weight=5.0,
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
    """Networks, optimizers and averaged model of one run; :func:`condgan.runs.train` drives it.

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

    def networks(self) -> dict[str, nn.Module]:
        """The networks by the names that checkpoints give them."""
        return {name: getattr(self, name) for name in ("generator", "discriminator", "ema_generator")}


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
