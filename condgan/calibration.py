"""The last steps of a training: what is fitted to the finished weights, with no gradient through the pictures."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm, trange

from condgan.correction import ANSWERS, middle_of, products_of
from condgan.drawing import iterate_turns, random_source
from condgan.functional import ConditionEncoder, evaluating, places_of_turns, roll_conditions
from condgan.images import from_uint8, to_uint8
from condgan.models import IterativeGenerator, NoiseEncoder
from condgan.precision import widest_float

FIRST_REACH = 1.0
"""Pixels around the mean place of an object's first turns within which they are corrected: all of i-CLEVR's are."""
RIDGE = 0.05
"""Share of the scenes of an object that its answers are shortened by, to find what objects share."""
NUMBER_RIDGE, PRODUCT_RIDGE = 0.01, 0.1
"""The same for the answers that objects share, to numbers and to products of two of them."""
FOUND_NOISE_STD = 0.15
"""Standard deviation of what is added to the code that the noise encoder finds: it must leave room around each."""
LIGHT_NOISE_STD = 0.3
"""The same for the light of later turns, whose numbers have a variance of 1: without it they would name the scene."""
BATCH_SIZE = 32
RECALIBRATION_BATCHES = 8
"""Batches of :data:`BATCH_SIZE` scenes that :func:`recalibrate` averages statistics over."""
MAPPING_EPOCHS = 64
"""How often :func:`fit_mapping` sees every turn."""
MAPPING_LEARNING_RATE = 2e-3
"""The highest, of AdamW; one cycle over all steps."""
PLACE_EPOCHS = 8
"""How often :func:`fit_places` sees every turn where it is not told."""
PLACE_LEARNING_RATE = 3e-3
FIT_BATCH_SIZE = 128
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
    objects: Tensor
    """(S, T) ids of what was added."""


def check_noise_encoder(noise_encoder: NoiseEncoder, generator: IterativeGenerator) -> None:
    """Refuse a noise encoder that cannot be the one that a generator was trained with.

    Raises:
        ValueError: it looks at other pictures, or finds codes of another length.
    """
    for field in ("image_size", "z_dim", "places", "window"):
        ours, theirs = getattr(generator.config, field), getattr(noise_encoder.config, field)
        if ours != theirs:
            raise ValueError(f"noise_encoder: it is of another model, its {field} is {theirs}, the generator's {ours}")


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

    Raises:
        ValueError: the noise encoder is of another model.
    """
    check_noise_encoder(noise_encoder, generator)
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
    return CodedTurns(torch.cat(codes), conditions, alone, flat, lights, objects)


class _Alike:
    """Of N = S x T turns with objects (S, T), those that add the same object as the same turn of their scenes."""

    def __init__(self, objects: Tensor) -> None:
        turns = torch.arange(objects.shape[1])
        kinds = (objects.cpu() * len(turns) + turns).flatten()
        sizes = kinds.bincount()
        self.later = (turns > 0).repeat(len(objects))
        self.order = kinds.argsort()
        self.first, self.size = (sizes.cumsum(0) - sizes)[kinds], sizes[kinds]  # of each turn's kind in this order

    def other_history(self, rows: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """For each of these turns (n,) one that is alike, of any scene, of a first turn itself; which are later."""
        number = (torch.rand(len(rows), generator=rng, dtype=torch.float64) * self.size[rows]).long()
        other = self.order[self.first[rows] + number].where(self.later[rows], rows)
        return other, self.later[rows]


@torch.no_grad()
def _read_both_ways(generator: IterativeGenerator, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Conditions (N, D) of N = S x T turns with objects (S, T) ids: as they follow each other, and each alone."""
    one_hot = F.one_hot(objects, len(generator.vocabulary)).float().to(next(generator.parameters()).device)
    conditions, _ = roll_conditions(generator.encoder, one_hot)
    return conditions.flatten(0, 1), read_alone(generator.encoder, one_hot).flatten(0, 1)


def fit_mapping(
    generator: IterativeGenerator,
    turns: CodedTurns,
    *,
    noise: float = FOUND_NOISE_STD,
    history_dropout: float,
    progress: bool = True,
) -> None:
    """Teach the mapping the codes of a finished noise encoder, which moved while both were trained together.

    Codes of later turns depend on the object, its place and the light. So that the mapping cannot learn by heart which
    code came in which scene, they are seen with the history of another scene whose same turn adds the same object, and
    with noise on the light.

    AdamW in batches of 128 for 64 epochs, from the weights that the mapping has. Equal arguments give equal weights;
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
    alike = _Alike(turns.objects)

    def loss(rows: Tensor, rng: torch.Generator) -> Tensor:
        around = torch.randn(len(rows), turns.codes.shape[1], generator=rng).to(turns.codes)
        others, later = alike.other_history(rows, rng)
        condition = _mixed(turns.conditions, turns.conditions_alone, others, history_dropout, rng)
        code = with_noise(turns.codes[rows], around, noise)
        place, light = (None if x is None else x[rows] for x in (turns.places, turns.light))
        if light is not None:
            light_noise = torch.randn(light.shape, generator=rng).to(light)
            light = light + LIGHT_NOISE_STD * later[:, None].to(light.device) * light_noise
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
    epochs: int | None = None,
    progress: bool = True,
) -> None:
    """Teach the place model where real objects stand, given what the finished RNN says and how the scene is lit.

    First turns start from empty scenes that the generator draws, each in the light of the real one, not from the real
    ones: what is left of an object where it was taken out of a real picture would give its place away, and so would
    its tint (:meth:`condgan.canvas.Canvas.scene_light`). A later object may stand wherever there is room. So that the
    model cannot learn by heart where it stood in which scene, later turns are seen mirrored or not, with their colours
    in any order, and with the light and the history of another scene whose same turn adds the same object.

    AdamW in batches of 128, from the weights that the place model has. Equal arguments give equal weights; the global
    random state is left alone.

    Args:
        generator: its place model is changed in place.
        pixels: (S, T + 1, 3, H, W) uint8, the empty scenes first.
        objects: (S, T) ids.
        places: (S, T, 2) pixels.
        history_dropout: share of turns that are read as if they were the first, as in training.
        epochs: how often every turn is seen; None: 8 times.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the generator has no place model.
    """
    model = generator.place_model
    if model is None:
        raise ValueError("generator: its configuration has places=False, so there is nothing to fit")
    conditions, alone = _read_both_ways(generator, objects)
    empty = _empty_scenes(generator, pixels[:, 1], objects[:, 0], torch.Generator().manual_seed(0))
    before = torch.cat((empty[:, None], pixels[:, 1:-1]), 1).flatten(0, 1)
    device = conditions.device
    light = None
    if generator.light is not None:
        light = torch.cat([generator.light(from_uint8(chunk.to(device))) for chunk in before.split(FIT_BATCH_SIZE)])
    where, alike = places.flatten(0, 1), _Alike(objects)

    def loss(rows: Tensor, rng: torch.Generator) -> Tensor:
        others, later = alike.other_history(rows, rng)
        condition = _mixed(conditions, alone, others, history_dropout, rng)
        image, place = _seen_anew(from_uint8(before[rows]), where[rows], later, rng)
        return model.loss(image.to(device), condition, place.to(device), None if light is None else light[others])

    steps = (PLACE_EPOCHS if epochs is None else epochs) * math.ceil(len(before) / FIT_BATCH_SIZE)
    _fit(model, loss, len(before), FIT_BATCH_SIZE, steps, PLACE_LEARNING_RATE, "places", progress)


def _seen_anew(images: Tensor, places: Tensor, chosen: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some of N pictures, ``chosen`` (N,) bool, mirrored or not and with colours in any order; and their places."""
    mirrored = chosen & (torch.rand(len(images), generator=rng) < 0.5)
    colours = torch.rand(len(images), 3, generator=rng).argsort(1).where(chosen[:, None], torch.arange(3))
    images = images.flip(3).where(mirrored[:, None, None, None], images)
    images = images.gather(1, colours[:, :, None, None].expand_as(images))
    x, y = places.unbind(1)
    return images, torch.stack((torch.where(mirrored, images.shape[3] - 1 - x, x), y), 1)


@torch.no_grad()
def _empty_scenes(generator: IterativeGenerator, first: Tensor, objects: Tensor, rng: torch.Generator) -> Tensor:
    """Canvases (S, 3, H, W) uint8 in the light of first turns (S, 3, H, W) uint8 that added ``objects`` (S,)."""
    canvas, scenes = generator.canvas, []
    light = canvas.scene_light(from_uint8(first.to(canvas.mean.device)), objects)
    for scores in light.split(FIT_BATCH_SIZE):
        grain = torch.randn(len(scores), *canvas.mean.shape, generator=rng).to(scores)
        scenes.append(to_uint8(canvas.in_light(scores, grain)).cpu())
    return torch.cat(scenes)


def _mixed(following: Tensor, alone: Tensor, rows: Tensor, share_alone: float, rng: torch.Generator) -> Tensor:
    """Conditions of these rows of (N, D); some as the RNN reads the turn alone."""
    forgetful = torch.rand(len(rows), 1, generator=rng) < share_alone
    return torch.where(forgetful.to(following.device), alone[rows], following[rows])


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
    """Minimise the mean of a loss that takes numbers of some of ``count`` samples, on the CPU, and a random source."""
    weights = [*module.parameters()]
    trainable = next(module.parameters()).requires_grad
    module.requires_grad_()
    optimizer = torch.optim.AdamW(weights, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    rng = torch.Generator().manual_seed(0)
    for _ in trange(steps, desc=name, unit="step", file=sys.stderr, disable=not progress):
        rows = torch.randint(count, (batch_size,), generator=rng)
        optimizer.zero_grad()
        loss(rows, rng).mean().backward(inputs=weights)
        nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
    module.requires_grad_(trainable)


@torch.no_grad()
def recalibrate(generator: IterativeGenerator, objects: Tensor) -> None:
    """Set the running statistics of every batch norm to those of scenes that the generator draws by itself.

    Averaged weights do not fit averaged statistics, and training sees real previous pictures where drawing sees the
    generator's own. The generator is left in eval mode.

    Args:
        generator: changed in place.
        objects: (S, T, K) multi-hot objects of scenes to draw from.

    Source: precise batch norm, Wu and Johnson 2021, arXiv:2105.07576, section 3.
    """
    norms = [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    generator.train()
    rng = torch.Generator().manual_seed(0)
    for batch in range(RECALIBRATION_BATCHES):
        chosen = objects[torch.randint(len(objects), (BATCH_SIZE,), generator=rng)]
        seeds = range(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE)
        for _ in iterate_turns(generator, chosen, [random_source(seed) for seed in seeds], [[]] * BATCH_SIZE, None):
            pass
    generator.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def correct_first_turns(
    generator: IterativeGenerator,
    noise_encoder: NoiseEncoder | None,
    pixels: Tensor,
    objects: Tensor,
    *,
    noise: float = FOUND_NOISE_STD,
    progress: bool = True,
) -> None:
    """Measure what first turns have wrong on average, object by object, and have the generator take it off.

    Draws the first turns of real scenes once more, in their own light but without the tint that the object gives the
    floor, at their own places and with their own codes, so that a cube is turned as the real one is and what is left is
    error. Around the codes there is noise, as around those that the mapping makes: in some directions found codes
    hardly differ, and there noise is all that there is. Pictures are compared, and not what turns change: the empty
    scenes before real turns were made of pictures with the object, and the faintest of its shadow is left in them.
    The error is explained by the object and, for models that know them, by the light, the place and the code: linearly,
    and by products of two of these numbers. They are many and there are few pictures of each object, so objects of one
    shape share their answers: two pictures for each number and each product (:data:`condgan.correction.ANSWERS`), mixed
    for every object and colour as the linear answers of the real turns are, by their first principal components.

    Args:
        generator: changed in place, with ``config.correction``. Its batch norms must be final: see :func:`recalibrate`.
        noise_encoder: finds the codes; None draws with random noise, which takes many more scenes to be as precise.
        pixels: (S, 2, 3, H, W) uint8, empty scenes and what real first turns made of them.
        objects: (S,) ids of the objects that were added.
        noise: standard deviation of what is added to every code, as in training.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the generator has no correction, or the noise encoder is of another model.

    Source: reduced-rank regression, Izenman 1975, "Reduced-rank regression for the multivariate linear model"; ridge
    regression, Hoerl and Kennard 1970.
    """
    correction = generator.correction
    if correction is None:
        raise ValueError("generator: its configuration has correction=False, so there is nothing to measure")
    device, count, numbers = correction.conditions.device, len(generator.vocabulary), correction.num_inputs
    kinds = torch.eye(count).to(correction.conditions)
    correction.conditions.copy_(generator.encoder(kinds)[0])
    correction.clear_()
    places, kind = places_of_turns(pixels)[:, 0].to(device), objects.to(device)
    if generator.place_model is not None:
        correction.put_(*_by_kind(places, kind, count), FIRST_REACH)
    codes, rng = None, torch.Generator().manual_seed(0)
    if noise_encoder is not None:
        where = None if generator.place_model is None else places[:, None]
        found = code_turns(generator, noise_encoder, pixels, objects[:, None], where).codes
        codes = with_noise(found, torch.randn(found.shape, generator=rng).to(device), noise)
        if generator.mapping is not None:
            correction.turn_(*_by_kind(codes, kind, count))
    canvases = _empty_scenes(generator, pixels[:, 1], objects, rng)
    changes = _Sums(count, numbers, generator.image_size, device)
    errors = _Sums(count, numbers + numbers * (numbers + 1) // 2, generator.image_size, device)
    with (
        evaluating(generator),
        tqdm(total=len(pixels), desc="first turns", unit="img", file=sys.stderr, disable=not progress) as bar,
    ):
        for rows in torch.arange(len(pixels), device=device).split(BATCH_SIZE):
            pictures, chosen = pixels[rows.to(pixels.device)], kind[rows]
            real = from_uint8(pictures.to(device))
            canvas = from_uint8(canvases[rows.to(canvases.device)].to(device))
            light, condition = generator.read_light(canvas), correction.conditions[chosen]
            place = None if generator.place_model is None else places[rows]
            if codes is not None:
                code = codes[rows]
            else:
                code = torch.randn(len(rows), generator.z_dim, generator=rng).to(device)
                if generator.mapping is not None:
                    code = generator.mapping(code, condition, place, light)
            error = real[:, 1] - generator.synthesis(code, condition, canvas, place)
            known = correction.read(chosen, light, place, code)
            changes.add(known, real[:, 1] - real[:, 0], kinds[chosen])
            errors.add(torch.cat((known, products_of(known)), 1), error, kinds[chosen])
            bar.update(len(rows))
    if correction.responses is None:
        correction.offsets.copy_(errors.means())
    else:
        correction.set_(*_explain(changes, errors, generator.vocabulary.shapes, correction.responses.shape[-1]))


def _by_kind(values: Tensor, kind: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (K, D) of values (S, D) of each kind (S,); NaN of those that there are none of."""
    groups = [values[kind == number] for number in range(count)]
    means = torch.stack([group.mean(0) for group in groups])
    return means, torch.stack([(x - m).square().mean(0).sqrt() for x, m in zip(groups, means, strict=True)])


def _explain(changes: _Sums, errors: _Sums, shapes: Sequence[str], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, answers and shares of a correction, see :meth:`FirstTurnCorrection.set_`.

    Args:
        changes: what real first turns changed, and L numbers that it may answer to.
        errors: what drawn ones lack, these numbers and their products.
        shapes: of the objects; those of one shape share their answers.
        size: side of the square in the middle that answers.
    """
    counts, numbers = changes.products[:, 0, 0], changes.products.shape[1] - 1
    ridge = torch.eye(numbers).to(counts) * (RIDGE * counts + (counts == 0))[:, None, None]
    products, pictures = changes.centred(size)
    slopes = torch.linalg.solve(products + ridge, pictures.flatten(2)).unflatten(2, (3, -1))  # (K, L, 3, size * size)

    offsets, means = errors.means(), errors.products[:, 1:, 0] / counts.clamp(min=1)[:, None]
    products, pictures = errors.centred(size)
    shares = counts.new_zeros(len(shapes), 3, ANSWERS * len(set(shapes)))
    answers = counts.new_zeros(shares.shape[2], products.shape[1], size * size)
    for number, shape in enumerate(dict.fromkeys(shapes)):
        rows = torch.tensor([other == shape for other in shapes], device=counts.device)
        part = slice(ANSWERS * number, ANSWERS * (number + 1))
        of_colours = slopes[rows].transpose(1, 2).flatten(2).flatten(0, 1)  # (k * 3, L * size * size)
        mixed = torch.linalg.svd(of_colours, full_matrices=False).U[:, :ANSWERS] * len(of_colours) ** 0.5
        mixed = mixed.unflatten(0, (-1, 3))  # (k, 3, R)
        weights = mixed.mT @ mixed  # (k, R, R)
        normal = sum(torch.kron(weight, product) for weight, product in zip(weights, products[rows], strict=True))
        ridge = torch.full((ANSWERS, products.shape[1]), PRODUCT_RIDGE).to(counts)
        ridge[:, :numbers] = NUMBER_RIDGE
        normal = normal + torch.diag(ridge.flatten() * (3 * counts[rows].sum()).clamp(min=1))
        wanted = torch.einsum("kcr,kfcp->rfp", mixed, pictures[rows])
        answers[part] = torch.linalg.solve(normal, wanted.flatten(0, 1)).view_as(wanted)
        shares[rows, :, part] = mixed
    explained = torch.einsum("kcr,rfp->kfcp", shares, answers)  # (K, F, 3, size * size)
    middle = middle_of(offsets.shape[-1], size)
    offsets[:, :, middle, middle] -= torch.einsum("kf,kfcp->kcp", means, explained).view(-1, 3, size, size)
    return offsets, answers.unflatten(2, (size, size)), shares


class _Sums:
    """What a linear regression of pictures on numbers has to know of its samples, object by object."""

    def __init__(self, kinds: int, numbers: int, image_size: int, device: torch.device) -> None:
        self.products = torch.zeros(kinds, 1 + numbers, 1 + numbers, dtype=widest_float(device), device=device)
        self.pictures = torch.zeros(kinds, 1 + numbers, 3, image_size, image_size, device=device)

    def add(self, numbers: Tensor, pictures: Tensor, one_hot: Tensor) -> None:
        """Take note of N samples: numbers (N, F), pictures (N, 3, H, W) and their objects (N, K)."""
        known = torch.cat((numbers.new_ones(len(numbers), 1), numbers), 1)
        wide = known.to(self.products)
        self.products += torch.einsum("nk,ni,nj->kij", one_hot.to(wide), wide, wide)
        by_kind = torch.einsum("nk,ni->kin", one_hot, known)
        self.pictures += (by_kind @ pictures.flatten(1)).view_as(self.pictures)

    def means(self) -> Tensor:
        """Mean pictures (K, 3, H, W); 0 of objects without samples."""
        return self.pictures[:, 0] / self.products[:, 0, 0].clamp(min=1).to(self.pictures)[:, None, None, None]

    def centred(self, size: int) -> tuple[Tensor, Tensor]:
        """Sums about the means: of products of two numbers (K, F, F), of numbers and pictures (K, F, 3, size * size).

        Of pictures the square in the middle.
        """
        sums, counts = self.products[:, 1:, 0], self.products[:, :1, :1].clamp(min=1)
        products = self.products[:, 1:, 1:] - sums[:, :, None] * sums[:, None] / counts
        middle = middle_of(self.pictures.shape[-1], size)
        pictures = self.pictures[..., middle, middle].flatten(3).to(products)
        return products, pictures[:, 1:] - sums[:, :, None, None] / counts[..., None] * pictures[:, :1]
