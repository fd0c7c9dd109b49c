"""Tests of the log of a training run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from condgan import runlog
from condgan.runlog import RunLog
from condgan.training import TrainingDiverged


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_last_steps_are_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now)
    with RunLog(tmp_path, images=0) as log:
        for step in range(1, 24):
            now += 0.5
            log.add(step, 9 * step, 0, {"gap": float(step)})
        now += 100  # for what comes between the last step and the end
    first, last = log_lines(tmp_path)
    assert (first["step"], last["step"], last["images"]) == (20, 23, 207)
    assert (first["gap"], last["gap"]) == (10.5, 22)
    assert first["images_per_second"] == last["images_per_second"] == 18


def test_the_last_line_never_hides_why_a_run_ends(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged), RunLog(tmp_path, images=0) as log:
        log.add(1, 9, 0, {"gap": 2.0})
        raise TrainingDiverged
    assert [line["gap"] for line in log_lines(tmp_path)] == [2]

    def full(line: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for error, passes in ((KeyboardInterrupt, KeyboardInterrupt), (None, OSError)):
        with pytest.raises(passes), RunLog(tmp_path, images=9) as log:
            log._file.close()
            log._file = SimpleNamespace(write=full, close=lambda: None)  # type: ignore[assignment]
            log.add(2, 18, 0, {"gap": 3.0})
            if error is not None:
                raise error
    assert [line["gap"] for line in log_lines(tmp_path)] == [2]


def test_tensorboard_keeps_the_point_at_the_checkpoint_as_the_log_does(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, reached in ((1, 0), (41, 360)):  # the second part goes on from step 40, the first had come to step 60
        with RunLog(tmp_path, images=reached) as log:
            for step in range(first, first + 60):
                log.add(step, 9 * step, 0, {"gap": float(first)})
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("gap")
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [20, 40, 60, 80, 100]
    assert [(event.step, event.value) for event in events] == [(line["images"], line["gap"]) for line in lines]


def test_a_log_that_ran_ahead_of_the_checkpoint_is_cut_back(tmp_path: Path) -> None:
    lines = [{"step": s, "images": 9 * s} for s in (20, 40, 60)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 80, "ima')
    with RunLog(tmp_path, images=400):
        pass
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [20, 40]


def test_a_kill_while_the_log_is_cut_back_does_not_lose_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = '{"step": 20, "images": 180}\n'
    (tmp_path / "log.jsonl").write_text(line)

    def killed(*paths: Path) -> None:
        raise InterruptedError

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(InterruptedError):
        RunLog(tmp_path, images=400)
    assert (tmp_path / "log.jsonl").read_text() == line


@pytest.mark.parametrize("line", ['{"a": 1}', "[]", '{"step": 40, "ima}', "\x00\x00"])
def test_a_damaged_log_says_what_to_do(line: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 20, "images": 180}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl' is damaged, it has the line .*: delete or move it to go on"):
        RunLog(tmp_path, images=400)


def test_losses_of_skipped_steps_are_not_in_the_log(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    with RunLog(tmp_path, images=0) as log:
        for step in range(1, 21):
            log.add(step, 9 * step, step // 20, {"gap": float("nan") if step == 7 else 2.0, "place": float("inf")})
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=refuse)
    assert found["gap"] == 2
    assert "place" not in found


def test_tensorboard_that_does_not_work_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setattr(pytest.importorskip("torch.utils.tensorboard"), "SummaryWriter", broken)
    with (
        pytest.warns(UserWarning, match=r"TensorBoard cannot be used \(Descriptors cannot"),
        RunLog(tmp_path, 0) as log,
    ):
        log.add(20, 180, 0, {"gap": 1.0})
    assert [line["gap"] for line in log_lines(tmp_path)] == [1]
