"""i-CLEVR: the folder as people have it, and the packed file that training reads."""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from condgan.files import file_sha256
from condgan.images import from_uint8
from condgan.vocab import Vocabulary

FORMAT = "condgan-scenes"
FORMAT_VERSION = 1

Split = Literal["train", "validation", "test"]


class DatasetError(ValueError):
    """A data set that cannot be used as it is; the message names the file and says what to do."""


def _scene_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def scene_split(name: str) -> Split:
    """The split of a scene, fixed for ever by a hash of its name: train / validation / test 90 / 5 / 5."""
    bucket = _scene_hash(name) % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


def scene_half(name: str) -> int:
    """0 or 1: two halves of any split, so that two classifiers can learn from different scenes."""
    return _scene_hash(name) // 100 % 2


# --- the JSON files of i-CLEVR ------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The content of one of i-CLEVR's JSON files.

    Raises:
        DatasetError: the file is missing or malformed.
    """
    if not path.exists() or path.is_dir():
        raise DatasetError(f"there is no {path.name} in {path.parent}: it belongs to the i-CLEVR download")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # malformed JSON, or bytes that are no UTF-8
        raise DatasetError(f"{path} is not valid JSON ({error}): copy it again from the i-CLEVR download") from error


def parse_names(path: Path, entry: str, names: object, vocabulary: Vocabulary | None) -> list[str]:
    """One list of object names out of a JSON file, checked; in the vocabulary's spelling where there is one.

    Raises:
        DatasetError: it is no list of strings, is empty or holds an unknown name; the message names file and entry.
    """
    where = f"{path}, entry {entry}"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(f'{where}: expected a list of names such as ["red cube", "blue sphere"], got {names!r}')
    if not names:
        raise DatasetError(f"{where}: the list of objects is empty; name at least one object or remove the entry")
    if vocabulary is None:
        return list(names)
    try:
        return [vocabulary.names[vocabulary.parse(name)] for name in names]
    except ValueError as error:
        raise DatasetError(f"{where}: {error}") from error


def read_conditions(path: str | Path, vocabulary: Vocabulary | None = None) -> list[list[str]]:
    """The lists of objects to draw, from a file such as ``test.json``.

    Args:
        path: a JSON list of lists of names, or a dict from file name to list as in ``train.json``, whose values are
            taken in the order of the file.
        vocabulary: when given, every name must be in it and is returned in its spelling.

    Raises:
        DatasetError: the file is missing, malformed or empty, or a list in it is empty or holds an unknown name.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():  # a pipe will do
        raise DatasetError(f"conditions: there is no file {str(path)!r}; it should be a list of lists, as test.json is")
    content = read_json(path)
    if not isinstance(content, (list, dict)) or not content:
        raise DatasetError(f'{path}: expected a list of lists of names such as [["red cube"]], got {content!r:.80}')
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    return [parse_names(path, repr(entry), names, vocabulary) for entry, names in entries]


def read_objects(path: str | Path) -> Vocabulary:
    """The vocabulary of an ``objects.json``, a dict from lower-case name to index 0 ... K-1.

    Raises:
        DatasetError: the file is missing or malformed, its indices are not 0 ... K-1, each once, or a name is not in
            lower case with single spaces.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise DatasetError(f'{path}: expected a dict from name to index such as {{"red cube": 0}}, got {content!r:.80}')
    try:
        return Vocabulary(content)
    except ValueError as error:
        raise DatasetError(f"{path}: {error}") from error


# --- the packed file ----------------------------------------------------------------------------------------------


def packed_path(data_dir: str | Path, image_size: int = 64) -> Path:
    """Where ``condgan prepare DATA_DIR`` writes its packed file by default."""
    return Path(data_dir) / f"condgan-{image_size}.npy"


class SceneRecord(NamedTuple):
    """One scene: T pictures, each with one object more than the last."""

    images: Tensor
    """(T, 3, H, W) float32 in [-1, 1]."""
    objects: Tensor
    """(T, K) float32 multi-hot: the object that each turn added."""
    name: str
    """The scene's name, as in the picture files without the turn."""


class SceneDataset(Dataset[SceneRecord]):
    """Scenes of a packed file that ``condgan prepare`` wrote.

    All scenes together stay on disk, memory-mapped; a split or a half is copied into memory.

    Args:
        path: the ``.npy`` file, whose ``.json`` index lies beside it, or the folder that was prepared.
        split: only the scenes of this split; None for all.
        half: 0 or 1, only the scenes of this half of the split; None for both.
        image_size: in a folder with several packed files the one with pictures of this side is taken, if it is there;
            None is 64.
        verify: also compare the file with its checksum, which reads all of it.

    Attributes:
        names: the scenes' names, S of them.
        objects: (S, T) int64, the id of the object that each turn added.
        pixels: (S, T, 3, H, W) uint8.
        vocabulary: the objects that the ids stand for.
        checksum: SHA-256 of the whole packed file, as its index has it; None for those of an older condgan.

    Raises:
        DatasetError: the file or its index is missing, damaged, of another format, or they do not belong together.
        ValueError: ``split`` or ``half`` is none of the values above.
    """

    def __init__(
        self,
        path: str | Path,
        split: Split | None = None,
        half: int | None = None,
        *,
        image_size: int | None = None,
        verify: bool = False,
    ) -> None:
        if split is not None and split not in get_args(Split):
            raise ValueError(f"split must be one of {get_args(Split)} or None, got {split!r}")
        if half not in (None, 0, 1):
            raise ValueError(f"half must be 0, 1 or None, got {half!r}")
        self.path = _find_packed(Path(path), image_size)
        index = read_index(self.path)
        self.vocabulary = index.vocabulary
        self.checksum = index.sha256
        names, ids = index.names, index.objects
        pixels = _map_pixels(self.path, (*ids.shape, 3, index.image_size, index.image_size))
        keep = [
            i
            for i, name in enumerate(names)
            if (split is None or scene_split(name) == split) and (half is None or scene_half(name) == half)
        ]
        self.names = [names[i] for i in keep]
        self.objects = ids[keep]  # (S, T)
        self._rows = keep
        self.pixels = _rows_of(pixels, keep)  # (S, T, 3, H, W)
        if verify:
            self.verify()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lists(self) -> list[list[str]]:
        """The objects of each scene by name, in the order of its turns."""
        return [[self.vocabulary.names[i] for i in scene] for scene in self.objects.tolist()]

    def __getitem__(self, index: int) -> SceneRecord:
        images = from_uint8(self.pixels[index])
        objects = torch.nn.functional.one_hot(self.objects[index], len(self.vocabulary)).float()
        return SceneRecord(images, objects, self.names[index])

    def __getstate__(self) -> dict[str, Any]:
        """Without the pixels: another process, such as a worker of a loader, reads them from the disk."""
        return {name: value for name, value in vars(self).items() if name != "pixels"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        index = read_index(self.path)
        if index.sha256 != self.checksum:
            raise DatasetError(f"{self.path} was prepared anew since this data set was opened: open it again")
        shape = (*index.objects.shape, 3, index.image_size, index.image_size)
        self.pixels = _rows_of(_map_pixels(self.path, shape), self._rows)

    def without(self, names: Sequence[str]) -> SceneDataset:
        """The scenes that hold none of these objects, as a data set of their own; its vocabulary is the whole one.

        Args:
            names: objects to leave out, such as ``["red cube"]``; a string is one name.

        Raises:
            ValueError: a name is unknown.
        """
        names = [names] if isinstance(names, str) else names
        left_out = torch.tensor([self.vocabulary.parse(name) for name in names], dtype=torch.long)
        keep = ~torch.isin(self.objects, left_out).any(1)  # (S,)
        rest = copy.copy(self)
        rest.names = [name for name, kept in zip(self.names, keep.tolist(), strict=True) if kept]
        rest._rows = [row for row, kept in zip(self._rows, keep.tolist(), strict=True) if kept]
        rest.objects, rest.pixels = self.objects[keep], self.pixels[keep]
        return rest

    def verify(self) -> None:
        """Compare the whole file with the checksum in its index, which takes a second for i-CLEVR at 64x64.

        Raises:
            DatasetError: they differ, or the index has no checksum.
        """
        if self.checksum is None:
            raise DatasetError(f"the index of {self.path} has no checksum: run `condgan prepare` again to get one")
        if file_sha256(self.path) != self.checksum:
            raise DatasetError(f"{self.path} differs from its checksum, it is damaged: run `condgan prepare` again")


def _find_packed(path: Path, image_size: int | None) -> Path:
    """The packed file that a path means: itself, or the one in the folder, of this size if there is one."""
    if path.suffix == ".npy":
        if not path.is_file():
            raise DatasetError(f"there is no file {path}: run `condgan prepare` on the i-CLEVR folder to write it")
        return path
    if not path.is_dir():
        raise DatasetError(f"{path} is neither a folder nor a packed .npy file: give what `condgan prepare` wrote")
    wanted = [packed_path(path, image_size)] if image_size else []
    for usual in (*wanted, packed_path(path)):
        if usual.is_file():
            return usual
    finished = (other for other in path.glob("*.npy") if not other.stem.endswith(".partial"))
    others = sorted(other for other in finished if other.with_suffix(".json").is_file())
    if len(others) > 1:
        raise DatasetError(f"{path} holds several packed files, give one: {', '.join(map(str, others))}")
    if others:
        return others[0]
    state = "its preparation is unfinished" if [*path.glob("*.partial.npy")] else "it is not prepared yet"
    raise DatasetError(f"there is no packed file in {path}, {state}: run `condgan prepare {shlex.quote(str(path))}`")


class PackedIndex(NamedTuple):
    """What the ``.json`` index says about the packed file beside it."""

    image_size: int
    vocabulary: Vocabulary
    names: list[str]
    """The scenes' names, S of them."""
    objects: Tensor
    """(S, T) int64, the id of the object that each turn added."""
    sha256: str | None
    """Of the packed file; None in an index that has none."""
    source: dict[str, Any]
    """What ``condgan prepare`` noted about the pictures it read."""


def read_index(path: Path) -> PackedIndex:
    """The index of the packed file ``path``.

    Raises:
        DatasetError: it is missing, damaged or of another format.
    """
    path = path.with_suffix(".json")
    if not path.is_file():
        raise DatasetError(f"there is no index {path} beside the packed file: run `condgan prepare` again")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"the index {path} is not valid JSON ({error}): run `condgan prepare` again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DatasetError(f'{path} is no index of a packed file (its "format" is not {FORMAT!r}): give another file')
    if index.get("version") != FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format version {index.get('version')!r} and this condgan reads {FORMAT_VERSION}: "
            "update condgan, or run `condgan prepare` again"
        )
    try:
        vocabulary = Vocabulary(index["objects"])
        names = [str(scene["name"]) for scene in index["scenes"]]
        ids = [[vocabulary.parse(name) for name in scene["objects"]] for scene in index["scenes"]]
        objects = torch.tensor(ids, dtype=torch.long)
        image_size = int(index["image_size"])
        source = dict(index.get("source", {}))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise DatasetError(f"the index {path} is damaged ({error}): run `condgan prepare` again") from error
    return PackedIndex(image_size, vocabulary, names, objects, index.get("sha256"), source)


def _map_pixels(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The packed file, mapped copy-on-write: nothing is read yet, and nothing that is written reaches the file."""
    try:
        pixels: NDArray[np.uint8] = np.lib.format.open_memmap(path, mode="c")
    except Exception as error:  # by the kind of damage NumPy raises any of half a dozen
        raise DatasetError(f"{path} cannot be read ({error}): run `condgan prepare` again") from error
    if pixels.dtype != np.uint8 or pixels.shape != shape:
        raise DatasetError(
            f"{path} does not fit its index: expected uint8 {shape}, got {pixels.dtype} {pixels.shape}; "
            "run `condgan prepare` again"
        )
    return pixels


def _rows_of(pixels: NDArray[np.uint8], rows: list[int]) -> Tensor:
    """Some scenes of a packed file; of all of them nothing is read yet."""
    return torch.from_numpy(pixels if len(rows) == len(pixels) else pixels[rows])


# --- augmentation -------------------------------------------------------------------------------------------------


@overload
def augment_scene(images: Tensor, rng: torch.Generator, places: None = None, *, max_shift: int = 4) -> Tensor: ...
@overload
def augment_scene(
    images: Tensor, rng: torch.Generator, places: Tensor, *, max_shift: int = 4
) -> tuple[Tensor, Tensor]: ...
def augment_scene(
    images: Tensor, rng: torch.Generator, places: Tensor | None = None, *, max_shift: int = 4
) -> Tensor | tuple[Tensor, Tensor]:
    """Mirror each scene with probability one half, and shift it; all pictures of a scene alike, colours untouched.

    Args:
        images: (N, T, 3, H, W), any dtype and range.
        rng: the source of randomness, on any device.
        places: (N, T, 2) pixels, (x, y); follow the pictures, even to outside them.
        max_shift: the largest shift to each side, in pixels; the picture's edge is repeated into the gap.

    Returns:
        The images, in shape and dtype as before; with ``places``, the images and the places.

    Raises:
        ValueError: ``images`` is not (N, T, 3, H, W), or ``places`` is not (N, T, 2).
    """
    if images.ndim != 5 or images.shape[2] != 3:
        raise ValueError(f"images must be (N, T, 3, H, W), got {tuple(images.shape)}")
    if places is not None and places.shape != (*images.shape[:2], 2):
        raise ValueError(f"places must be {(*images.shape[:2], 2)} for these images, got {tuple(places.shape)}")
    n, _, _, height, width = images.shape
    flip = (torch.rand(n, 1, generator=rng, device=rng.device) < 0.5).to(images.device)  # (N, 1)
    shift = torch.randint(-max_shift, max_shift + 1, (n, 2), generator=rng, device=rng.device).to(images.device)
    columns = (torch.arange(width, device=images.device) - shift[:, :1]).clamp(0, width - 1)  # (N, W)
    columns = torch.where(flip, width - 1 - columns, columns)
    rows = (torch.arange(height, device=images.device) - shift[:, 1:]).clamp(0, height - 1)  # (N, H)
    source = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)  # (N, H*W)
    source = source[:, None, None].expand(*images.shape[:3], height * width)
    moved = images.flatten(3).gather(3, source).view(images.shape)
    if places is None:
        return moved
    x, y = places.unbind(-1)  # (N, T) each
    return moved, torch.stack([torch.where(flip, width - 1 - x, x) + shift[:, :1], y + shift[:, 1:]], -1)
