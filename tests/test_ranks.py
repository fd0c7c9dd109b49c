"""ranks.py, and training on several processes: as one process, when one is lost, and with another number of them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rank_program import CONFIGS, LONG, normed_parts, start_ranks, trained
from safetensors import safe_open
from tiny import RUN

from condgan.batches import own_parts
from condgan.checkpoints import CHECKPOINT
from condgan.ranks import ALONE, GlobalBatchNorm, RankLost, Ranks, _losing_ranks, joined, launched, own_device
from condgan.runs import train


@pytest.fixture(scope="module")
def two_ranks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found; found once, over however many processes the tests are spread."""
    temporary = tmp_path_factory.getbasetemp()
    out = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "ranks"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            out.mkdir()
            assert ended(start_ranks(2, "compare", data, out))[0] == [0, 0]
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


def ended(processes: Sequence[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Exit codes and messages."""
    messages = [process.communicate(timeout=300)[1] for process in processes]
    print(*messages, sep="\n")
    return [process.returncode for process in processes], messages


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_learn_what_one_process_learns(name: str, data: Path, two_ranks: list[dict[str, Any]]) -> None:
    """Three scenes a step: one on one rank, two on the other; both stages; spectral norm in the reference's.

    What a rectifier reads may be zero but for rounding, and its gradient then one or another: here 1e-4 in one weight.
    """
    losses, weights = trained(data, CONFIGS[name])
    for rank in two_ranks:
        assert len(rank[name][0]) == len(losses) == 5
        for ours, theirs in zip(losses, rank[name][0], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-4)
        for key, value in weights.items():
            torch.testing.assert_close(
                rank[name][1][key], value, rtol=1e-4, atol=3e-4, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_stay_together_to_the_last_bit(name: str, two_ranks: list[dict[str, Any]]) -> None:
    (first_losses, first), (second_losses, second) = (rank[name] for rank in two_ranks)
    assert first_losses == second_losses
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []


def test_batch_norm_over_ranks_is_batch_norm_of_all(two_ranks: list[dict[str, Any]]) -> None:
    output, grad, *weight_grads_and_buffers = normed_parts(None)
    first, second = (rank["norm"] for rank in two_ranks)
    torch.testing.assert_close(torch.cat((first[0], second[0])), output)
    torch.testing.assert_close(torch.cat((first[1], second[1])), grad)
    for i, whole in enumerate(weight_grads_and_buffers[:2], 2):  # each rank has what its own pictures say
        torch.testing.assert_close(first[i] + second[i], whole)
    for i, whole in enumerate(weight_grads_and_buffers[2:], 4):
        torch.testing.assert_close(first[i], whole)
        torch.testing.assert_close(second[i], whole)


def test_a_rank_may_have_a_single_number_of_a_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a part of one scene has a map of one pixel; the variance of one number alone is no number."""
    monkeypatch.setattr("condgan.ranks._all_reduce", lambda tensor: tensor.mul_(2))  # the other rank has the same
    norm = GlobalBatchNorm(torch.nn.BatchNorm2d(3))
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    assert norm(x).abs().max() < 1e-3
    torch.testing.assert_close(norm.running_mean, 0.1 * x.flatten())
    torch.testing.assert_close(norm.running_var, torch.full((3,), 0.9))


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["skipped"] for rank in two_ranks] == [[0, 1, 1]] * 2


def test_the_first_rank_finishes_a_run_alone(two_ranks: list[dict[str, Any]]) -> None:
    """It may take longer than ranks wait for each other."""
    assert [rank["finished alone"] for rank in two_ranks] == [True, True]


def test_every_scene_of_a_step_is_in_one_part_and_parts_are_alike() -> None:
    for scenes, count, accumulate in ((5, 1, 1), (5, 2, 1), (11, 3, 2), (7, 1, 7), (64, 8, 4)):
        parts = [own_parts(scenes, Ranks(rank, count), accumulate) for rank in range(count)]
        together = sorted(part for own in parts for part in own)
        assert [i for part in together for i in range(scenes)[part.scenes]] == list(range(scenes))
        assert {len(own) for own in parts} == {accumulate}
        assert max(part.size for part in together) - min(part.size for part in together) <= 1
        assert sum(part.share for part in together) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"batch_scenes is 5, too few for 2 ranks with 3 parts each"):
        own_parts(5, Ranks(0, 2), 3)
    with pytest.raises(ValueError, match=r"accumulate must be between 1 and 2\*\*63 - 1, got 0"):
        own_parts(5, ALONE, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_one_after_the_other_add_up_to_the_whole(name: str, data: Path) -> None:
    """But for batch norm, which is over one part, and spectral norm, which goes on with every pass."""
    config = dataclasses.replace(CONFIGS[name], images=18, reconstruction_images=9 if name == "compact" else 0)
    losses, weights = trained(data, config, frozen=True)
    in_parts, weights_in_parts = trained(data, config, accumulate=3, frozen=True)
    for ours, theirs in zip(losses, in_parts, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(weights_in_parts[key], value, rtol=1e-5, atol=1e-5)


def test_a_process_that_was_started_alone_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined("cpu") as ranks:
        assert (ranks.rank, ranks.count, ranks.leads) == (0, 1, True)
        assert ranks.any(True)
        assert not ranks.any(False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match=r"2 processes were started \(WORLD_SIZE\), but MASTER_ADDR is not set, where"):
        joined("cpu").__enter__()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with joined("cpu") as ranks:
        assert ranks.count == 1
    assert not torch.distributed.is_initialized()


def test_every_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert own_device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cpu") == torch.device("cpu")
    assert own_device() == own_device("cuda") == torch.device("cuda", 3)
    assert chosen == [3, 3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: 'cuda:1' was asked for, but PyTorch finds no GPU here: give cpu"):
        own_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="process 4 of this machine has none of its 4 GPUs"):
        own_device()


@pytest.mark.parametrize(("rank", "count"), [("2", "2"), ("0", "0"), ("x", "2"), ("0", "2.0"), ("-1", "2"), ("0", "")])
def test_wrong_numbers_of_processes_are_named(monkeypatch: pytest.MonkeyPatch, rank: str, count: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(ValueError, match=f"RANK and WORLD_SIZE must be .*, got '{rank}' and '{count}': set both"):
        launched()


def reached(out: Path) -> int:
    """Steps in the checkpoint of a run, 0 without one."""
    if not (out / CHECKPOINT).exists():
        return 0
    with safe_open(out / CHECKPOINT, "pt") as file:
        return int(json.loads(file.metadata()["counters"])["step"])


def start_and_wait(count: int, data: Path, out: Path) -> list[subprocess.Popen[str]]:
    """Ranks of a long run, some steps after its last checkpoint."""
    before, deadline = reached(out), time.monotonic() + 300
    processes = start_ranks(count, "train", data, out)
    while reached(out) <= before:
        assert all(process.poll() is None for process in processes), ended(processes)
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.02)
    return processes


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("NCCL error: Duplicate GPU detected\nException raised from create", "NCCL error: Duplicate GPU detected"),
        ("NCCL error in: x.cpp:1, invalid usage\nncclInvalidUsage: ...\nLast error:\nDuplicate GPU", "Duplicate GPU"),
        ("NCCL error in: x.cpp:1, remote\nncclRemoteError: ...\nLast error:\n", "NCCL error in: x.cpp:1, remote"),
        ("", "RuntimeError"),
    ],
)
def test_a_lost_rank_comes_with_the_reason(message: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("condgan.ranks.dist.get_rank", lambda: 1)
    monkeypatch.setattr("condgan.ranks.dist.get_world_size", lambda: 2)
    expected = f"rank 1 of 2 has lost another rank, so that all stop ({reason})"
    with pytest.raises(RankLost, match=f"^{re.escape(expected)}$"), _losing_ranks():
        raise RuntimeError(message)


def test_memory_that_runs_out_is_no_lost_rank() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory$"), _losing_ranks():
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_after_a_signal_to_one_and_the_death_of_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    processes = start_and_wait(2, data, out)
    before = reached(out)
    processes[1].send_signal(signal.SIGTERM)  # only to the one that does not write
    codes, messages = ended(processes)
    assert all(codes), "KeyboardInterrupt on both"
    assert all("KeyboardInterrupt" in message for message in messages)
    assert reached(out) > before, "the last step is in the checkpoint"

    processes = start_and_wait(3, data, out)
    processes[1].kill()
    codes, messages = ended(processes)
    assert codes == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        assert re.search(
            rf"rank {rank} of 3 has lost another rank, so that all stop \(.+\); the last good checkpoint",
            messages[rank],
        )
    steps = reached(out)

    config = dataclasses.replace(LONG, images=9 * (20 * (steps // 20) + 40))  # to the end of a line of 20 steps
    train(data, out, config, device="cpu", progress=False)
    train(data, tmp_path / "whole", config, device="cpu", progress=False)
    logs = [
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (out, tmp_path / "whole")
    ]
    ours_steps, whole_steps = ([line["step"] for line in log] for log in logs)
    assert ours_steps == sorted(set(ours_steps)), "checkpoints have lines of their own"
    assert set(whole_steps) <= set(ours_steps)
    ours, whole = logs[0][-1], logs[1][-1]
    assert ours.pop("images_per_second") > 0
    assert whole.pop("images_per_second") > 0
    # a mapping that was fitted to few codes magnifies what the last bits of sums over other ranks change
    assert ours.pop("mapping") == pytest.approx(whole.pop("mapping"), abs=0.5)
    assert ours == pytest.approx(whole, rel=2e-2, abs=2e-2)


@pytest.mark.slow
def test_the_command_under_torchrun_speaks_once(data: Path, tmp_path: Path) -> None:
    fields = {f"generator.{name}": value for name, value in dataclasses.asdict(RUN.generator).items()}
    fields |= {f"discriminator.{name}": value for name, value in dataclasses.asdict(RUN.discriminator).items()}
    fields |= {"batch_scenes": 3, "reconstruction_images": 9}
    small = [f"--set={name}={value}" for name, value in fields.items() if not name.endswith(".objects")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "condgan", "train"]
    command = [*launch, "--data", str(data), "--out", str(tmp_path / "run"), "--images", "27", "--device", "cpu"]
    run = subprocess.run([*command, *small], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("trained on 27 pictures") == 1
    assert reached(tmp_path / "run") == 3
    assert sorted(file.name for file in (tmp_path / "run").iterdir() if file.name != "tensorboard") == [
        ".lock",
        CHECKPOINT,
        "discriminator",
        "log.jsonl",
        "model",
        "noise-encoder",
        "pictures",
    ]
    run = subprocess.run([*command, *small, "--accumulate", "2"], capture_output=True, text=True)
    assert run.returncode != 0
    assert "condgan train, rank 1: error: batch_scenes is 3, too few for 2 ranks with 2 parts each" in run.stderr


RESTARTED = """
import os, signal
from condgan.ranks import joined
with joined("cpu") as ranks:
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and not ranks.leads:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.any(True)
    if ranks.leads:
        print("met again" if not first else "first", flush=True)
"""


@pytest.mark.slow
def test_restarted_ranks_meet_again(tmp_path: Path) -> None:
    """Those of the first attempt have left their addresses behind."""
    (tmp_path / "restarted.py").write_text(RESTARTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, tmp_path / "restarted.py"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("met again") == 1
