"""Drawing scenes: names and seeds in, pictures out. The methods of IterativeGenerator are thin shells over this."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgan.canvas import Canvas
from condgan.derived import steady_weights
from condgan.functional import ConditionEncoder, channels_last, encode_objects, evaluating, roll_conditions
from condgan.images import round_levels, round_turn
from condgan.precision import full_precision
from condgan.requests import (
    MAX_PICTURES,
    MAX_SEED,
    AskedModel,
    Place,
    fold_seed,
    parse_request,
    parse_seed,
    parse_whole,
)
from condgan.results import Drawing, Turn, exact_probability, target_objects

CPU_BATCH, GPU_BATCH = 1, 256
"""Pictures that pass the network at once on a CPU and on a GPU, unless told otherwise."""
CANDIDATE_STRIDE = 2**32
"""Distance between the seeds of the candidates of one picture in best-of-n."""
GOOD_TURN = 0.9
"""A turn is drawn again while the verifier's probability that exactly the objects asked so far are there is below this.
96 % of the turns of real scenes of the validation split reach it."""

Redraw = Literal["picture", "turn"]
"""What best-of-n draws several times: whole pictures, or the turns that failed."""


class DrawnTurn(NamedTuple):
    """One turn of N pictures."""

    image: Tensor
    """(N, 3, H, W) in [-1, 1], whole levels of 256."""
    rest: Tensor
    """(N, 3, H, W): what rounding has taken from them, half a level at most."""
    place: Tensor | None
    """(N, 2) float32: where the objects were put, in pixels (x, y); None for models that do not know places."""


class PlaceSampler(Protocol):
    """Draws places (N, 2) for new objects, given pictures, conditions, (N, 3) uniform numbers and the light."""

    def __call__(self, image: Tensor, condition: Tensor, uniform: Tensor, light: Tensor | None = None) -> Tensor: ...


class SceneGraphs(Protocol):
    """What may draw single pictures in a model's stead; :class:`condgan.onnx.Sessions` does."""

    def empty_scene(self, light: Tensor, grain: Tensor) -> tuple[Tensor, Tensor]: ...
    def turn(
        self, image: Tensor, rest: Tensor, condition: Tensor, noise: TurnNoise, asked: Tensor | None
    ) -> DrawnTurn: ...


class SceneModel(AskedModel, Protocol):
    """What drawing needs of a model; :class:`condgan.IterativeGenerator` is one."""

    @property
    def graphs(self) -> SceneGraphs | None: ...

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
    def read_light(self, prev_image: Tensor) -> Tensor | None: ...
    def __call__(
        self,
        z: Tensor,
        condition: Tensor,
        prev_image: Tensor,
        place: Tensor | None = None,
        light: Tensor | None = None,
    ) -> Tensor: ...


class Turns(NamedTuple):
    """Scenes drawn turn by turn, as tensors."""

    images: Tensor
    """(N, T + 1, 3, H, W) float32 in [-1, 1]: the canvas, then the picture after each turn; a scene that is shorter
    than T repeats its last picture."""
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
    batch_size: int | None = None,
    draw_turn: Callable[[range, int, Tensor, Tensor, Tensor, Sequence[Place | None]], DrawnTurn] | None = None,
) -> Turns:
    """Draw one picture for each list of objects and seed.

    A picture depends on its own list, seed, places and start only: every random number comes from a generator seeded
    with the picture's seed, and autocast is off. On the CPU pictures pass the network one at a time unless
    ``batch_size`` says otherwise, since the last bits of a batched convolution depend on the size of the batch. The
    generator draws in eval mode, whatever mode it is in.

    Args:
        generator: the model.
        conditions: N lists of names.
        seeds: N seeds, 0 to 2**63 - 1.
        places: for each object its centre in pixels (x, y), or None to have it drawn.
        start: (N, 3, H, W) float32 in [-1, 1], pictures to draw on; None draws empty scenes.
        batch_size: pictures that pass the network at once; None: one on a CPU, 256 on a GPU.
        draw_turn: draws one turn of a part of the pictures, given which ones, the turn's number, conditions (n, D),
            pictures so far (n, 3, H, W), what rounding took from them, and asked places; None draws it once, with the
            random numbers that come next.

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
    size = min(pictures_at_once(generator, batch_size), len(objects))
    images, where = [], []
    device = next(generator.parameters()).device
    with evaluating(generator), steady_weights(), full_precision(device):
        for low in range(0, len(objects), size):
            part = slice(low, low + size)
            steps = iterate_turns(
                generator,
                torch.nn.utils.rnn.pad_sequence(objects[part], batch_first=True),
                [random_source(seed) for seed in seeds[part]],
                [[]] * size if places is None else places[part],
                None if start is None else start[part],
                None if draw_turn is None else partial(draw_turn, range(len(objects))[part]),
            )
            drawn, put = zip(*steps, strict=True)
            images.append(torch.stack([*drawn, *[drawn[-1]] * (turns + 1 - len(drawn))], 1).cpu())
            _check_drawn(images[-1])
            if generator.place_model is not None:
                where.append(F.pad(torch.stack(put[1:], 1).cpu(), (0, 0, 0, turns + 1 - len(put)), value=math.nan))
    return Turns(torch.cat(images), torch.cat(where) if where else None)


def _check_drawn(images: Tensor) -> None:
    """Refuse pictures of a model that is damaged."""
    if not math.isfinite(images.sum()):  # one number is enough to see it
        raise ValueError("the model draws NaN or infinity: its weights are damaged, load or train them again")


def pictures_at_once(generator: SceneModel, batch_size: int | None) -> int:
    """How many pictures pass the network at once: ``batch_size``, or what is usual for the generator's device."""
    if batch_size is not None:
        return batch_size
    return CPU_BATCH if next(generator.parameters()).device.type == "cpu" else GPU_BATCH


def random_source(seed: int) -> torch.Generator:
    """Where all random numbers of one picture come from."""
    return torch.Generator().manual_seed(fold_seed(seed))


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
    draw_turn: Callable[[int, Tensor, Tensor, Tensor, Sequence[Place | None]], DrawnTurn] | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The canvas, then turn after turn of one batch: pictures (N, 3, H, W) and places (N, 2), where the generator is.

    Light and grain are drawn for a given ``start`` too, so that the noise of the turns does not depend on it.
    ``draw_turn`` is as in :func:`draw_turns`, for these pictures.
    """
    weight = next(generator.parameters())
    image, rest = empty_scene(generator, *_canvas_noise(generator, rngs))
    if start is not None:
        image = start.to(weight.device)
    image = channels_last(image)
    yield image, None
    conditions, _ = roll_conditions(generator.encoder, objects.to(weight.device, weight.dtype))
    # The same strides for any number of turns: a turn that was compiled for one scene then serves all.
    by_turn = conditions.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    for turn, condition in enumerate(by_turn.unbind(0)):
        wanted = [scene[turn] if turn < len(scene) else None for scene in asked]
        if draw_turn is None:
            drawn = _draw_turn(generator, _turn_noise(generator, rngs), condition, image, rest, wanted)
        else:
            drawn = draw_turn(turn, condition, image, rest, wanted)
        present = objects[:, turn].any(1).to(weight.device)[:, None]
        image = torch.where(present[:, :, None, None], drawn.image, image)
        rest = torch.where(present[:, :, None, None], drawn.rest, rest)
        yield image, None if drawn.place is None else drawn.place.masked_fill(~present, math.nan)


def _normal(generator: SceneModel, rngs: Sequence[torch.Generator], *shape: int) -> Tensor:
    """Standard normal numbers (N, ...), every row from its own random source."""
    weight = next(generator.parameters())
    rows = [torch.randn(shape, generator=rng, dtype=torch.float32, device="cpu") for rng in rngs]
    return torch.stack(rows).to(weight.device, weight.dtype)


def _canvas_noise(generator: SceneModel, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """The first use of each random source: light (N, components) and grain (N, 3, H, W) of the empty scene."""
    light = _normal(generator, rngs, len(generator.canvas.components))
    return light, _normal(generator, rngs, 3, generator.image_size, generator.image_size)


class TurnNoise(NamedTuple):
    """The random numbers of one turn."""

    uniform: Tensor
    """(N, 3) in [0, 1): the place."""
    z: Tensor
    """(N, z_dim) standard normal."""


def _turn_noise(generator: SceneModel, rngs: Sequence[torch.Generator]) -> TurnNoise:
    """The next turn's use of each random source; the same for models that do not know places."""
    uniform = torch.stack([torch.rand(3, generator=rng, dtype=torch.float32, device="cpu") for rng in rngs])
    return TurnNoise(uniform.to(next(generator.parameters()).device), _normal(generator, rngs, generator.z_dim))


class SceneNoise(NamedTuple):
    """The random numbers of whole scenes, float32 or as the model's weights, on their device."""

    light: Tensor
    """(N, L) standard normal: the light of the empty scene, read by ``generator.canvas``."""
    grain: Tensor
    """(N, 3, H, W) standard normal: its grain, likewise."""
    uniform: Tensor
    """(N, T, 3) in [0, 1): the places of all turns, read by ``generator.place_model``."""
    z: Tensor
    """(N, T, z_dim) standard normal: what the generator takes."""


def scene_noise(generator: SceneModel, seeds: object, turns: int) -> SceneNoise:
    """What ``IterativeGenerator.noise`` does; see there."""
    listed = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    if not listed:
        raise ValueError("seeds is empty: give at least one")
    rngs = [random_source(parse_whole("seeds", seed, 0)) for seed in listed]
    turns = parse_whole("turns", turns, 1)
    light, grain = _canvas_noise(generator, rngs)
    uniform, z = zip(*(_turn_noise(generator, rngs) for _ in range(turns)), strict=True)
    return SceneNoise(light, grain, torch.stack(uniform, 1), torch.stack(z, 1))


def empty_scene(generator: SceneModel, light: Tensor, grain: Tensor) -> tuple[Tensor, Tensor]:
    """Empty scenes (N, 3, H, W) at 256 levels and what rounding took from them, of :class:`SceneNoise`."""
    if generator.graphs is not None and len(grain) == 1:
        return generator.graphs.empty_scene(light, grain)
    return round_levels(generator.canvas(light, grain))


def _draw_turn(
    generator: SceneModel,
    noise: TurnNoise,
    condition: Tensor,
    image: Tensor,
    rest: Tensor,
    wanted: Sequence[Place | None],
) -> DrawnTurn:
    """One turn of every picture, drawn once, given conditions (N, D), pictures so far and asked places."""
    asked = None
    if generator.place_model is not None and any(place is not None for place in wanted):
        told = [place or (math.nan, math.nan) for place in wanted]
        asked = torch.tensor(told, dtype=torch.float32).to(image.device)
    if generator.graphs is not None and len(image) == 1:
        return generator.graphs.turn(image, rest, condition, noise, asked)
    return turn_of(generator, image, rest, condition, noise, asked)


def turn_of(
    generator: SceneModel, image: Tensor, rest: Tensor, condition: Tensor, noise: TurnNoise, asked: Tensor | None
) -> DrawnTurn:
    """One turn, given pictures so far and conditions (N, D); ``asked`` are places (N, 2), NaN where one is drawn."""
    place, light = None, generator.read_light(image)
    if generator.place_model is not None:
        place = generator.place_model(image.to(condition.dtype), condition, noise.uniform, light).float()
        if asked is not None:
            place = torch.where(asked.isnan(), place, asked)
    drawn = generator(noise.z, condition, image, place, light)
    return DrawnTurn(*round_turn(image, drawn, rest), place)


def draw(
    generator: SceneModel,
    conditions: object,
    *,
    num_images: int = 1,
    seed: int | None = None,
    at: object = None,
    best_of: int = 1,
    redraw: Redraw = "picture",
    batch_size: int | None = None,
    start: Tensor | None = None,
) -> Drawing:
    """What ``IterativeGenerator.generate`` and ``add`` do; see there."""
    num_images = parse_whole("num_images", num_images, 1, MAX_PICTURES)
    best_of, batch_size = parse_best_of(best_of, redraw), parse_batch_size(batch_size)
    first = parse_seed(seed)
    scenes, places = parse_request(generator, conditions, at)
    scenes = [[*scene] for scene in scenes for _ in range(num_images)]
    if places is not None:
        places = [scene for scene in places for _ in range(num_images)]
    seeds = [(first + n) % (MAX_SEED + 1) for n in range(len(scenes))]
    asked = places or [[None] * len(scene) for scene in scenes]
    best = draw_best(generator, scenes, seeds, best_of, redraw, places=places, start=start, batch_size=batch_size)
    again: list[dict[str, object]] | None = None
    if best_of > 1 and redraw == "turn":
        again = [{"at": None if places is None else row, "best_of": best_of, "redraw": redraw} for row in asked]
    where = None
    if best.places is not None:
        where = [_known_places(*scene) for scene in zip(asked, best.places.tolist(), strict=True)]
    return Drawing(scenes, best.seeds, where, best.images, best.scores, best.draws, again)


def parse_best_of(best_of: object, redraw: object) -> int:
    """How many candidates there are of what ``redraw`` names; both from a user.

    Raises:
        TypeError: ``best_of`` is not a whole number.
        ValueError: it is not from 1 to a million, or ``redraw`` is none of :data:`Redraw`.
    """
    if redraw not in get_args(Redraw):
        raise ValueError(f"redraw must be 'picture' or 'turn', got {redraw!r}")
    return parse_whole("best_of", best_of, 1, MAX_PICTURES)


def parse_batch_size(batch_size: object) -> int | None:
    """How many pictures pass the network at once, from a user.

    Raises:
        TypeError: it is neither a whole number nor None.
        ValueError: it is below 1.
    """
    return None if batch_size is None else parse_whole("batch_size", batch_size, 1)


def _one_each(start: Tensor | None, scenes: Sequence[object]) -> Tensor | None:
    """The picture (3, H, W) that all scenes start from, once for each."""
    return None if start is None else start.expand(len(scenes), -1, -1, -1)


class Best(NamedTuple):
    """The best of several candidates; see :class:`condgan.Drawing` and :class:`Turns` for the fields."""

    images: Tensor
    places: Tensor | None
    seeds: list[int]
    scores: list[float] | None
    draws: list[list[int]]


def _candidate_seed(seed: int, candidate: int) -> int:
    return (seed + candidate * CANDIDATE_STRIDE) % (MAX_SEED + 1)


def draw_best(
    generator: SceneModel,
    scenes: Sequence[Sequence[str]],
    seeds: list[int],
    best_of: int,
    redraw: Redraw,
    *,
    places: Sequence[Sequence[Place | None]] | None = None,
    start: Tensor | None = None,
    batch_size: int | None = None,
) -> Best:
    """The best of ``best_of`` candidates of each picture, or of each turn: what users get; 1 draws once, unscored.

    Arguments as in :func:`draw_turns`, but ``start`` is one picture (3, H, W).
    """
    if best_of == 1:
        images, put = draw_turns(
            generator, scenes, seeds, places=places, start=_one_each(start, scenes), batch_size=batch_size
        )
        return Best(images, put, seeds, None, [[1] * len(scene) for scene in scenes])
    choose = best_pictures if redraw == "picture" else best_turns
    return choose(generator, scenes, seeds, best_of, places=places, start=start, batch_size=batch_size)


def best_pictures(
    generator: SceneModel,
    scenes: Sequence[Sequence[str]],
    seeds: list[int],
    best_of: int,
    *,
    places: Sequence[Sequence[Place | None]] | None = None,
    start: Tensor | None = None,
    batch_size: int | None = None,
) -> Best:
    """Draw every picture ``best_of`` times and keep the one that the verifier likes best.

    Arguments as in :func:`draw_turns`, but ``start`` is one picture (3, H, W). Candidates have seeds of their own.
    """
    target = target_objects(scenes, start)
    draw_all = partial(
        draw_turns, generator, scenes, places=places, start=_one_each(start, scenes), batch_size=batch_size
    )
    images, put = draw_all(seeds)
    scores = exact_probability(images[:, -1], target)
    kept = seeds
    for candidate in range(1, best_of):
        other_seeds = [_candidate_seed(seed, candidate) for seed in seeds]
        other = draw_all(other_seeds)
        other_scores = exact_probability(other.images[:, -1], target)
        better = other_scores > scores
        scores = torch.where(better, other_scores, scores)
        kept = [o if b else s for s, o, b in zip(kept, other_seeds, better.tolist(), strict=True)]
        images[better] = other.images[better]
        if put is not None and other.places is not None:
            put[better] = other.places[better]
    return Best(images, put, kept, scores.tolist(), [[best_of] * len(scene) for scene in scenes])


def best_turns(
    generator: SceneModel,
    scenes: Sequence[Sequence[str]],
    seeds: list[int],
    best_of: int,
    *,
    places: Sequence[Sequence[Place | None]] | None = None,
    start: Tensor | None = None,
    batch_size: int | None = None,
) -> Best:
    """Draw every turn until the verifier finds it good (:data:`GOOD_TURN`), at most ``best_of`` times; keep the best.

    All candidates of a turn are drawn on the same picture. Candidate k has the random numbers of this turn in the
    k-th candidate of :func:`best_pictures`: scenes whose first candidates are good come out as :func:`draw_turns` has
    them. Arguments as in :func:`best_pictures`.
    """
    num_turns = max(len(scene) for scene in scenes)
    targets = [target_objects([scene[: turn + 1] for scene in scenes], start) for turn in range(num_turns)]
    scores = [0.0] * len(scenes)
    draws = [[1] * len(scene) for scene in scenes]

    def draw_turn(
        pictures: range, turn: int, condition: Tensor, image: Tensor, rest: Tensor, wanted: Sequence[Place | None]
    ) -> DrawnTurn:
        def draw_candidate(candidate: int, rows: list[int]) -> tuple[DrawnTurn, Tensor]:
            chosen = [pictures[row] for row in rows]
            rngs = [_source_of_turn(generator, _candidate_seed(seeds[i], candidate), turn) for i in chosen]
            noise, asked = _turn_noise(generator, rngs), [wanted[row] for row in rows]
            drawn = _draw_turn(generator, noise, condition[rows], image[rows], rest[rows], asked)
            _check_drawn(drawn.image)
            return drawn, exact_probability(drawn.image, targets[turn][chosen])

        best, score = draw_candidate(0, [*range(len(pictures))])
        there = [row for row, i in enumerate(pictures) if turn < len(scenes[i])]
        for candidate in range(1, best_of):
            failed = [row for row in there if score[row] < GOOD_TURN]
            if not failed:
                break
            other, other_scores = draw_candidate(candidate, failed)
            for n, row in enumerate(failed):
                draws[pictures[row]][turn] += 1
                if other_scores[n] > score[row]:
                    score[row] = other_scores[n]
                    for kept, new in zip(best, other, strict=True):
                        if kept is not None and new is not None:
                            kept[row] = new[n]
        for row in there:
            scores[pictures[row]] = score[row].item()
        return best

    starts = _one_each(start, scenes)
    images, put = draw_turns(
        generator, scenes, seeds, places=places, start=starts, batch_size=batch_size, draw_turn=draw_turn
    )
    return Best(images, put, seeds, scores, draws)


def _source_of_turn(generator: SceneModel, seed: int, turn: int) -> torch.Generator:
    """The random source of the picture ``seed`` as it is when the turn begins."""
    rng = random_source(seed)
    _canvas_noise(generator, [rng])
    for _ in range(turn):
        _turn_noise(generator, [rng])
    return rng


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
    device = next(generator.parameters()).device

    def draw_next() -> tuple[Tensor, Tensor | None]:
        with torch.no_grad(), evaluating(generator), full_precision(device):
            image, place = next(steps)
        _check_drawn(image)
        return image.cpu().clone(), None if place is None else place.cpu()  # the next turn is drawn on the other

    image, _ = draw_next()
    for turn, name in enumerate(scene):
        previous = image
        image, place = draw_next()
        where = None
        if place is not None:
            (where,) = _known_places([None if asked is None else asked[turn]], place.tolist())
        yield Turn(image[0].clone(), previous[0], name, where, seed)
