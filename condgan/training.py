"""Training steps: losses, optimizers, exponential moving average. Their scenes: ``batches``; runs: ``runs``."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from functools import partial
from math import isfinite
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from condgan import images as pictures
from condgan.batches import Batch, Part, TrainingScenes, own_parts, step_rng
from condgan.calibration import (
    FOUND_NOISE_STD,
    code_turns,
    correct_first_turns,
    fit_mapping,
    fit_places,
    read_alone,
    recalibrate,
    with_noise,
)
from condgan.classifier import SceneClassifier
from condgan.devices import cpu_by_default
from condgan.functional import changed_region, local_mean, pixel_distance, roll_conditions, rollout
from condgan.losses import OBJECTIVES, reverse_gradient
from condgan.models import DiffDiscriminator, IterativeGenerator, NoiseEncoder
from condgan.precision import autocast
from condgan.presets import TrainConfig
from condgan.ranks import ALONE, Ranks, share_statistics

MAX_SKIPPED_IN_A_ROW = 5
CHANCE_WEIGHT = 0.01
"""Weight of the losses of the place model and the mapping: no other weight feels them."""
CHANGED_WEIGHT = 5.0
"""Weight of a changed pixel in the reconstruction loss, where an unchanged one has 1."""
FRAGILE_WEIGHT = 10.0
"""Weight of a pixel of an earlier object in the reconstruction loss, changed or not, and of a ghost: they are few, and
show."""
COLOUR_WEIGHT = 40.0
"""Weight of errors of colour, without brightness and at low resolution, in the reconstruction loss."""
HIDDEN_LOSS = 6.0
"""Most that a turn counts for the verifier, in nats: some objects hide behind others whatever they look like."""
GHOST_DISTANCE = 3
"""What is further than so many pixels from all that the real turn changed, and was changed, is a ghost."""


class TrainingDiverged(RuntimeError):
    """Several steps in a row had a loss or gradient that is not finite."""


class Losses(NamedTuple):
    """What a batch adds to the losses of a step."""

    minimised: dict[tuple[str, ...], Tensor]
    """By the names of the optimizers that minimise them."""
    reported: dict[str, Tensor]
    """By the names that the log gives them."""


def _as_seen(drawn: Tensor, prev_images: Tensor, uniform: Tensor) -> Tensor:
    """Drawn pictures in [-1, 1] at 256 levels, as users get them; the gradient passes as if they were not rounded.

    ``uniform`` is (2, N, 1, H, W): of what rounding took from the pictures that they were drawn on, and of their grain.
    """
    rest = pictures.estimate_rest(prev_images, uniform[0])
    return drawn + (pictures.render_anew(drawn.detach(), rest, uniform[1]) - drawn).detach()


class Trainer:
    """Networks, optimizers and averaged model of one run; :func:`condgan.runs.train` drives it.

    Args:
        config: the run.
        scenes: the train split.
        generator: networks that are trained in place.
        discriminator: likewise.
        noise_encoder: likewise; None where the configuration has none.
        ranks: the processes that train together; each takes its part of every step's scenes.
        accumulate: parts that pass the networks one after the other, for small memories; their gradients are added up.
        verifier: the classifier that ``config.verifier`` names, where its word counts; it is not trained.

    Raises:
        ValueError: a step has too few scenes for so many ranks and parts.
    """

    @cpu_by_default()
    def __init__(
        self,
        config: TrainConfig,
        scenes: TrainingScenes,
        generator: IterativeGenerator,
        discriminator: DiffDiscriminator,
        noise_encoder: NoiseEncoder | None = None,
        ranks: Ranks = ALONE,
        accumulate: int = 1,
        verifier: SceneClassifier | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.parts = own_parts(config.batch_scenes, ranks, accumulate)
        self.scenes = scenes
        self.objective = OBJECTIVES[config.objective]
        self.device = next(generator.parameters()).device
        if generator.light is not None and discriminator.light is not None:
            discriminator.light.load_state_dict(generator.light.state_dict())
        self.generator = generator.to(memory_format=torch.channels_last).train()
        self.discriminator = discriminator.to(memory_format=torch.channels_last).train()
        self.noise_encoder = noise_encoder
        self.verifier = verifier
        found = []
        if noise_encoder is not None:
            self.noise_encoder = noise_encoder.to(memory_format=torch.channels_last).train()
            found = list(noise_encoder.parameters())
        self.ema_generator = copy.deepcopy(generator).eval().requires_grad_(False)
        learners: list[nn.Module] = [generator] if noise_encoder is None else [generator, noise_encoder]
        if ranks.count > 1:
            for network in learners:
                share_statistics(network)
        norms = [module for network in learners for module in network.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        encoder = list(generator.encoder.parameters())
        others = [p for name, p in generator.named_parameters() if not name.startswith("encoder.")]
        adam = partial(torch.optim.Adam, betas=(0.0, config.beta2), fused=True)
        self.optimizers = {
            "reconstruction": adam([*encoder, *others, *found], config.lr_reconstruction, betas=(0.0, 0.99)),
            "generator": adam(others, config.lr_generator),
            "encoder": adam(encoder, config.lr_encoder),
            "discriminator": adam(discriminator.parameters(), config.lr_discriminator),
        }
        self.step = 0
        self.images = 0
        self.skipped = 0
        self.skipped_in_a_row = 0

    @property
    def adversarial(self) -> bool:
        """Whether the first stage, reconstruction, is over."""
        return self.images >= self.config.reconstruction_images

    @cpu_by_default()
    def train_step(self) -> dict[str, float]:
        """One step of the current stage; returns the losses by name, as plain numbers."""
        self._set_learning_rates()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        statistics = [buffer.clone() for buffer in self._statistics]
        reports = [self._learn_from(part) for part in self.parts]
        totals = self._optimize(torch.stack([torch.stack([*report.values()]) for report in reports]).sum(0))
        num_images = self.config.batch_scenes * self.scenes.objects.shape[1]
        if self.skipped_in_a_row:  # this step was: nothing that it has seen stays
            for buffer, before in zip(self._statistics, statistics, strict=True):
                buffer.copy_(before)
        else:
            self._update_average(num_images)
        self.step += 1
        reconstructed = not self.adversarial
        self.images += num_images
        if reconstructed and self.adversarial:
            self._settle_codes()
        return dict(zip(reports[0], totals, strict=True))

    def _settle_codes(self) -> None:
        """From now on the noise encoder stays as it is; what the mapping knows of its codes is brought up to date."""
        ours, averaged = self.generator.mapping, self.ema_generator.mapping
        if ours is not None and averaged is not None:
            self._fit_mapping(self.ema_generator, progress=False)
            self.ranks.copy_from_first(averaged)
            ours.load_state_dict(averaged.state_dict())

    def _learn_from(self, part: Part) -> dict[str, Tensor]:
        """Add to the gradients what these scenes say; returns what they add to the losses."""
        batch = self.scenes.batch(self.step, self.config.batch_scenes, self.config.seed, part, self.device)
        batch = self._mix_own_pictures(batch)
        losses = self._adversarial_losses(batch) if self.adversarial else self._reconstruction_losses(batch)
        for names, loss in losses.minimised.items():
            loss.backward(inputs=self._parameters(*names), retain_graph=True)
        return {name: loss.detach() for name, loss in losses.reported.items()}

    def _parameters(self, *names: str) -> list[nn.Parameter]:
        """What the optimizers of these names change."""
        return [p for name in names for group in self.optimizers[name].param_groups for p in group["params"]]

    def _set_learning_rates(self) -> None:
        config = self.config
        left = max(0.0, config.images - self.images) / max(1, config.decay_images)
        factor = min(1.0, 0.1 + 0.9 * left) if config.decay_images else 1.0
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = getattr(config, f"lr_{name}") * factor

    def _mix_own_pictures(self, batch: Batch) -> Batch:
        """Let some scenes go on from what the averaged model drew; what a turn adds stays the same."""
        start = self.config.reconstruction_images
        progress = max(0.0, (self.images - start) / max(1, self.config.images - start))
        rng = step_rng(self.config.seed, self.step, "own")
        turns, part = batch.turns, batch.part
        chosen = torch.rand(part.total, generator=rng) < self.config.own_pictures * progress  # of all ranks' scenes
        own = chosen[part.scenes]
        if not own.any():
            return batch
        count, before_ours = int(own.sum()), int(chosen[: part.first].sum())
        z = torch.randn(int(chosen.sum()), turns, self.config.generator.z_dim, generator=rng)
        z = z[before_ours : before_ours + count].to(self.device)
        uniform = torch.rand(int(chosen.sum()), 1, *batch.images.shape[2:], generator=rng)
        uniform = uniform[before_ours : before_ours + count].to(self.device)
        rows = own.repeat_interleave(turns).nonzero()[:, 0].to(self.device)  # numbers: for masks a GPU is waited for
        prev_images = batch.prev_images.clone()
        images = batch.images.clone()
        places = None if batch.places is None else batch.places[rows].unflatten(0, (count, turns))
        start_images = prev_images[rows].unflatten(0, (count, turns))[:, 0]
        rest = pictures.estimate_rest(start_images, uniform)
        with torch.no_grad(), self._autocast():
            conditions, _ = roll_conditions(self.ema_generator.encoder, batch.objects[own.nonzero()[:, 0]])
            drawn = rollout(self.ema_generator, conditions, z, start_images, places, rest=rest)
        before = torch.cat((start_images[:, None], drawn[:, :-1]), 1).flatten(0, 1)
        changed = changed_region(prev_images[rows], images[rows])[:, None]
        shaded = (before + images[rows] - prev_images[rows]).clamp(-1, 1)  # soft shadows fall on what was drawn
        images[rows] = torch.where(changed, images[rows], shaded)
        prev_images[rows] = before
        return batch._replace(prev_images=prev_images, images=images)

    def _conditions(self, batch: Batch) -> Tensor:
        """What the RNN says of every turn, (N, D); of some scenes it reads each turn as if it were the first."""
        objects = batch.objects
        conditions = roll_conditions(self.generator.encoder, objects)[0]
        rng = step_rng(self.config.seed, self.step, "history")
        forgetful = torch.rand(batch.part.total, generator=rng) < self.config.history_dropout
        if forgetful.any():  # on every rank alike
            alone = read_alone(self.generator.encoder, objects)
            forgetful = forgetful[batch.part.scenes].to(conditions.device)[:, None, None]
            conditions = torch.where(forgetful, alone, conditions)
        return conditions.flatten(0, 1)

    def _noise(self, batch: Batch, purpose: str) -> Tensor:
        """Standard normal numbers (N, z_dim), those of a picture whatever rank and part it is in."""
        rng = step_rng(self.config.seed, self.step, purpose)
        return batch.rows(torch.randn(batch.part.total * batch.turns, self.config.generator.z_dim, generator=rng))

    def _uniform(self, batch: Batch) -> Tensor:
        """Two numbers in [0, 1) for every pixel of these pictures, (2, N, 1, H, W)."""
        rng = step_rng(self.config.seed, self.step, "levels")
        size = batch.images.shape[2:]
        return batch.rows(torch.rand(batch.part.total * batch.turns, 2, 1, *size, generator=rng)).transpose(0, 1)

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self.device, self.config.bf16)

    def _reconstruction_errors(self, fake: Tensor, batch: Batch, found: Tensor | None = None) -> Tensor:
        """Weighted L1 to the real next picture, of values, of differences between neighbours and of colour, (N,).

        The differences make edges count, which are what tells one pose of an object from another. Colour is smooth in
        real pictures, where it is light that objects throw on the floor, so that the mean over 3x3 pixels shows errors
        of parts of a level, which grain and rounding hide from the other two. Pictures that were not drawn from the
        found code, ``found`` (N,) bool, show another pose: they answer for ghosts only.
        """
        changed = changed_region(batch.prev_images, batch.images)
        earlier = changed.unflatten(0, (-1, batch.turns)).cumsum(1).flatten(0, 1) > changed.int()  # by earlier turns
        weight = 1 + (CHANGED_WEIGHT - 1) * changed
        weight = torch.where(earlier, FRAGILE_WEIGHT, weight)
        if found is not None:
            weight = weight * found[:, None, None]
        near = F.max_pool2d(changed[:, None].float(), 2 * GHOST_DISTANCE + 1, 1, GHOST_DISTANCE)[:, 0] > 0
        ghost = changed_region(batch.prev_images, fake.detach().float()) & ~near
        weight = torch.where(ghost, FRAGILE_WEIGHT, weight)[:, None]
        error = fake.float() - batch.images
        size = self.config.generator.window or self.config.generator.image_size
        total = (weight * pixel_distance(error)).sum((1, 2, 3))
        total = total + (weight[:, :, :, 1:] * pixel_distance(error.diff(dim=3))).sum((1, 2, 3))
        total = total + (weight[:, :, 1:] * pixel_distance(error.diff(dim=2))).sum((1, 2, 3))
        colour = local_mean(error - error.mean(1, keepdim=True), 3).abs().sum((1, 2, 3))
        total = total + COLOUR_WEIGHT * (colour if found is None else colour * found)
        return total / (3 * size**2)

    def _misread(self, fake: Tensor, batch: Batch) -> Tensor:
        """How far the verifier is from seeing the objects so far and no others: (N,), at most :data:`HIDDEN_LOSS`."""
        assert self.verifier is not None
        with self._autocast():
            logits = self.verifier(fake).float()
        there = batch.objects.cummax(1).values.flatten(0, 1)
        error = F.binary_cross_entropy_with_logits(logits, there, reduction="none").sum(1)
        return error.clamp(max=HIDDEN_LOSS)

    def _found_code(self, batch: Batch) -> Tensor:
        """The code that the noise encoder sees in the real pictures, (N, z_dim)."""
        assert self.noise_encoder is not None
        if self.adversarial:
            self.noise_encoder.eval()
        with torch.set_grad_enabled(not self.adversarial):
            found = self.noise_encoder(batch.prev_images, batch.images, batch.places)
        return with_noise(found, self._noise(batch, "around"), FOUND_NOISE_STD)

    @torch.no_grad()
    def _random_code(self, batch: Batch, conditions: Tensor) -> Tensor:
        """The code that the generator makes of random noise, (N, z_dim)."""
        z = self._noise(batch, "z")
        mapping = self.generator.mapping
        if mapping is None:
            return z
        return mapping(z, conditions.float(), batch.places, self.generator.read_light(batch.prev_images))

    def _chance_losses(self, batch: Batch, conditions: Tensor, code: Tensor | None) -> dict[str, Tensor]:
        """Of what is left to chance, places and codes: how unlikely the real ones are. The networks are not touched."""
        losses: dict[str, Tensor] = {}
        if self.config.keeps_chance:
            return losses
        conditions = conditions.detach().float()
        light = self.generator.read_light(batch.prev_images)
        if self.generator.place_model is not None and batch.places is not None:
            place = self.generator.place_model.loss(batch.prev_images, conditions, batch.places, light)
            losses["place"] = batch.mean(place)
        if self.generator.mapping is not None and code is not None:
            code = code.detach().float()
            losses["mapping"] = batch.mean(self.generator.mapping.loss(code, conditions, batch.places, light))
        return losses

    def _reconstruction_losses(self, batch: Batch) -> Losses:
        with self._autocast():
            conditions = self._conditions(batch)
            code = self._found_code(batch)
            fake = self.generator.synthesis(code, conditions, batch.prev_images, batch.places)
        reconstruction = batch.mean(self._reconstruction_errors(fake, batch))
        chance = self._chance_losses(batch, conditions, code)
        minimised = reconstruction + CHANCE_WEIGHT * sum(chance.values())
        return Losses({("reconstruction",): minimised}, {"reconstruction": reconstruction, **chance})

    def _adversarial_losses(self, batch: Batch) -> Losses:
        """Both networks learn from one pass of the discriminator, the generator from its weights before the update."""
        objects = batch.objects.flatten(0, 1)
        penalised = self.step % self.config.penalty_interval == 0
        found_code = None
        with self._autocast():
            conditions = self._conditions(batch)
            if self.config.reconstruction_weight:
                found_code = self._found_code(batch)
        code = self._random_code(batch, conditions)
        if found_code is not None:
            rng = step_rng(self.config.seed, self.step, "which")
            chosen = torch.rand(batch.part.total * batch.turns, generator=rng) < 0.5
            found, num_found = batch.rows(chosen), chosen.sum().clamp(min=1).to(self.device)
            code = torch.where(found[:, None], found_code, code)
        with self._autocast():
            drawn = self.generator.synthesis(code, conditions, batch.prev_images, batch.places).float()
        fake = _as_seen(drawn, batch.prev_images, self._uniform(batch))
        judged = reverse_gradient(fake) if self.objective.zero_sum else fake
        real_input = batch.images.clone().requires_grad_(penalised)
        with self._autocast():
            pair = self.discriminator.compare(
                batch.prev_images, [judged, real_input], conditions.detach().float(), batch.places
            )
        (fake_logits, fake_object_logits), (real_logits, real_object_logits) = pair

        discriminator_loss = batch.mean(
            self.objective.discriminator(
                real_logits=real_logits,
                fake_logits=fake_logits,
                real_object_logits=real_object_logits,
                objects=objects,
            )
        )
        generator_loss = batch.mean(
            self.objective.generator(
                real_logits=real_logits.detach(),
                fake_logits=fake_logits,
                fake_object_logits=fake_object_logits,
                objects=objects,
            )
        )
        reported = {
            "discriminator": discriminator_loss,
            "generator": generator_loss,
            "gap": batch.mean(real_logits - fake_logits),
        }
        if penalised:
            penalty = batch.mean(
                self.objective.penalty(real_logits=real_logits, real=real_input, fake_logits=fake_logits, fake=fake)
            )
            reported["penalty"] = penalty
            discriminator_loss = discriminator_loss + self.config.penalty_interval * penalty
        chance = self._chance_losses(batch, conditions, found_code)
        other_loss = CHANCE_WEIGHT * sum(chance.values())  # of the generator, whatever the discriminator says
        if found_code is not None:
            errors = self._reconstruction_errors(drawn, batch, found)
            reconstruction = errors.sum() / num_found
            reported["reconstruction"] = reconstruction
            other_loss = other_loss + self.config.reconstruction_weight * reconstruction
        if self.config.legibility_weight:
            reported["misread"] = batch.mean(self._misread(fake, batch))
            other_loss = other_loss + self.config.legibility_weight * reported["misread"]
        minimised: dict[tuple[str, ...], Tensor]
        if self.objective.zero_sum:
            minimised = {("discriminator", "generator", "encoder"): discriminator_loss + other_loss}
        else:
            minimised = {("discriminator",): discriminator_loss, ("generator", "encoder"): generator_loss + other_loss}
        return Losses(minimised, reported | chance)

    def _optimize(self, losses: Tensor) -> list[float]:
        """One step of this stage's optimizers, unless a loss or a gradient is not finite.

        Losses (L,) and gradients are what the scenes of this rank add; returned are the losses over all ranks. Only
        here a step waits for its device, which then has the updates to do while the next step is prepared.
        """
        names = ("discriminator", "generator", "encoder") if self.adversarial else ("reconstruction",)
        grads = [p.grad for p in self._parameters(*names) if p.grad is not None]
        self.ranks.sum_(losses, *grads)
        *totals, norm = torch.cat((losses, nn.utils.get_total_norm(grads)[None])).tolist()
        if not all(map(isfinite, (*totals, norm))):
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise TrainingDiverged(
                    f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite, "
                    f"the last one at picture {self.images}: lower the learning rate or raise the penalty's weight"
                )
            return totals
        self.skipped_in_a_row = 0
        for name in names:
            self.optimizers[name].step()
        return totals

    @torch.no_grad()
    def _update_average(self, num_images: int) -> None:
        halflife = min(self.config.ema_halflife_images, 0.05 * (self.images + num_images))  # short memory of the start
        decay = 0.5 ** (num_images / halflife)
        source, target = self.generator.state_dict(), self.ema_generator.state_dict()
        floats = [name for name, value in target.items() if value.is_floating_point()]
        get_ema_multi_avg_fn(decay)([target[n] for n in floats], [source[n] for n in floats], None)

    @cpu_by_default()
    def export(self) -> IterativeGenerator:
        """A copy of the averaged model with batch norm statistics of its own free-running scenes, in eval mode."""
        generator = copy.deepcopy(self.ema_generator)
        recalibrate(generator, F.one_hot(self.scenes.objects, self.scenes.num_objects).float())
        return generator

    @cpu_by_default()
    def finish(self, progress: bool = True) -> IterativeGenerator:
        """What the run was for: :meth:`export`, with mapping, place model and correction fitted to finished weights."""
        generator = copy.deepcopy(self.ema_generator)
        if not self.config.keeps_chance:
            self._fit_mapping(generator, progress)
            self._fit_places(generator, progress)
        recalibrate(generator, F.one_hot(self.scenes.objects, self.scenes.num_objects).float())
        if generator.correction is not None:
            turns = self.scenes.first_turns
            correct_first_turns(generator, self.noise_encoder, *turns, progress=progress)
        return generator

    def _fit_places(self, generator: IterativeGenerator, progress: bool) -> None:
        scenes, dropout = self.scenes, self.config.history_dropout
        if scenes.places is not None:
            fit_places(
                generator, scenes.pixels, scenes.objects, scenes.places, history_dropout=dropout, progress=progress
            )

    def _fit_mapping(self, generator: IterativeGenerator, progress: bool) -> None:
        if generator.mapping is None or self.noise_encoder is None:
            return
        scenes, dropout = self.scenes, self.config.history_dropout
        turns = code_turns(generator, self.noise_encoder, scenes.pixels, scenes.objects, scenes.places)
        fit_mapping(generator, turns, history_dropout=dropout, progress=progress)

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
