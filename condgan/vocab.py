"""Object names, their ids and multi-hot vectors: the only place that parses names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor

COLOURS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
SHAPES = ("cube", "sphere", "cylinder")
ICLEVR_OBJECTS: tuple[str, ...] = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
"""The 24 classes of i-CLEVR in the order of its ``objects.json``."""


class Vocabulary:
    """The objects that a model knows, in the order of their ids.

    Args:
        names: in lower case with single spaces, "gray" for "grey", each once; the place in the sequence is the id. Or a
            dict from name to id, as an ``objects.json`` holds, whose order does not matter.

    Raises:
        TypeError: ``names`` is not a sequence of strings; a set has no order.
        ValueError: ``names`` is empty, repeats a name, or has one that is spelled in another way, or its K ids are not
            0 ... K-1.

    Example:
        >>> Vocabulary().parse("Grey  CUBE")
        0
    """

    def __init__(self, names: Sequence[str] | Mapping[str, int] = ICLEVR_OBJECTS) -> None:
        if isinstance(names, (str, Set)) or not isinstance(names, Iterable):
            raise TypeError(f"names must be a sequence of strings, got {names!r}")
        self.names = _by_id(names) if isinstance(names, Mapping) else tuple(names)
        if not all(isinstance(name, str) for name in self.names):
            raise TypeError(f"names must be a sequence of strings, got {names!r}")
        self._ids = {name: index for index, name in enumerate(self.names)}
        if not self.names or "" in self._ids or len(self._ids) != len(self.names):
            raise ValueError(f"names must be non-empty and unique, got {list(self.names)!r}")
        for name in self.names:
            if name != _canonical(name):
                raise ValueError(f'names: write {name!r} in lower case with single spaces, and "gray" for "grey"')

    @property
    def shapes(self) -> tuple[str, ...]:
        """The shape of each object: the last word of its name."""
        return tuple(name.split()[-1] for name in self.names)

    @property
    def words(self) -> tuple[str, ...]:
        """All words of the names, each once, in the order in which they first come."""
        return tuple(dict.fromkeys(word for name in self.names for word in name.split()))

    def spelling(self) -> Tensor:
        """Which of the W :attr:`words` each of the K names has, (K, W) float32 of 0 and 1.

        Raises:
            ValueError: two names have the same words, in another order or more often, so that these do not tell them
                apart.
        """
        words, names = self.words, [name.split() for name in self.names]
        known: dict[frozenset[str], str] = {}
        for name, own in zip(self.names, names, strict=True):
            other = known.setdefault(frozenset(own), name)
            if other != name:
                raise ValueError(f"names: {other!r} and {name!r} have the same words: rename one, or set words=False")
        return torch.tensor([[word in name for word in words] for name in names]).float()

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} objects: {self.names[0]}, ..., {self.names[-1]})"

    def parse(self, name: str) -> int:
        """The id of one object; case and spacing do not matter, ``grey`` is ``gray``.

        Raises:
            TypeError: ``name`` is not a string.
            ValueError: ``name`` is unknown; the message shows the closest known name.
        """
        if not isinstance(name, str):
            raise TypeError(f'an object is named by a string such as "{self.names[0]}", got {name!r}')
        key = _canonical(name)
        if key in self._ids:
            return self._ids[key]
        raise ValueError(
            f"unknown object {name!r}: {did_you_mean(key, self.names)} "
            "The known names are in `model.vocabulary.names` and in `condgan info`."
        )

    def multi_hot(self, names: Iterable[str]) -> Tensor:
        """Multi-hot vector of a set of objects, (K,) float32 of 0 and 1; repeats count once, a string is one name."""
        objects = torch.zeros(len(self))
        objects[[self.parse(name) for name in ([names] if isinstance(names, str) else names)]] = 1
        return objects

    def decode(self, objects: Tensor) -> list[str]:
        """Names of the entries above one half of a (K,) vector, in the order of their ids.

        Raises:
            ValueError: ``objects`` is not (K,).
        """
        if objects.shape != (len(self),):
            raise ValueError(f"objects must be ({len(self)},), got {tuple(objects.shape)}")
        return [name for name, value in zip(self.names, objects.tolist(), strict=True) if value > 0.5]


def _by_id(ids: Mapping[str, int]) -> tuple[str, ...]:
    """The names of a dict from name to id, in the order of their ids."""
    if any(type(index) is not int for index in ids.values()) or sorted(ids.values()) != [*range(len(ids))]:
        raise ValueError(
            f"names: the ids of {len(ids)} objects must be 0 to {len(ids) - 1}, each once, got {dict(ids)!r:.120}"
        )
    return tuple(sorted(ids, key=ids.__getitem__))


def _canonical(name: str) -> str:
    """The one spelling of a name."""
    return " ".join("gray" if word == "grey" else word for word in name.lower().split())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask whether a name that is unknown should be the closest of those that are known, at least one."""
    return f"did you mean {difflib.get_close_matches(name, [*known], n=1, cutoff=0.0)[0]!r}?"
