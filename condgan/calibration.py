"""The last steps of a training: what is fitted to the finished weights, with no gradient through the pictures."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm, trange

from condgan.classifier import SceneClassifier
from condgan.drawing import DrawnTurn, iterate_turns, random_source
from condgan.functional import ConditionEncoder, evaluating, places_of_turns, roll_conditions
from condgan.images import from_uint8, to_uint8
from condgan.models import IterativeGenerator, NoiseEncoder
from condgan.precision import autocast

CORRECTION_PASSES = 3
"""How often :func:`correct_first_turns` draws all scenes."""
FIRST_REACH = 1.0
"""Pixels around the mean place of an object's first turns within which they are corrected: all of i-CLEVR's are."""
RIDGE = 0.05
"""Share of the scenes that answers to the light are shortened by: there are about 200 of each object."""
BATCH_SIZE = 32
MAPPING_EPOCHS = 32
"""How often :func:`fit_mapping` sees every turn."""
MAPPING_LEARNING_RATE = 2e-3
"""The highest, of AdamW; one cycle over all steps."""
PLACE_EPOCHS = 8
"""How often :func:`fit_places` sees every turn."""
PLACE_LEARNING_RATE = 3e-3
FIT_BATCH_SIZE = 128
LEGIBLE_BATCH_SIZE = 48
"""Scenes that :func:`prefer_legible_codes` draws in each of its steps."""
LEGIBLE_LEARNING_RATE = 1e-4
LEGIBLE_WEIGHT = 6.0
"""Power of the verifier's likelihood: how much more its word counts than what real codes are like."""
HIDDEN_LOSS = 6.0
"""A turn does not count for more than this: some objects hide behind others whatever their codes."""
MAX_GRADIENT_NORM = 10.0


def read_alone(encoder: ConditionEncoder, objects: Tensor) -> Tensor:
    """What the RNN says of turns (N, T, K) when it reads each as if it were the first: (N, T, D)."""
    return roll_conditions(encoder, objects.flatten(0, 1)[:, None])[0].unflatten(0, objects.shape[:2])[:, :, 0]


def with_noise(code: Tensor, noise: Tensor, std: float) -> Tensor:
    """Codes with standard normal ``noise`` around them, of standard deviation ``std``; their variance stays 1."""
    return (1 - std**2) ** 0.5 * code + std * noise


class CodedTurns(NamedTuple):
    """Real turns as the mapping has to know them: N = scenes x turns."""

    codes: Tensor
    """(N, z_dim), as found by a noise encoder in eval mode."""
    conditions: Tensor
    """(N, D)."""
    conditions_alone: Tensor
    """(N, D): what the RNN says when it reads the turn as if it were the first."""
    places: Tensor | None
    """(N, 2) pixels, for models that know places."""
    light: Tensor | None
    """(N, light_inputs), for models that know the light."""


@torch.no_grad()
def code_turns(
    generator: IterativeGenerator, noise_encoder: NoiseEncoder, pixels: Tensor, objects: Tensor, places: Tensor | None
) -> CodedTurns:
    """Find the codes of real turns.

    Args:
        generator: whose RNN reads the objects.
        noise_encoder: on the same device; it is put to eval mode while it looks.
        pixels: (S, T + 1, 3, H, W) uint8, the empty scenes first.
        objects: (S, T) ids.
        places: (S, T, 2) pixels, for models that know places; else None.
    """
    device = next(generator.parameters()).device
    conditions, alone = _read_both_ways(generator, objects)
    where = None if places is None else places.to(device)
    codes, light = [], []
    with evaluating(noise_encoder):
        for rows in torch.arange(len(pixels)).split(BATCH_SIZE):
            images = from_uint8(pixels[rows].to(device))
            place = None if where is None else where[rows].flatten(0, 1)
            before, after = images[:, :-1].flatten(0, 1), images[:, 1:].flatten(0, 1)
            codes.append(noise_encoder(before, after, place))
            if generator.light is not None:
                light.append(generator.light(before))
    flat = None if where is None else where.flatten(0, 1)
    lights = torch.cat(light) if light else None
    return CodedTurns(torch.cat(codes), conditions, alone, flat, lights)


@torch.no_grad()
def _read_both_ways(generator: IterativeGenerator, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Conditions (N, D) of N = S x T turns with objects (S, T) ids: as they follow each other, and each alone."""
    one_hot = F.one_hot(objects, len(generator.vocabulary)).float().to(next(generator.parameters()).device)
    conditions, _ = roll_conditions(generator.encoder, one_hot)
    return conditions.flatten(0, 1), read_alone(generator.encoder, one_hot).flatten(0, 1)


def fit_mapping(
    generator: IterativeGenerator, turns: CodedTurns, *, noise: float, history_dropout: float, progress: bool = True
) -> None:
    """Teach the mapping the codes of a finished noise encoder, which moved while both were trained together.

    AdamW in batches of 128 for 32 epochs, from the weights that the mapping has. Equal arguments give equal weights;
    the global random state is left alone.

    Args:
        generator: its mapping is changed in place.
        turns: real turns of the train split.
        noise: standard deviation of what is added to every code, as in training.
        history_dropout: share of turns that are read as if they were the first, as in training.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the generator has no mapping.
    """
    mapping = generator.mapping
    if mapping is None:
        raise ValueError("generator: its configuration has mapping=False, so there is nothing to fit")

    def loss(rows: Tensor, rng: torch.Generator) -> Tensor:
        around = torch.randn(len(rows), turns.codes.shape[1], generator=rng).to(rows.device)
        condition = _mixed(turns.conditions, turns.conditions_alone, rows, history_dropout, rng)
        code = with_noise(turns.codes[rows], around, noise)
        place, light = (None if x is None else x[rows] for x in (turns.places, turns.light))
        return mapping.loss(code, condition, place, light)

    steps = MAPPING_EPOCHS * math.ceil(len(turns.codes) / FIT_BATCH_SIZE)
    _fit(mapping, loss, len(turns.codes), FIT_BATCH_SIZE, steps, MAPPING_LEARNING_RATE, "mapping", progress)


def fit_places(
    generator: IterativeGenerator,
    pixels: Tensor,
    objects: Tensor,
    places: Tensor,
    *,
    history_dropout: float,
    progress: bool = True,
) -> None:
    """Teach the place model where real objects stand, given what the finished RNN says.

    First turns start from empty scenes that the generator draws, not from the real ones: what is left of an object
    where it was taken out of a real picture would give its place away. AdamW in batches of 128 for 8 epochs, from the
    weights that the place model has. Equal arguments give equal weights; the global random state is left alone.

    Args:
        generator: its place model is changed in place.
        pixels: (S, T + 1, 3, H, W) uint8, the empty scenes first.
        objects: (S, T) ids.
        places: (S, T, 2) pixels.
        history_dropout: share of turns that are read as if they were the first, as in training.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the generator has no place model.
    """
    model = generator.place_model
    if model is None:
        raise ValueError("generator: its configuration has places=False, so there is nothing to fit")
    conditions, alone = _read_both_ways(generator, objects)
    before = torch.cat((_empty_scenes(generator, len(pixels))[:, None], pixels[:, 1:-1]), 1).flatten(0, 1)
    where = places.flatten(0, 1)

    def loss(rows: Tensor, rng: torch.Generator) -> Tensor:
        image, place = from_uint8(before[rows.to(before.device)]), where[rows.to(where.device)]
        condition = _mixed(conditions, alone, rows, history_dropout, rng)
        return model.loss(image.to(rows.device), condition, place.to(rows.device))

    steps = PLACE_EPOCHS * math.ceil(len(before) / FIT_BATCH_SIZE)
    _fit(model, loss, len(before), FIT_BATCH_SIZE, steps, PLACE_LEARNING_RATE, "places", progress)


@torch.no_grad()
def _empty_scenes(generator: IterativeGenerator, count: int) -> Tensor:
    """Canvases (N, 3, H, W) uint8 of seeds 0, 1, 2, ..."""
    nothing = torch.zeros(count, 1, len(generator.vocabulary))
    scenes = []
    for rows in torch.arange(count).split(BATCH_SIZE):
        sources = [random_source(row) for row in rows.tolist()]
        canvas, _ = next(iterate_turns(generator, nothing[rows], sources, [[]] * len(rows), None))
        scenes.append(to_uint8(canvas))
    return torch.cat(scenes)


def misread(logits: Tensor, objects: Tensor) -> Tensor:
    """Cross-entropy (N,) in nats of what a classifier sees, logits (N, K), and what is there, (N, K) of 0 and 1.

    At most :data:`HIDDEN_LOSS`.
    """
    return F.binary_cross_entropy_with_logits(logits, objects, reduction="none").sum(1).clamp(max=HIDDEN_LOSS)


def prefer_legible_codes(
    generator: IterativeGenerator,
    verifier: SceneClassifier,
    objects: Tensor,
    *,
    scenes: int,
    bf16: bool = True,
    progress: bool = True,
) -> None:
    """Have the mapping make codes of which the verifier can tell the object, and else as before.

    Bayes' rule: given that the verifier sees in a picture what was asked and nothing else, which codes are likely? The
    mapping moves towards this posterior by variational inference, in scenes that the generator draws by itself: it
    maximises the log-likelihood of what was asked, times 6, less the Kullback-Leibler divergence to what it was
    before. Nothing else is touched: an object stands and hides where it would, and looks as its code says.

    AdamW, 48 scenes a step. Equal arguments give equal weights; the global random state is left alone.

    Args:
        generator: its mapping is changed in place.
        verifier: finds the objects in a picture; never the judge that reports.
        objects: (S, T, K) multi-hot objects of scenes to draw from.
        scenes: how many are drawn.
        bf16: draw and look in bfloat16 where that is fast.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the generator has no mapping, or the verifier knows other objects.

    Source: ours; amortised variational inference as in Kingma and Welling 2014, arXiv:1312.6114.
    """
    mapping, places = generator.mapping, generator.place_model
    if mapping is None:
        raise ValueError("generator: its configuration has mapping=False, so there is nothing to fit")
    if verifier.config.objects != generator.config.objects:
        raise ValueError(f"verifier: it knows {verifier.config.objects}, the generator {generator.config.objects}")
    device = next(generator.parameters()).device
    before = copy.deepcopy(mapping).requires_grad_(False)

    def loss(rows: Tensor, rng: torch.Generator) -> Tensor:
        chosen = objects[rows.to(objects.device)].to(device)
        losses: list[Tensor] = []

        def draw_turn(turn: int, condition: Tensor, image: Tensor, rest: Tensor, wanted: object) -> DrawnTurn:
            condition = condition.detach()
            uniform, z = torch.rand(len(rows), 3, generator=rng), torch.randn(len(rows), generator.z_dim, generator=rng)
            with torch.no_grad():
                place = None if places is None else places(image, condition, uniform.to(device))
                context = condition, place, generator.read_light(image)
            code = mapping(z.to(device), *context)
            with autocast(device, bf16):
                drawn = generator.synthesis(code, condition, image, place).float()
                logits = verifier(drawn).float()
            seen = misread(logits, chosen[:, : turn + 1].amax(1))
            divergence = before.loss(code, *context) - mapping.loss(code, *context)
            losses.append(LEGIBLE_WEIGHT * seen + divergence)
            return drawn.detach(), place

        sources = [random_source(seed) for seed in torch.randint(2**31, (len(rows),), generator=rng).tolist()]
        for _ in iterate_turns(generator, chosen, sources, [[]] * len(rows), None, draw_turn):
            pass
        return torch.cat(losses)

    steps, rate = math.ceil(scenes / LEGIBLE_BATCH_SIZE), LEGIBLE_LEARNING_RATE
    with evaluating(generator), evaluating(verifier):
        _fit(mapping, loss, len(objects), LEGIBLE_BATCH_SIZE, steps, rate, "legible codes", progress)


def _mixed(following: Tensor, alone: Tensor, rows: Tensor, share_alone: float, rng: torch.Generator) -> Tensor:
    """Conditions of these rows of (N, D); some as the RNN reads the turn alone."""
    forgetful = torch.rand(len(rows), 1, generator=rng) < share_alone
    return torch.where(forgetful.to(rows.device), alone[rows], following[rows])


def _fit(
    module: nn.Module,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    count: int,
    batch_size: int,
    steps: int,
    learning_rate: float,
    name: str,
    progress: bool,
) -> None:
    """Minimise the mean of a loss that takes the numbers of some of ``count`` samples and a random source."""
    weights = [*module.parameters()]
    device = next(module.parameters()).device
    trainable = next(module.parameters()).requires_grad
    module.requires_grad_()
    optimizer = torch.optim.AdamW(weights, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    rng = torch.Generator().manual_seed(0)
    for _ in trange(steps, desc=name, unit="step", file=sys.stderr, disable=not progress):
        rows = torch.randint(count, (batch_size,), generator=rng).to(device)
        optimizer.zero_grad()
        loss(rows, rng).mean().backward(inputs=weights)
        nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
    module.requires_grad_(trainable)


@torch.no_grad()
def recalibrate(generator: IterativeGenerator, objects: Tensor, batches: int = 8) -> None:
    """Set the running statistics of every batch norm to those of scenes that the generator draws by itself.

    Averaged weights do not fit averaged statistics, and training sees real previous pictures where drawing sees the
    generator's own. The generator is left in eval mode.

    Args:
        generator: changed in place.
        objects: (S, T, K) multi-hot objects of scenes to draw from.
        batches: number of batches, of :data:`BATCH_SIZE` scenes, that the statistics are averaged over.

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
        chosen = objects[torch.randint(len(objects), (BATCH_SIZE,), generator=rng)]
        seeds = range(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE)
        for _ in iterate_turns(generator, chosen, [random_source(seed) for seed in seeds], [[]] * BATCH_SIZE, None):
            pass
    generator.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def correct_first_turns(
    generator: IterativeGenerator, pixels: Tensor, objects: Tensor, *, progress: bool = True
) -> None:
    """Measure what first turns have wrong on average, object by object, and have the generator take it off.

    What an object changes in a picture is explained by the object and, for models that know the light, linearly by the
    light, in real turns and in drawn ones. Every pass draws the first turns of all scenes and moves the correction
    towards the difference: in the n-th pass by the n-th part of what is still missing, so that all passes count alike.

    Args:
        generator: changed in place, with ``config.correction``. Its batch norms must be final: see :func:`recalibrate`.
        pixels: (S, 2, 3, H, W) uint8, empty scenes and what real first turns made of them.
        objects: (S,) ids of the objects that were added.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the generator has no correction.

    Source: stochastic approximation, Robbins and Monro 1951; ridge regression, Hoerl and Kennard 1970.
    """
    correction = generator.correction
    if correction is None:
        raise ValueError("generator: its configuration has correction=False, so there is nothing to measure")
    device = correction.conditions.device
    kinds = torch.eye(len(generator.vocabulary))
    correction.conditions.copy_(generator.encoder(kinds.to(device))[0])
    correction.clear_()
    real = _Answers(generator)
    for rows in torch.arange(len(pixels)).split(BATCH_SIZE):
        before, after = from_uint8(pixels[rows].to(device)).unbind(1)
        real.add(before, after, kinds[objects[rows]])
    wanted = real.coefficients()
    if generator.place_model is not None:  # the mean of no places is NaN
        places = places_of_turns(pixels)[:, 0].to(device)
        correction.put_(torch.stack([places[objects == kind].mean(0) for kind in range(len(kinds))]), FIRST_REACH)
    total = CORRECTION_PASSES * len(pixels)
    with (
        evaluating(generator),
        tqdm(total=total, desc="first turns", unit="img", file=sys.stderr, disable=not progress) as bar,
    ):
        for number in range(CORRECTION_PASSES):
            drawn = _Answers(generator)
            for rows in torch.arange(len(pixels)).split(BATCH_SIZE):
                rngs = [random_source(number * len(pixels) + row) for row in rows.tolist()]
                one_hot = kinds[objects[rows]]
                turns = iterate_turns(generator, one_hot[:, None], rngs, [[]] * len(rows), None)
                before, after = (from_uint8(to_uint8(image).to(device)) for image, _ in turns)
                drawn.add(before, after, one_hot)
                bar.update(len(rows))
            correction.add_((wanted - drawn.coefficients()) / (number + 1))


class _Answers:
    """Linear regression, object by object, of what a turn changed on how the scene is lit."""

    def __init__(self, generator: IterativeGenerator) -> None:
        self.generator = generator
        kinds, numbers, size = len(generator.vocabulary), 1 + generator.config.light_inputs, generator.image_size
        device = next(generator.parameters()).device
        self.products = torch.zeros(kinds, numbers, numbers, device=device)
        self.sums = torch.zeros(kinds, numbers, 3, size, size, device=device)

    def add(self, before: Tensor, after: Tensor, one_hot: Tensor) -> None:
        """Take note of N turns, each with the object that was added, (N, K)."""
        light = self.generator.read_light(before)
        known = torch.ones(len(before), 1, device=before.device)
        known = known if light is None else torch.cat((known, light), 1)  # (N, 1 + L)
        one_hot = one_hot.to(known)
        self.products += torch.einsum("nk,ni,nj->kij", one_hot, known, known)
        known_by_kind = torch.einsum("nk,ni->kin", one_hot, known)
        self.sums += (known_by_kind @ (after - before).flatten(1)).view_as(self.sums)

    def coefficients(self) -> Tensor:
        """(K, 1 + L, 3, H, W): the mean change, and the answer to each number; 0 for objects that were never added."""
        counts = self.products[:, 0, 0, None]
        ridge = RIDGE * counts.repeat(1, self.products.shape[1])
        ridge[:, 0] = 0
        ridge += (counts == 0).to(ridge)
        found = torch.linalg.solve(self.products + torch.diag_embed(ridge), self.sums.flatten(2))
        return found.view_as(self.sums)
