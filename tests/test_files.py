"""files.py: a file is there whole or not at all."""

from __future__ import annotations

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
