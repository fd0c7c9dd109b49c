"""Drawing scenes: names and seeds in, pictures out. The methods of IterativeGenerator are thin shells over this."""

from __future__ import annotations

import io
import json
import math
import operator
import os
import reprlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from condgan import images as pictures
from condgan.canvas import Canvas
from condgan.classifier import SceneClassifier
from condgan.functional import ConditionEncoder, encode_objects, roll_conditions
from condgan.vocab import Vocabulary

Place = tuple[float, float]
MAX_SEED = 2**63 - 1
CPU_BATCH, GPU_BATCH = 1, 256
"""Pictures that pass the network at once on a CPU and on a GPU."""
CANDIDATE_STRIDE = 2**32
"""Distance between the seeds of the candidates of one picture in best-of-n."""
VERIFIER_SIZE = 64
"""Side of the pictures that the verifier was trained on, in pixels."""


class PlaceSampler(Protocol):
    """Draws places (N, 2) for new objects, given pictures, conditions and (N, 3) uniform numbers."""

    def sample(self, image: Tensor, condition: Tensor, uniform: Tensor) -> Tensor: ...


class SceneModel(Protocol):
    """What drawing needs of a model; :class:`condgan.IterativeGenerator` is one."""

    @property
    def image_size(self) -> int: ...
    @property
    def z_dim(self) -> int: ...
    @property
    def num_turns(self) -> int: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
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


class Switchable(Protocol):
    """What :func:`evaluating` needs; every ``nn.Module`` is one."""

    def modules(self) -> Iterator[nn.Module]: ...
    def train(self, mode: bool = True) -> object: ...


@contextmanager
def evaluating(module: Switchable) -> Iterator[None]:
    """Eval mode inside the block; after it every submodule is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.train(False)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class Found(NamedTuple):
    """What the verifier says of one object in one picture."""

    found: bool
    """Whether it is there: the probability is above one half."""
    probability: float
    """In [0, 1]."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """What ``generate`` and ``add`` return: N pictures and how they came about. Shows itself in notebooks."""

    conditions: list[list[str]]
    """For each picture the objects that it was asked to add, in order."""
    seeds: list[int]
    """For each picture the seed that draws it again."""
    places: list[list[Place]] | None
    """For each picture where each object was put, in pixels (x, y); None if the model does not know places."""
    trajectory: Tensor
    """(N, T + 1, 3, H, W) float32 in [-1, 1]: the canvas, then the picture after each turn."""
    scores: list[float] | None = None
    """With ``best_of``: the verifier's probability that exactly the asked objects are in the picture; those that it saw
    in the picture that ``add`` was given are asked, too."""

    @property
    def tensor(self) -> Tensor:
        """The final pictures, (N, 3, H, W) float32 in [-1, 1]."""
        return self.trajectory[:, -1]

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return pictures.to_pil(self.tensor[0])

    @property
    def images(self) -> list[Image.Image]:
        """All pictures, after their final turn."""
        return [pictures.to_pil(image) for image in self.tensor]

    @property
    def turns(self) -> list[list[Image.Image]]:
        """For each picture the pictures after each of its turns; the last one is the final picture."""
        return [
            [pictures.to_pil(image) for image in images[1 : len(scene) + 1]]
            for images, scene in zip(self.trajectory, self.conditions, strict=True)
        ]

    def grid(self, columns: int | None = None, turns: bool = False) -> Image.Image:
        """All pictures on one sheet.

        Args:
            columns: pictures a row; None is a roughly square sheet.
            turns: one row a picture instead, the canvas and every turn side by side.
        """
        if turns:
            images = [pictures.to_pil(image) for row in self.trajectory for image in row]
            return pictures.grid(images, self.trajectory.shape[1])
        return pictures.grid(self.images, math.ceil(len(self.seeds) ** 0.5) if columns is None else columns)

    def metadata(self, index: int) -> dict[str, object]:
        """How to draw picture ``index`` again: conditions, seed and places."""
        return {
            "conditions": self.conditions[index],
            "seed": self.seeds[index],
            "places": None if self.places is None else self.places[index],
        }

    def save(self, path: str | os.PathLike[str], index: int | None = None) -> list[Path]:
        """Write the pictures; a PNG file carries conditions, seed and places as JSON in its text field ``condgan``.

        Args:
            path: file name whose ending says the format. Several pictures become ``name-0.png``, ``name-1.png``, ...
            index: write this picture only, under ``path`` itself.

        Returns:
            The files written, each whole or not at all.

        Raises:
            OSError: the folder is not there or cannot be written.
            ValueError: the ending of ``path`` is not that of a picture format that can be written.
        """
        path = Path(path)
        if index is None and len(self.seeds) > 1:
            files = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(self.seeds))]
            for i, file in enumerate(files):
                self.save(file, i)
            return files
        index = index or 0
        save_image(pictures.to_pil(self.tensor[index]), path, self.metadata(index))
        return [path]

    def verify(self) -> list[dict[str, Found]]:
        """Ask the bundled verifier which of the asked objects it finds.

        Returns:
            For each picture the asked objects, by name, each with :class:`Found`.

        Raises:
            ValueError: the verifier does not know an object of the model's own vocabulary.
        """
        asked = _verifier_objects(self.conditions)
        return [
            {name: Found(p[i] > 0.5, p[i]) for name, i in zip(scene, objects, strict=True)}
            for scene, objects, p in zip(self.conditions, asked, _seen_objects(self.tensor).tolist(), strict=True)
        ]

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.grid().save(buffer, "PNG")
        return buffer.getvalue()

    def __repr__(self) -> str:
        n, _, _, height, width = self.trajectory.shape
        scenes = ", ".join(f"{scene} seed {seed}" for scene, seed in zip(self.conditions[:3], self.seeds, strict=False))
        return f"Drawing({n} x {width}x{height}: {scenes}{', ...' if n > 3 else ''})"


@dataclass(frozen=True, eq=False)
class Turn:
    """One step of ``stream``."""

    tensor: Tensor
    """(3, H, W) float32 in [-1, 1]: the picture after this turn."""
    previous: Tensor
    """(3, H, W) float32 in [-1, 1]: the picture before it."""
    added: str
    """The object that this turn added."""
    place: Place | None
    """Where it was put, in pixels (x, y); None if the model does not know places."""
    seed: int
    """The seed that draws the scene again."""

    @property
    def image(self) -> Image.Image:
        """The picture after this turn."""
        return pictures.to_pil(self.tensor)

    @property
    def difference(self) -> Image.Image:
        """What changed: half the signed difference to the picture before, mid-gray where nothing did."""
        return pictures.to_pil((self.tensor - self.previous) / 2)


def save_image(image: Image.Image, path: Path, metadata: dict[str, object]) -> None:
    """Write a picture under a temporary name, then rename it; PNG text field ``condgan`` holds ``metadata`` as JSON."""
    picture_format = Image.registered_extensions().get(path.suffix.lower())
    if picture_format not in Image.SAVE:
        raise ValueError(f"path must end like a picture file, such as scene.png, got {str(path)!r}")
    text = PngInfo()
    text.add_text("condgan", json.dumps(metadata))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        image.save(partial, picture_format, **({"pnginfo": text} if picture_format == "PNG" else {}))
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is of a format that cannot hold this picture: {error}") from error
    finally:
        with suppress(OSError):  # it is there only if writing failed
            partial.unlink()


@lru_cache(maxsize=1)
def _verifier() -> SceneClassifier:
    return SceneClassifier.from_pretrained("verifier")


def _seen_objects(images: Tensor) -> Tensor:
    """The verifier's probability (N, K) of every object in pictures (N, 3, H, W) of any size, float64 on the CPU."""
    return _verifier().probabilities(pictures.resize(images, VERIFIER_SIZE)).double().cpu()


def _verifier_objects(scenes: Sequence[Sequence[str]]) -> list[list[int]]:
    """The verifier's ids of the objects of every scene."""
    vocabulary = Vocabulary(_verifier().config.objects)
    try:
        return [[vocabulary.parse(name) for name in scene] for scene in scenes]
    except ValueError as error:
        raise ValueError(f"the bundled verifier, which knows i-CLEVR's objects, cannot help here: {error}") from error


def parse_scenes(conditions: object, vocabulary: Vocabulary) -> list[list[str]]:
    """Whatever a user may call conditions, as a list of scenes of canonical names.

    Raises:
        TypeError: it is not a name, a list of names, or a list of such lists.
        ValueError: a list is empty or a name is unknown.
    """
    if isinstance(conditions, str):
        conditions = [conditions]
    if not isinstance(conditions, (list, tuple)):
        raise TypeError(
            'conditions must be a list of objects such as ["red cube"], or a list of such lists, '
            f"got {reprlib.repr(conditions)} ({type(conditions).__name__})"
        )
    if len(conditions) == 0:
        raise ValueError('conditions is empty: name at least one object, such as ["red cube"]')
    nested = [isinstance(item, (list, tuple)) for item in conditions]
    if any(nested) and not all(nested):
        raise TypeError(
            f"conditions mixes names and lists of names: {reprlib.repr(conditions)}; make every scene a list"
        )
    scenes = conditions if all(nested) else [conditions]
    for i, scene in enumerate(scenes):
        if len(scene) == 0:
            raise ValueError(f"conditions[{i}] is empty: name at least one object in every scene")
    return [[vocabulary.names[vocabulary.parse(name)] for name in scene] for scene in scenes]


def parse_places(at: object, scenes: list[list[str]], batched: bool, image_size: int) -> list[list[Place | None]]:
    """``at=`` as one list of places for each scene, checked.

    Raises:
        ValueError: a place is not two finite numbers inside the picture, or there is not one entry an object.
    """
    example = "one entry an object, each None or (x, y), such as at=[None, (45, 30)]"
    per_scene = at if batched else [at]
    if not isinstance(per_scene, (list, tuple)) or len(per_scene) != len(scenes):
        raise ValueError(f"at needs one list a scene and {example}; got {at!r} for {len(scenes)} scenes")
    result: list[list[Place | None]] = []
    for scene, entries in zip(scenes, per_scene, strict=True):
        if entries is None:
            entries = [None] * len(scene)
        if not isinstance(entries, (list, tuple)) or len(entries) != len(scene):
            raise ValueError(f"at needs {example}; got {entries!r} for the objects {scene}")
        row: list[Place | None] = []
        for entry in entries:
            if entry is None:
                row.append(None)
                continue
            try:
                x, y = (float(value) for value in entry if not isinstance(value, str))
            except (TypeError, ValueError):
                raise ValueError(f"at needs {example}; got the entry {entry!r}") from None
            if not (0 <= x <= image_size - 1 and 0 <= y <= image_size - 1):  # False for NaN too
                raise ValueError(
                    f"at: the place {entry!r} is not inside the picture, x and y go from 0 to {image_size - 1}"
                )
            row.append((x, y))
        result.append(row)
    return result


def _parse_whole(name: str, value: Any, low: int) -> int:
    """A whole number from a user, of Python or NumPy; ``name`` is what errors call it."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if not low <= whole <= MAX_SEED:
        raise ValueError(f"{name} must be between {low} and 2**63 - 1, got {whole}")
    return whole


def parse_seed(seed: object) -> int:
    """A seed from a user, or a fresh one for None.

    Raises:
        TypeError: ``seed`` is not a whole number.
        ValueError: it is negative or beyond 2**63 - 1.
    """
    if seed is None:
        return int.from_bytes(os.urandom(4), "big")
    return _parse_whole("seed", seed, 0)


class Request(NamedTuple):
    """What a user asked for, checked."""

    scenes: list[list[str]]
    places: list[list[Place | None]] | None


def parse_request(generator: SceneModel, conditions: object, at: object) -> Request:
    """Scenes and places; warns of scenes longer than those of training.

    Raises:
        TypeError, ValueError: see :func:`parse_scenes` and :func:`parse_places`; or the model does not know places.
    """
    scenes = parse_scenes(conditions, generator.vocabulary)
    batched = isinstance(conditions, (list, tuple)) and isinstance(conditions[0], (list, tuple))
    if at is not None and generator.place_model is None:
        raise ValueError("at was given, but this model does not know places; the default model does")
    places = None if at is None else parse_places(at, scenes, batched, generator.image_size)
    longest = max(len(scene) for scene in scenes)
    if longest > generator.num_turns:
        warnings.warn(
            f"{longest} objects are asked, but the model was trained on scenes of at most {generator.num_turns}: "
            "the later ones may come out worse",
            UserWarning,
            stacklevel=4,
        )
    return Request(scenes, places)


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
    num_images = _parse_whole("num_images", num_images, 1)
    best_of = _parse_whole("best_of", best_of, 1)
    first = parse_seed(seed)
    scenes, places = parse_request(generator, conditions, at)
    scenes = [scene for scene in scenes for _ in range(num_images)]
    if places is not None:
        places = [scene for scene in places for _ in range(num_images)]
    seeds = [(first + n) % (MAX_SEED + 1) for n in range(len(scenes))]
    target = _target(scenes, start) if best_of > 1 else None
    if start is not None:
        start = start.expand(len(scenes), -1, -1, -1)
    best = draw_turns(generator, scenes, seeds, places=places, start=start)
    scores = None
    if target is not None:
        scores = _exact_probability(best.images[:, -1], target)
        for i in range(1, best_of):
            other_seeds = [(first + n + i * CANDIDATE_STRIDE) % (MAX_SEED + 1) for n in range(len(scenes))]
            other = draw_turns(generator, scenes, other_seeds, places=places, start=start)
            other_scores = _exact_probability(other.images[:, -1], target)
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


def _target(scenes: Sequence[Sequence[str]], start: Tensor | None) -> Tensor:
    """What the verifier should see, multi-hot (N, K): the objects asked and those of the picture ``start``, if any."""
    target = torch.zeros(len(scenes), len(_verifier().config.objects), dtype=torch.bool)
    for row, objects in zip(target, _verifier_objects(scenes), strict=True):
        row[objects] = True
    return target if start is None else target | (_seen_objects(start[None]) > 0.5)


def _exact_probability(images: Tensor, target: Tensor) -> Tensor:
    """The verifier's probability (N,) that exactly the target's objects are in each picture."""
    probabilities = _seen_objects(images)
    return torch.where(target, probabilities, 1 - probabilities).prod(1)


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
