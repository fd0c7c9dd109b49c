"""Once before training: a folder in the i-CLEVR layout is read, resized and packed into one memory-mapped file."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BufferedRandom, BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from condgan.datasets import (
    FORMAT,
    FORMAT_VERSION,
    DatasetError,
    packed_path,
    parse_names,
    read_index,
    read_json,
    read_objects,
)
from condgan.files import file_sha256, locked, replacing
from condgan.images import read_pixels, resize
from condgan.requests import parse_whole
from condgan.vocab import Vocabulary

JOURNAL_SCENES = 200
"""An interruption costs at most this many scenes."""
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

# --- reading the i-CLEVR layout -----------------------------------------------------------------------------------


class LabelledScene(NamedTuple):
    """One scene of the i-CLEVR layout."""

    name: str
    """The picture files' common name, as in ``CLEVR_train_000123`` of ``CLEVR_train_000123_0.png``."""
    pictures: tuple[str, ...]
    """File names, one a turn."""
    objects: tuple[str, ...]
    """The object that each turn added, in the vocabulary's spelling."""


@dataclass(frozen=True)
class SceneLayout:
    """What a folder in the i-CLEVR layout holds, before any picture is opened."""

    folder: Path
    """Where the pictures lie."""
    vocabulary: Vocabulary
    scenes: tuple[LabelledScene, ...]
    """Every complete scene, sorted by name; all have equally many turns."""
    missing: tuple[str, ...]
    """Picture files that ``train.json`` lists but that are not there."""
    unlabelled: tuple[str, ...]
    """Picture files that are there but that ``train.json`` does not list."""
    skipped_scenes: tuple[str, ...]
    """Scenes that miss a picture, or that have another number of turns than most."""


def read_layout(data_dir: str | Path) -> SceneLayout:
    """Read the labels of a folder in the i-CLEVR layout and compare them with the picture files that are there.

    The folder holds ``train.json`` (file name -> names, each scene's list with one name more than the turn before),
    ``objects.json`` (name -> index), and the pictures in ``images/``, in ``iclevr/`` or beside the JSON files.

    Raises:
        DatasetError: a JSON file is missing or wrong, or no picture of ``train.json`` is there.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DatasetError(f"there is no folder {data_dir}: give the folder that holds train.json and the pictures")
    path = data_dir / "train.json"
    content = read_json(path)
    vocabulary = read_objects(data_dir / "objects.json")
    if not isinstance(content, dict) or not content:
        raise DatasetError(
            f'{path}: expected a dict such as {{"CLEVR_train_000000_0.png": ["red cube"]}}, got {content!r:.80}'
        )
    labels = {file: parse_names(path, repr(file), names, vocabulary) for file, names in content.items()}
    folder, files = _picture_folder(data_dir, labels)
    scenes = _group_scenes(path, labels)
    turns_of = {name: len(turns) for name, turns in scenes.items()}
    num_turns = max(Counter(turns_of.values()).items(), key=lambda item: (item[1], item[0]))[0]
    complete = [
        LabelledScene(name, tuple(turns.values()), tuple(labels[turns[num_turns - 1]]))
        for name, turns in sorted(scenes.items())
        if [*turns] == [*range(num_turns)] and files.issuperset(turns.values())
    ]
    return SceneLayout(
        folder,
        vocabulary,
        tuple(complete),
        missing=tuple(sorted(labels.keys() - files)),
        unlabelled=tuple(sorted(files - labels.keys())),
        skipped_scenes=tuple(sorted(scenes.keys() - {scene.name for scene in complete})),
    )


def _picture_folder(data_dir: Path, labels: Iterable[str]) -> tuple[Path, set[str]]:
    """The first folder that holds a labelled picture, and the names of all pictures in it."""
    wanted = set(labels)
    for folder in (data_dir / "images", data_dir / "iclevr", data_dir):
        if folder.is_dir():
            with os.scandir(folder) as entries:
                files = {entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")}
            files = {file for file in files if file in wanted or Path(file).suffix.lower() in PICTURE_SUFFIXES}
            if files & wanted:
                return folder, files
    raise DatasetError(
        f"no picture that {data_dir / 'train.json'} lists, such as {min(wanted)}, is in {data_dir / 'images'} "
        f"or {data_dir}: unpack the i-CLEVR pictures there"
    )


def _group_scenes(path: Path, labels: dict[str, list[str]]) -> dict[str, dict[int, str]]:
    """Scene name -> turn -> file name, turns in order; checks that every turn adds one object to the turn before."""
    scenes: dict[str, dict[int, str]] = {}
    for file in labels:
        match = re.fullmatch(r"(.+)_(\d+)\.\w+", file)
        if match is None:
            raise DatasetError(f"{path}: {file!r} is not named SCENE_TURN.png as in CLEVR_train_000123_0.png")
        turns = scenes.setdefault(match[1], {})
        if int(match[2]) in turns:
            raise DatasetError(f"{path}: {turns[int(match[2])]!r} and {file!r} are the same turn; remove one")
        turns[int(match[2])] = file
    for name, unsorted in scenes.items():
        turns = scenes[name] = dict(sorted(unsorted.items()))
        previous: list[str] = []
        for turn, file in turns.items():
            names = labels[file]
            if len(names) != turn + 1 or names[: len(previous)] != previous:
                raise DatasetError(
                    f"{path}, entry {file!r}: turn {turn} must list the objects of the turn before and one more, "
                    f"{turn + 1} in all; got {names} after {previous}"
                )
            previous = names
    return scenes


# --- packing ------------------------------------------------------------------------------------------------------


def read_picture(path: str | Path, image_size: int) -> NDArray[np.uint8]:
    """One picture file as (3, image_size, image_size) uint8 RGB.

    Read by :func:`condgan.images.read_pixels` and resized by :func:`condgan.images.resize`; a picture that has the size
    already is returned bit for bit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, or is damaged.
    """
    pixels = read_pixels(path)
    return np.ascontiguousarray(resize(pixels[None].float(), image_size)[0].round().byte().numpy())


@dataclass(frozen=True)
class PrepareReport:
    """What :func:`prepare` wrote and what it had to leave out."""

    path: Path
    """The packed ``.npy`` file; its ``.json`` index lies beside it."""
    scenes: int
    """Scenes in the packed file."""
    pictures: int
    """Pictures in the packed file."""
    missing: tuple[str, ...]
    """Picture files that ``train.json`` lists but that are not there."""
    unreadable: tuple[str, ...]
    """Picture files that are there but are damaged, or no pictures."""
    unlabelled: tuple[str, ...]
    """Picture files that are there but that ``train.json`` does not list."""
    skipped_scenes: tuple[str, ...]
    """Scenes left out: a picture is missing or unreadable, or they have another number of turns than most."""
    sha256: str
    """Checksum of the packed file."""
    seconds: float
    """What this call took."""
    already_prepared: bool = False
    """The packed file was complete and up to date before this call."""
    resumed_scenes: int = 0
    """Scenes that an interrupted call had read before."""

    def summary(self, max_names: int = 20) -> str:
        """A few lines for people; of each kind of trouble the first ``max_names`` names."""
        done = "was prepared before, nothing to do" if self.already_prepared else f"took {self.seconds:.1f} s"
        if self.resumed_scenes:
            done += f", went on after {self.resumed_scenes:,} scenes that were read before"
        lines = [f"{self.path}: {self.scenes:,} scenes, {self.pictures:,} pictures; {done}"]
        troubles = {
            "pictures listed in train.json but missing": self.missing,
            "pictures that cannot be read": self.unreadable,
            "pictures without an entry in train.json": self.unlabelled,
            "scenes left out": self.skipped_scenes,
        }
        for trouble, names in troubles.items():
            if names:
                more = f", and {len(names) - max_names:,} more" if len(names) > max_names else ""
                lines.append(f"{len(names):,} {trouble}: {', '.join(names[:max_names])}{more}")
        return "\n".join(lines)


def prepare(
    data_dir: str | Path, *, out: str | Path | None = None, image_size: int = 64, progress: bool = True
) -> PrepareReport:
    """Pack a folder in the i-CLEVR layout into one memory-mapped file that :class:`SceneDataset` reads.

    Scenes that miss a picture, or have one that cannot be read, are left out and named in the report. When the file
    is there already and fits the folder, nothing is done; an interrupted call is continued by the next one. While
    another process writes the same file this one warns and waits for it, where the file system knows locks.

    Args:
        data_dir: the folder that holds ``train.json``, ``objects.json`` and the pictures; see :func:`read_layout`.
        out: the ``.npy`` file to write, or a folder for it; by default ``condgan-SIZE.npy`` in ``data_dir``.
        image_size: side of the square pictures that are written, in pixels.
        progress: show a progress bar on stderr.

    Raises:
        DatasetError: the folder is not in the i-CLEVR layout, nothing in it is usable, a picture that may be whole
            cannot be read, or ``out`` cannot be written or would take the place of a file of somebody else's.
        TypeError: ``image_size`` is not a whole number.
        ValueError: ``image_size`` is not positive.

    Files: the pictures, (S, T, 3, H, W) uint8 in C order, and beside them the index, a ``.json`` with the names of
    the scenes, the object that each turn added, and the checksum. Until both are complete, the pictures so far lie in
    ``NAME.partial.npy`` and the number of finished scenes in ``NAME.partial.json``. ``.NAME.npy.lock``, which is
    empty, keeps other processes out.
    """
    start = time.monotonic()
    image_size = parse_whole("image_size", image_size, 1)
    layout = read_layout(data_dir)
    if not layout.scenes:
        raise DatasetError(
            f"no scene in {layout.folder} is complete: of the pictures that train.json lists {len(layout.missing)} are "
            f"missing, such as {', '.join(layout.missing[:3])}; unpack the i-CLEVR pictures there"
        )
    path = packed_path(data_dir, image_size) if out is None else Path(out)
    path = path if path.suffix == ".npy" else packed_path(path, image_size)
    fingerprint = _fingerprint(layout, image_size)
    outcome = _finished(path, layout, image_size, fingerprint)  # asked without the lock: the folder may be read-only
    if outcome is None:
        _check_is_ours(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(f".{path.name}.lock"), f"waiting for another process, which prepares {path}"):
                outcome = _finished(path, layout, image_size, fingerprint)
                if outcome is None:
                    outcome = _pack(path, layout, image_size, fingerprint, progress)
        except OSError as error:
            raise DatasetError(
                f"cannot write {path} ({error}): make room, or give another place with `out`, and run it again to go on"
            ) from error
    unreadable = outcome.unreadable
    packed = _readable(layout.scenes, unreadable)
    left_out = {scene.name for scene in layout.scenes} - {scene.name for scene in packed}
    return PrepareReport(
        path,
        scenes=len(packed),
        pictures=sum(len(scene.pictures) for scene in packed),
        missing=layout.missing,
        unreadable=tuple(sorted(unreadable)),
        unlabelled=layout.unlabelled,
        skipped_scenes=tuple(sorted(left_out.union(layout.skipped_scenes))),
        sha256=outcome.sha256,
        seconds=time.monotonic() - start,
        already_prepared=outcome.already_prepared,
        resumed_scenes=outcome.resumed_scenes,
    )


class _Outcome(NamedTuple):
    """What is known of a complete packed file."""

    sha256: str
    unreadable: frozenset[str]
    already_prepared: bool
    resumed_scenes: int


class _Progress(NamedTuple):
    """How far an unfinished packed file has come."""

    num_done: int = 0
    """Scenes of the layout that were read, in order, the unreadable ones included."""
    unreadable: frozenset[str] = frozenset()
    """Picture files among them that could not be read."""


def _readable(scenes: Sequence[LabelledScene], unreadable: frozenset[str]) -> list[LabelledScene]:
    return [scene for scene in scenes if unreadable.isdisjoint(scene.pictures)]


def _fingerprint(layout: SceneLayout, image_size: int) -> str:
    """A hash of all that the packed file depends on: labels, and size and time of change of every picture file."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, image_size, layout.vocabulary.names, layout.scenes]).encode())
    for scene in layout.scenes:
        for picture in scene.pictures:
            status = os.stat(layout.folder / picture)
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _finished(path: Path, layout: SceneLayout, image_size: int, fingerprint: str) -> _Outcome | None:
    """The packed file if it is complete, undamaged and made of the same pictures, as many as can be read, else None.

    Raises:
        DatasetError: whether a picture can be read cannot be told.
    """
    try:
        index = read_index(path)
        if index.source.get("fingerprint") != fingerprint or not path.is_file() or file_sha256(path) != index.sha256:
            return None
    except (DatasetError, FileNotFoundError):  # another process may be about to replace it
        return None
    listed = index.source.get("unreadable")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        return None
    unreadable = frozenset(listed)
    packed = _readable(layout.scenes, unreadable)
    ids = [[layout.vocabulary.parse(name) for name in scene.objects] for scene in packed]
    said = [*index.names], index.objects.tolist(), index.image_size, index.vocabulary.names
    if said != ([scene.name for scene in packed], ids, image_size, layout.vocabulary.names):
        return None
    if any(_undamaged(layout.folder / picture, image_size) is not None for picture in unreadable):
        return None
    return _Outcome(index.sha256, unreadable, already_prepared=True, resumed_scenes=0)


def _check_is_ours(path: Path) -> None:
    """Raise a DatasetError if other files are where ours go, such as the labels of the folder, or somebody's array."""
    index = path.with_suffix(".json")
    if path.exists() and not index.exists():
        raise DatasetError(f"{path} is in the way: it has no index, so it is no packed file; give another `out`")
    try:
        text = index.read_bytes()
    except OSError:  # it is not there
        return
    begins = json.dumps({"format": FORMAT}).encode()[:-1]
    if text.startswith(begins) or begins.startswith(text):  # ours, even if it is damaged
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DatasetError(f"{index} is in the way, where the index of the packed file goes: give another `out`")


def _pack(path: Path, layout: SceneLayout, image_size: int, fingerprint: str, progress: bool) -> _Outcome:
    """Read what is not read yet, and put the finished file and its index in place.

    Raises:
        DatasetError: no scene is whole, or a picture that may be whole cannot be read.
        OSError: the files cannot be written.
    """
    partial, journal = path.with_suffix(".partial.npy"), path.with_suffix(".partial.json")
    scene_shape = (len(layout.scenes[0].pictures), 3, image_size, image_size)
    header_bytes = len(_npy_header(len(layout.scenes), scene_shape))

    def offset(state: _Progress) -> int:
        return header_bytes + len(_readable(layout.scenes[: state.num_done], state.unreadable)) * math.prod(scene_shape)

    for link in (partial, journal):
        if link.is_symlink():
            raise DatasetError(f"{link} is a link, through which nothing is written: remove it")
    state = _read_journal(journal, fingerprint)
    if not partial.is_file() or partial.stat().st_size < offset(state):
        state = _Progress()
    resumed_scenes = state.num_done
    needed = (len(layout.scenes) - state.num_done) * math.prod(scene_shape)
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise OSError(f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free")
    with (
        open(partial, "r+b" if state.num_done else "w+b") as file,
        tqdm(desc="prepare", total=len(layout.scenes), initial=state.num_done, disable=not progress) as bar,
    ):
        file.truncate(offset(state))  # a scene that was cut off in the middle
        file.seek(offset(state))
        try:
            for scene in layout.scenes[state.num_done :]:
                pixels, unreadable = _read_scene(layout.folder, scene, image_size)
                if not unreadable:
                    file.write(pixels.tobytes())
                state = _Progress(state.num_done + 1, state.unreadable | unreadable)
                if state.num_done % JOURNAL_SCENES == 0:
                    _write_journal(journal, fingerprint, state, file)
                bar.update()
        finally:
            _write_journal(journal, fingerprint, state, file)
        scenes = _readable(layout.scenes, state.unreadable)
        file.seek(0)
        file.write(_npy_header(len(scenes), scene_shape))
    if not scenes:
        partial.unlink()
        journal.unlink()
        raise DatasetError(f"no scene in {layout.folder} can be read: {min(state.unreadable)} and others are damaged")
    sha256 = file_sha256(partial)
    index = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "image_size": image_size,
        "sha256": sha256,
        "objects": layout.vocabulary.names,
        "scenes": [{"name": scene.name, "objects": scene.objects} for scene in scenes],
        "source": {"fingerprint": fingerprint, "unreadable": sorted(state.unreadable)},
    }
    path.unlink(missing_ok=True)  # so that at no moment an old file stands beside a new index
    _write_json(path.with_suffix(".json"), index)
    os.replace(partial, path)
    journal.unlink()
    return _Outcome(sha256, state.unreadable, already_prepared=False, resumed_scenes=resumed_scenes)


def _read_scene(folder: Path, scene: LabelledScene, image_size: int) -> tuple[NDArray[np.uint8], frozenset[str]]:
    """The readable pictures of a scene, (T, 3, H, W) uint8, and the names of the others."""
    pictures = {name: _undamaged(folder / name, image_size) for name in scene.pictures}
    readable = [picture for picture in pictures.values() if picture is not None]
    unreadable = frozenset(name for name, picture in pictures.items() if picture is None)
    return np.array(readable, dtype=np.uint8), unreadable


def _undamaged(path: Path, image_size: int) -> NDArray[np.uint8] | None:
    """A picture as :func:`read_picture` gives it; None if there is none in the file, or a damaged one.

    Raises:
        DatasetError: the file could not be read, which says nothing about the picture.
    """
    try:
        return read_picture(path, image_size)
    except (OSError, ValueError, MemoryError) as error:
        cause = error.__cause__ or error
        # the system's errors have numbers and Pillow's have none; EINVAL comes of an offset that is damaged
        if isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL):
            reason = cause.strerror
        elif isinstance(cause, MemoryError):
            reason = "not enough memory"
        else:
            return None
        raise DatasetError(f"cannot read {path} ({reason}): mend that and run it again to go on") from cause


def _npy_header(num_scenes: int, scene_shape: tuple[int, ...]) -> bytes:
    """Of a uint8 array in C order; NumPy makes it equally long for any ``num_scenes``."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (num_scenes, *scene_shape)}
    )
    return header.getvalue()


def _read_journal(path: Path, fingerprint: str) -> _Progress:
    """How far an earlier call with the same fingerprint came; nothing done when there is no such journal."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["fingerprint"] == fingerprint:
            return _Progress(int(content["num_done"]), frozenset(content["unreadable"]))
    except (OSError, KeyError, TypeError, ValueError):
        pass
    return _Progress()


def _write_journal(path: Path, fingerprint: str, state: _Progress, file: BufferedRandom) -> None:
    """Note how far ``file`` has come, once that much of it is safe on the disk."""
    file.flush()
    os.fsync(file.fileno())
    _write_json(path, {"fingerprint": fingerprint, "num_done": state.num_done, "unreadable": sorted(state.unreadable)})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")
