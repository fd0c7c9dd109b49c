"""benchmarks/: the plain way draws and judges what condgan does, and the measuring measures."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from reference import randomise

from benchmarks import __main__ as command
from benchmarks import loading, measure, plain, scaling
from benchmarks.measure import Row
from condgan import DiffDiscriminator, DiscriminatorConfig, GeneratorConfig, IterativeGenerator
from condgan.functional import encode_objects, roll_conditions, rollout

GREY_LEVEL = 1 / 127.5


def reference_generator() -> IterativeGenerator:
    """Of the reference's architecture, but narrow; the same whatever ran before."""
    torch.manual_seed(0)
    generator = randomise(IterativeGenerator(GeneratorConfig(width=8)))
    assert isinstance(generator, IterativeGenerator)
    return generator


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.01), (torch.bfloat16, 4.0)])
@torch.no_grad()
def test_fast_and_plain_scenes_agree_within_some_grey_levels(dtype: torch.dtype, tolerance: float) -> None:
    """Three turns, each on the picture of the turn before."""
    generator = reference_generator()
    conditions, _ = roll_conditions(generator.encoder, encode_objects([["red cube", "gray cube", "blue sphere"]] * 4))
    z = torch.randn(4, 3, generator.z_dim, generator=torch.Generator().manual_seed(0))
    image, wanted = torch.zeros(4, 3, 64, 64), []
    for turn in range(3):
        image = plain.turn(generator, z[:, turn], conditions[:, turn], image)
        wanted.append(image)
    assert torch.stack(wanted).std() > 0.1, "the pictures are not flat"
    fast = generator.to(dtype, memory_format=torch.channels_last)
    drawn = rollout(fast, conditions.to(dtype), z.to(dtype), torch.zeros(3, 64, 64))
    error = (drawn - torch.stack(wanted, 1)).abs()
    assert error.amax() < tolerance * GREY_LEVEL


@torch.no_grad()
def test_the_steps_away_from_the_plain_way_draw_the_same() -> None:
    generator = reference_generator()
    inputs = torch.randn(2, generator.z_dim), torch.randn(2, 256), torch.rand(2, 3, 64, 64) * 2 - 1
    wanted = plain.turn(generator, *inputs)
    for steps in (1, 2):
        torch.testing.assert_close(plain.turn(generator, *inputs, steps), wanted, rtol=0, atol=1e-4)


def test_fast_and_plain_judgements_agree() -> None:
    discriminator = randomise(DiffDiscriminator(DiscriminatorConfig(width=8)))
    before, after = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    condition = torch.randn(3, 256)
    torch.testing.assert_close(
        tuple(discriminator(before, after, condition)),
        plain.judge(discriminator, before, after, condition),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_plain_step_trains_both_networks() -> None:
    generator, discriminator = (
        IterativeGenerator(GeneratorConfig(width=2)),
        DiffDiscriminator(DiscriminatorConfig(width=2)),
    )
    before = [p.clone() for network in (generator, discriminator) for p in network.parameters()]
    images, objects = torch.rand(2, 4, 3, 64, 64) * 2 - 1, torch.eye(24)[:6].view(2, 3, 24)
    plain.PlainTraining(generator, discriminator, images, objects).step()
    after = [p for network in (generator, discriminator) for p in network.parameters()]
    assert sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True)) > 0.9 * len(after)


def test_cases_take_turns_and_ratios_are_of_medians() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    times = measure.interleaved({"slow": slow, "fast": lambda: order.append("fast")}, 3)
    assert order == ["slow", "fast"] * 4, "one round to warm up"
    assert measure.median(times, "slow") >= 0.02
    assert measure.ratio({"a": [1.0, 8.0, 3.0], "b": [1.0, 2.0, 1.0]}, "a", "b") == 3.0


def test_a_round_may_run_each_case_several_times_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    order, waits, clock = [], iter([0.0, 0.1, 0.02, 0.0]), [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def uneven() -> None:
        order.append("uneven")
        clock[0] += next(waits)

    times = measure.interleaved({"uneven": uneven, "other": lambda: order.append("other")}, 1, in_a_row=3)
    assert order == ["uneven", "other"] + ["uneven"] * 3 + ["other"] * 3
    assert times["uneven"] == [pytest.approx(0.02)], "the median"


def note_process(path: Path) -> Callable[[], object]:
    """A case that writes down in which process it ran."""

    def note() -> None:
        with path.open("a") as file:
            file.write(f"{os.getpid()}\n")

    return note


def test_a_case_may_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    with measure.elsewhere(partial(note_process, tmp_path / "runs")) as case:
        assert len(measure.interleaved({"elsewhere": case}, 2)["elsewhere"]) == 2
        first, *others = (tmp_path / "runs").read_text().split()
        assert others == [first] * 2, "one process, which is done when the case returns"
        assert first != str(os.getpid())
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)


def test_a_process_that_fails_is_not_waited_for() -> None:
    with pytest.raises(EOFError), measure.elsewhere(partial(int, "no number")):
        pass


def test_the_operations_of_a_matrix_product_are_counted() -> None:
    case, multiplied = measure.matrix_product(torch.float32)
    assert measure.operations(case) == multiplied


@torch.no_grad()
def test_counting_operations_changes_none(generator: IterativeGenerator) -> None:
    """Hooks would: with them a layer takes the plain way."""
    config = generator.config
    z, condition = torch.randn(8, config.z_dim), torch.randn(8, config.condition_dim)
    place = torch.full((8, 2), 30.0) if config.places else None
    turn = partial(generator, z, condition, torch.zeros(8, 3, 64, 64), place)
    fast = measure.operations(turn)
    hooks = [module.register_forward_hook(lambda *_: None) for module in generator.modules()]
    plainly = measure.operations(turn)
    for hook in hooks:
        hook.remove()
    assert 0 < fast < 0.9 * plainly


def test_what_is_dispatched_in_one_run_is_counted() -> None:
    x = torch.ones(3)
    assert measure.dispatched(lambda: (x + 1).mul_(2)) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak_memory_is_that_of_the_program_alone() -> None:
    ballast = bytearray(200 * 2**20)  # in this process
    small, large = measure.peak_memory(""), measure.peak_memory("x = bytearray(50 * 2**20)\nx[::4096] = b'1' * 12800\n")
    assert len(ballast) == 200 * 2**20
    assert small < 100
    assert 45 < large - small < 55


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SCENES", 2)
    out = tmp_path / "numbers.json"
    command.main(["--parts", "loading", "--rounds", "1", "--out", str(out), "--markdown"])
    report = json.loads(out.read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert [row["name"] for row in report["rows"]] == ["plain, PNG files of 320x240", "condgan, packed"]
    plainly, packed = report["rows"]
    assert packed["ratio"] == pytest.approx(packed["value"] / plainly["value"]), "of one round; who wins is not tested"
    assert "| loading | condgan, packed |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds: must be at least 1, got 0"),
        (["--out", "nowhere/x.json"], "--out: there is no folder 'nowhere'"),
        (["--plot", "nowhere/x.png"], "--plot: there is no folder 'nowhere'"),
        (["--parts", "loading", "--plot", "x.png"], "--plot: shows the part work, which is not asked for"),
        (["--out", "."], "--out: '.' is a folder, it must be a file"),
        (["--plot", "."], "--plot: '.' is a folder, it must be a file"),
    ],
)
def test_the_command_refuses_what_is_wrong_before_it_measures(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "machine", None)  # it is not called
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.bmp", "x", "png"])
def test_the_command_refuses_a_plot_that_matplotlib_cannot_write_before_it_measures(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command, "machine", None)  # it is not called
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(["--plot", name])
    error = capsys.readouterr().err
    assert f"--plot: '{name}' must end in one of " in error and ".png, " in error


def test_any_plot_is_taken_where_there_is_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    monkeypatch.setattr(command, "machine", lambda: {})
    monkeypatch.setattr(command.work, "run", lambda rounds, plot: iter([]))
    command.main(["--parts", "work", "--plot", "x.bmp"])


def test_what_cannot_be_measured_is_null_and_no_file_is_written_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "run", lambda rounds: iter([Row("loading", "memory", math.nan, "MiB")]))
    command.main(["--parts", "loading"])
    assert not list(tmp_path.iterdir())
    command.main(["--parts", "loading", "--out", "numbers.json"])
    assert json.loads(Path("numbers.json").read_text())["rows"][0]["value"] is None


def test_ranks_alternate_and_their_ratio_is_that_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def step(ranks: int, scenes: int = scaling.SCENES) -> float:
        calls.append((ranks, scenes))
        return len(calls) / ranks

    monkeypatch.setattr(scaling, "_step", step)
    rates = {row.name: row.value for row in scaling.run(1)}
    assert calls == [(1, 12), (2, 12), (1, 6), (1, 6), (2, 24), (1, 12), (1, 12)] * 3
    one, two, half, as_many, whole = list(rates.values())[:5]
    assert (one, two, half) == pytest.approx((36 / 8, 36 / 4.5, 36 / 11)), "the slower one of two processes counts"
    assert (as_many, whole) == pytest.approx((72 / 6, 72 / 14)), "two ranks with as many scenes do twice as many"
    assert rates["two ranks, against one rank"] == 8 / 4.5
    assert rates["two ranks, as many scenes each, against one rank"] == 2 * 8 / 6


def test_a_rank_prints_the_seconds_of_its_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        scaling, "step_of_command", lambda interval, scenes, ranks: partial(time.sleep, 0.02 if scenes == 7 else 1)
    )
    monkeypatch.setattr("sys.argv", ["scaling", "7"])
    scaling.main()
    torch.set_num_threads(threads)
    assert 0.02 <= float(capsys.readouterr().out) < 1
