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
from condgan.functional import changed_region, place_of_change, roll_conditions, rollout
from condgan.losses import OBJECTIVES
from condgan.models import (
    DiffDiscriminator,
    DiscriminatorConfig,
    GeneratorConfig,
    IterativeGenerator,
    NoiseEncoder,
    NoiseEncoderConfig,
)

MAX_SKIPPED_IN_A_ROW = 5
FOUND_NOISE_STD = 0.15
"""Standard deviation of what is added to the noise that the noise encoder finds: it must leave room around each."""
CHANGED_WEIGHT = 5.0
"""Weight of a changed pixel in the reconstruction loss, where an unchanged one has 1."""


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
    """Length of the first stage, in pictures: the noise encoder finds the noise of the real next picture, from which
    the generator must draw it; no discriminator."""
    reconstruction_weight: float = 0.0
    """Adversarial stage: weight of the same reconstruction for half of the pictures; the others get random noise, as
    all do with a weight of 0."""
    batch_scenes: int = 11
    """Scenes a step; every turn of a scene is one picture."""
    lr_generator: float = 1e-4
    lr_discriminator: float = 4e-4
    lr_encoder: float = 1e-3
    beta2: float = 0.9
    """Adam's second coefficient in the adversarial stage; the first is 0."""
    lr_reconstruction: float = 1e-3
    """Generator and encoder in the first stage."""
    penalty_interval: int = 1
    """Gradient penalties every so many steps, multiplied by as much."""
    decay_images: int = 0
    """Pictures at the end of the run over which the learning rates fall linearly to a tenth."""
    own_pictures: float = 0.0
    """Share of scenes, at the end of the run, whose turns start from the model's own picture; grows from 0."""
    history_dropout: float = 0.0
    """Share of scenes of which the RNN reads every turn as if it were the first, as it is when an object is added to a
    picture from elsewhere: what stands there is then known from the picture only."""
    ema_halflife_images: int = 10_000
    """Pictures after which a weight has half its influence on the averaged model."""
    init_generator: str | None = None
    """Name, folder or hub id of a generator to start from; None starts afresh."""
    init_discriminator: str | None = None
    """Name, folder or hub id of a discriminator to start from; None starts afresh."""
    init_noise_encoder: str | None = None
    """Name, folder or hub id of a noise encoder to start from; None starts afresh."""
    bf16: bool = True
    """Autocast to bfloat16; weights, penalties and optimizer stay float32."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {sorted(OBJECTIVES)}, got {self.objective!r}")
        for name in ("batch_scenes", "penalty_interval", "ema_halflife_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("image_size", "places", "window", "condition_dim", "objects"):
            ours, theirs = getattr(self.generator, name), getattr(self.discriminator, name)
            if ours != theirs:
                raise ValueError(f"generator and discriminator must agree on {name}, got {ours!r} and {theirs!r}")

    @property
    def noise_encoder(self) -> NoiseEncoderConfig | None:
        """The noise encoder's architecture; None where nothing is reconstructed."""
        if not (self.reconstruction_images or self.reconstruction_weight):
            return None
        ours = self.generator
        return NoiseEncoderConfig(image_size=ours.image_size, z_dim=ours.z_dim, places=ours.places, window=ours.window)


PRESETS: dict[str, TrainConfig] = {
    "reference": TrainConfig(),
    "reference-code": TrainConfig(objective="reference-code", lr_encoder=3e-4),
    "compact": TrainConfig(
        generator=GeneratorConfig(
            width=24, z_dim=6, output="blend", places=True, window=40, noise_in_norm=True, light_components=64
        ),
        discriminator=DiscriminatorConfig(width=32, places=True, window=40, spectral_norm=False),
        objective="relativistic",
        images=350_000,
        reconstruction_images=100_000,
        reconstruction_weight=5.0,
        batch_scenes=5,
        lr_generator=3e-4,
        lr_discriminator=5e-4,
        lr_encoder=3e-4,
        beta2=0.99,
        penalty_interval=4,
        decay_images=80_000,
        own_pictures=0.5,
        history_dropout=0.25,
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


def _rounded(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] at the nearest of 256 levels; the gradient passes as if they were not."""
    levels = ((images.detach() + 1) * 127.5).round() / 127.5 - 1
    return images + (levels - images).detach()


class Trainer:
    """Networks, optimizers and averaged model of one run; :func:`condgan.runs.train` drives it.

    Args:
        config: the run.
        scenes: the train split.
        generator: networks that are trained in place.
        discriminator: likewise.
        noise_encoder: likewise; None where the configuration has none.
    """

    def __init__(
        self,
        config: TrainConfig,
        scenes: TrainingScenes,
        generator: IterativeGenerator,
        discriminator: DiffDiscriminator,
        noise_encoder: NoiseEncoder | None = None,
    ) -> None:
        self.config = config
        self.scenes = scenes
        self.objective = OBJECTIVES[config.objective]
        self.device = next(generator.parameters()).device
        self.generator = generator.to(memory_format=torch.channels_last).train()
        self.discriminator = discriminator.to(memory_format=torch.channels_last).train()
        self.noise_encoder = noise_encoder
        found = []
        if noise_encoder is not None:
            self.noise_encoder = noise_encoder.to(memory_format=torch.channels_last).train()
            found = list(noise_encoder.parameters())
        self.ema_generator = copy.deepcopy(generator).eval().requires_grad_(False)
        encoder = list(generator.encoder.parameters())
        others = [p for name, p in generator.named_parameters() if not name.startswith("encoder.")]
        betas = (0.0, config.beta2)
        self.optimizers = {
            "reconstruction": torch.optim.Adam([*encoder, *others, *found], config.lr_reconstruction, (0.0, 0.99)),
            "generator": torch.optim.Adam([*others, *found], config.lr_generator, betas),
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
        self._set_learning_rates()
        losses = self._adversarial_step(batch) if self.adversarial else self._reconstruction_step(batch)
        self._update_average(len(batch.images))
        self.step += 1
        self.images += len(batch.images)
        return losses

    def _set_learning_rates(self) -> None:
        config = self.config
        rates = {
            "reconstruction": config.lr_reconstruction,
            "generator": config.lr_generator,
            "encoder": config.lr_encoder,
            "discriminator": config.lr_discriminator,
        }
        left = max(0.0, config.images - self.images) / max(1, config.decay_images)
        factor = min(1.0, 0.1 + 0.9 * left) if config.decay_images else 1.0
        for name, rate in rates.items():
            for group in self.optimizers[name].param_groups:
                group["lr"] = rate * factor

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
        shaded = (before + images[rows] - prev_images[rows]).clamp(-1, 1)  # soft shadows fall on what was drawn
        images[rows] = torch.where(changed, images[rows], shaded)
        prev_images[rows] = before
        return batch._replace(prev_images=prev_images, images=images)

    def _conditions(self, objects: Tensor) -> Tensor:
        """What the RNN says of every turn, (N, D); of some scenes it reads each turn as if it were the first."""
        conditions = roll_conditions(self.generator.encoder, objects)[0]
        rng = _step_rng(self.config.seed, self.step, "history")
        forgetful = torch.rand(len(objects), generator=rng) < self.config.history_dropout
        if forgetful.any():
            alone, _ = roll_conditions(self.generator.encoder, objects.flatten(0, 1)[:, None])  # (N, 1, D)
            forgetful = forgetful.to(conditions.device)[:, None, None]
            conditions = torch.where(forgetful, alone.view_as(conditions), conditions)
        return conditions.flatten(0, 1)

    def _noise(self, batch: Batch, purpose: str) -> Tensor:
        rng = _step_rng(self.config.seed, self.step, purpose)
        return torch.randn(len(batch.images), self.config.generator.z_dim, generator=rng).to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    def _reconstruction_errors(self, fake: Tensor, batch: Batch) -> Tensor:
        """Weighted L1 to the real next picture, of values and of differences between neighbours, (N,).

        The differences make edges count, which are what tells one pose of an object from another.
        """
        weight = 1 + (CHANGED_WEIGHT - 1) * changed_region(batch.prev_images, batch.images)[:, None]
        error = fake.float() - batch.images
        size = self.config.generator.window or self.config.generator.image_size
        total = (weight * error.abs()).sum((1, 2, 3))
        total = total + (weight[:, :, :, 1:] * error.diff(dim=3).abs()).sum((1, 2, 3))
        total = total + (weight[:, :, 1:] * error.diff(dim=2).abs()).sum((1, 2, 3))
        return total / (3 * size**2)

    def _found_noise(self, batch: Batch) -> Tensor:
        """The noise that the noise encoder sees in the real pictures, (N, z_dim), about standard normal."""
        assert self.noise_encoder is not None
        found = self.noise_encoder(batch.prev_images, batch.images, batch.places)
        return (1 - FOUND_NOISE_STD**2) ** 0.5 * found + FOUND_NOISE_STD * self._noise(batch, "around")

    def _place_loss(self, batch: Batch, conditions: Tensor) -> Tensor:
        if self.generator.place_model is None or batch.places is None:
            return torch.zeros((), device=self.device)
        return self.generator.place_model.loss(batch.prev_images, conditions.detach().float(), batch.places).mean()

    def _reconstruction_step(self, batch: Batch) -> dict[str, float]:
        with self._autocast():
            conditions = self._conditions(batch.objects)
            fake = self.generator(self._found_noise(batch), conditions, batch.prev_images, batch.places)
        reconstruction = self._reconstruction_errors(fake, batch).mean()
        place = self._place_loss(batch, conditions)
        self._optimize({("reconstruction",): reconstruction + 0.01 * place})
        return {"reconstruction": reconstruction.item(), "place": place.item()}

    def _adversarial_step(self, batch: Batch) -> dict[str, float]:
        """Both networks learn from one pass of the discriminator, the generator from its weights before the update."""
        objects = batch.objects.flatten(0, 1)
        penalised = self.step % self.config.penalty_interval == 0
        reconstructs = self.config.reconstruction_weight > 0
        z = self._noise(batch, "z")
        with self._autocast():
            conditions = self._conditions(batch.objects)
            if reconstructs:
                rng = _step_rng(self.config.seed, self.step, "which")
                found = (torch.rand(len(z), generator=rng) < 0.5).to(z.device)
                z = torch.where(found[:, None], self._found_noise(batch), z)
            drawn = self.generator(z, conditions, batch.prev_images, batch.places).float()
        fake = _rounded(drawn)  # as users see it: the discriminator shall not judge what rounding hides
        real_input = batch.images.clone().requires_grad_(penalised)
        with self._autocast():
            pair = self.discriminator.compare(batch.prev_images, [real_input, fake], conditions.detach(), batch.places)
        (real_logits, real_object_logits), (fake_logits, fake_object_logits) = (
            (output.logits.float(), output.object_logits.float()) for output in pair
        )

        discriminator_loss = self.objective.discriminator(
            real_logits=real_logits,
            fake_logits=fake_logits,
            real_object_logits=real_object_logits,
            fake_object_logits=fake_object_logits,
            objects=objects,
        ).mean()
        generator_loss = self.objective.generator(
            real_logits=real_logits.detach(),
            fake_logits=fake_logits,
            fake_object_logits=fake_object_logits,
            objects=objects,
        ).mean()
        losses = {
            "discriminator": discriminator_loss.item(),
            "generator": generator_loss.item(),
            "gap": (real_logits - fake_logits).mean().item(),
        }
        if penalised:
            penalty = self.objective.penalty(
                real_logits=real_logits, real=real_input, fake_logits=fake_logits, fake=fake
            ).mean()
            losses["penalty"] = penalty.item()
            discriminator_loss = discriminator_loss + self.config.penalty_interval * penalty
        if reconstructs:
            errors = self._reconstruction_errors(drawn, batch)
            reconstruction = (errors * found).sum() / found.sum().clamp(min=1)
            losses["reconstruction"] = reconstruction.item()
            generator_loss = generator_loss + self.config.reconstruction_weight * reconstruction
        place = self._place_loss(batch, conditions)
        losses["place"] = place.item()
        self._optimize(
            {("discriminator",): discriminator_loss, ("generator", "encoder"): generator_loss + 0.01 * place}
        )
        return losses

    def _optimize(self, losses: dict[tuple[str, ...], Tensor]) -> None:
        """One step of the optimizers, each with its own loss, unless a loss or a gradient is not finite."""
        parameters = {
            names: [p for name in names for group in self.optimizers[name].param_groups for p in group["params"]]
            for names in losses
        }
        for ours in parameters.values():
            for parameter in ours:
                parameter.grad = None
        for names, loss in losses.items():
            loss.backward(inputs=parameters[names], retain_graph=True)
        grads = [p.grad for ours in parameters.values() for p in ours if p.grad is not None]
        if not torch.stack([*(x.detach() for x in losses.values()), *torch._foreach_norm(grads)]).isfinite().all():
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise TrainingDiverged(
                    f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite, "
                    f"the last one at picture {self.images}: lower the learning rate or raise the penalty's weight"
                )
            return
        self.skipped_in_a_row = 0
        for names in losses:
            for name in names:
                self.optimizers[name].step()

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
        networks: dict[str, nn.Module] = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema_generator": self.ema_generator,
        }
        if self.noise_encoder is not None:
            networks["noise_encoder"] = self.noise_encoder
        return networks


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
