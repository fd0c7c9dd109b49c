"""The command line, driven as a user does: exit status, what is on which stream, and what is left on the disk."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from scenes import write_iclevr_layout

import condgan
from condgan import allocator, cli, evaluation, hub, realism, results, runs
from condgan.arguments import parser
from condgan.classifier import SceneClassifier, SceneClassifierConfig
from condgan.cli import main
from condgan.configs import DiscriminatorConfig, GeneratorConfig, NoiseEncoderConfig
from condgan.counter import ObjectCounter, ObjectCounterConfig
from condgan.models import DiffDiscriminator, IterativeGenerator, NoiseEncoder
from condgan.presets import PRESETS, TrainConfig
from condgan.training import TrainingDiverged

COMMANDS = ("generate", "add", "info", "list", "render", "prepare", "train", "evaluate", "export")
SCENE = ["red cube", "blue sphere"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny random models that stand in for the shipped ones, and of broken ones."""
    folder = tmp_path_factory.mktemp("models")
    tiny = GeneratorConfig(width=4, z_dim=4, condition_dim=8)
    classifier = SceneClassifierConfig(widths=(4,), blocks=(1,), stem="small")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = IterativeGenerator(
            GeneratorConfig(width=4, z_dim=4, condition_dim=8, output="blend", places=True, light_components=2)
        )
        with torch.no_grad():
            generator.conv.bias[3] = 1.0  # each turn is seen in the picture
        generator.save_pretrained(folder / "iclevr-64")
        IterativeGenerator(tiny).save_pretrained(folder / "plain")
        IterativeGenerator(tiny).save_pretrained(folder / "corrupt")
        DiffDiscriminator(DiscriminatorConfig(width=1, condition_dim=4)).save_pretrained(folder / "critic")
        SceneClassifier(classifier).save_pretrained(folder / "verifier")
        SceneClassifier(classifier).save_pretrained(folder / "judge")
        ObjectCounter(ObjectCounterConfig(widths=(4,))).save_pretrained(folder / "counter")
        NoiseEncoder(NoiseEncoderConfig(width=1, z_dim=2)).save_pretrained(folder / "noise")
    weights = folder / "corrupt" / hub.WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.fixture(scope="module")
def iclevr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 scenes in the layout of i-CLEVR, not prepared; the tests leave it alone."""
    return write_iclevr_layout(tmp_path_factory.mktemp("data") / "iclevr", 24)


@pytest.fixture(scope="module")
def packed(iclevr: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from condgan.prepare import prepare

    return prepare(iclevr, out=tmp_path_factory.mktemp("packed") / "condgan-64.npy", progress=False).path


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, in an installation that ships the tiny models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "SHIPPED", models)
    results._verifier.cache_clear()
    yield
    results._verifier.cache_clear()


class Outcome:
    """What a command answered."""

    def __init__(self, status: int | str | None, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> dict[str, Any]:
        assert self.status == 0, self.err
        value = json.loads(self.out)  # fails where more than one value was printed
        assert isinstance(value, dict)
        assert self.out.count("\n") == 1
        return value


class Run:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *argv: object) -> Outcome:
        try:
            status: int | str | None = main([str(argument) for argument in argv])
        except SystemExit as exit_:
            status = exit_.code
        return Outcome(status, *self.capsys.readouterr())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


def pixels(path: Path | str) -> bytes:
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


def process(*argv: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of a process of its own, with this very package."""
    root = str(Path(condgan.__file__).parents[1])
    result = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    return result.returncode, result.stdout, result.stderr


# --- help, version, wrong usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_that_parse(command: str, run: Run) -> None:
    outcome = run(command, "--help")
    assert outcome.status == 0
    assert outcome.err == ""
    _, _, examples = outcome.out.replace("\\\n", "").partition("\nexamples:\n")
    lines = [line.strip() for line in examples.splitlines() if line.strip().startswith("condgan ")]
    assert any(line.startswith(f"condgan {command}") for line in lines)
    for line in lines:
        parser().parse_args(shlex.split(line)[1:])
    assert max(map(len, outcome.out.splitlines())) <= 110


def test_main_help_names_every_command(run: Run) -> None:
    outcome = run("--help")
    assert outcome.status == 0
    assert re.findall(r"^    (\w+)", outcome.out, flags=re.MULTILINE) == list(COMMANDS)
    assert 'condgan generate "red cube"' in outcome.out


def test_train_help_names_every_preset(run: Run) -> None:
    described = re.findall(r"^  (\S+)  ", run("train", "--help").out.partition("presets:\n")[2], flags=re.MULTILINE)
    assert set(PRESETS) <= set(described)


def test_version(run: Run) -> None:
    outcome = run("--version")
    assert (outcome.status, outcome.out) == (0, f"condgan {condgan.__version__}\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "COMMAND"),
        ("paint", "invalid choice: 'paint'"),
        ("generate", "required: OBJECT"),
        ("generate 'red cube' --num 0", "--num: '0' is not a whole number of at least 1"),
        ("generate 'red cube' --best-of many", "--best-of: 'many' is not a whole number"),
        ("generate 'red cube' --seed seven", "--seed: 'seven' is not a whole number from 0 to 2**63 - 1"),
        ("generate 'red cube' --seed -1", "--seed: '-1' is not a whole number from 0 to 2**63 - 1"),
        ("generate 'red cube' --seed 9223372036854775808", "--seed: '9223372036854775808' is not a whole number"),
        ("generate 'red cube' --num 1000001", "--num: at most 1,000,000, got 1,000,001"),
        ("add a.png 'red cube' --best-of 1000001", "--best-of: at most 1,000,000, got 1,000,001"),
        ("generate 'red cube' 'blue sphere' --at 3,4", "--at: give one for each object, `none` to leave it to the"),
        (
            "add a.png 'red cube' --at 3,4 --at none",
            "--at: give one for each object, `none` to leave it to the model: ",
        ),
        ("generate 'red cube' --redraw turn", "--redraw: needs --best-of"),
        ("generate --from list.jsonl --out set --redraw picture", "--redraw: needs --best-of"),
        ("generate 'red cube' --at left", "--at: 'left' is neither X,Y in pixels, such as 45,30, nor none"),
        ("generate 'red cube' --at 1,2,3", "--at: '1,2,3' is neither"),
        ("generate 'red cube' --from list.jsonl --out set", "--from: the list says what to draw"),
        ("generate --from list.jsonl --out set --at none", "--at: not allowed with argument --from"),
        ("generate 'red cube' --batch-size 0", "--batch-size: '0' is not a whole number of at least 1"),
        ("generate 'red cube' --shard-size 5", "--shard-size: needs --from, whose tar files it is about"),
        ("generate --from list.jsonl --out set --verify", "--verify: not allowed with argument --from"),
        ("generate --from list.jsonl", "--from: needs --out, the folder of the set"),
        ("generate 'red cube' --see 7", "unrecognized arguments: --see 7"),  # no abbreviations: they break scripts
        ("add photo.png", "required: OBJECT"),
        ("render", "required: OUT_DIR"),
        ("render scenes --scenes 0", "--scenes: '0' is not a whole number of at least 1"),
        ("prepare", "required: DATA_DIR"),
        ("prepare data --image-size 0", "--image-size: '0' is not"),
        ("train --out run", "required: --data"),
        ("train --data data --out run --preset compcat", "unknown preset 'compcat': did you mean 'compact'?"),
        (
            "train --data data --out run --set lr_genrator=1",
            "unknown field 'lr_genrator': did you mean 'lr_generator'?",
        ),
        ("train --data data --out run --set generator.widht=1", "did you mean 'generator.width'?"),
        ("train --data data --out run --set generator=1", "unknown field 'generator'"),
        ("train --data data --out run --set bf16", "'bf16' is not FIELD=VALUE"),
        ("train --data data --out run --set images=1e6", "images must be a whole number, got '1e6'"),
        ("train --data data --out run --set lr_encoder=low", "lr_encoder must be a number, got 'low'"),
        ("train --data data --out run --set bf16=maybe", "bf16 must be true or false, got 'maybe'"),
        ("train --data data --out run --set generator.output=relu", "generator.output must be tanh or blend"),
        ("train --data data --out run --set objective=l2", "objective must be one of"),
        ("train --data data --out run --set discriminator.window=32", "must agree on window"),
        ("train --data data --out run --device abacus", "--device: 'abacus' cannot be used"),
        ("evaluate", "required: --conditions"),
        ("evaluate --conditions test.json --draws 0", "--draws: '0' is not"),
        ("evaluate --conditions test.json --redraw turn", "--redraw: needs --best-of"),
        ("evaluate --realism --data data --judge nosuch", "--judge: needs --conditions"),
        ("evaluate --realism --data data --draws 3", "--draws: needs --conditions"),
        ("evaluate --realism --data data --counter mine", "--counter: needs --conditions"),
    ],
)
def test_wrong_usage(line: str, message: str, run: Run, tmp_path: Path) -> None:
    outcome = run(*shlex.split(line))
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("usage: condgan")
    assert message in outcome.err.splitlines()[-1]
    assert [*tmp_path.iterdir()] == []


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate 'pink cube'", "unknown object 'pink cube': did you mean '"),
        ("generate 'red cube' 'blu sphere'", "unknown object 'blu sphere': did you mean 'blue sphere'?"),
        ("generate red cube", "unknown object 'red': did you mean 'red cube'?"),  # the quotes forgotten
        ("generate ''", "unknown object ''"),
        ("generate 5", "unknown object '5'"),
        ("generate 'red cube' --model iclevr-46", "unknown checkpoint 'iclevr-46': did you mean 'iclevr-64'?"),
        ("generate 'red cube' --model ./nowhere", "nowhere does not exist: check the path"),
        ("generate 'red cube' --model {models}/corrupt", "model.safetensors is cut short or damaged"),
        ("generate 'red cube' --model verifier", "holds the model type SceneClassifier, wanted is IterativeGenerator"),
        ("generate 'red cube' --model {data}", "has no config.json"),
        ("generate 'red cube' --model {models}/plain --at 3,4", "does not know places"),
        ("generate 'red cube' --at 64,4", "x and y go from 0 to 63"),
        ("generate 'red cube' --at nan,4", "x and y go from 0 to 63"),
        ("generate 'red cube' --out missing/scene.png", "cannot write 'missing/scene.png'"),
        ("generate 'red cube' --out {data}/train.json/scene.png", "cannot write '"),
        ("generate 'red cube' --turns --out missing/turns.png", "cannot write 'missing/turns.png'"),
        ("generate 'red cube' --out scene", "path must end like a picture file, such as scene.png"),
        ("add missing.png 'red cube'", "there is no file 'missing.png'"),
        ("add {data}/train.json 'red cube'", "is not a readable picture"),
        ("add {data}/images/CLEVR_train_000000_0.png cube", "unknown object 'cube'"),
        ("info iclevr", "unknown checkpoint 'iclevr': did you mean 'iclevr-64'?"),
        ("info ''", "''"),
        ("info {models}/corrupt", "is cut short or damaged"),
        ("info {data}", "has no config.json"),
        ("render {data}", "holds train.json, but no render.json that says what it is: choose another folder"),
        ("render scenes --height 7", "height must be between 8 and"),
        ("prepare missing", "there is no folder missing"),
        ("prepare {models}", "there is no"),
        ("prepare {data} --out {data}/train.json/packed.npy", "cannot write"),
        ("train --data missing --out run", "missing is neither a folder nor a packed .npy file"),
        ("train --data {data} --out run", "it is not prepared yet: run `condgan prepare"),
        ("evaluate --conditions missing.json", "there is no file 'missing.json'"),
        ("evaluate --conditions {data}/objects.json", "expected a list of names"),
        ("evaluate --conditions {data}/images/CLEVR_train_000000_0.png", "is not valid JSON"),
        ("evaluate --conditions {data}/test.json --judge jugde", "unknown checkpoint 'jugde': did you mean 'judge'?"),
        (
            "evaluate --conditions {data}/test.json --counter conter",
            "unknown checkpoint 'conter': did you mean 'counter'?",
        ),
        (
            "evaluate --conditions {data}/test.json --judge iclevr-64",
            "holds the model type IterativeGenerator, wanted is Sce",
        ),
        ("evaluate --conditions {data}/test.json --data missing", "missing is neither a folder nor a packed .npy file"),
        ("evaluate --conditions {data}/test.json --out missing/report.json", "cannot write 'missing/report.json'"),
        ("evaluate --conditions {data}/test.json --out .", "cannot write '.'"),
    ],
)
def test_a_failure_is_one_line(line: str, message: str, run: Run, models: Path, iclevr: Path, tmp_path: Path) -> None:
    argv = shlex.split(line.format(models=models, data=iclevr))
    outcome = run(*argv, "--json")
    assert outcome.status == 1
    assert outcome.out == ""
    assert re.fullmatch(rf"condgan {argv[0]}: error: [^\n]+\n", outcome.err)
    assert message in outcome.err
    assert [*tmp_path.iterdir()] == [], "nothing half done is left"


def test_a_data_folder_without_labels(run: Run, tmp_path: Path) -> None:
    (tmp_path / "objects.json").write_text('{"red cube": 0}')
    outcome = run("prepare", ".")
    assert outcome.status == 1
    assert "there is no train.json in ." in outcome.err


def test_a_process_that_trains_keeps_freed_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def diverge(*_: object, **__: object) -> None:
        order.append("train")
        raise TrainingDiverged

    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: order.append("keep"))
    monkeypatch.setattr(runs, "train", diverge)
    run("train", "--data", "data", "--out", "run")
    assert order == ["keep", "train"]


def test_diverged_training_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise TrainingDiverged("five updates in a row\nwere not finite")

    monkeypatch.setattr(runs, "train", diverge)
    outcome = run("train", "--data", "data", "--out", "run")
    assert outcome.status == 1
    assert outcome.err == "condgan train: error: five updates in a row were not finite\n"


@pytest.mark.parametrize(
    ("module", "function", "line", "advice"),
    [
        (
            runs,
            "train",
            "train --data data --out run",
            ": run the same command again to go on; until then RUN/model lacks what a run fits at its end",
        ),
        (evaluation, "evaluate", "evaluate --conditions test.json --out report.json", ""),
    ],
)
def test_ctrl_c(
    module: Any, function: str, line: str, advice: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupt)
    outcome = run(*shlex.split(line))
    assert outcome.status == 130
    assert outcome.out == ""
    assert outcome.err == f"condgan {line.split()[0]}: interrupted{advice}\n"
    assert [*tmp_path.iterdir()] == []


def test_sigterm_leaves_no_half_of_a_file(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(9))
    outcome = run("evaluate", "--conditions", "test.json", "--out", "report.json")
    assert (outcome.status, outcome.err) == (130, "condgan evaluate: interrupted\n")
    assert [*tmp_path.iterdir()] == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_while_arguments_are_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "empty", interrupt)
    outcome = run("train", "--data", "data", "--out", "run", "--device", "cpu")
    assert (outcome.status, outcome.out, outcome.err) == (130, "", "condgan: interrupted\n")


@pytest.mark.parametrize("device", ["hpu", "privateuseone", "mps", "nonsense"])
def test_a_device_that_is_not_there_is_wrong_usage(device: str, run: Run) -> None:
    outcome = run("train", "--data", "data", "--out", "run", "--device", device)
    assert outcome.status == 2
    last = outcome.err.splitlines()[-1]
    assert re.fullmatch(
        rf"condgan train: error: argument --device: '{device}' cannot be used \(.+\); give cpu, .*", last
    )
    assert len(last) < 400


# --- as a program of its own --------------------------------------------------------------------------------------


def test_python_m_condgan() -> None:
    status, out, err = process(sys.executable, "-m", "condgan", "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: condgan ")


def test_drawing_imports_nothing_slow(models: Path) -> None:
    slow = {"torchvision", "huggingface_hub", "condgan.training", "condgan.evaluation"}
    script = f"import sys; from condgan.cli import main; print(main(sys.argv[1:]), {slow} & {{*sys.modules}})"
    status, out, err = process(sys.executable, "-c", script, "generate", *SCENE, "--model", str(models / "iclevr-64"))
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "0 set()"
    assert Path("scene.png").is_file()


def test_a_reader_that_has_gone() -> None:
    script = f"{shlex.quote(sys.executable)} -m condgan list | true; echo ${{PIPESTATUS[0]}}"
    assert process("bash", "-c", script) == (0, "1\n", "")


# --- generate and add ---------------------------------------------------------------------------------------------


def test_generate_draws_what_python_draws(run: Run) -> None:
    outcome = run("generate", *SCENE, "--seed", 7)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == "scene.png: red cube, blue sphere; seed 7\n"
    expected = IterativeGenerator.from_pretrained().generate(SCENE, seed=7)
    assert pixels("scene.png") == expected.image.tobytes()
    with Image.open("scene.png") as picture:
        assert json.loads(picture.info["condgan"])["seed"] == 7


def test_a_fresh_seed_is_told_and_draws_the_picture_again(run: Run) -> None:
    (picture,) = run("generate", "Grey  CUBE", "--json").json["pictures"]
    assert picture["conditions"] == ["gray cube"]
    run("generate", "gray cube", "--seed", picture["seed"], "--out", "again.png")
    assert pixels("scene.png") == pixels("again.png")
    assert run("generate", "gray cube", "--json").json["pictures"][0]["seed"] != picture["seed"]


def test_several_pictures_are_numbered(run: Run, tmp_path: Path) -> None:
    report = run("generate", *SCENE, "--num", 3, "--seed", 7, "--out", tmp_path / "scene.png", "--json").json
    assert report["files"] == [str(tmp_path / f"scene-{i}.png") for i in range(3)]
    assert [picture["file"] for picture in report["pictures"]] == report["files"]
    assert [picture["seed"] for picture in report["pictures"]] == [7, 8, 9]
    assert sorted(map(str, tmp_path.iterdir())) == report["files"]
    run("generate", *SCENE, "--seed", 8)
    assert pixels("scene.png") == pixels("scene-1.png")


@pytest.mark.parametrize("out", ["missing/scene.png", "scene", "folder.png"])
@pytest.mark.parametrize("command", ["generate", "add image.png"])
def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(
    command: str, out: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(IterativeGenerator, "from_pretrained", None)  # it is not called
    outcome = run(*command.split(), "red cube", "--out", out)
    assert outcome.status == 1
    assert re.search("cannot write '|path must end like a picture file", outcome.err)


@pytest.mark.parametrize(
    ("options", "columns", "rows"), [(["--turns"], 3, 3), (["--grid"], 2, 2), (["--turns", "--grid"], 3, 3)]
)
def test_sheets(options: list[str], columns: int, rows: int, run: Run, tmp_path: Path) -> None:
    outcome = run("generate", *SCENE, "--num", 3, "--seed", 7, *options, "--out", "sheet.png")
    assert outcome.out == "".join(f"sheet.png: red cube, blue sphere; seed {seed}\n" for seed in (7, 8, 9))
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    expected = IterativeGenerator.from_pretrained().generate(SCENE, num_images=3, seed=7)
    with Image.open("sheet.png") as sheet:
        assert sheet.size == (columns * 66 - 2, rows * 66 - 2)
        assert [picture["seed"] for picture in json.loads(sheet.info["condgan"])["pictures"]] == [7, 8, 9]
        assert sheet.tobytes() == expected.grid(turns="--turns" in options).tobytes()


def test_places(run: Run) -> None:
    argv = ("generate", *SCENE, "--seed", 7, "--json")
    (drawn,) = run(*argv).json["pictures"]
    (asked,) = run(*argv, "--at", "none", "--at", "45,30.5", "--out", "asked.png").json["pictures"]
    assert asked["places"] == [drawn["places"][0], [45.0, 30.5]]
    assert pixels("scene.png") != pixels("asked.png")
    places = [f"--at={x},{y}" for x, y in drawn["places"]]  # what is reported can be asked for
    assert run(*argv, *places, "--out", "again.png").json["pictures"][0]["places"] == drawn["places"]
    assert pixels("scene.png") == pixels("again.png")


def test_a_model_without_places_reports_none(run: Run, models: Path) -> None:
    (picture,) = run("generate", "red cube", "--model", models / "plain", "--json").json["pictures"]
    assert (picture["places"], picture["score"], picture["verified"]) == (None, None, None)


def test_best_of_tells_score_and_seed(run: Run) -> None:
    argv = ("generate", *SCENE, "--seed", 7, "--best-of", 4)
    (picture,) = run(*argv, "--json").json["pictures"]
    expected = IterativeGenerator.from_pretrained().generate(SCENE, seed=7, best_of=4)
    assert (picture["seed"], picture["score"]) == (expected.seeds[0], expected.scores[0] if expected.scores else None)
    said = f"seed {picture['seed']}, score {picture['score']:.3f}, 8 passes"
    assert picture["passes"] == 8
    assert run(*argv).out == f"scene.png: red cube, blue sphere; {said}\n"
    run("generate", *SCENE, "--seed", picture["seed"], "--out", "again.png")
    assert pixels("scene.png") == pixels("again.png")


def test_failed_turns_are_drawn_again(run: Run, iclevr: Path) -> None:
    argv = (*SCENE, "--seed", 7, "--best-of", 3, "--redraw", "turn")
    (picture,) = run("generate", *argv, "--json").json["pictures"]
    generator = IterativeGenerator.from_pretrained()
    expected = generator.generate(SCENE, seed=7, best_of=3, redraw="turn")
    assert [picture[name] for name in ("seed", "best_of", "redraw", "at")] == [7, 3, "turn", None]
    assert [picture["passes"]] == expected.passes
    assert pixels("scene.png") == expected.image.tobytes()
    photo = iclevr / "images" / "CLEVR_train_000000_0.png"
    run("add", photo, *argv)
    assert pixels("more.png") == generator.add(photo, SCENE, seed=7, best_of=3, redraw="turn").image.tobytes()


def test_verify_tells_what_was_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def probabilities(self: SceneClassifier, images: torch.Tensor) -> torch.Tensor:
        return condgan.Vocabulary().multi_hot(["red cube"]).expand(len(images), -1) * 0.75

    monkeypatch.setattr(SceneClassifier, "probabilities", probabilities)
    outcome = run("generate", *SCENE, "--seed", 7, "--verify")
    assert outcome.out.splitlines()[1:] == ["  red cube: found, 0.750", "  blue sphere: not found, 0.000"]
    (picture,) = run("generate", *SCENE, "--verify", "--json").json["pictures"]
    assert picture["verified"] == {
        "red cube": {"found": True, "probability": 0.75},
        "blue sphere": {"found": False, "probability": 0.0},
    }


@pytest.mark.parametrize("action", ["error", "ignore"])  # of PYTHONWARNINGS
def test_more_objects_than_in_training_is_a_warning(action: Any, run: Run) -> None:
    warnings.simplefilter(action)
    outcome = run("generate", *["red cube", "blue sphere", "gray cube", "cyan cube", "green sphere"], "--json")
    assert outcome.json["files"] == ["scene.png"]
    assert re.fullmatch(r"condgan generate: warning: 5 objects are asked, [^\n]+ at most 3: [^\n]+\n", outcome.err)
    assert Path("scene.png").is_file()


def test_warnings_for_developers_are_not_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def deprecated(*_: object) -> list[str]:
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return []

    monkeypatch.setattr(hub, "list_pretrained", deprecated)
    assert (run("list").status, run("list").err) == (0, "")


def test_add_draws_on_a_picture(run: Run, iclevr: Path) -> None:
    photo = iclevr / "images" / "CLEVR_train_000000_0.png"
    before = photo.read_bytes()
    outcome = run("add", photo, "green cylinder", "--seed", 8)
    assert outcome.out == "more.png: green cylinder; seed 8\n"
    expected = IterativeGenerator.from_pretrained().add(photo, "green cylinder", seed=8)
    assert pixels("more.png") == expected.image.tobytes()
    assert photo.read_bytes() == before
    run("generate", "green cylinder", "--seed", 8)
    assert pixels("more.png") != pixels("scene.png")


def test_add_takes_the_options_of_generate(run: Run, iclevr: Path) -> None:
    photo = iclevr / "images" / "CLEVR_train_000000_0.png"
    argv = ("--num", 2, "--seed", 8, "--at", "20,40", "--best-of", 2, "--turns", "--out", "sheet.png", "--verify")
    report = run("add", photo, "green cylinder", *argv, "--json").json
    assert report["files"] == ["sheet.png"]
    for picture in report["pictures"]:
        assert picture["places"] == [[20.0, 40.0]]
        assert picture["score"] is not None
        assert [*picture["verified"]] == ["green cylinder"]
    with Image.open("sheet.png") as sheet:
        assert sheet.size == (2 * 66 - 2, 2 * 66 - 2)


def test_a_list_is_drawn_by_any_number_of_processes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("list.jsonl").write_text('["red cube"]\n{"conditions": ["blue sphere"], "num_images": 2}\n')
    argv = ("generate", "--from", "list.jsonl", "--shard-size", 2, "--seed", 7, "--out")
    report = run(*argv, "alone", "--json").json
    assert report == {"out": "alone", "pictures": 3, "shards": 2, "drawn": 3, "skipped": 0}
    assert run(*argv, "alone").out == "alone: 3 pictures in 2 tar files; 0 drawn now, 3 were there\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, text in (
        ("1", "shared: 3 pictures in 2 tar files; 1 drawn now, by process 1 of 2, 0 were there\n"),
        ("0", "shared: 3 pictures in 2 tar files; 2 drawn now, by process 0 of 2, 0 were there\n"),
    ):
        monkeypatch.setenv("RANK", rank)
        assert run(*argv, "shared").out == text
    monkeypatch.setenv("LOCAL_RANK", "1")  # of those that torchrun starts the first one reports
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert bool(run(*argv, "shared").out) == (rank == "0")
        assert run("info").out != "", "what is not shared each does for itself"
    for name in ("00000.tar", "00001.tar", "set.json"):
        assert Path("alone", name).read_bytes() == Path("shared", name).read_bytes()


def test_pictures_pass_in_batches_where_that_is_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    together, forward = [], IterativeGenerator.forward

    def watch(self: IterativeGenerator, z: torch.Tensor, *args: Any) -> torch.Tensor:
        together.append(len(z))
        return forward(self, z, *args)

    monkeypatch.setattr(IterativeGenerator, "forward", watch)
    run("generate", "red cube", "--num", 3, "--batch-size", 2)
    assert together == [2, 1]
    Path("list.jsonl").write_text('{"conditions": ["red cube"], "num_images": 3}\n')
    run("generate", "--from", "list.jsonl", "--out", "set", "--batch-size", 3)
    assert together == [2, 1, 3]


def test_a_list_with_a_wrong_line_is_one_line_of_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("list.jsonl").write_text('["red cube"]\n["red cone"]\n')
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    outcome = run("generate", "--from", "list.jsonl", "--out", "set")
    assert outcome.status == 1
    assert re.fullmatch(r"condgan generate, rank 1: error: line 2 of 'list.jsonl': .*red cone.*\n", outcome.err)
    outcome = run("generate", "--from", "none.jsonl", "--out", "set")
    assert outcome.status == 1
    assert "none.jsonl" in outcome.err


@pytest.mark.parametrize(("rank", "count"), [("2", "2"), ("0", "0"), ("x", "2")])
def test_wrong_numbers_of_processes_are_one_line_of_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, rank: str, count: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    outcome = run("train", "--data", "data", "--out", "run")
    assert (outcome.status, outcome.out) == (1, "")
    assert re.fullmatch(r"condgan train: error: the variables RANK and WORLD_SIZE must [^\n]+\n", outcome.err)


def test_what_json_cannot_say_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "list", lambda args: cli.Report({"score": math.nan}, ""))
    outcome = run("list", "--json")
    assert (outcome.status, outcome.out) == (1, "")


# --- info and list ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("iclevr-64", {"width": 10**20}),
        ("iclevr-64", {"objects": [""]}),
        ("iclevr-64", {"objects": ["Red Cube"]}),
        ("verifier", {"widths": [], "blocks": []}),
    ],
)
def test_a_config_of_no_model_is_one_line_of_error(
    run: Run, models: Path, tmp_path: Path, model: str, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / model, folder)
    config = json.loads((folder / hub.CONFIG_NAME).read_text())
    (folder / hub.CONFIG_NAME).write_text(json.dumps(config | changes))
    outcome = run("info", folder)
    assert outcome.status == 1
    assert re.fullmatch(r"condgan info: error: [^\n]*config\.json[^\n]+\n", outcome.err)


def test_info_shows_a_card_in_any_encoding(run: Run, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "iclevr-64", tmp_path / "model")
    (tmp_path / "model" / hub.CARD_NAME).write_bytes("Würfel".encode("latin-1"))
    assert run("info", tmp_path / "model", "--json").json["card"] == "W\ufffdrfel"


def test_info_does_without_a_card_that_may_not_be_read(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models / "iclevr-64", tmp_path / "model")
    read_text = Path.read_text

    def forbidden(path: Path, *args: Any, **options: Any) -> str:
        if path.name == hub.CARD_NAME:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", forbidden)
    assert run("info", tmp_path / "model", "--json").json["card"] == ""


def test_a_terminal_of_ascii_gets_what_it_can_show(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "iclevr-64", tmp_path / "model")
    (tmp_path / "model" / hub.CARD_NAME).write_text("Würfel", encoding="utf-8")
    command = [sys.executable, "-m", "condgan", "info", "model"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.endswith("W\\xfcrfel\n")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: make room and run the same again"),
        (PermissionError(errno.EACCES, "Permission denied", "run/log.jsonl"), "Permission denied: 'run/log.jsonl'"),
        (OSError("out: cannot\nbe"), "out: cannot be"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_errors_of_the_system_are_told_without_their_number(
    error: Exception, text: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(hub, "list_pretrained", fail)
    outcome = run("list")
    assert (outcome.status, outcome.err) == (1, f"condgan list: error: {text}\n")


def test_info_describes_the_default_model(run: Run, models: Path) -> None:
    generator = IterativeGenerator.from_pretrained()
    report = run("info", "--json").json
    assert report["model"] == "iclevr-64"
    assert report["model_type"] == "IterativeGenerator"
    assert report["parameters"] == sum(parameter.numel() for parameter in generator.parameters())
    assert report["file_bytes"] == (models / "iclevr-64" / hub.WEIGHTS_NAME).stat().st_size
    assert report["objects"] == list(generator.vocabulary.names)
    assert report["config"] | {"objects": tuple(report["objects"])} == vars(generator.config)
    assert report["card"] == (models / "iclevr-64" / hub.CARD_NAME).read_text()
    text = run("info").out
    assert text.startswith(f"iclevr-64: IterativeGenerator, {report['parameters']:,} parameters, ")
    assert re.search(r"^image_size +64$", text, flags=re.MULTILINE)
    assert "24 objects: gray cube, red cube, " in text
    assert "# IterativeGenerator\n\nDraws one more object" in text
    assert "license: mit" not in text, "the header of the card is for machines"
    assert "## Use" not in text


def test_a_card_cannot_command_the_terminal(run: Run, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "plain", tmp_path / "model")
    (tmp_path / "model" / hub.CARD_NAME).write_text("# A model\n\nof\x1b]0;mine\x07 cubes\tand\x9b spheres\n")
    text = run("info", str(tmp_path / "model")).out
    assert text.endswith(
        "# A model\n\nof\N{REPLACEMENT CHARACTER}]0;mine\N{REPLACEMENT CHARACTER} cubes\tand"
        "\N{REPLACEMENT CHARACTER} spheres\n"
    )


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("verifier", "SceneClassifier"),
        ("critic", "DiffDiscriminator"),
        ("judge", "SceneClassifier"),
        ("counter", "ObjectCounter"),
        ("noise", "NoiseEncoder"),
    ],
)
def test_info_knows_every_kind_of_model(name: str, model_type: str, run: Run, models: Path) -> None:
    (models / "critic" / hub.CARD_NAME).unlink(missing_ok=True)  # a card is not needed
    report = run("info", models / name, "--json").json
    assert report["model_type"] == model_type
    assert run("info", name).out.startswith(f"{name}: {model_type}, ")


def test_list(run: Run) -> None:
    assert run("list").out.split() == condgan.list_pretrained()
    report = run("list", "--json").json
    assert [model["name"] for model in report["models"]] == condgan.list_pretrained()
    assert report["default"] == "iclevr-64"


def test_list_all(run: Run) -> None:
    report = run("list", "--all", "--json").json
    assert sorted(model["name"] for model in report["models"]) == sorted(condgan.list_pretrained(None))
    assert {"name": "verifier", "model_type": "SceneClassifier"} in report["models"]
    assert ["judge", "SceneClassifier"] in [line.split() for line in run("list", "--all").out.splitlines()]


# --- prepare, train, evaluate -------------------------------------------------------------------------------------


def test_render(run: Run) -> None:
    outcome = run("render", "scenes", "--scenes", 2, "--seed", 5, "--height", 24, "--json")
    report = outcome.json
    assert outcome.err == "", "no progress bar where nobody sees it"
    assert (report["out"], report["scenes"], report["pictures"], report["rendered"]) == ("scenes", 2, 6, 2)
    again = run("render", "scenes", "--scenes", 2, "--seed", 5, "--height", 24)
    assert "scenes: 2 scenes, 2 of them from before, 6 pictures; took" in again.out
    assert "condgan prepare scenes" in again.out
    assert run("prepare", "scenes", "--json").json["scenes"] == 2


def test_prepare(run: Run, tmp_path: Path) -> None:
    write_iclevr_layout(tmp_path / "iclevr", 3)
    (tmp_path / "iclevr" / "images" / "CLEVR_train_000001_2.png").unlink()
    outcome = run("prepare", "iclevr", "--image-size", 32, "--json")
    report = outcome.json
    assert outcome.err == "", "no progress bar where nobody sees it"
    assert report["path"] == "iclevr/condgan-32.npy"
    assert (report["scenes"], report["pictures"], report["already_prepared"]) == (2, 6, False)
    assert report["missing"] == ["CLEVR_train_000001_2.png"]
    assert report["skipped_scenes"] == ["CLEVR_train_000001"]
    again = run("prepare", "iclevr", "--image-size", 32)
    assert "was prepared before" in again.out
    assert "1 pictures listed in train.json but missing: CLEVR_train_000001_2.png" in again.out
    assert run("prepare", "iclevr", "--out", "packed.npy", "--json").json["path"] == "packed.npy"
    assert Path("packed.npy").is_file()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What ``condgan train`` asks of the library, without the training."""
    calls: list[tuple[Any, ...]] = []

    def note(data: Path, out: Path, config: TrainConfig, **options: object) -> IterativeGenerator:
        print("a library that talks")
        calls.append((data, out, config, options))
        return IterativeGenerator(GeneratorConfig(width=1, condition_dim=4))

    monkeypatch.setattr(runs, "train", note)
    return calls


def test_train_changes_fields_of_a_preset(run: Run, asked: list[tuple[Any, ...]]) -> None:
    fields = (
        *("--set", "generator.output=tanh", "--set", "lr_generator=7e-4", "--set", "bf16=False"),
        *("--set", "generator.places=false", "--set", "discriminator.places=false"),  # they have to agree
        *("--set", "generator.window=none", "--set", "discriminator.window=none"),
        *("--set", "generator.objects=red cube, blue sphere", "--set", "discriminator.objects=red cube, blue sphere"),
        *("--set", "init_generator=iclevr-64", "--set", "init_discriminator=none"),
    )
    run("train", "--data", "data", "--out", "run", *fields, "--images", 1000, "--seed", 3, "--batch-scenes", 2)
    ((data, out, config, options),) = asked
    assert (data, out) == (Path("data"), Path("run"))
    assert options == {"device": None, "accumulate": 1, "progress": False}
    changed = {name for name in vars(config) if getattr(config, name) != getattr(PRESETS["compact"], name)}
    assert changed == {
        *("generator", "discriminator", "init_generator", "lr_generator", "bf16", "images", "seed", "batch_scenes")
    }
    assert (config.init_generator, config.init_discriminator) == ("iclevr-64", None)
    assert (config.lr_generator, config.bf16, config.images, config.seed, config.batch_scenes) == (
        7e-4,
        False,
        1000,
        3,
        2,
    )
    assert config.generator.objects == ("red cube", "blue sphere")
    assert (config.generator.output, config.generator.places, config.discriminator.places) == ("tanh", False, False)
    assert config.generator.width == PRESETS["compact"].generator.width


@pytest.mark.parametrize("preset", PRESETS)
def test_train_takes_every_preset(preset: str, run: Run, asked: list[tuple[Any, ...]]) -> None:
    report = run("train", "--data", "data", "--preset", preset, "--out", "run", "--device", "cpu", "--json")
    assert report.json["model"] == "run/model"
    assert report.err == "a library that talks\n", "standard output is for the report alone"
    ((_, _, config, options),) = asked
    assert config == PRESETS[preset]
    assert options["device"] == "cpu"


def test_a_run_can_take_its_scenes_in_parts(run: Run, asked: list[tuple[Any, ...]]) -> None:
    run("train", "--data", "data", "--out", "run", "--accumulate", 4)
    assert asked[0][-1]["accumulate"] == 4


def test_train_and_draw(run: Run, packed: Path) -> None:
    small = "generator.width=1 generator.z_dim=2 generator.condition_dim=4 bf16=false decay_images=0 "
    small += "discriminator.width=1 discriminator.condition_dim=4 reconstruction_images=6"
    fields = [argument for field in small.split() for argument in ("--set", field)]
    argv = ("train", "--data", packed, "--out", "run", "--batch-scenes", 2, *fields)
    outcome = run(*argv, "--images", 12)
    assert outcome.status == 0, outcome.err
    assert re.fullmatch(r"condgan train: warning: data: generator\.light_components=64 ways[^\n]+\n", outcome.err)
    (command,) = re.findall(r"^  condgan (.+)$", outcome.out, flags=re.MULTILINE)
    assert run(*shlex.split(command)).status == 0  # what it tells to do works
    assert Path("scene.png").is_file()
    assert run(*argv, "--images", 18, "--json").json["images"] == 18  # goes on
    other = run(*argv, "--images", 18, "--seed", 1)
    assert other.status == 1
    assert "is of another run: seed was 0 and is 1" in other.err


API_KEYS = (
    *("model", "conditions", "draws", "judge", "accuracy", "accuracy_ci95", "exact", "object_f1", "real_accuracy"),
    *("real_exact", "frechet_distance", "preservation", "diversity", "seconds"),
)


def test_evaluate(run: Run, iclevr: Path, packed: Path) -> None:
    argv = ("evaluate", "--conditions", iclevr / "test.json", "--draws", 2, "--data", packed)
    outcome = run(*argv, "--out", "report.json", "--json")
    report = outcome.json
    assert outcome.err == ""
    assert set(API_KEYS) <= report.keys()
    assert all(report[key] is not None for key in API_KEYS)
    assert (report["model"], report["conditions"], report["judge"], report["draws"]) == (
        "iclevr-64",
        "test.json",
        "judge",
        2,
    )
    assert json.loads(Path("report.json").read_text()) == report
    assert [path.name for path in Path().iterdir()] == ["report.json"]


def test_a_sheet_that_cannot_be_written_costs_no_report(
    run: Run, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the beginning, where it is refused, but at the end: the disk may be full by then."""

    class Found:
        def to_dict(self) -> dict[str, object]:
            return {"rate": 0.5}

        def sheet(self) -> Image.Image:
            (tmp_path / "sheet.png").mkdir()
            return Image.new("RGB", (4, 4))

    monkeypatch.setattr(realism, "realism_report", lambda *args, **options: Found())
    arguments = ("evaluate", "--realism", "--data", packed, "--sheet", "sheet.png", "--out", "report.json")
    outcome = run(*arguments)
    assert outcome.status == 1
    assert "cannot write 'sheet.png' (Is a directory)" in outcome.err
    assert json.loads(Path("report.json").read_text())["realism"] == {"rate": 0.5}
    Path("report.json").unlink()
    monkeypatch.setattr(realism, "realism_report", None)  # it is not called
    assert "cannot write 'sheet.png' (Is a directory)" in run(*arguments).err
    assert not Path("report.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux that takes nothing")
def test_a_full_disk_costs_no_report(run: Run, iclevr: Path, models: Path) -> None:
    """It may fill while the pictures are drawn."""
    argv = ("evaluate", models / "plain", "--conditions", iclevr / "test.json", "--draws", 1)
    outcome = run(*argv, "--judge", models / "verifier", "--out", "/dev/full", "--json")
    assert outcome.status == 1
    assert "error: --out: '/dev/full' cannot be written (No space left on device); all that was" in outcome.err
    assert json.loads(outcome.out)["pictures"] > 0


def test_evaluate_prints_a_table(run: Run, iclevr: Path, models: Path) -> None:
    argv = (
        "evaluate",
        models / "plain",
        "--conditions",
        iclevr / "test.json",
        "--draws",
        1,
        "--judge",
        models / "verifier",
    )
    outcome = run(*argv, "--seed", 5)
    assert outcome.out.startswith(f"{models / 'plain'} on test.json: 6 lists of 12 objects, 1 draws each")
    assert f"judged by {models / 'verifier'}" in outcome.out
    assert re.search(r"^accuracy +[01]\.\d{3} ", outcome.out, flags=re.MULTILINE)
    report = run(*argv, "--seed", 5, "--json").json
    assert report["seed"] == 5
    assert report["real_accuracy"] is None


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both parts of an evaluation, of which the second one fails; what was done."""
    done: list[str] = []

    def first(*args: object, **options: object) -> SimpleNamespace:
        done.append("first")
        return SimpleNamespace(to_dict=lambda: {"accuracy": 0.5})

    def second(*args: object, **options: object) -> None:
        done.append("second")
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(evaluation, "evaluate", first)
    monkeypatch.setattr(realism, "realism_report", second)
    return done


def test_what_was_measured_is_kept_when_the_trial_of_told_apart_fails(
    run: Run, tried: list[str], packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("lists.json").write_text('[["red cube"]]')
    argv = ("evaluate", "--conditions", "lists.json", "--realism", "--data", packed, "--json", "--out", "report.json")
    monkeypatch.setattr(realism, "check_data", lambda data, generator: None)
    outcome = run(*argv)
    assert outcome.status == 1
    assert json.loads(outcome.out)["accuracy"] == json.loads(Path("report.json").read_text())["accuracy"] == 0.5
    assert outcome.err.endswith("error: --realism: no memory is left; what was measured before is printed\n")
    assert tried == ["first", "second"]
    assert run("evaluate", "--realism", "--data", packed).out == ""


def test_data_for_which_there_is_no_trial_is_refused_before_anything_is_measured(
    run: Run, tried: list[str], packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("lists.json").write_text('[["red cube"]]')
    monkeypatch.setattr(realism, "scene_split", lambda name: "train")
    outcome = run("evaluate", "--conditions", "lists.json", "--realism", "--data", packed)
    assert (outcome.status, outcome.out, tried) == (1, "", [])
    assert "at least 2 of each are needed" in outcome.err


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("reconstruction_images=65000", "images=12 are reconstruction only"),
        ("reconstruction_images=6", "learning rates fall over decay_images=130,000 pictures"),
        ("decay_images=3", ""),
    ],
)
def test_a_run_that_is_too_short_for_its_stages_is_warned_of(
    run: Run, asked: list[tuple[Any, ...]], setting: str, words: str
) -> None:
    fields = ("--set", "reconstruction_images=6", "--set", setting)
    outcome = run("train", "--data", "data", "--out", "run", "--images", 12, *fields)
    assert words in outcome.err
    assert ("warning" in outcome.err) == bool(words)


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_stream_is_no_failure(closed: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m condgan list --json {closed}>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (closed == "2")
    wrong = command.replace("list --json", "info nonesuch")
    done = subprocess.run(["sh", "-c", wrong], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
