"""What users ask for, checked: names of objects, places, seeds."""

from __future__ import annotations

import operator
import os
import reprlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from condgan.vocab import Vocabulary

Place = tuple[float, float]
"""Where an object is, in pixels (x, y)."""
MAX_SEED = 2**63 - 1
MAX_PICTURES = 1_000_000
"""Most pictures of one scene that a call draws, and most candidates of one picture."""


class TooManyObjectsWarning(UserWarning):
    """A scene has more objects than those that the model was trained on."""


class AskedModel(Protocol):
    """What a request is checked against."""

    @property
    def image_size(self) -> int: ...
    @property
    def num_turns(self) -> int: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def place_model(self) -> object | None: ...


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


def parse_places(
    at: object, scenes: list[list[str]], batched: bool, image_size: int, name: str = "at"
) -> list[list[Place | None]]:
    """``at=`` as one list of places for each scene, checked; ``name`` is what errors call it.

    Raises:
        ValueError: a place is not two finite numbers inside the picture, or there is not one entry an object.
    """
    example = f"one entry an object, each None or (x, y), such as {name}=[None, (45, 30)]"
    at = _as_list(at)
    per_scene = at if batched else [at]
    if not isinstance(per_scene, (list, tuple)) or len(per_scene) != len(scenes):
        raise ValueError(f"{name} needs one list a scene and {example}; got {at!r} for {len(scenes)} scenes")
    result: list[list[Place | None]] = []
    for scene, entries in zip(scenes, map(_as_list, per_scene), strict=True):
        if entries is None:
            entries = [None] * len(scene)
        if not isinstance(entries, (list, tuple)) or len(entries) != len(scene):
            raise ValueError(f"{name} needs {example}; got {entries!r} for the objects {scene}")
        row: list[Place | None] = []
        for entry in entries:
            if entry is None:
                row.append(None)
                continue
            try:
                x, y = (_number(value) for value in entry)
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"{name} needs {example}; got the entry {reprlib.repr(entry)}") from None
            if not (0 <= x <= image_size - 1 and 0 <= y <= image_size - 1):  # False for NaN too
                raise ValueError(
                    f"{name}: the place {entry!r} is not inside the picture, x and y go from 0 to {image_size - 1}"
                )
            row.append((x, y))
        result.append(row)
    return result


def _as_list(value: Any) -> Any:
    """An array or tensor as a list; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _number(value: Any) -> float:
    if isinstance(value, str):  # which Python would read as one
        raise TypeError
    return float(value)


def parse_whole(name: str, value: Any, low: int, high: int = MAX_SEED) -> int:
    """A whole number from a user, of Python or NumPy; ``name`` is what errors call it.

    Raises:
        TypeError: ``value`` is not a whole number.
        ValueError: it is below ``low`` or above ``high``.
    """
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if not low <= whole <= high:
        most = "2**63 - 1" if high == MAX_SEED else f"{high:,}"
        raise ValueError(f"{name} must be between {low} and {most}, got {reprlib.repr(whole)}")
    return whole


def fold_seed(seed: int) -> int:
    """A seed of up to 63 bits as one of 32, the same if it has no more.

    PyTorch's generator on the CPU reads 32 bits of a seed, so what is above them is mixed in; Knuth's multiplicative
    hash keeps the mixtures apart.
    """
    high, low = divmod(seed, 2**32)
    return low ^ (high * 2654435761 % 2**32)


def parse_seed(seed: object) -> int:
    """A seed from a user, or a fresh one for None.

    Raises:
        TypeError: ``seed`` is not a whole number.
        ValueError: it is negative or beyond 2**63 - 1.
    """
    if seed is None:
        return int.from_bytes(os.urandom(4), "big")
    return parse_whole("seed", seed, 0)


class Request(NamedTuple):
    """What a user asked for, checked."""

    scenes: list[list[str]]
    places: list[list[Place | None]] | None


def parse_request(generator: AskedModel, conditions: object, at: object, name: str = "at") -> Request:
    """Scenes and places; warns of scenes longer than those of training. ``name`` is what errors call ``at``.

    Raises:
        TypeError, ValueError: see :func:`parse_scenes` and :func:`parse_places`; or the model does not know places.
    """
    scenes = parse_scenes(conditions, generator.vocabulary)
    batched = isinstance(conditions, (list, tuple)) and isinstance(conditions[0], (list, tuple))
    if at is not None and generator.place_model is None:
        raise ValueError(f"{name} was given, but this model does not know places; the default model does")
    places = None if at is None else parse_places(at, scenes, batched, generator.image_size, name)
    warn_of_long_scenes(scenes, generator, stacklevel=5)
    return Request(scenes, places)


def warn_of_long_scenes(scenes: Sequence[Sequence[str]], generator: AskedModel, stacklevel: int = 3) -> None:
    """Warn if a scene has more objects than those of training."""
    longest = max(len(scene) for scene in scenes)
    if longest > generator.num_turns:
        warnings.warn(
            f"{longest} objects are asked, but the model was trained on scenes of at most {generator.num_turns}: the "
            "later ones may come out worse",
            TooManyObjectsWarning,
            stacklevel=stacklevel,
        )
