"""files.py: a file is there whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from condgan.files import replacing


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / f"{'ä' * 120}.json"  # as long as names can be
    path.write_text("old")
    with replacing(path) as first, replacing(path) as second:  # as two threads may
        first.write_text("first")
        second.write_text("second")
        assert path.read_text() == "old"
    assert path.read_text() == "first"
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode, "others may read it as any file"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_is_not_finished_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt") as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_stays_one_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    with replacing(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert len([*tmp_path.iterdir(), *target.parent.iterdir()]) == 3


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    with replacing(pipe) as path:
        path.write_text("all")
    reader.join(10)
    assert read == ["all"]
    assert pipe.is_fifo()


def test_a_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a\.json"), replacing(tmp_path / "a.json"):
        raise AssertionError("nothing is written")
