"""Drawing a large set: a list of scenes in a file, pictures in tar files, by one process or several, resumable."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import shutil
import tarfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from condgan.drawing import Redraw, parse_batch_size, parse_best_of, pictures_at_once
from condgan.files import claim, file_sha256, replacing
from condgan.images import to_png
from condgan.models import IterativeGenerator
from condgan.requests import MAX_SEED, Place, TooManyObjectsWarning, parse_request, parse_whole
from condgan.results import Drawing

DESCRIPTION = "set.json"
"""File that says what a folder holds."""
KEYS = ("conditions", "seed", "places", "num_images")
"""What a line of the list may say of its scene."""
CHUNK = 64
"""About so many pictures are drawn before they are written, more only if more pass the network at once."""
MAX_SET = 10**9
"""Pictures of a set: their names have nine digits."""
ABANDONED = 3600
"""Seconds without a change after which an unfinished tar file is nobody's."""


@dataclass(frozen=True)
class SetReport:
    """What :func:`draw_set` did."""

    out: Path
    """The folder."""
    pictures: int
    """In the whole set."""
    shards: int
    """In the whole set."""
    drawn: int
    """Pictures that this call drew; those of other processes and of earlier calls are not counted."""
    skipped: int
    """Pictures of this process that were there already."""


class Asked(NamedTuple):
    """One picture of a set."""

    number: int
    """Its number in the set, from 0."""
    line: int
    """The line of the list that asks for it, from 1."""
    scene: list[str]
    places: list[Place | None] | None
    seed: int


def draw_set(
    generator: IterativeGenerator,
    source: str | Path,
    out: str | Path,
    *,
    num_images: int = 1,
    seed: int = 0,
    best_of: int = 1,
    redraw: Redraw = "picture",
    batch_size: int | None = None,
    shard_size: int = 1000,
    rank: int = 0,
    count: int = 1,
    progress: bool = True,
) -> SetReport:
    """Draw all scenes of a list into tar files, as many as there are; what is there already is not drawn again.

    A line of the list is JSON: the objects of one scene, such as ``["red cube", "blue sphere"]``, or an object with
    ``conditions`` (those) and, as needed, ``seed``, ``places`` (for each object ``[x, y]`` or null) and ``num_images``.
    Blank lines are passed over. Picture n of the set, from 0, has the seed ``seed + n`` unless its line gives one; more
    images of that line then have the seeds that follow.

    ``out`` gets ``00000.tar``, ``00001.tar``, ... in the layout of WebDataset, with ``000000000.png`` and
    ``000000000.json`` for each picture, and ``set.json``, which says what the set is. A tar file is there whole or not
    at all, and its bytes depend on the list, the model and the arguments only, not on how many processes there are.
    Memory does not grow with the list.

    Args:
        generator: the model, on the device it shall draw on.
        source: the list, a JSON Lines file in UTF-8, no pipe; read twice, first to check every line.
        out: the folder; made if it is not there.
        num_images: pictures of a line that does not say.
        seed: of the first picture.
        best_of: candidates of each picture, as in :meth:`condgan.IterativeGenerator.generate`.
        redraw: what ``best_of`` is about, likewise.
        batch_size: pictures that pass the network at once, likewise; those whose seeds do not follow each other do not.
        shard_size: pictures a tar file.
        rank: number of this process, from 0; it draws every ``count``-th tar file.
        count: how many processes draw this set.
        progress: show a progress bar on stderr.

    Returns:
        :class:`SetReport`.

    Raises:
        OSError: the list cannot be read, or the folder cannot be written.
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; a line is wrong, which the message names; the list is empty, or asks
            for more than 1,000,000,000 pictures; or ``out`` holds another set.
    """
    source, out = Path(source), Path(out)
    num_images = parse_whole("num_images", num_images, 1, MAX_SET)
    seed, shard_size = parse_whole("seed", seed, 0), parse_whole("shard_size", shard_size, 1)
    best_of, batch_size = parse_best_of(best_of, redraw), parse_batch_size(batch_size)
    rank, count = parse_whole("rank", rank, 0), parse_whole("count", count, 1)
    if rank >= count:
        raise ValueError(f"rank must be below count, which is {count}: processes are numbered from 0, got {rank}")
    total = sum(1 for _ in _asked(generator, source, num_images, seed))
    if total == 0:
        raise ValueError(f'{str(source)!r} has no lines: write one scene a line, such as ["red cube"]')
    description = {"pictures": total, "list": file_sha256(source), "model": _digest_of_model(generator)}
    description |= {"num_images": num_images, "seed": seed, "best_of": best_of, "redraw": redraw}
    claim(out, DESCRIPTION, description | {"batch_size": batch_size, "shard_size": shard_size}, strangers="*.tar")
    _remove_abandoned(out)
    at_once = pictures_at_once(generator, batch_size)
    together = max(CHUNK // at_once, 1) * at_once
    shards = -(-total // shard_size)
    ours = {shard: min(shard_size, total - shard * shard_size) for shard in range(rank, shards, count)}
    left = {shard for shard in ours if not _is_whole(_tar(out, shard))}
    drawn = sum(ours[shard] for shard in left)
    skipped = sum(ours.values()) - drawn
    with (
        warnings.catch_warnings(),
        tqdm(total=drawn + skipped, initial=skipped, unit="img", desc=str(out), disable=not progress) as bar,
    ):
        warnings.simplefilter("ignore", TooManyObjectsWarning)  # said when the list was checked
        pictures = _asked(generator, source, num_images, seed)
        for shard, asked in itertools.groupby(pictures, lambda picture: picture.number // shard_size):
            if shard in left:
                with _new_tar(_tar(out, shard)) as tar:
                    while chunk := list(itertools.islice(asked, together)):
                        for drawing, those in _drawn(generator, chunk, best_of, redraw, batch_size):
                            _write(tar, drawing, those)
                        bar.update(len(chunk))
                    if file_sha256(source) != description["list"]:
                        raise ValueError(
                            f"source (--from): {str(source)!r} has changed while it was drawn: draw it into another "
                            f"folder, or restore it and run the same again"
                        )
    return SetReport(out, total, shards, drawn, skipped)


def _asked(generator: IterativeGenerator, source: Path, num_images: int, seed: int) -> Iterator[Asked]:
    """The pictures of a list, one after the other; only one line is in memory."""
    index = 0
    if source.exists() and not source.is_file():
        raise ValueError(
            f"source (--from): {str(source)!r} is no file, which is read twice: write the list to one first"
        )
    try:
        file = source.open("rb")
    except OSError as error:
        raise OSError(f"source (--from): cannot read {str(source)!r} ({error.strerror}): check the path") from error
    with file:
        for line_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                scene, places, own_seed, count = _parse_line(generator, line)
            except (TypeError, ValueError) as error:
                raise ValueError(f"line {line_number} of {str(source)!r}: {error}") from None
            wanted = num_images if count is None else count
            if index + wanted > MAX_SET:
                raise ValueError(
                    f"line {line_number} of {str(source)!r}: with its pictures the set has {index + wanted:,}, "
                    f"more than {MAX_SET:,}: draw it in several"
                )
            for n in range(wanted):
                picture_seed = seed + index if own_seed is None else own_seed + n
                yield Asked(index, line_number, scene, places, picture_seed % (MAX_SEED + 1))
                index += 1


def _parse_line(
    generator: IterativeGenerator, line: bytes
) -> tuple[list[str], list[Place | None] | None, int | None, int | None]:
    """Scene, places, seed and number of pictures, None where the line does not say.

    Raises:
        TypeError, ValueError: it is not what :func:`draw_set` describes.
    """
    try:
        value: Any = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'it is not JSON ({error}): write one scene a line, such as ["red cube"]') from None
    if isinstance(value, list):
        value = {"conditions": value}
    if not isinstance(value, dict) or "conditions" not in value:
        raise ValueError(
            'a line is a list of objects, such as ["red cube"], or {"conditions": ["red cube"], "seed": 7}'
        )
    if unknown := [key for key in value if key not in KEYS]:
        raise ValueError(f"unknown key {unknown[0]!r}: the keys are {', '.join(KEYS)}")
    scenes, places = parse_request(generator, value["conditions"], value.get("places"), "places")
    if len(scenes) > 1 or isinstance(value["conditions"][0], list):
        raise ValueError("a line is one scene: give every scene a line of its own")
    own_seed, count = value.get("seed"), value.get("num_images")
    return (
        scenes[0],
        None if places is None else places[0],
        None if own_seed is None else parse_whole("seed", own_seed, 0),
        None if count is None else parse_whole("num_images", count, 1, MAX_SET),
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that names a key twice is none."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return value


def _drawn(
    generator: IterativeGenerator, chunk: list[Asked], best_of: int, redraw: Redraw, batch_size: int | None
) -> Iterator[tuple[Drawing, list[Asked]]]:
    """Draw the pictures, those together whose seeds follow each other."""
    for _, group in itertools.groupby(chunk, lambda picture: picture.seed - picture.number):
        asked = list(group)
        at = None
        if any(picture.places is not None for picture in asked):
            at = [picture.places for picture in asked]
        scenes = [picture.scene for picture in asked]
        seed = asked[0].seed
        drawing = generator.generate(scenes, seed=seed, at=at, best_of=best_of, redraw=redraw, batch_size=batch_size)
        yield drawing, asked


def _write(tar: tarfile.TarFile, drawing: Drawing, asked: list[Asked]) -> None:
    """Append pictures and what is known of them."""
    for i, (image, picture) in enumerate(zip(drawing.images, asked, strict=True)):
        known = {**drawing.metadata(i), "line": picture.line}
        if drawing.scores is not None:
            known["score"] = drawing.scores[i]
        for ending, content in (("png", to_png(image)), ("json", json.dumps(known).encode())):
            entry = tarfile.TarInfo(f"{picture.number:09d}.{ending}")  # of the year 1970: equal sets are equal files
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _tar(out: Path, shard: int) -> Path:
    return out / f"{shard:05d}.tar"


def _is_whole(path: Path) -> bool:
    """Whether a tar file is there and ends as one does; what a full disk or a broken copy left of it does not."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begins = any(file.read(tarfile.BLOCKSIZE))  # what a power failure leaves may be nothing but zeros
            file.seek(-min(size, 2 * tarfile.BLOCKSIZE), io.SEEK_END)
            return begins and size >= tarfile.RECORDSIZE and size % tarfile.RECORDSIZE == 0 and not any(file.read())
    except FileNotFoundError:
        return False


def _remove_abandoned(out: Path) -> None:
    """What killed processes have left of tar files, an hour ago or more."""
    for left in out.glob(".*.tar-*"):
        with contextlib.suppress(OSError):  # another process is at it or has just ended, or another user has left it
            times = [file.stat().st_mtime for file in (left, *left.iterdir())]
            if time.time() - max(times) > ABANDONED:
                shutil.rmtree(left)


@contextlib.contextmanager
def _new_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar file that gets its name when the block ends well.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with replacing(path) as partial, tarfile.open(partial, "w") as tar:
            yield tar
    except OSError as error:
        raise OSError(
            f"out: cannot write {str(path)!r} ({error.strerror or error}): make room and run the same again, which "
            "goes on after the tar files that are there"
        ) from error


def _digest_of_model(generator: IterativeGenerator) -> str:
    digest = hashlib.sha256(json.dumps(asdict(generator.config)).encode())
    for name, value in generator.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
