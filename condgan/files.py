"""Files: written whole or not at all, by one process at a time, known by their digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What file systems say that know no locks, as some of clusters do."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of ``path`` when the block ends well; otherwise it is removed.

    It lies in a folder of its own beside ``path``, ``.NAME-...``, which only a process that is killed leaves behind.
    What a link points to is replaced, not the link; a device or a pipe is written to as it is.

    Raises:
        OSError: the folder of ``path`` is not there or cannot be written, or ``path`` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:40]}-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        settle(partial)
        os.replace(partial, path)


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a folder, which is made; all are complete before the first of them replaces an older one.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:  # on the disk of the folder
        for name, content in contents.items():
            (Path(temporary) / name).write_bytes(content)
            settle(Path(temporary) / name)
        for name in contents:
            os.replace(Path(temporary) / name, folder / name)


def settle(path: Path) -> None:
    """Wait until a file is on the disk: a power failure after it got its name then finds it whole."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[None]:
    """Keep other processes out of the same block while it lasts, where the file system can.

    The end of a process, however it comes, ends its lock; the empty file stays, since to remove it would let two in.

    Args:
        path: the file that is locked; it is made.
        waiting: what to warn of before this waits for another process; None does not wait.

    Raises:
        BlockingIOError: another process is in the block, and this one does not wait.
        OSError: the file cannot be made.
    """
    from filelock import FileLock, Timeout  # not needed to draw, hence not at the top

    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlast a process that is killed
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting is None:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path)) from None
            warnings.warn(waiting, stacklevel=2)
            lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


def claim(out: Path, name: str, description: Mapping[str, object], strangers: str) -> None:
    """Say in a folder what it will hold, so that what belongs to something else never gets into it.

    Args:
        out: the folder, which is made.
        name: of the JSON file that says it.
        description: what it says.
        strangers: a pattern of files that may not be there before that file is.

    Raises:
        OSError: the folder cannot be made, or the file written.
        ValueError: the folder holds something else.
    """
    file = out / name
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            for found in out.glob(strangers):
                raise ValueError(
                    f"out: {str(out)!r} holds {found.name}, but no {name} that says what it is: choose another folder, "
                    "or empty this one"
                )
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out) as folder:
                partial = Path(folder) / name
                partial.write_text(json.dumps(description, indent=2) + "\n")
                _put_first(partial, file)
    except OSError as error:
        raise OSError(f"out: cannot write {str(file)!r} ({error.strerror}): choose another folder") from None
    try:
        known = json.loads(file.read_bytes())
        differing = [key for key in description if known[key] != description[key]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"out: {str(file)!r} does not describe a set: choose another folder, or remove this folder"
        ) from None
    if differing:
        changes = ", ".join(f"{key} was {known[key]!r} and is {description[key]!r}" for key in differing)
        raise ValueError(f"out: {str(out)!r} holds another set: {changes}; choose another folder")


def _put_first(partial: Path, file: Path) -> None:
    """Give a file its name unless another process was first, of this set or of another."""
    try:
        os.link(partial, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(partial, file)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_utf8(path: Path) -> None:
    """Refuse what safetensors cannot open, and would call damaged.

    Raises:
        OSError: the path is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise OSError(
            f"{str(path)!a} has a name that is not UTF-8, which safetensors cannot open: the file may be whole; "
            "rename its folder"
        ) from None
