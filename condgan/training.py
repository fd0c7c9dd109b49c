"""Training: configuration, the two optimizer steps, exponential moving average. Runs and their files: ``runs``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from condgan import images as pictures
from condgan.calibration import (
    code_turns,
    correct_first_turns,
    fit_mapping,
    fit_places,
    misread,
    prefer_legible_codes,
    read_alone,
    recalibrate,
    with_noise,
)
from condgan.classifier import SceneClassifier
from condgan.configs import DiscriminatorConfig, GeneratorConfig, NoiseEncoderConfig
from condgan.datasets import SceneDataset
from condgan.functional import (
    SCENES_AT_ONCE,
    changed_region,
    local_mean,
    pixel_distance,
    places_of_turns,
    roll_conditions,
    rollout,
)
from condgan.losses import OBJECTIVES, reverse_gradient
from condgan.models import DiffDiscriminator, IterativeGenerator, NoiseEncoder
from condgan.precision import autocast
from condgan.ranks import ALONE, Ranks, share_statistics
from condgan.requests import parse_seed

MAX_SKIPPED_IN_A_ROW = 5
FOUND_NOISE_STD = 0.15
"""Standard deviation of what is added to the code that the noise encoder finds: it must leave room around each."""
CHANCE_WEIGHT = 0.01
"""Weight of the losses of the place model and the mapping: no other weight feels them."""
CHANGED_WEIGHT = 5.0
"""Weight of a changed pixel in the reconstruction loss, where an unchanged one has 1."""
FRAGILE_WEIGHT = 10.0
"""Weight of a pixel of an earlier object in the reconstruction loss, changed or not, and of a ghost: they are few, and
show."""
COLOUR_WEIGHT = 40.0
"""Weight of errors of colour, without brightness and at low resolution, in the reconstruction loss."""
GHOST_DISTANCE = 3
"""What is further than so many pixels from all that the real turn changed, and was changed, is a ghost."""


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
    """Length of the first stage, in pictures: the noise encoder finds the code of the real next picture, from which
    the generator must draw it; no discriminator. Then what a code means is settled: the noise encoder learns no
    more."""
    reconstruction_weight: float = 0.0
    """Adversarial stage: weight of the same reconstruction for half of the pictures; the others get random noise, as
    all do with a weight of 0."""
    batch_scenes: int = 11
    """Scenes a step, over all ranks; every turn of a scene is one picture."""
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
    """Name, folder or hub id of a generator to start from, without its correction of first turns; None: a fresh one."""
    init_discriminator: str | None = None
    """Name, folder or hub id of a discriminator to start from; None starts afresh."""
    init_noise_encoder: str | None = None
    """Name, folder or hub id of a noise encoder to start from; None starts afresh."""
    verifier: str | None = None
    """Name, folder or hub id of the classifier that at the end of the run tells which codes show the object well
    (:func:`condgan.calibration.prefer_legible_codes`), for models with a mapping; None leaves the mapping as it is."""
    verifier_scenes: int = 28_800
    """Scenes that are drawn for it."""
    legibility_weight: float = 0.0
    """Adversarial stage: weight of the verifier's cross-entropy for the objects so far, in what the generator draws."""
    bf16: bool = True
    """Autocast to bfloat16, on devices that multiply it (:func:`condgan.precision.fast_bfloat16`). Weights and the
    optimizer stay float32; gradient penalties are sums in float32 of what passed convolutions in bfloat16."""
    seed: int = 0
    """From 0 to 2**63 - 1."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(TrainConfig).items():
            value = getattr(self, name)
            fits = isinstance(value, (float, int) if kind is float else kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")
        parse_seed(self.seed)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {sorted(OBJECTIVES)}, got {self.objective!r}")
        for name in ("batch_scenes", "penalty_interval", "ema_halflife_images", "verifier_scenes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("images", "reconstruction_images", "reconstruction_weight", "legibility_weight", "decay_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("own_pictures", "history_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1, got {getattr(self, name)}")
        if self.reconstruction_weight and not (self.reconstruction_images or self.init_noise_encoder):
            raise ValueError(
                f"reconstruction_weight={self.reconstruction_weight} needs a noise encoder that has learned: "
                "give reconstruction_images or init_noise_encoder"
            )
        if self.legibility_weight and self.verifier is None:
            raise ValueError(f"legibility_weight={self.legibility_weight} needs a verifier: give its name or folder")
        for name in ("image_size", "places", "window", "condition_dim", "objects", "light_inputs"):
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
            width=24,
            z_dim=6,
            output="blend",
            places=True,
            window=40,
            noise_in_norm=True,
            mapping=True,
            correction=True,
            light_components=64,
            light_inputs=12,
        ),
        discriminator=DiscriminatorConfig(width=32, places=True, window=40, spectral_norm=False, light_inputs=12),
        objective="relativistic",
        images=500_000,
        reconstruction_images=65_000,
        reconstruction_weight=10.0,
        batch_scenes=5,
        lr_generator=3e-4,
        lr_discriminator=5e-4,
        lr_encoder=3e-4,
        beta2=0.99,
        penalty_interval=4,
        decay_images=130_000,
        own_pictures=0.8,
        history_dropout=0.25,
        verifier="verifier",
        legibility_weight=3.0,
    ),
}


class Part(NamedTuple):
    """Some of the scenes of a step: those that one rank has on its device at once."""

    first: int
    """Number of the first scene."""
    size: int
    """How many they are."""
    total: int
    """Scenes of the whole step."""

    @property
    def scenes(self) -> slice:
        """Where they are among all scenes of the step."""
        return slice(self.first, self.first + self.size)

    def pictures(self, turns: int) -> slice:
        """Where their turns are among those of all scenes."""
        return slice(self.first * turns, (self.first + self.size) * turns)

    @property
    def share(self) -> float:
        """Weight of a mean over these scenes in the mean over all."""
        return self.size / self.total


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
    part: Part
    """Which scenes of the step they are."""

    @property
    def turns(self) -> int:
        """Turns of each scene."""
        return self.objects.shape[1]

    def mean(self, values: Tensor) -> Tensor:
        """What the mean of these pictures' values, (N,), adds to the mean over all pictures of the step."""
        return values.mean() * self.part.share

    def rows(self, values: Tensor) -> Tensor:
        """These pictures' rows of what was drawn for all pictures of the step."""
        return values[self.part.pictures(self.turns)].to(self.images.device)


class Losses(NamedTuple):
    """What a batch adds to the losses of a step."""

    minimised: dict[tuple[str, ...], Tensor]
    """By the names of the optimizers that minimise them."""
    reported: dict[str, Tensor]
    """By the names that the log gives them."""


class TrainingScenes:
    """The train split with an empty scene before every first turn and the place of every object.

    Args:
        data: scenes of the train split.
        generator: its canvas and what it knows of light are fitted to them, unless they were before.
        fit_canvas: whether to fit them.
        progress: show a progress bar on stderr while they are.
    """

    def __init__(
        self, data: SceneDataset, generator: IterativeGenerator, fit_canvas: bool = True, *, progress: bool = False
    ) -> None:
        device = generator.canvas.mean.device
        first = pictures.from_uint8(data.pixels[:, 0].to(device))
        if fit_canvas:
            generator.canvas.fit(first, data.objects[:, 0], progress=progress)
        if generator.config.light_components:
            empty, _ = pictures.round_levels(generator.canvas.remove_objects(first))
            uniform = torch.rand(2, len(empty), 1, *empty.shape[2:], generator=torch.Generator().manual_seed(0))
            chunks = zip(*(x.to(device).split(SCENES_AT_ONCE) for x in (empty, *uniform)), strict=True)
            empty = torch.cat(  # the next picture has grain of its own
                [pictures.render_anew(x, pictures.estimate_rest(x, of_rest), grain) for x, of_rest, grain in chunks]
            )
        else:
            empty = generator.canvas.mean.expand_as(first)
        if fit_canvas and generator.light is not None:
            generator.light.fit(empty)
        self.pixels = torch.cat((pictures.to_uint8(empty).cpu()[:, None], data.pixels), 1)  # (S, T + 1, 3, H, W)
        self.objects = data.objects  # (S, T) ids
        self.names = data.vocabulary.names
        self.num_objects = len(self.names)
        self.places = None
        if generator.config.places:
            self.places = places_of_turns(self.pixels)  # (S, T, 2)

    @property
    def first_turns(self) -> tuple[Tensor, Tensor]:
        """Empty scenes and what first turns made of them, (S, 2, 3, H, W) uint8, and the ids of their objects, (S,)."""
        return self.pixels[:, :2], self.objects[:, 0]

    def batch(self, step: int, size: int, seed: int, part: Part | None = None) -> Batch:
        """The scenes of one step, or a part of them: every epoch is a permutation, a function of seed and step only."""
        part = part or Part(0, size, size)
        scenes = []
        for position in range(step * size, (step + 1) * size)[part.scenes]:
            epoch, offset = divmod(position, len(self.pixels))
            scenes.append(int(self._permutation(epoch, seed)[offset]))
        images = pictures.from_uint8(self.pixels[scenes])
        objects = F.one_hot(self.objects[scenes], self.num_objects).float()
        places = None if self.places is None else self.places[scenes].flatten(0, 1)
        return Batch(images[:, :-1].flatten(0, 1), images[:, 1:].flatten(0, 1), objects, places, part)

    def _permutation(self, epoch: int, seed: int) -> Tensor:
        if getattr(self, "_epoch", None) != (epoch, seed):
            self._epoch = (epoch, seed)
            self._order = torch.randperm(len(self.pixels), generator=_step_rng(seed, epoch, "order"))
        return self._order


def _step_rng(seed: int, step: int, purpose: str) -> torch.Generator:
    """A random source of its own for every step and purpose, so that resuming needs no random state."""
    salt = sum(ord(letter) * 257**i for i, letter in enumerate(purpose))
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_000_033 + salt % 1_000_033) % 2**64)


def _own_parts(scenes: int, ranks: Ranks, accumulate: int) -> list[Part]:
    """Which of a step's scenes this rank takes: consecutive ones of equal number, or one more or less, in each part."""
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    count = ranks.count * accumulate
    if count > scenes:
        raise ValueError(
            f"batch_scenes is {scenes}, too few for {ranks.count} ranks with {accumulate} parts each: "
            f"take more scenes a step, or fewer ranks or parts"
        )
    starts = [scenes * i // count for i in range(count + 1)]
    ours = range(ranks.rank, count, ranks.count)  # a part is next to those that the other ranks have at the same time
    return [Part(starts[i], starts[i + 1] - starts[i], scenes) for i in ours]


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
        verifier: the classifier that ``config.verifier`` names; it is not trained.

    Raises:
        ValueError: a step has too few scenes for so many ranks and parts.
    """

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
        self.parts = _own_parts(config.batch_scenes, ranks, accumulate)
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
        learners = [generator] if noise_encoder is None else [generator, noise_encoder]
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

    def train_step(self) -> dict[str, float]:
        """One step of the current stage; returns the losses by name, as plain numbers."""
        self._set_learning_rates()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        statistics = [buffer.clone() for buffer in self._statistics]
        reports = [self._learn_from(part) for part in self.parts]
        total = self._optimize(torch.stack([torch.stack([*report.values()]) for report in reports]).sum(0))
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
        return dict(zip(reports[0], total.tolist(), strict=True))

    def _settle_codes(self) -> None:
        """From now on the noise encoder stays as it is; what the mapping knows of its codes is brought up to date."""
        ours, averaged = self.generator.mapping, self.ema_generator.mapping
        if ours is not None and averaged is not None:
            self._fit_mapping(self.ema_generator, progress=False)
            self.ranks.copy_from_first(averaged)
            ours.load_state_dict(averaged.state_dict())

    def _learn_from(self, part: Part) -> dict[str, Tensor]:
        """Add to the gradients what these scenes say; returns what they add to the losses."""
        batch = self._mix_own_pictures(self._batch(part))
        losses = self._adversarial_losses(batch) if self.adversarial else self._reconstruction_losses(batch)
        for names, loss in losses.minimised.items():
            loss.backward(inputs=self._parameters(*names), retain_graph=True)
        return {name: loss.detach() for name, loss in losses.reported.items()}

    def _batch(self, part: Part) -> Batch:
        batch = self.scenes.batch(self.step, self.config.batch_scenes, self.config.seed, part)
        *tensors, part = batch
        return Batch(*(None if x is None else x.to(self.device) for x in tensors), part)  # type: ignore[arg-type, call-arg]

    def _parameters(self, *names: str) -> list[nn.Parameter]:
        """What the optimizers of these names change."""
        return [p for name in names for group in self.optimizers[name].param_groups for p in group["params"]]

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
        own = own.to(self.device)
        rows = own.repeat_interleave(turns)
        prev_images = batch.prev_images.clone()
        images = batch.images.clone()
        places = None if batch.places is None else batch.places[rows].unflatten(0, (count, turns))
        start_images = prev_images[rows].unflatten(0, (count, turns))[:, 0]
        rest = pictures.estimate_rest(start_images, uniform)
        with torch.no_grad(), self._autocast():
            drawn = rollout(self.ema_generator, batch.objects[own], z, start_images, places, rest=rest)
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
        rng = _step_rng(self.config.seed, self.step, "history")
        forgetful = torch.rand(batch.part.total, generator=rng) < self.config.history_dropout
        if forgetful.any():  # on every rank alike
            alone = read_alone(self.generator.encoder, objects)
            forgetful = forgetful[batch.part.scenes].to(conditions.device)[:, None, None]
            conditions = torch.where(forgetful, alone, conditions)
        return conditions.flatten(0, 1)

    def _noise(self, batch: Batch, purpose: str) -> Tensor:
        """Standard normal numbers (N, z_dim), those of a picture whatever rank and part it is in."""
        rng = _step_rng(self.config.seed, self.step, purpose)
        return batch.rows(torch.randn(batch.part.total * batch.turns, self.config.generator.z_dim, generator=rng))

    def _uniform(self, batch: Batch) -> Tensor:
        """Two numbers in [0, 1) for every pixel of these pictures, (2, N, 1, H, W)."""
        rng = _step_rng(self.config.seed, self.step, "levels")
        size = batch.images.shape[2:]
        return batch.rows(torch.rand(batch.part.total * batch.turns, 2, 1, *size, generator=rng)).transpose(0, 1)

    def _autocast(self) -> torch.autocast:
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
        """How far the verifier is from seeing the objects so far and no others, (N,), at most :data:`HIDDEN_LOSS`."""
        assert self.verifier is not None
        with self._autocast():
            logits = self.verifier(fake).float()
        return misread(logits, batch.objects.cummax(1).values.flatten(0, 1))

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
        conditions = conditions.detach().float()
        losses = {}
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
            rng = _step_rng(self.config.seed, self.step, "which")
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
                batch.prev_images, [judged, real_input], conditions.detach(), batch.places
            )
        (fake_logits, fake_object_logits), (real_logits, real_object_logits) = (
            (output.logits.float(), output.object_logits.float()) for output in pair
        )

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

    def _optimize(self, losses: Tensor) -> Tensor:
        """One step of this stage's optimizers, unless a loss or a gradient is not finite.

        Losses (L,) and gradients are what the scenes of this rank add; returned are the losses over all ranks.
        """
        names = ("discriminator", "generator", "encoder") if self.adversarial else ("reconstruction",)
        grads = [p.grad for p in self._parameters(*names) if p.grad is not None]
        self.ranks.sum_(losses, *grads)
        if not torch.cat((losses, torch.stack(torch._foreach_norm(grads)))).isfinite().all():
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise TrainingDiverged(
                    f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite, "
                    f"the last one at picture {self.images}: lower the learning rate or raise the penalty's weight"
                )
            return losses
        self.skipped_in_a_row = 0
        for name in names:
            self.optimizers[name].step()
        return losses

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

    def finish(self, progress: bool = True) -> IterativeGenerator:
        """What the run was for: :meth:`export`, with mapping, place model and correction fitted to finished weights."""
        generator, scenes = copy.deepcopy(self.ema_generator), self.scenes
        one_hot = F.one_hot(scenes.objects, scenes.num_objects).float()
        self._fit_mapping(generator, progress)
        if scenes.places is not None:
            dropout = self.config.history_dropout
            fit_places(
                generator, scenes.pixels, scenes.objects, scenes.places, history_dropout=dropout, progress=progress
            )
        recalibrate(generator, one_hot)
        if self.verifier is not None and generator.mapping is not None:
            drawn, bf16 = self.config.verifier_scenes, self.config.bf16
            prefer_legible_codes(generator, self.verifier, one_hot, scenes=drawn, bf16=bf16, progress=progress)
        if generator.correction is not None:
            turns = scenes.first_turns
            correct_first_turns(generator, self.noise_encoder, *turns, noise=FOUND_NOISE_STD, progress=progress)
        return generator

    def _fit_mapping(self, generator: IterativeGenerator, progress: bool) -> None:
        if generator.mapping is None or self.noise_encoder is None:
            return
        scenes, dropout = self.scenes, self.config.history_dropout
        turns = code_turns(generator, self.noise_encoder, scenes.pixels, scenes.objects, scenes.places)
        fit_mapping(generator, turns, noise=FOUND_NOISE_STD, history_dropout=dropout, progress=progress)

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
