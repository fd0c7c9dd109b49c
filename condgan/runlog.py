"""The log of a training run."""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

from condgan.files import replacing

LOG_INTERVAL = 20
"""Steps between two lines of the log, at most: a checkpoint and the end of a run bring a line of their own."""


def _images_of(line: str, log: Path) -> int:
    """Where the run was when it wrote a line of its log."""
    try:
        return int(json.loads(line)["images"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError(
            f"{str(log)!r} is damaged, it has the line {line[:80]!r}: delete or move it to go on"
        ) from None


class RunLog:
    """``log.jsonl``: mean losses every few steps; the same to TensorBoard if it is installed.

    A line covers the steps since the line before it: :data:`LOG_INTERVAL` of them, or fewer after and before a
    checkpoint, which has a line of its own so that what a later part adds begins where the last line ended; and at the
    end of the log, which comes with an error too.

    Args:
        folder: of the run.
        images: where the run goes on; later lines, of a part that was lost, are dropped.

    Raises:
        ValueError: there is a log with a line that is not of a run.
    """

    def __init__(self, folder: Path, images: int) -> None:
        path = folder / "log.jsonl"
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # the last one may have been broken off
        with replacing(path) as partial:
            partial.write_text("".join(line for line in whole if _images_of(line, path) <= images))
        self._file = path.open("a")
        self._sums: dict[str, list[float]] = {}
        self._writer: Any = None
        self._since = (time.monotonic(), images)
        self._last: tuple[float, int, int, int] | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=images + 1)
        except ImportError:  # it is not installed
            pass
        except Exception as error:  # such as protobuf of another version
            warnings.warn(f"TensorBoard cannot be used ({error}): the log is written without it", stacklevel=2)

    def add(self, step: int, images: int, skipped: int, losses: dict[str, float]) -> None:
        """Take the losses of one step; write a line every :data:`LOG_INTERVAL` steps."""
        for name, value in losses.items():
            if math.isfinite(value):  # where not, the step was skipped
                self._sums.setdefault(name, []).append(value)
        self._last = (time.monotonic(), step, images, skipped)
        if step % LOG_INTERVAL == 0:
            self.write_line()

    def write_line(self) -> None:
        """Write the means over the steps since the line before, if there were any.

        Raises:
            OSError: the log cannot be written.
        """
        if self._last is None:
            return
        means = {name: sum(values) / len(values) for name, values in self._sums.items()}
        (now, step, images, skipped), (then, images_then) = self._last, self._since
        self._sums, self._since, self._last = {}, (now, images), None
        line = {"step": step, "images": images, "skipped": skipped, **means}
        line["images_per_second"] = (images - images_then) / (now - then)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in means.items():
                self._writer.add_scalar(name, value, images)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, failed: type[BaseException] | None, *exc_info: object) -> None:
        with contextlib.ExitStack() as closed:
            if failed is not None:  # which says more than that a line could not be written
                closed.enter_context(contextlib.suppress(Exception))
            if self._writer is not None:
                closed.callback(self._writer.close)
            closed.callback(self._file.close)
            self.write_line()
