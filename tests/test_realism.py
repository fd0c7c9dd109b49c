"""The trial sees what differs and nothing else, is fair to both sides, and its report shows what it is sure about."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scenes import write_iclevr_layout
from torch import Tensor

from condgan import IterativeGenerator, cli, drawing, evaluation, precision, realism
from condgan.datasets import SceneDataset, scene_split
from condgan.drawing import Best, draw_turns
from condgan.images import to_uint8
from condgan.prepare import prepare
from condgan.realism import RealismReport, ToldApart, blur, realism_report, told_apart


def noise(num: int, seed: int, mean: float = 120.0, std: float = 8.0, size: int = 16) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (mean + std * torch.randn(num, 3, size, size, generator=rng)).round().clamp(0, 255).to(torch.uint8)


def trial(real: Tensor, drawn: Tensor, held_out: int = 64, **options: Any) -> ToldApart:
    """The last ``held_out`` pictures of each are held out."""
    options = {"seeds": 2, "epochs": 4, "progress": False} | options
    return told_apart(
        real[:-held_out], drawn[:-held_out], held_out_real=real[-held_out:], held_out_drawn=drawn[-held_out:], **options
    )


@pytest.fixture(scope="module")
def bright() -> ToldApart:
    """Drawn pictures are 20 grey levels brighter."""
    return trial(noise(192, 0), noise(192, 1, mean=140))


# --- what the trial sees ------------------------------------------------------------------------------------------


def test_one_distribution_is_not_told_apart() -> None:
    result = trial(noise(320, 0), noise(320, 1), held_out=200)
    assert abs(result.rate - 0.5) < 0.08
    low, high = result.rate_ci95
    assert low <= 0.5 <= high


def test_another_light_is_told_apart(bright: ToldApart) -> None:
    assert bright.rate > 0.95
    assert bright.rate_ci95[0] > 0.9
    assert bright.real_scores.median() > 0 > bright.drawn_scores.median()


def test_another_grain_is_told_apart() -> None:
    assert trial(noise(192, 0), noise(192, 1, std=4), epochs=8).rate > 0.95


def test_flips_are_the_only_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    logits = realism._logits

    def watch(network: torch.nn.Module, pictures: Tensor, device: torch.device) -> Tensor:
        seen.append(pictures)
        return logits(network, pictures, device)

    monkeypatch.setattr(realism, "_logits", watch)
    pictures = noise(64, 0)
    trial(pictures, noise(64, 1), held_out=32, seeds=1, epochs=2)
    flipped = [any(torch.equal(picture, other.flip(2)) for other in pictures) for picture in seen[0]]
    as_is = [any(torch.equal(picture, other) for other in pictures) for picture in seen[0]]
    ours = sum(flipped) + sum(as_is)
    assert 0 < ours < 64, "real and drawn pictures share a batch"
    assert 0.2 < sum(flipped) / ours < 0.8
    held_out = torch.cat([pictures[-32:], noise(64, 1)[-32:]])
    assert torch.equal(seen[-1], held_out), "tested as they are"


def test_classifiers_are_in_float32_where_bfloat16_is_fast_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: True)
    seen: list[torch.dtype] = []

    class Network(realism._Network):
        def __init__(self) -> None:
            super().__init__()
            self.features[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))

    monkeypatch.setattr(realism, "_Network", Network)
    trial(noise(24, 0), noise(24, 1), held_out=8, seeds=1, epochs=1)
    assert set(seen) == {torch.float32}


def test_counts_and_rates(bright: ToldApart) -> None:
    assert (bright.training_pictures, bright.held_out_pictures) == (128, 64)
    assert len(bright.rates) == 2
    assert bright.rate == pytest.approx(sum(bright.rates) / 2)
    assert bright.real_scores.shape == bright.drawn_scores.shape == (64,)
    assert bright.real_scores.dtype == torch.float32


def test_rate_is_the_share_that_the_scores_are_right_about() -> None:
    result = trial(noise(96, 0), noise(96, 1, mean=124), seeds=1)
    right = torch.cat([result.real_scores > 0, result.drawn_scores <= 0])
    assert 0.5 < result.rate < 1
    assert result.rates == (result.rate,) == (pytest.approx(float(right.double().mean())),)


# --- fairness -----------------------------------------------------------------------------------------------------


def test_same_arguments_same_result_and_global_random_state_untouched(
    bright: ToldApart, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs' random states changed"))
    again = trial(noise(192, 0), noise(192, 1, mean=140))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.real_scores, bright.real_scores)
    assert torch.equal(again.drawn_scores, bright.drawn_scores)
    assert (again.rates, again.rate_ci95) == (bright.rates, bright.rate_ci95)


def test_the_default_device_makes_no_difference() -> None:
    real, drawn = noise(96, 0), noise(96, 1, mean=123)
    expected = trial(real, drawn, seeds=1)
    with torch.device("meta"):
        assert trial(real, drawn, seeds=1).rates == expected.rates


def test_seeds_differ_and_the_first_do_not_depend_on_how_many_there_are() -> None:
    real, drawn = noise(96, 0), noise(96, 1, mean=123)
    two, three = trial(real, drawn, seeds=2), trial(real, drawn, seeds=3)
    assert three.rates[:2] == two.rates
    assert not torch.equal(two.real_scores, trial(real, drawn, seeds=1).real_scores)


def test_a_score_depends_on_its_own_picture_only(bright: ToldApart) -> None:
    real, drawn = noise(192, 0), noise(192, 1, mean=140)
    others = told_apart(
        real[:128],
        drawn[:128],
        held_out_real=torch.cat([real[-64:-60], noise(3, 2, mean=10)]),
        held_out_drawn=torch.cat([drawn[-64:-60], noise(3, 3, mean=200)]),
        seeds=2,
        epochs=4,
        progress=False,
    )
    torch.testing.assert_close(others.real_scores[:4], bright.real_scores[:4], rtol=0.05, atol=0.05)
    torch.testing.assert_close(others.drawn_scores[:4], bright.drawn_scores[:4], rtol=0.05, atol=0.05)


def test_progress_is_on_stderr_and_can_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    trial(noise(8, 0), noise(8, 1), held_out=4, seeds=1, epochs=1)
    assert capsys.readouterr() == ("", "")
    trial(noise(8, 0), noise(8, 1), held_out=4, seeds=1, epochs=1, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "telling apart" in err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"drawn": noise(7, 1)},
            ValueError,
            r"real and drawn must be as many .* \(8, 3, 16, 16\) and \(7, 3, 16, 16\)",
        ),
        ({"held_out_drawn": noise(3, 1)}, ValueError, "held_out_real and held_out_drawn must be as many"),
        ({"drawn": noise(8, 1, size=8)}, ValueError, "pictures of one size"),
        (
            {"held_out_real": noise(4, 1, size=8), "held_out_drawn": noise(4, 1, size=8)},
            ValueError,
            "real and held_out_real must be pictures of one size",
        ),
        ({"real": noise(8, 1).float()}, TypeError, "real must be uint8 pictures of 0 to 255, got torch.float32"),
        ({"held_out_drawn": noise(4, 1)[:, :1]}, ValueError, r"held_out_drawn must be \(N, 3, H, W\)"),
        ({"real": noise(0, 1), "drawn": noise(0, 1)}, ValueError, r"real must be \(N, 3, H, W\) and not empty"),
        ({"seeds": 1.0}, TypeError, "seeds must be a whole number, got 1.0"),
        ({"seeds": 0}, ValueError, "seeds must be between 1 and .*, got 0"),
        ({"epochs": 0}, ValueError, "epochs must be between 1 and .*, got 0"),
        ({"scene_size": 0}, ValueError, "scene_size must be between 1 and .*, got 0"),
        ({"scene_size": 3}, ValueError, "scene_size: 4 held-out pictures are no whole scenes of 3"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "real": noise(8, 0),
        "drawn": noise(8, 1),
        "held_out_real": noise(4, 2),
        "held_out_drawn": noise(4, 3),
        "progress": False,
    } | changes
    with pytest.raises(error, match=message):
        told_apart(arguments.pop("real"), arguments.pop("drawn"), **arguments)


# --- the interval -------------------------------------------------------------------------------------------------


def test_interval_of_one_seed_is_that_of_a_share() -> None:
    right = (torch.arange(2000) % 5 < 3).view(1, 2, 1000).double()  # 0.6 of both kinds
    low, high = realism._interval(right)
    half_width = 1.96 * math.sqrt(0.6 * 0.4 / 2000)
    assert low == pytest.approx(0.6 - half_width, abs=0.004)
    assert high == pytest.approx(0.6 + half_width, abs=0.004)


def test_interval_takes_the_pictures_of_a_scene_together() -> None:
    real, drawn = noise(96, 0), noise(96, 1, mean=122)
    learned, tested = (real[:64], drawn[:64]), (real[64:], drawn[64:])

    def told(times: int, scene_size: int) -> ToldApart:
        held_out = [x.repeat_interleave(times, 0) for x in tested]
        options = {"seeds": 2, "epochs": 2, "scene_size": scene_size, "progress": False}
        return told_apart(*learned, held_out_real=held_out[0], held_out_drawn=held_out[1], **options)

    once, together, apart = told(1, 1), told(4, 4), told(4, 1)
    assert 0.5 < once.rate == together.rate == apart.rate < 1
    assert together.rate_ci95 == pytest.approx(once.rate_ci95)
    widths = [high - low for low, high in (once.rate_ci95, apart.rate_ci95)]
    assert widths[1] < 0.9 * widths[0], "equal pictures say no more than one"


def test_interval_has_a_width_where_all_are_right_or_none() -> None:
    right = torch.ones(4, 2, 500, dtype=torch.float64)
    low, high = realism._interval(right)
    assert (0.997 < low < 0.999) and high == 1  # of 1,000 to 4,000 that are right
    assert realism._interval(1 - right) == pytest.approx((0, 1 - low))


def test_interval_knows_of_seeds_that_disagree() -> None:
    right = torch.ones(4, 2, 500, dtype=torch.float64)
    right[:2] = 0
    assert realism._interval(right) == pytest.approx((0, 1))


# --- the control that must be told apart --------------------------------------------------------------------------


def test_blur_is_the_gaussian_that_it_says() -> None:
    point = torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
    point[:, 1, 4, 4] = 255
    weights = [math.exp(-(i**2) / 2 / 0.5**2) for i in (-2, -1, 0, 1, 2)]
    total = sum(weights)
    expected = [[round(255 * a * b / total**2) for a in weights] for b in weights]
    blurred = blur(point)
    assert blurred.dtype == torch.uint8
    assert blurred[0, 1, 2:7, 2:7].tolist() == expected
    assert blurred[:, [0, 2]].sum() == 0
    flat = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(blur(flat), flat), "edges too"


# --- a generator against a data set -------------------------------------------------------------------------------


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``realism_report`` asks of ``told_apart``, without the training."""
    calls: list[dict[str, Any]] = []

    def note(real: Tensor, drawn: Tensor, **options: Any) -> ToldApart:
        calls.append({"real": real, "drawn": drawn, **options})
        return some_trial(len(options["held_out_real"]))

    monkeypatch.setattr(realism, "told_apart", note)
    return calls


def some_trial(num: int) -> ToldApart:
    """Scores rise by one from picture to picture."""
    scores = torch.arange(num).float() - num // 2
    return ToldApart(
        rate=0.625,
        rates=(0.5, 0.75),
        rate_ci95=(0.25, 0.875),
        training_pictures=22,
        held_out_pictures=num,
        real_scores=scores,
        drawn_scores=-scores,
    )


def scenes_of(pictures: Tensor, data: SceneDataset) -> list[tuple[int, int]]:
    """The scene and the turn that each picture is."""
    where = {data.pixels[i, t].numpy().tobytes(): (i, t) for i in range(len(data)) for t in range(3)}
    return [where[picture.contiguous().numpy().tobytes()] for picture in pictures]


def test_real_pictures_are_those_of_the_splits(
    compact: IterativeGenerator, data: Path, trials: list[dict[str, Any]]
) -> None:
    realism_report(compact, data, first_seed=3, progress=False)
    drawn, real, blurred = trials
    dataset = SceneDataset(data)
    training, held_out = scenes_of(drawn["real"], dataset), scenes_of(drawn["held_out_real"], dataset)
    splits = [scene_split(name) for name in dataset.names]
    assert sorted(scene for scene, _ in training) == [i for i, split in enumerate(splits) if split == "train"]
    assert sorted(scene for scene, _ in held_out) == [i for i, split in enumerate(splits) if split != "train"]
    assert {turn for _, turn in training} == {0, 1, 2}

    pairs = {"real": training, "held_out_real": held_out}
    for key, seed in (("real", 3), ("held_out_real", 3 + len(training))):
        lists = [[dataset.vocabulary.names[i] for i in dataset.objects[s, : t + 1]] for s, t in pairs[key]]
        expected = draw_turns(compact, lists, range(seed, seed + len(lists))).images[:, -1]
        assert torch.equal(drawn[key.replace("real", "drawn")], to_uint8(expected))

    for key in ("real", "held_out_real"):
        other = key.replace("real", "drawn")
        half = len(pairs[key]) // 2
        assert scenes_of(real[key], dataset) == pairs[key][:half]
        assert scenes_of(real[other], dataset) == pairs[key][half : 2 * half]
        assert torch.equal(blurred[key], real[key])
        assert torch.equal(blurred[other], blur(real[other]))
    assert [call["seeds"] for call in trials] == [5, 2, 2]
    assert len({call["epochs"] for call in trials}) == 1


def test_fewer_pictures_and_another_seed_leave_the_rest_as_it_was(
    compact: IterativeGenerator, data: Path, trials: list[dict[str, Any]]
) -> None:
    realism_report(compact, data, progress=False)
    realism_report(compact, data, pictures=5, seeds=3, control_seeds=1, epochs=4, first_seed=9, progress=False)
    assert torch.equal(trials[3]["real"], trials[0]["real"][:5])
    assert torch.equal(trials[3]["held_out_real"], trials[0]["held_out_real"])
    assert not torch.equal(trials[3]["drawn"], trials[0]["drawn"][:5])
    assert [len(trials[i]["real"]) for i in (4, 5)] == [5, 5]
    assert [(call["seeds"], call["epochs"]) for call in trials[3:]] == [(3, 4), (1, 4), (1, 4)]


@pytest.mark.parametrize("redraw", ["picture", "turn"])
def test_the_verifiers_choice_may_be_what_is_told_apart(
    redraw: Any, compact: IterativeGenerator, data: Path, trials: list[dict[str, Any]], monkeypatch: Any
) -> None:
    asked: list[tuple[list[int], int]] = []

    def best(generator: Any, lists: Any, seeds: list[int], best_of: int, **options: object) -> Best:
        asked.append((seeds, best_of))
        turns = draw_turns(compact, lists, [seed + 1000 for seed in seeds])
        return Best(turns.images, None, seeds, None, [[1] * len(names) for names in lists])

    def never(*args: object, **options: object) -> None:
        raise AssertionError("a single draw, or the other way to redraw")

    for name in ("draw_turns", "best_pictures", "best_turns"):
        monkeypatch.setattr(drawing, name, best if name == f"best_{redraw}s" else never)
    report = realism_report(compact, data, first_seed=3, best_of=4, redraw=redraw, progress=False)
    assert {best_of for _, best_of in asked} == {4}
    assert [seed for seeds, _ in asked for seed in seeds] == list(
        range(3, 3 + len(trials[0]["drawn"]) + len(report.held_out_drawn))
    )
    assert (report.to_dict()["best_of"], report.to_dict()["redraw"]) == (4, redraw)
    assert f"the best of 4 by the verifier, by {redraw}: how often" in str(report)


def test_report_of_real_trials(compact: IterativeGenerator, data: Path) -> None:
    options = {"pictures": 8, "seeds": 2, "control_seeds": 1, "epochs": 1, "progress": False}
    report = realism_report(compact, data, **options)  # type: ignore[arg-type]
    assert report.model == "IterativeGenerator"
    assert report.told_apart.training_pictures == report.blurred.training_pictures == 8
    held_out = report.told_apart.held_out_pictures
    assert len(report.held_out_real) == len(report.held_out_drawn) == len(report.told_apart.real_scores) == held_out
    assert report.real_against_real.held_out_pictures == held_out // 2
    again = realism_report(compact, data, model_name="again", **options)  # type: ignore[arg-type]
    same = {"model": "IterativeGenerator", "seconds": report.seconds}
    assert again.to_dict() | same == report.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pictures": 0}, "pictures must be between 1 and .*, got 0"),
        ({"control_seeds": 0}, "control_seeds must be between 1 and .*, got 0"),
        ({"first_seed": -1}, "seed must be between 0"),
        ({"best_of": 0}, "best_of"),
        ({"data": "nowhere.npy"}, "there is no file nowhere.npy"),
        ({"data": "."}, "there is no packed file in"),
    ],
)
def test_wrong_report_arguments(
    options: dict[str, Any], message: str, compact: IterativeGenerator, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        realism_report(compact, options.pop("data", data), progress=False, **options)


def test_data_that_does_not_serve(compact: IterativeGenerator, tmp_path: Path) -> None:
    folder = write_iclevr_layout(tmp_path / "few", num_scenes=9, image_size=(32, 32))
    few = prepare(folder, progress=False).path
    with pytest.raises(ValueError, match="8 scenes of the train split and 1 of the validation and test splits"):
        realism_report(compact, folder, progress=False)
    small = prepare(folder, out=few.with_name("small.npy"), image_size=32, progress=False).path
    with pytest.raises(ValueError, match="has pictures of 32 pixels, but the generator draws 64"):
        realism_report(compact, small, progress=False)


# --- what is shown ------------------------------------------------------------------------------------------------


@pytest.fixture
def report() -> RealismReport:
    """Held-out pictures of one grey level each: real 0 to 7, drawn 100 to 107."""
    levels = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 4, 4)
    return RealismReport(
        model="tiny",
        first_seed=3,
        told_apart=some_trial(8),
        real_against_real=some_trial(4),
        blurred=some_trial(4),
        held_out_real=levels,
        held_out_drawn=levels + 100,
        seconds=1.5,
    )


def test_sheet_shows_the_surest(report: RealismReport) -> None:
    sheet = report.sheet(columns=2, scale=3)
    assert sheet.width == 3 * (4 + 2 + 4)
    levels = [level for _, level in sheet.convert("L").getcolors() or []]
    shown = {*range(8), *range(100, 108)} & {*levels}
    assert shown >= {0, 1, 6, 7, 100, 101, 106, 107}
    first_of_rows, second_of_rows = (
        [sheet.getpixel((x, y)) for y in range(sheet.height)] for x in (0, sheet.width - 1)
    )
    # Scores of drawn pictures fall from one to the next, those of real ones rise: drawn first, real last in each half.
    order = [107, 100, 0, 7], [106, 101, 1, 6]
    for column, expected in zip((first_of_rows, second_of_rows), order, strict=True):
        rows = [column[y][0] for y in range(1, len(column)) if column[y] != column[y - 1]]
        assert [level for level in rows if level in {*range(8), *range(100, 108)}] == expected


def test_sheet_refuses_nothing(report: RealismReport) -> None:
    assert report.sheet().size[0] == 2 * (8 * 6 - 2), "no more than there are"
    for option in ("columns", "scale"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            report.sheet(**{option: 0})


def test_table_and_json(report: RealismReport) -> None:
    text = str(report)
    assert "tiny" in text
    lines = {line[:32].strip(): line for line in text.splitlines()}
    told = lines["drawn against real"].removeprefix("drawn against real")
    assert " ".join(told.split()) == "0.625 0.250 .. 0.875 44 16 0.500 0.750"
    assert "control: real against real" in lines
    assert "control: real, blurred by 0.5 px" in lines
    content = json.loads(json.dumps(report.to_dict()))
    trials = {"told_apart", "real_against_real", "blurred"}
    assert content.keys() == {"model", "first_seed", "best_of", "redraw", *trials, "seconds"}
    assert content["told_apart"] == {
        "rate": 0.625,
        "rates": [0.5, 0.75],
        "rate_ci95": [0.25, 0.875],
        "training_pictures": 22,
        "held_out_pictures": 8,
    }
    fields = {field.name for field in dataclasses.fields(ToldApart)}
    assert fields - content["told_apart"].keys() == {"real_scores", "drawn_scores"}


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def model(
    compact: IterativeGenerator, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A tiny generator, where trials are short."""
    short = functools.partial(realism_report, pictures=4, seeds=1, control_seeds=1, epochs=1)
    monkeypatch.setattr(realism, "realism_report", short)
    folder = tmp_path_factory.mktemp("model")
    compact.save_pretrained(folder)
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    return folder


def test_command(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["evaluate", str(model), "--realism", "--data", str(data), "--seed", "3"]
    assert cli.main([*argv, "--sheet", "sheet.png", "--out", "report.json", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    content = json.loads(out)
    assert content.keys() == {"model", "realism"}
    assert content["realism"]["model"] == content["model"] == str(model)
    assert content["realism"]["first_seed"] == 3
    assert content["realism"]["told_apart"]["training_pictures"] == 4
    assert json.loads(Path("report.json").read_text()) == content
    with Image.open("sheet.png") as sheet:
        assert json.loads(sheet.info["condgan"]) == {"realism": content["realism"]}
    assert sorted(path.name for path in Path().iterdir()) == ["report.json", "sheet.png"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.startswith(f"{model}: how often a fresh classifier is right")


def test_command_with_conditions(
    model: Path, data: Path, report: RealismReport, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated = dataclasses.make_dataclass("Evaluated", [], namespace={"to_dict": lambda _: {"accuracy": 0.9}})
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: evaluated())
    monkeypatch.setattr(realism, "realism_report", lambda *_, **__: report)
    argv = ["evaluate", str(model), "--conditions", "test.json", "--realism", "--data", str(data)]
    assert cli.main([*argv, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == {"model": str(model), "accuracy": 0.9, "realism": report.to_dict()}
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == f"Evaluated()\n\n{report}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data data", "the following arguments are required: --conditions (or --realism)"),
        ("--realism", "argument --realism: needs --data"),
        ("--conditions test.json --sheet sheet.png", "argument --sheet: needs --realism"),
        ("--realism --data data --sheet sheet", "argument --sheet: 'sheet' is not a .png file"),
        ("--realism --data data --sheet no/sheet.png", "in a folder that is there"),
    ],
)
def test_wrong_usage(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", *options.split()])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
