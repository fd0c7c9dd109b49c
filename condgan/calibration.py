"""The last steps of a training: what is fitted to the finished weights, with no gradient through the pictures."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm, trange

from condgan.drawing import iterate_turns, random_source
from condgan.functional import ConditionEncoder, evaluating, roll_conditions
from condgan.images import from_uint8, to_uint8
from condgan.models import IterativeGenerator, NoiseEncoder

CORRECTION_PASSES = 3
"""How often :func:`correct_first_turns` draws all scenes."""
RIDGE = 0.05
"""Share of the scenes that answers to the light are shortened by: there are about 200 of each object."""
BATCH_SIZE = 32
MAPPING_EPOCHS = 32
"""How often :func:`fit_mapping` sees every turn."""
MAPPING_BATCH_SIZE = 128
MAPPING_LEARNING_RATE = 2e-3
"""The highest, of AdamW; one cycle over all steps."""
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
    one_hot = F.one_hot(objects, len(generator.vocabulary)).float().to(device)
    conditions, _ = roll_conditions(generator.encoder, one_hot)
    alone = read_alone(generator.encoder, one_hot)
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
    return CodedTurns(torch.cat(codes), conditions.flatten(0, 1), alone.flatten(0, 1), flat, lights)


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
    count, device = len(turns.codes), turns.codes.device
    steps = MAPPING_EPOCHS * math.ceil(count / MAPPING_BATCH_SIZE)
    trainable = next(mapping.parameters()).requires_grad
    mapping.requires_grad_()
    optimizer = torch.optim.AdamW(mapping.parameters(), weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAPPING_LEARNING_RATE, total_steps=steps)
    rng = torch.Generator().manual_seed(0)
    for _ in trange(steps, desc="mapping", unit="step", file=sys.stderr, disable=not progress):
        rows = torch.randint(count, (MAPPING_BATCH_SIZE,), generator=rng).to(device)
        around = torch.randn(MAPPING_BATCH_SIZE, turns.codes.shape[1], generator=rng).to(device)
        forgetful = (torch.rand(MAPPING_BATCH_SIZE, 1, generator=rng) < history_dropout).to(device)
        condition = torch.where(forgetful, turns.conditions_alone[rows], turns.conditions[rows])
        code = with_noise(turns.codes[rows], around, noise)
        place, light = (None if x is None else x[rows] for x in (turns.places, turns.light))
        loss = mapping.loss(code, condition, place, light).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(mapping.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
    mapping.requires_grad_(trainable)


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
