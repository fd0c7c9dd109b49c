"""shards.py: what is in the tar files, going on, several processes, wrong lines, memory."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import shutil
import tarfile
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from condgan import IterativeGenerator, shards
from condgan.results import Drawing
from condgan.shards import draw_set

LINES = [
    '["red cube"]',
    '{"conditions": ["gray sphere", "blue cylinder"], "num_images": 3}',
    "",
    '{"conditions": ["cyan cube", "Red Cube"], "seed": 40, "places": [[12, 30.5], null], "num_images": 2}',
    '{"conditions": "yellow cylinder"}',
]
SEEDS = [5, 6, 7, 8, 40, 41, 11]


def write_list(folder: Path, lines: list[str] = LINES) -> Path:
    path = folder / "list.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def contents(folder: Path) -> list[tuple[str, bytes]]:
    """The entries of all tar files."""
    entries = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                entries.append((member.name, file.read()))
    return entries


@pytest.fixture(scope="module")
def whole(compact: IterativeGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of seven pictures, three a tar file."""
    folder = tmp_path_factory.mktemp("set")
    report = draw_set(compact, write_list(folder), folder / "out", seed=5, shard_size=3, progress=False)
    assert (report.pictures, report.shards, report.drawn, report.skipped) == (7, 3, 7, 0)
    return folder / "out"


def test_a_set_holds_the_pictures_that_generate_draws(compact: IterativeGenerator, whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == ["00000.tar", "00001.tar", "00002.tar", "set.json"]
    entries = contents(whole)
    assert [name for name, _ in entries] == [f"{n:09d}.{kind}" for n in range(7) for kind in ("png", "json")]
    known = [json.loads(content) for name, content in entries if name.endswith("json")]
    assert [picture["seed"] for picture in known] == SEEDS
    assert [picture["line"] for picture in known] == [1, 2, 2, 2, 4, 4, 5]
    assert known[5]["conditions"] == ["cyan cube", "red cube"]
    for n, picture in enumerate(known):
        at = [[12, 30.5], None] if picture["seed"] in (40, 41) else None
        drawing = compact.generate(picture["conditions"], seed=picture["seed"], at=at)
        assert Image.open(io.BytesIO(entries[2 * n][1])).tobytes() == drawing.image.tobytes()
        assert drawing.places is not None
        assert picture["places"] == [pytest.approx(place) for place in drawing.places[0]]


def test_what_a_line_got_can_be_a_line(compact: IterativeGenerator, whole: Path, tmp_path: Path) -> None:
    known = [json.loads(content) for name, content in contents(whole) if name.endswith("json")]
    lines = [json.dumps({key: picture[key] for key in ("conditions", "seed", "places")}) for picture in known]
    draw_set(compact, write_list(tmp_path, lines), tmp_path / "again", progress=False)
    pictures = [
        [entry for entry in contents(folder) if entry[0].endswith("png")] for folder in (whole, tmp_path / "again")
    ]
    assert pictures[0] == pictures[1]


def test_the_number_of_processes_changes_nothing(compact: IterativeGenerator, whole: Path, tmp_path: Path) -> None:
    source = write_list(tmp_path)
    for rank in (1, 0):
        report = draw_set(compact, source, tmp_path / "out", seed=5, shard_size=3, rank=rank, count=2, progress=False)
        assert (report.pictures, report.drawn) == (7, 3 if rank else 4)
    for path in whole.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_is_done_is_not_drawn_again(
    compact: IterativeGenerator, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_list(tmp_path), tmp_path / "out"
    write = shards._write

    def stop_in_the_second(tar: tarfile.TarFile, drawing: Drawing, asked: list[Any]) -> None:
        write(tar, drawing, asked)
        if asked[0].number >= 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "_write", stop_in_the_second)
        draw_set(compact, source, out, seed=5, shard_size=3, progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "set.json"]
    for name in (".00001.tar-x7z", ".00002.tar-x7z"):
        (out / name).mkdir()
        (out / name / "tar").write_bytes(b"what kill -9 leaves")
    for left in (out / ".00001.tar-x7z/tar", out / ".00001.tar-x7z"):
        os.utime(left, (time.time() - 3700,) * 2)
    report = draw_set(compact, source, out, seed=5, shard_size=3, progress=False)
    assert (report.drawn, report.skipped) == (4, 3)
    shutil.rmtree(out / ".00002.tar-x7z")  # another process may still be at it
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    monkeypatch.setattr(shards, "_drawn", lambda *args: pytest.fail("nothing is left to draw"))
    assert draw_set(compact, source, out, seed=5, shard_size=3, progress=False).skipped == 7


def test_what_another_user_left_behind_stops_no_set(
    compact: IterativeGenerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(path: Path, **options: Any) -> None:
        if path == left:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        remove(path, **options)

    out, remove = tmp_path / "out", shutil.rmtree
    left = out / ".00000.tar-x7z"
    left.mkdir(parents=True)
    os.utime(left, (time.time() - 3700,) * 2)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert draw_set(compact, write_list(tmp_path), out, seed=5, progress=False).drawn == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sets_are_drawn_in_every_precision(compact: IterativeGenerator, dtype: torch.dtype, tmp_path: Path) -> None:
    generator = copy.deepcopy(compact).to(dtype)
    assert draw_set(generator, write_list(tmp_path), tmp_path / "out", seed=5, progress=False).drawn == 7
    assert draw_set(generator, write_list(tmp_path), tmp_path / "out", seed=5, progress=False).skipped == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("red cube", r"line 2 of .*list\.jsonl': it is not JSON .* write one scene a line"),
        ('["red cub"]', "line 2 of .*red cub"),
        ("[]", "line 2 of .*conditions is empty"),
        ('"red cube"', "line 2 of .*a line is a list of objects"),
        ('{"objects": ["red cube"]}', "line 2 of .*a line is a list of objects"),
        ('{"conditions": ["red cube"], "sed": 7}', "line 2 of .*unknown key 'sed': the keys are conditions, seed"),
        ('{"conditions": ["red cube"], "seed": -1}', "line 2 of .*seed must be between 0"),
        ('{"conditions": ["red cube"], "seed": "7"}', "line 2 of .*seed must be a whole number, got '7'"),
        ('{"conditions": ["red cube"], "num_images": 0}', "line 2 of .*num_images must be between 1"),
        (
            '{"conditions": ["red cube"], "places": [[99, 2]]}',
            r"line 2 of .*: places: the place \[99, 2\] is not inside",
        ),
        ('{"conditions": ["red cube"], "places": [[1e999, 2]]}', "line 2 of .*: places: the place .inf, 2. is not ins"),
        ('{"conditions": ["red cube"], "num_images": 1e9}', "line 2 of .*num_images must be a whole number"),
        ('{"conditions": ["red cube"], "num_images": 1000000001}', "line 2 of .*between 1 and 1,000,000,000"),
        ('{"conditions": ["red cube"], "num_images": 1000000000}', "line 2 of .*the set has 1,000,000,001, more than"),
        (
            '{"seed": 1, "conditions": ["red cube"], "seed": 2}',
            "line 2 of .*not JSON .the key 'seed' stands in it twice",
        ),
        ("[" * 100_000, "line 2 of .*it is not JSON"),
        ('[["red cube"], ["blue cube"]]', "line 2 of .*a line is one scene"),
        ('[["red cube"]]', "line 2 of .*a line is one scene"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_drawn(
    line: str, message: str, compact: IterativeGenerator, tmp_path: Path
) -> None:
    source = write_list(tmp_path, ['["red cube"]', line])
    with pytest.raises(ValueError, match=message):
        draw_set(compact, source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_set_is_refused(compact: IterativeGenerator, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another set: seed was 5 and is 6; choose another folder"):
        draw_set(compact, write_list(tmp_path), whole, seed=6, shard_size=3, progress=False)
    with pytest.raises(ValueError, match=r"holds another set: pictures was 7 and is 6, list was '\w+' and is '\w+'"):
        draw_set(compact, write_list(tmp_path, LINES[:4]), whole, seed=5, shard_size=3, progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/set.json").write_text("[1]")
    with pytest.raises(ValueError, match="does not describe a set"):
        draw_set(compact, write_list(tmp_path), tmp_path / "other", progress=False)
    strange = shutil.copytree(whole, tmp_path / "strange")
    (strange / "set.json").unlink()
    with pytest.raises(ValueError, match=r"strange' holds 0000\d\.tar, but no set\.json that says what it is: choose"):
        draw_set(compact, write_list(tmp_path), strange, seed=5, shard_size=3, progress=False)
    assert not (strange / "set.json").exists()
    with pytest.raises(OSError, match="out: cannot write"):
        draw_set(compact, write_list(tmp_path), tmp_path / "list.jsonl", progress=False)
    with pytest.raises(ValueError, match="has no lines"):
        draw_set(compact, write_list(tmp_path, [""]), tmp_path / "empty", progress=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"best_of": 0}, ValueError, "best_of must be between 1"),
        ({"redraw": "scene"}, ValueError, "redraw must be 'picture' or 'turn', got 'scene'"),
        ({"batch_size": 0}, ValueError, "batch_size must be between 1"),
        ({"count": 0}, ValueError, "count must be between 1"),
        ({"rank": 2, "count": 2}, ValueError, "rank must be below count, which is 2"),
        ({"rank": -1}, ValueError, "rank must be between 0"),
        ({"rank": "0"}, TypeError, "rank must be a whole number"),
    ],
)
def test_wrong_arguments_leave_no_folder_behind(
    arguments: dict[str, Any], error: type[Exception], message: str, compact: IterativeGenerator, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        draw_set(compact, write_list(tmp_path), tmp_path / "out", progress=False, **arguments)
    assert not (tmp_path / "out").exists()


def test_a_list_that_is_not_there_is_named(compact: IterativeGenerator, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"source \(--from\): cannot read '.*none' \(No such file or directory\)"):
        draw_set(compact, tmp_path / "none", tmp_path / "out", progress=False)


def test_a_pipe_is_no_list(compact: IterativeGenerator, tmp_path: Path) -> None:
    """It could be read once only: nothing was drawn and the report said all was there."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"source .--from.: .*pipe' is no file, which is read twice: write the list"):
        draw_set(compact, tmp_path / "pipe", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", [0, 512, 10240, -512])
def test_a_cut_tar_file_is_drawn_again(left: int, compact: IterativeGenerator, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    content = (whole / "00001.tar").read_bytes()
    (out / "00001.tar").write_bytes(content[:left])
    report = draw_set(compact, write_list(tmp_path), out, seed=5, shard_size=3, progress=False)
    assert (report.drawn, report.skipped) == (3, 4)
    assert (out / "00001.tar").read_bytes() == content


def test_a_full_disk_is_told_and_what_is_drawn_stays(
    compact: IterativeGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, write = write_list(tmp_path), tmp_path / "out", shards._write

    def full(tar: tarfile.TarFile, drawing: Drawing, asked: list[Any]) -> None:
        if asked[0].number >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tar, drawing, asked)

    monkeypatch.setattr(shards, "_write", full)
    with pytest.raises(OSError, match=r"out: cannot write .*00001.tar' .No space left on device.: make room and run"):
        draw_set(compact, source, out, seed=5, shard_size=3, progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "set.json"]


def test_long_scenes_are_warned_of_once(compact: IterativeGenerator, tmp_path: Path) -> None:
    source = tmp_path / "long.jsonl"
    source.write_text(json.dumps(["red cube"] * (compact.num_turns + 1)) + "\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw_set(compact, source, tmp_path / "out", progress=False)
    assert ["objects are asked" in str(warning.message) for warning in caught] == [True]


def test_scores_of_best_of_are_kept(compact: IterativeGenerator, tmp_path: Path) -> None:
    draw_set(compact, write_list(tmp_path, ['["red cube"]']), tmp_path / "out", best_of=np.int64(2), progress=False)
    known = json.loads(contents(tmp_path / "out")[1][1])
    drawing = compact.generate(["red cube"], seed=0, best_of=2)
    assert drawing.scores is not None
    assert known["score"] == drawing.scores[0]
    assert known["seed"] == drawing.seeds[0]


def test_a_set_is_drawn_in_batches(compact: IterativeGenerator, tmp_path: Path) -> None:
    source = write_list(tmp_path, ['["red cube"]', '["gray cube", "blue sphere"]', '["cyan cylinder"]'])
    draw_set(compact, source, tmp_path / "out", batch_size=3, progress=False)
    scenes = [["red cube"], ["gray cube", "blue sphere"], ["cyan cylinder"]]
    drawing = compact.generate(scenes, seed=0, batch_size=3)
    pictures = [content for name, content in contents(tmp_path / "out") if name.endswith("png")]
    for content, image in zip(pictures, drawing.images, strict=True):
        assert Image.open(io.BytesIO(content)).tobytes() == image.tobytes()
    with pytest.raises(ValueError, match="holds another set: batch_size was 3 and is None; choose another folder"):
        draw_set(compact, source, tmp_path / "out", progress=False)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many pictures each chunk of a set is; none of them is drawn."""
    sizes: list[int] = []

    def not_drawn(generator: object, chunk: list[Any], *args: object) -> Iterator[Any]:
        sizes.append(len(chunk))
        return iter(())

    monkeypatch.setattr(shards, "_drawn", not_drawn)
    return sizes


@pytest.mark.parametrize(("batch_size", "chunk"), [(None, 64), (48, 48), (20, 60), (100, 100)])
def test_batches_are_filled(
    batch_size: int | None, chunk: int, chunks: list[int], compact: IterativeGenerator, tmp_path: Path
) -> None:
    source = write_list(tmp_path, ['["red cube"]'] * 230)
    draw_set(compact, source, tmp_path / "out", batch_size=batch_size, progress=False)
    assert chunks == [chunk] * (230 // chunk) + [230 % chunk]


def test_memory_does_not_grow_with_the_list(compact: IterativeGenerator, tmp_path: Path, chunks: list[int]) -> None:
    peaks = []
    for count in (1_000, 10_000):
        source = write_list(tmp_path, ['["red cube", "blue sphere"]'] * count)
        tracemalloc.start()
        draw_set(compact, source, tmp_path / str(count), progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert sum(chunks) == 11_000
    assert max(chunks) <= shards.CHUNK
    assert peaks[1] < peaks[0] + 200_000


def test_zeros_where_a_tar_file_was_are_drawn_again(compact: IterativeGenerator, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "00001.tar").write_bytes(bytes(10_240))
    report = draw_set(compact, write_list(tmp_path), tmp_path / "out", seed=5, shard_size=3, progress=False)
    assert (report.drawn, report.skipped) == (3, 4)


def test_a_list_that_changes_while_it_is_drawn_is_told(
    compact: IterativeGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, write = write_list(tmp_path), tmp_path / "out", shards._write

    def edited(tar: tarfile.TarFile, drawing: Drawing, asked: list[Any]) -> None:
        if asked[-1].number >= 3:
            source.write_text('["red cube"]\n' * 7)
        write(tar, drawing, asked)

    monkeypatch.setattr(shards, "_write", edited)
    with pytest.raises(ValueError, match=r"source \(--from\): .*list.jsonl' has changed while it was drawn"):
        draw_set(compact, source, out, seed=5, shard_size=3, progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "set.json"]
