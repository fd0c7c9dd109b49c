"""The examples run as they stand, on small scenes drawn by the tests."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from reference import randomise
from scenes import write_iclevr_layout

from condgan import GeneratorConfig, IterativeGenerator, SceneClassifier
from condgan.prepare import prepare

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_iclevr_layout(tmp_path_factory.mktemp("examples"), num_scenes=24, image_size=(64, 64))
    prepare(folder, progress=False)
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


def test_finetune_moves_a_loaded_model_towards_the_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = GeneratorConfig(width=4, z_dim=4, condition_dim=8, output="blend", places=True, light_components=2)
    start = IterativeGenerator(config)
    randomise(start.canvas)
    start.save_pretrained(tmp_path / "start")
    arguments = ("--data", data, "--model", tmp_path / "start", "--epochs", 4, "--learning-rate", 3e-3)
    run(monkeypatch, "finetune.py", *arguments, "--out", tmp_path / "tuned")
    tuned = IterativeGenerator.from_pretrained(tmp_path / "tuned")
    assert not torch.equal(tuned.l0.weight, start.l0.weight)
    assert torch.equal(tuned.canvas.mean, start.canvas.mean)
    losses = [
        float(text.split("loss=")[1].split("]")[0]) for text in capsys.readouterr().err.split("\r") if "loss=" in text
    ]
    assert losses[-1] < losses[0]


def test_train_classifier_reports_and_saves(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", data, "--role", "judge", "--steps", 2, "--out", tmp_path / "judge")
    run(monkeypatch, "train_classifier.py", *arguments)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["split"] == "test"
    assert 0 <= lines[-1]["accuracy"] <= 1
    assert SceneClassifier.from_pretrained(tmp_path / "judge").config.widths == (24, 48, 96, 160)
