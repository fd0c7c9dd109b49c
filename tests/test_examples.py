"""The examples run as they stand, on small scenes drawn by the tests."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import randomise
from scenes import write_iclevr_layout
from tiny import COMPACT, REFERENCE, lively_generator
from torch import Tensor

from condgan import (
    DiffDiscriminator,
    DiscriminatorConfig,
    GeneratorConfig,
    IterativeGenerator,
    NoiseEncoder,
    NoiseEncoderConfig,
    ObjectCounter,
    SceneClassifier,
    calibration,
    evaluation,
    presets,
    training,
)
from condgan.datasets import SceneDataset
from condgan.prepare import prepare
from condgan.report import EvaluationReport
from condgan.vocab import ICLEVR_OBJECTS

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_iclevr_layout(tmp_path_factory.mktemp("examples"), num_scenes=24, image_size=(64, 64))
    prepare(folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def other_objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small scenes of two turns and of 25 objects, those of i-CLEVR in reverse order."""
    folder = write_iclevr_layout(tmp_path_factory.mktemp("other"), num_scenes=24, image_size=(32, 32))
    names = (*reversed(ICLEVR_OBJECTS), "pink cow")
    (folder / "objects.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    labels = json.loads((folder / "train.json").read_text())
    two_turns = {file: objects for file, objects in labels.items() if len(objects) < 3}
    (folder / "train.json").write_text(json.dumps(two_turns))
    prepare(folder, image_size=32, progress=False)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_train_writes_a_generator_that_draws(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "train.py", "--data", data, "--steps", 2, "--width", 4, "--out", tmp_path / "model")
    generator = IterativeGenerator.from_pretrained(tmp_path / "model")
    assert generator.config == GeneratorConfig(width=4)
    assert generator.generate(["red cube"], seed=0).tensor.isfinite().all()


def test_train_learns_names_turns_and_size_of_the_data(
    other_objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--data", other_objects, "--steps", 1, "--width", 4, "--out", tmp_path / "model")
    run(monkeypatch, "train.py", *arguments)
    config = IterativeGenerator.from_pretrained(tmp_path / "model").config
    names = SceneDataset(other_objects).vocabulary.names
    assert config == GeneratorConfig(image_size=32, width=4, objects=names, num_turns=2)


def test_the_counter_is_trained_on_pictures_of_any_size(
    other_objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "train_counter.py", "--data", other_objects, "--steps", 2, "--out", tmp_path / "counter")
    assert ObjectCounter.from_pretrained(tmp_path / "counter").config.image_size == 32


@pytest.mark.parametrize(
    "command",
    [("train.py",), ("finetune.py",), ("train_counter.py",), ("train_classifier.py", "--role", "judge")],
    ids=lambda command: command[0],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_the_data_is_read(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("something")
    for out in ("file", "file/model"):
        with pytest.raises(SystemExit):
            run(monkeypatch, *command, "--data", tmp_path / "nowhere", "--out", tmp_path / out)
        assert f"--out: '{tmp_path / out}' cannot be written to: " in capsys.readouterr().err


def test_train_makes_do_with_few_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = prepare(write_iclevr_layout(tmp_path / "few", num_scenes=4), progress=False).path
    assert 0 < len(SceneDataset(few, "train")) < 8
    run(monkeypatch, "train.py", "--data", few, "--steps", 1, "--width", 4, "--out", tmp_path / "model")
    assert (tmp_path / "model").exists()


def test_the_mean_of_two_generators_is_corrected_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = lively_generator(COMPACT, seed=0), lively_generator(COMPACT, seed=1)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    paths = (tmp_path / "one", tmp_path / "other", "--data", data, "--out", tmp_path / "mean")
    with pytest.raises(SystemExit):
        run(monkeypatch, "average.py", *paths)
    assert "these models need --noise-encoder" in capsys.readouterr().err
    paths += ("--noise-encoder", "iclevr-64-noise-encoder")
    run(monkeypatch, "average.py", *paths, "--share", 0.25)
    mean = IterativeGenerator.from_pretrained(tmp_path / "mean")
    for (name, weight), *ends in zip(mean.named_parameters(), one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, torch.lerp(*ends, 0.25), atol=1e-2, rtol=1e-2, msg=name)
    assert mean.correction is not None and one.correction is not None
    assert not torch.allclose(mean.correction.offsets, one.correction.offsets, atol=0.1)
    lively_generator(dataclasses.replace(COMPACT, width=5)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="models: they must have one configuration"):
        run(monkeypatch, "average.py", *paths)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((), {"correction"}),
        (("light",), {"canvas", "correction"}),
        (("codes",), {"mapping", "correction"}),
        (("places",), {"place_model", "correction"}),
        (None, {"canvas", "mapping", "place_model", "correction"}),
    ],
)
def test_refit_changes_the_parts_that_are_named_and_the_correction_and_nothing_else(
    parts: tuple[str, ...] | None, expected: set[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lively_generator(COMPACT).save_pretrained(tmp_path / "before", dtype=torch.float16)
    weights = IterativeGenerator.from_pretrained(tmp_path / "before").state_dict()
    arguments = ("--data", data, "--model", tmp_path / "before", "--out", tmp_path / "after", "--place-epochs", 3)
    arguments += ("--noise-encoder", "iclevr-64-noise-encoder")
    run(monkeypatch, "refit.py", *arguments, *(() if parts is None else ("--parts", *parts)))
    after = IterativeGenerator.from_pretrained(tmp_path / "after").state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, weights[name])}
    assert {name.split(".")[0] for name in changed} == expected
    if "canvas" in expected:
        assert {"canvas.components", "canvas.flow.high"} <= changed
        assert "canvas.grain_mix" not in changed


def test_refit_refuses_what_belongs_to_another_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    IterativeGenerator(COMPACT).save_pretrained(tmp_path / "model")
    arguments = ("--data", data, "--out", tmp_path / "after", "--model", tmp_path / "model")
    with pytest.raises(SystemExit):
        run(monkeypatch, "refit.py", *arguments)
    assert "--model needs --noise-encoder" in capsys.readouterr().err
    other = NoiseEncoderConfig(width=4, z_dim=COMPACT.z_dim + 1, places=True, window=COMPACT.window)
    NoiseEncoder(other).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        run(monkeypatch, "refit.py", *arguments, "--noise-encoder", tmp_path / "other")
    assert "noise_encoder: it is of another model, its z_dim is 7, the generator's 6" in capsys.readouterr().err
    objects = (*COMPACT.objects[1:], COMPACT.objects[0])
    IterativeGenerator(dataclasses.replace(COMPACT, objects=objects)).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        run(monkeypatch, "refit.py", *arguments, "--noise-encoder", "iclevr-64-noise-encoder")
    assert "--data: its objects.json must name the model's objects" in capsys.readouterr().err
    assert not (tmp_path / "after").exists()


def test_refit_needs_a_number_of_epochs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "refit.py", "--data", data, "--out", tmp_path / "after", "--place-epochs", 0)
    assert "--place-epochs must be 1 or more, got 0" in capsys.readouterr().err


def test_crops_of_an_untrained_generator_are_told_apart(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    generator = lively_generator(GeneratorConfig(width=4))
    generator.save_pretrained(tmp_path / "model")
    arguments = ["--data", data, "--model", tmp_path / "model", "--scenes", 20, "--held-out", 6, "--epochs", 3]
    run(monkeypatch, "crops.py", *arguments, "--seeds", 1)
    first, second = capsys.readouterr().out.splitlines()
    assert re.match(r"right about 1\.000 \(0\.\d+ to 1\.000\) of 36 squares", first), "an untrained generator"
    assert second.endswith("1.000, 1.000, 1.000")
    run(monkeypatch, "crops.py", *arguments, "--seeds", 2, "--view", "gray")
    assert capsys.readouterr().out.endswith("1.000, 1.000, 1.000\n"), "of gray squares too"
    with pytest.raises(SystemExit):
        run(monkeypatch, "crops.py", *arguments, "--held-out", 20)
    assert "--held-out must be from 1 to" in capsys.readouterr().err


def test_crops_tests_on_fewer_scenes_than_there_are(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    IterativeGenerator(COMPACT).save_pretrained(tmp_path / "model")
    count = len(SceneDataset(data, "train"))
    with pytest.raises(SystemExit):
        run(monkeypatch, "crops.py", "--data", data, "--model", tmp_path / "model", "--held-out", count)
    expected = f"--held-out must be from 1 to one less than the {count} scenes, got {count}"
    assert expected in capsys.readouterr().err


def test_looks_puts_real_pictures_first_and_measures_as_evaluate_does(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lively_generator(COMPACT).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        run(monkeypatch, "looks.py", folder, "--data", data)
    assert "three scenes of each split are needed at least" in capsys.readouterr().err
    more = write_iclevr_layout(tmp_path / "more", num_scenes=80, image_size=(64, 64))
    prepare(more, progress=False)
    run(monkeypatch, "looks.py", folder, "--data", more)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    names = [name.removeprefix("| ") for name, *_ in rows]
    assert names == ["other real pictures", "the same, blurred by 0.5 pixels", str(folder), "empty scenes"]
    real, blurred, drawn, empty = (float(frechet.split()[0]) for _, frechet, _ in rows)
    assert real < blurred < min(drawn, empty), "an untrained generator"
    generator = IterativeGenerator.from_pretrained(folder)
    report = evaluation.evaluate(generator, [["red cube"]], draws=1, data=more, progress=False)
    assert real == pytest.approx(report.measures["frechet_distance"].real, abs=0.01)
    small = IterativeGenerator(dataclasses.replace(REFERENCE, image_size=32)).save_pretrained(tmp_path / "small")
    with pytest.raises(SystemExit):
        run(monkeypatch, "looks.py", folder, small, "--data", more)
    assert "all models must draw pictures of one size" in capsys.readouterr().err


@pytest.mark.parametrize("example", ["average.py", "turns.py"])
def test_objects_in_another_order_than_the_models_are_refused(
    example: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    objects = (*COMPACT.objects[1:], COMPACT.objects[0])
    config = dataclasses.replace(COMPACT, objects=objects, correction=False)
    model = IterativeGenerator(config).save_pretrained(tmp_path / "model")
    arguments = {"average.py": (model, model, "--out", tmp_path / "mean"), "turns.py": ("--model", model)}
    with pytest.raises(SystemExit):
        run(monkeypatch, example, *arguments[example], "--data", data)
    assert "--data: its objects.json must name the model" in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()


def test_turns_finds_what_drawn_ones_have_too_much_and_too_low(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lively_generator(COMPACT).save_pretrained(tmp_path / "model")
    config = DiscriminatorConfig(width=4, condition_dim=COMPACT.condition_dim, places=True, window=COMPACT.window)
    DiffDiscriminator(config).save_pretrained(tmp_path / "discriminator")
    corrected = []

    def three_pixels_lower(self: IterativeGenerator, z: Tensor, _: Tensor, before: Tensor, places: Tensor) -> Tensor:
        assert self.correction is not None
        corrected.append(bool(self.correction.offsets.any()))
        drawn = before.clone()
        for picture, (x, y) in zip(drawn, places.round().long().tolist(), strict=True):
            square = picture[:, y + 2 : y + 5, x - 1 : x + 2]
            square.copy_(torch.where(square > 0, -0.9, 0.9))
        return drawn

    def likes_small_changes(_: DiffDiscriminator, before: Tensor, images: tuple[Tensor, ...], *__: Tensor) -> list[Any]:
        return [SimpleNamespace(logits=-(image - before).abs().mean((1, 2, 3))) for image in images]

    monkeypatch.setattr(IterativeGenerator, "forward", three_pixels_lower)
    monkeypatch.setattr(DiffDiscriminator, "compare", likes_small_changes)
    arguments = ("--data", data, "--model", tmp_path / "model", "--discriminator", tmp_path / "discriminator")
    run(monkeypatch, "turns.py", *arguments, "--scenes", 10)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 3 and all(corrected)
    for turn, line in enumerate(lines, 1):
        start, preferred, drawn, real, lower = re.split(": |, | and ", line)
        assert (start, preferred, drawn) == (str(turn), "0.000", "9.0"), "the real objects are larger"
        assert float(real) > 20
        assert abs(float(lower) - 3) < 0.5
    corrected.clear()
    run(monkeypatch, "turns.py", *arguments, "--scenes", 10, "--no-correction")
    assert corrected and not any(corrected)
    with pytest.raises(SystemExit):
        run(monkeypatch, "turns.py", *arguments, "--scenes", 25)
    assert "--scenes must be from 1 to" in capsys.readouterr().err


def test_finetune_moves_a_loaded_model_towards_the_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = GeneratorConfig(
        width=4, z_dim=4, condition_dim=8, output="blend", places=True, window=40, mapping=True, light_components=2
    )
    start = IterativeGenerator(dataclasses.replace(config, correction=True))
    randomise(start.canvas)
    assert start.correction is not None
    start.correction.offsets.fill_(0.5)
    start.save_pretrained(tmp_path / "start")
    noise_encoder = NoiseEncoder(NoiseEncoderConfig(width=4, z_dim=4, places=True, window=40))
    randomise(noise_encoder)
    noise_encoder.save_pretrained(tmp_path / "noise-encoder")
    found, used = [], []
    find, draw = NoiseEncoder.forward, IterativeGenerator.synthesis

    def watched_find(self: NoiseEncoder, *pictures: Tensor) -> Tensor:
        assert not self.training, "of one batch, the statistics would not be those that the generator knows"
        found.append(find(self, *pictures))
        return found[-1]

    def watched_draw(self: IterativeGenerator, code: Tensor, *others: Tensor) -> Tensor:
        assert self.correction is not None and not self.correction.offsets.any(), "nothing leans on it"
        if torch.is_grad_enabled():
            used.append(code)
        return draw(self, code, *others)

    monkeypatch.setattr(NoiseEncoder, "forward", watched_find)
    monkeypatch.setattr(IterativeGenerator, "synthesis", watched_draw)
    models = ("--model", tmp_path / "start", "--noise-encoder", tmp_path / "noise-encoder")
    arguments = ("--data", data, *models, "--epochs", 4, "--learning-rate", 3e-3)
    run(monkeypatch, "finetune.py", *arguments, "--out", tmp_path / "tuned")
    assert used and all(code is of_real for code, of_real in zip(used, found[: len(used)], strict=True)), "never random"
    split = SceneDataset(prepare(data, progress=False).path, "train")
    assert sum(map(len, used)) <= 4 * split.objects.numel(), "of the train split only"
    tuned = IterativeGenerator.from_pretrained(tmp_path / "tuned")
    assert not torch.equal(tuned.l0.weight, start.l0.weight)
    assert torch.equal(tuned.canvas.mean, start.canvas.mean)
    assert tuned.correction is not None and tuned.correction.offsets.any(), "it is measured anew"
    assert not torch.allclose(tuned.correction.offsets, start.correction.offsets, atol=0.1)
    losses = [
        float(text.split("loss=")[1].split("]")[0]) for text in capsys.readouterr().err.split("\r") if "loss=" in text
    ]
    assert losses[-1] < losses[0]


def test_finetune_without_a_noise_encoder_leaves_what_noise_is_mapped_to(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "BATCH_SIZE", 2)
    start = lively_generator(COMPACT)
    start.save_pretrained(tmp_path / "start")
    arguments = ("--data", data, "--model", tmp_path / "start", "--epochs", 1, "--out", tmp_path / "tuned")
    run(monkeypatch, "finetune.py", *arguments)
    tuned = IterativeGenerator.from_pretrained(tmp_path / "tuned")
    assert not torch.equal(tuned.l0.weight, start.l0.weight)
    assert tuned.mapping is not None and start.mapping is not None
    assert all(map(torch.equal, tuned.mapping.parameters(), start.mapping.parameters()))
    assert tuned.correction is not None and not tuned.correction.offsets.any()
    warning = "warning: without --noise-encoder the model loses its correction of first turns"
    assert warning in capsys.readouterr().err, "what was lost is said"


@pytest.mark.parametrize("example", ["finetune.py", "refit.py"])
@pytest.mark.parametrize("arguments", [(), ("--model", "iclevr-64")])
def test_the_noise_encoder_that_ships_is_used_with_the_model_that_ships(
    arguments: tuple[str, ...], example: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    def load(name: str | None) -> NoiseEncoder:
        names.append(name)
        raise InterruptedError

    monkeypatch.setattr(NoiseEncoder, "from_pretrained", load)
    with pytest.raises(InterruptedError):
        run(monkeypatch, example, "--data", data, "--out", tmp_path / "model", *arguments)
    assert names == ["iclevr-64-noise-encoder"]


def test_finetune_refuses_the_noise_encoder_of_another_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    IterativeGenerator(COMPACT).save_pretrained(tmp_path / "model")
    arguments = ("--data", data, "--out", tmp_path / "tuned", "--model", tmp_path / "model")
    other = NoiseEncoderConfig(width=4, z_dim=COMPACT.z_dim, places=True, window=32)
    NoiseEncoder(other).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        run(monkeypatch, "finetune.py", *arguments, "--noise-encoder", tmp_path / "other")
    assert f"it is of another model, its window is 32, the generator's {COMPACT.window}" in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()


def test_train_classifier_reports_and_saves(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", data, "--role", "judge", "--steps", 2, "--out", tmp_path / "judge")
    run(monkeypatch, "train_classifier.py", *arguments)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["split"] == "test"
    assert 0 <= lines[-1]["accuracy"] <= 1
    assert SceneClassifier.from_pretrained(tmp_path / "judge").config.widths == (40, 80, 128, 192)


def test_train_classifier_learns_the_names_of_the_data(
    other_objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--data", other_objects, "--role", "verifier", "--steps", 2, "--out", tmp_path / "verifier")
    run(monkeypatch, "train_classifier.py", *arguments)
    config = SceneClassifier.from_pretrained(tmp_path / "verifier").config
    assert (config.objects, config.image_size) == (SceneDataset(other_objects).vocabulary.names, 32)


def test_pictures_put_together_from_two_hold_what_is_said_of_them() -> None:
    """Every object is a bar of its own grey level, so what stands in a picture can be read off."""
    module = runpy.run_path(str(EXAMPLES / "train_classifier.py"))
    rng = torch.Generator().manual_seed(0)
    objects = torch.stack([torch.randperm(24, generator=rng)[:3] for _ in range(200)])
    pixels = torch.zeros(200, 3, 3, 64, 64, dtype=torch.uint8)
    for scene in range(200):
        columns = torch.randperm(12, generator=rng)[:3]
        for turn in range(3):
            column = 5 * int(columns[turn])
            pixels[scene, turn:, :, 20:40, column : column + 3] = 40 + 8 * int(objects[scene, turn])
    data = SimpleNamespace(objects=objects, pixels=pixels, vocabulary=range(24))
    pictures = module["Pictures"](data)
    scenes, turns = torch.randint(200, (64,), generator=rng), torch.randint(3, (64,), generator=rng)
    images, targets = pixels[scenes, turns].float(), pictures.targets[scenes, turns]
    composed, said = pictures._compose(images, targets, scenes, turns, rng)
    for image, target in zip(composed, said, strict=True):
        levels = {int(level) for level in image.unique().tolist()} - {0}
        assert levels == {40 + 8 * kind for kind in target.nonzero()[:, 0].tolist()}
    changed = (composed != images).flatten(1).any(1)
    assert 10 < int(changed.sum()) < 50, "about every second one"
    assert bool((said.sum(1) == 0).any()), "even the empty floor"


def test_beyond_reports_every_experiment(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lively_generator(COMPACT).save_pretrained(tmp_path / "model")
    arguments = ("--data", data, "--model", tmp_path / "model", "--lists", 1, "--redraws", 2, "--json", "--markdown")
    run(monkeypatch, "beyond.py", *arguments, "--sheet", tmp_path / "sheets")
    report, *table = capsys.readouterr().out.splitlines()
    rows = json.loads(report)["rows"]
    for row in rows:
        assert row["pictures"] >= row["lists"] > 0
        for measure in ("accuracy", "exact"):
            low, high = row[f"{measure}_ci95"] or (0, 1)
            assert 0 <= low <= row[measure] <= high <= 1
            assert (row[f"{measure}_ci95"] is None) == (row["lists"] == 1)
    assert (
        len({row["experiment"] for row in rows})
        == len(rows)
        == len(table) - 2
        == len([*(tmp_path / "sheets").iterdir()])
    )
    by_name = {row["experiment"]: row for row in rows}
    assert by_name["5 objects, failed turns redrawn"]["passes"] == 5 * 8, "this model draws nothing that is right"
    assert by_name["one turn again and again"]["place_spread"] > 0
    assert (
        by_name["one turn again and again"]["diversity"]
        > by_name["one turn again and again, at one place"]["diversity"]
    )


@pytest.mark.parametrize(
    ("example", "arguments", "message"),
    [
        ("beyond.py", ("--redraws", 1), "--redraws must be at least 2, which are compared, got 1"),
        ("beyond.py", ("--photo", "nowhere.jpg"), "--photo: "),
        ("beyond.py", ("--photo", __file__), "--photo: "),
        ("ablations.py", ("--draws", 0, "--out", "out"), "--draws must be at least 1, got 0"),
        ("held_out_pairs.py", ("--draws", 0, "--out", "out"), "--draws must be at least 1, got 0"),
    ],
)
def test_wrong_numbers_and_files_are_refused_before_the_data_is_read(
    example: str,
    arguments: tuple[object, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(monkeypatch, example, "--data", "nowhere", *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [False, True])
def test_held_out_pairs_are_not_trained_on_but_asked_for(
    words: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compact = presets.PRESETS["compact"]
    few = dataclasses.replace(compact.generator, light_components=2)  # there are only 18 scenes
    monkeypatch.setitem(presets.PRESETS, "compact", dataclasses.replace(compact, generator=few))
    arguments = ("--data", data, "--images", 15, "--width", 4, "--draws", 1, "--out", tmp_path / "run")
    held_out = ["red cube"] if words else ["red cube", "blue sphere"]
    run(monkeypatch, "held_out_pairs.py", *arguments, *(["--words"] if words else []), "--hold-out", *held_out)
    report = json.loads(capsys.readouterr().out)
    scenes = SceneDataset(data, "train")
    assert 0 < report["scenes"] == len(scenes.without(held_out)) < len(scenes)
    count = len(held_out)
    assert [report[group]["pictures"] for group in ("held_out", "seen")] == [count, 24 - count]
    for group in ("held_out", "seen"):
        for measure in ("found", "right_colour", "right_shape", "found_as_third"):
            low, high = report[group][f"{measure}_ci95"] or (0, 1)
            assert 0 <= low <= report[group][measure] <= high <= 1
            assert (report[group][f"{measure}_ci95"] is None) == (report[group]["objects"] == 1)
    config = IterativeGenerator.from_pretrained(tmp_path / "run" / "model").config
    assert (config.width, config.words) == (4, words)


def test_ablations_does_not_show_what_was_measured_with_other_settings(tmp_path: Path) -> None:
    module = runpy.run_path(str(EXAMPLES / "ablations.py"))
    measures = dict.fromkeys(module["MEASURES"], 0.5)
    settings = {"draws": 4, "images": 30, "width": 4}
    (tmp_path / "report.json").write_text(json.dumps(measures | {"settings": settings}))
    config = module["base_recipe"](30, 4)
    assert module["measured"](config, "data", tmp_path, [], 4) == measures
    for other, draws in ((config, 5), (module["base_recipe"](33, 4), 4), (module["base_recipe"](30, 8), 4)):
        with pytest.raises(SystemExit, match=r"report\.json is of .*'draws': 4.*, asked for is .*choose another --out"):
            module["measured"](other, "data", tmp_path, [], draws)


@pytest.mark.slow
def test_ablations_trains_and_measures_each_row_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corrected = []
    evaluate = evaluation.evaluate

    def watched(model: IterativeGenerator, *args: Any, **kwargs: Any) -> EvaluationReport:
        assert model.correction is not None
        corrected.append(bool(model.correction.offsets.any()))
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(evaluation, "evaluate", watched)
    preset = presets.PRESETS["compact"]
    few = dataclasses.replace(preset.generator, light_components=2)  # there are 20 scenes to fit the canvas to
    monkeypatch.setitem(presets.PRESETS, "compact", dataclasses.replace(preset, generator=few))
    rows = ("everything", "no-window")
    short = ("--images", 45, "--width", 4, "--seeds", 1, "--draws", 1)
    run(monkeypatch, "ablations.py", "--data", data, "--out", tmp_path, *short, "--rows", *rows)
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {row}" for row in rows]
    accuracy = json.loads((tmp_path / "everything-0" / "report.json").read_text())["accuracy"]
    assert table[2].startswith(f"| everything | {accuracy:.3f} ({accuracy:.3f} to {accuracy:.3f}) |")
    window = IterativeGenerator.from_pretrained(tmp_path / "no-window-0" / "model").config.window
    assert window is None
    monkeypatch.setattr(training.Trainer, "train_step", None)  # nothing is trained again
    run(monkeypatch, "ablations.py", "--data", data, "--out", tmp_path, *short, "--rows", *rows, "no-correction")
    assert capsys.readouterr().out.splitlines()[:-1] == table
    uncorrected = json.loads((tmp_path / "everything-0" / "report-uncorrected.json").read_text())
    assert uncorrected["accuracy"] is not None
    assert corrected == [True, True, False], "of the models that were measured"
    with pytest.raises(SystemExit):
        run(monkeypatch, "ablations.py", "--data", data, "--out", tmp_path, "--rows", "no-such-row")
    assert "no-such-row" in capsys.readouterr().err
