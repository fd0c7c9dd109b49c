"""files.py: a file is there whole or not at all, and one process at a time writes it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from condgan import files
from condgan.files import check_utf8, claim, locked, replacing


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


HOLD = """
import sys
from pathlib import Path
from condgan.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_kept_out_or_waits(tmp_path: Path) -> None:
    lock, entered = tmp_path / "ä.lock", threading.Event()

    def wait() -> None:
        with pytest.warns(UserWarning, match="waiting for another"), locked(lock, "waiting for another"):
            entered.set()

    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(BlockingIOError, match="ä"), locked(lock):
            raise AssertionError("it is kept out")
        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        assert not entered.wait(0.3)
        holder.kill()  # which leaves nothing that would keep others out
    assert entered.wait(10)
    waiter.join(10)
    with locked(lock):
        assert [*tmp_path.iterdir()] == [lock]
    assert lock.read_bytes() == b""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".lock").write_text("4711\nanother-machine\n")  # as filelock marks what it cannot lock
    with locked(tmp_path / ".lock"), locked(tmp_path / ".lock", "waiting"):
        pass
    with pytest.raises(ZeroDivisionError), locked(tmp_path / ".lock"):
        raise ZeroDivisionError


def test_other_trouble_with_a_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file" / ".lock"):
        raise AssertionError("it is not entered")

    def fail(fd: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), locked(tmp_path / ".lock"):
        raise AssertionError("it is not entered")


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    with replacing(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert order == ["fsync", "replace"]
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_name_that_is_not_utf8_is_told_from_damage(tmp_path: Path) -> None:
    check_utf8(tmp_path / "schön")
    with pytest.raises(OSError, match=r"r\\udcffn' has a name that is not UTF-8, .* the file may be whole"):
        check_utf8(Path(os.fsdecode(b"r\xffn")))


@pytest.mark.parametrize("links", [True, False])
def test_of_two_sets_that_begin_at_once_in_a_folder_one_is_refused(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one gets there after this one has looked whether the folder is empty."""
    put = files._put_first

    def late(partial: Path, file: Path) -> None:
        if links:
            file.write_text('{"seed": 1}')
            put(partial, file)
        else:
            monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
            put(partial, file)

    monkeypatch.setattr(files, "_put_first", late)
    if links:
        with pytest.raises(ValueError, match="holds another set: seed was 1 and is 2"):
            claim(tmp_path, "set.json", {"seed": 2}, strangers="*.tar")
    else:
        claim(tmp_path, "set.json", {"seed": 2}, strangers="*.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["set.json"]
