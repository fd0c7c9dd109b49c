"""Drawing scenes: names and seeds in, pictures out. The methods of IterativeGenerator are thin shells over this."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgan.canvas import Canvas
from condgan.functional import ConditionEncoder, encode_objects, evaluating, roll_conditions
from condgan.requests import MAX_SEED, AskedModel, Place, parse_request, parse_seed, parse_whole
from condgan.results import Drawing, Turn, exact_probability, target_objects

CPU_BATCH, GPU_BATCH = 1, 256
"""Pictures that pass the network at once on a CPU and on a GPU."""
CANDIDATE_STRIDE = 2**32
"""Distance between the seeds of the candidates of one picture in best-of-n."""


class PlaceSampler(Protocol):
    """Draws places (N, 2) for new objects, given pictures, conditions and (N, 3) uniform numbers."""

    def sample(self, image: Tensor, condition: Tensor, uniform: Tensor) -> Tensor: ...


class SceneModel(AskedModel, Protocol):
    """What drawing needs of a model; :class:`condgan.IterativeGenerator` is one."""

    @property
    def z_dim(self) -> int: ...
    @property
    def encoder(self) -> ConditionEncoder: ...
    @property
    def canvas(self) -> Canvas: ...
    @property
    def place_model(self) -> PlaceSampler | None: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def train(self, mode: bool = True) -> object: ...
    def __call__(self, z: Tensor, condition: Tensor, prev_image: Tensor, place: Tensor | None = None) -> Tensor: ...


class Turns(NamedTuple):
    """Scenes drawn turn by turn, as tensors."""

    images: Tensor
    """(N, T + 1, 3, H, W) float32 in [-1, 1]: the canvas, then the picture after each turn; a scene that is shorter
    than T repeats its last picture."""
    lengths: Tensor
    """(N,) int64: turns of each scene."""
    places: Tensor | None
    """(N, T, 2) float32: where each object was put, in pixels (x, y); NaN after a scene's last turn. None for models
    that do not know places."""


@torch.no_grad()
def draw_turns(
    generator: SceneModel,
    conditions: Sequence[Sequence[str]],
    seeds: Sequence[int],
    *,
    places: Sequence[Sequence[Place | None]] | None = None,
    start: Tensor | None = None,
) -> Turns:
    """Draw one picture for each list of objects and seed.

    A picture depends on its own list, seed, places and start only: every random number comes from a generator seeded
    with the picture's seed. On the CPU pictures pass the network one at a time, since the last bits of a batched
    convolution depend on the size of the batch. The generator draws in eval mode, whatever mode it is in.

    Args:
        generator: the model.
        conditions: N lists of names.
        seeds: N seeds, 0 to 2**63 - 1.
        places: for each object its centre in pixels (x, y), or None to have it drawn.
        start: (N, 3, H, W) float32 in [-1, 1], pictures to draw on; None draws empty scenes.

    Returns:
        :class:`Turns`, on the CPU.

    Raises:
        TypeError: a name is not a string.
        ValueError: there are no conditions, a list is empty, a name is unknown, there is not one seed (one list of
            places, one start) for each list, or ``start`` is not of the model's size.
    """
    _check_lengths(generator, conditions, seeds, places, start)
    objects = [encode_objects(scene, generator.vocabulary) for scene in conditions]
    turns = max(len(scene) for scene in objects)
    size = CPU_BATCH if next(generator.parameters()).device.type == "cpu" else GPU_BATCH
    images, where = [], []
    with evaluating(generator):
        for low in range(0, len(objects), size):
            part = slice(low, low + size)
            steps = iterate_turns(
                generator,
                torch.nn.utils.rnn.pad_sequence(objects[part], batch_first=True),
                [random_source(seed) for seed in seeds[part]],
                [[]] * size if places is None else places[part],
                None if start is None else start[part],
            )
            drawn, put = zip(*steps, strict=True)
            images.append(torch.stack([*drawn, *[drawn[-1]] * (turns + 1 - len(drawn))], 1))
            if generator.place_model is not None:
                where.append(F.pad(torch.stack(put[1:], 1), (0, 0, 0, turns + 1 - len(put)), value=math.nan))
    lengths = torch.tensor([len(scene) for scene in objects])
    return Turns(torch.cat(images), lengths, torch.cat(where) if where else None)


def random_source(seed: int) -> torch.Generator:
    """Where all random numbers of one picture come from.

    PyTorch's generator on the CPU reads 32 bits of a seed, so what is above them is mixed in; Knuth's multiplicative
    hash keeps the mixtures apart.
    """
    high, low = divmod(seed, 2**32)
    return torch.Generator().manual_seed(low ^ (high * 2654435761 % 2**32))


def _check_lengths(
    generator: SceneModel,
    conditions: Sequence[Sequence[str]],
    seeds: Sequence[int],
    places: Sequence[Sequence[Place | None]] | None,
    start: Tensor | None,
) -> None:
    """Raise ValueError unless all arguments of :func:`draw_turns` are for the same N pictures."""
    n = len(conditions)
    if n == 0:
        raise ValueError('conditions is empty: give at least one list of objects, such as [["red cube"]]')
    if len(seeds) != n:
        raise ValueError(f"seeds must be one a picture: got {len(seeds)} seeds for {n} lists of objects")
    if places is not None and generator.place_model is None:
        raise ValueError("places were given, but this model does not know places; the default model does")
    if places is not None and [len(scene) for scene in places] != [len(scene) for scene in conditions]:
        raise ValueError("places must be one list a picture, each with one (x, y) or None for every object")
    shape = (n, 3, generator.image_size, generator.image_size)
    if start is not None and start.shape != shape:
        raise ValueError(f"start must be {shape}, got {tuple(start.shape)}")


def iterate_turns(
    generator: SceneModel,
    objects: Tensor,
    rngs: Sequence[torch.Generator],
    asked: Sequence[Sequence[Place | None]],
    start: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The canvas, then turn after turn of one batch: pictures (N, 3, H, W) and places (N, 2), both on the CPU.

    Light and grain are drawn for a given ``start`` too, so that the noise of the turns does not depend on it.
    """
    weight = next(generator.parameters())

    def noise(*shape: int) -> Tensor:  # standard normal, one random source a picture
        return torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(weight.device, weight.dtype)

    light, grain = noise(len(generator.canvas.components)), noise(3, generator.image_size, generator.image_size)
    image = generator.canvas(light, grain).float()
    if start is not None:
        image = start.to(weight.device)
    yield image.cpu(), None
    conditions, _ = roll_conditions(generator.encoder, objects.to(weight.device, weight.dtype))
    for turn, condition in enumerate(conditions.unbind(1)):
        uniform = torch.stack([torch.rand(3, generator=rng) for rng in rngs]).to(weight.device)
        z = noise(generator.z_dim)
        present = objects[:, turn].any(1)
        place = None
        if generator.place_model is not None:
            place = generator.place_model.sample(image.to(weight.dtype), condition, uniform).float()
            for i, scene in enumerate(asked):
                wanted = scene[turn] if turn < len(scene) else None
                if wanted is not None:
                    place[i] = torch.tensor(wanted)
        drawn = generator(z, condition, image, place)
        image = torch.where(present.to(weight.device)[:, None, None, None], drawn, image)
        yield image.cpu(), None if place is None else place.cpu().masked_fill(~present[:, None], math.nan)


def draw(
    generator: SceneModel,
    conditions: object,
    *,
    num_images: int = 1,
    seed: int | None = None,
    at: object = None,
    best_of: int = 1,
    start: Tensor | None = None,
) -> Drawing:
    """What ``IterativeGenerator.generate`` and ``add`` do; see there."""
    num_images = parse_whole("num_images", num_images, 1)
    best_of = parse_whole("best_of", best_of, 1)
    first = parse_seed(seed)
    scenes, places = parse_request(generator, conditions, at)
    scenes = [scene for scene in scenes for _ in range(num_images)]
    if places is not None:
        places = [scene for scene in places for _ in range(num_images)]
    seeds = [(first + n) % (MAX_SEED + 1) for n in range(len(scenes))]
    target = target_objects(scenes, start) if best_of > 1 else None
    if start is not None:
        start = start.expand(len(scenes), -1, -1, -1)
    best = draw_turns(generator, scenes, seeds, places=places, start=start)
    scores = None
    if target is not None:
        scores = exact_probability(best.images[:, -1], target)
        for i in range(1, best_of):
            other_seeds = [(first + n + i * CANDIDATE_STRIDE) % (MAX_SEED + 1) for n in range(len(scenes))]
            other = draw_turns(generator, scenes, other_seeds, places=places, start=start)
            other_scores = exact_probability(other.images[:, -1], target)
            better = other_scores > scores
            scores = torch.where(better, other_scores, scores)
            seeds = [o if b else s for s, o, b in zip(seeds, other_seeds, better.tolist(), strict=True)]
            best.images[better] = other.images[better]
            if best.places is not None and other.places is not None:
                best.places[better] = other.places[better]
    where = None
    if best.places is not None:
        asked = places or [[None] * len(scene) for scene in scenes]
        where = [_known_places(*scene) for scene in zip(asked, best.places.tolist(), strict=True)]
    return Drawing(scenes, seeds, where, best.images, None if scores is None else scores.tolist())


def _known_places(asked: Sequence[Place | None], put: Sequence[Sequence[float]]) -> list[Place]:
    """For each object the place as it was asked, in full precision, or else where it was put."""
    return [wanted or (x, y) for wanted, (x, y) in zip(asked, put, strict=False)]  # ``put`` may be padded


def stream(generator: SceneModel, conditions: object, *, seed: int | None = None, at: object = None) -> Iterator[Turn]:
    """What ``IterativeGenerator.stream`` does; see there. Wrong arguments are refused here, before the first turn."""
    first = parse_seed(seed)
    scenes, places = parse_request(generator, conditions, at)
    if len(scenes) > 1:
        raise ValueError("stream draws one scene: give one list of objects, or call generate for several")
    return _stream_turns(generator, scenes[0], None if places is None else places[0], first)


def _stream_turns(
    generator: SceneModel, scene: list[str], asked: list[Place | None] | None, seed: int
) -> Iterator[Turn]:
    """The turns of one scene; between them the generator is in its own mode and gradients are as they were."""
    objects = encode_objects(scene, generator.vocabulary)[None]
    steps = iterate_turns(generator, objects, [random_source(seed)], [asked or []], None)
    image, _ = next(steps)
    for turn, name in enumerate(scene):
        previous = image
        with torch.no_grad(), evaluating(generator):
            image, place = next(steps)
        where = None
        if place is not None:
            (where,) = _known_places([None if asked is None else asked[turn]], place.tolist())
        yield Turn(image[0], previous[0], name, where, seed)
