"""What a GPU is for, on one that is not there (``pretend_gpu``): nothing is left on the CPU, hardly anything waits."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import GPU, OnGpu, pretend_gpu
from tiny import RUN, SCENES, make_trainer
from torch import Tensor

from condgan import IterativeGenerator, ObjectCounter, SceneClassifier, precision, ranks
from condgan.cli import main
from condgan.datasets import SceneDataset
from condgan.images import LEVEL
from condgan.realism import ToldApart, told_apart
from condgan.results import Drawing
from condgan.runs import train
from condgan.shards import draw_set


def test_the_pretended_gpu_is_as_strict_as_a_real_one() -> None:
    with pretend_gpu() as gpu:
        there = torch.arange(4.0, device=GPU)
        assert (there.device, (there + 1).sum().item()) == (GPU, 10)
        assert there[torch.tensor([1, 2])].tolist() == [1, 2]
        gpu.waits.clear()
        assert (there * 2 + torch.tensor(1.0)).device == GPU, "numbers without a shape may come from the CPU"
        there[0] = torch.tensor(3.0)
        assert gpu.waits == []
        assert there.cpu().tolist() == [3, 1, 2, 3]
        assert len(gpu.waits) == 1
        for wrong in (
            lambda: there + torch.ones(4),
            lambda: torch.ones(4)[there.long()],
            lambda: torch.randn(4, device=GPU, generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError):
                wrong()
        with pytest.raises(TypeError):
            there.numpy()


def on_gpu(generator: IterativeGenerator) -> IterativeGenerator:
    moved: IterativeGenerator = copy.deepcopy(generator).to(GPU)
    assert all(isinstance(x, OnGpu) for x in (*moved.parameters(), *moved.buffers()))
    return moved


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator: generator.generate(SCENES[:3], seed=1, batch_size=1),
        lambda generator: generator.generate(SCENES[:3], seed=1, best_of=2, batch_size=1),
        lambda generator: generator.add(generator.generate(SCENES[2], seed=3).image, "red cube", seed=1),
    ],
)
def test_a_gpu_draws_what_a_cpu_draws(
    generator: IterativeGenerator, draw: Callable[[IterativeGenerator], Drawing]
) -> None:
    wanted = draw(generator)
    with pretend_gpu():
        drawn = draw(on_gpu(generator))
    assert type(drawn.trajectory) is torch.Tensor
    difference = (drawn.trajectory - wanted.trajectory).abs()
    assert difference.max() < 1.01 * LEVEL, "last bits, which decide on a level of 256 now and then"
    assert (difference > 0).float().mean() < 2e-3
    assert drawn.places == wanted.places


@pytest.mark.parametrize("objective", ["relativistic", "reference"])
def test_a_gpu_learns_what_a_cpu_learns_and_is_waited_for_once_a_step(data: Path, objective: str) -> None:
    config = dataclasses.replace(RUN, objective=objective, legibility_weight=1.0, reconstruction_images=27)
    trainer = make_trainer(data, config, SceneClassifier.from_pretrained())
    wanted = [trainer.train_step() for _ in range(6)]
    with pretend_gpu() as gpu:
        trainer = make_trainer(data, config, SceneClassifier.from_pretrained(), GPU)
        losses, waits = [], []
        for _ in range(6):
            gpu.waits.clear()
            losses.append(trainer.train_step())
            waits.append([*gpu.waits])
        finished = trainer.finish(progress=False)
    assert "penalty" in losses[-2], "the stage is the adversarial one"
    torch.testing.assert_close(losses, wanted)
    del waits[2]  # the last step of the first stage, after which the mapping is fitted
    assert {len(lines) for lines in waits} == {1}
    assert ".tolist()" in waits[-1][0]
    assert all(isinstance(x, OnGpu) for x in (*finished.parameters(), *finished.buffers()))


def test_a_run_on_a_gpu_goes_on_where_it_was(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "own_device", lambda device: torch.device(GPU if device is None else device))
    whole = train(data, tmp_path / "whole", RUN, device="cpu", progress=False)
    with pretend_gpu():
        train(data, tmp_path / "parts", dataclasses.replace(RUN, images=45), progress=False)
        generator = train(data, tmp_path / "parts", RUN, progress=False)
        assert next(generator.parameters()).device == GPU
    drawn = IterativeGenerator.from_pretrained(tmp_path / "parts/model").generate(SCENES[2], seed=1)
    torch.testing.assert_close(drawn.tensor, whole.generate(SCENES[2], seed=1).tensor)


def test_a_model_on_a_gpu_is_evaluated_as_on_a_cpu(
    compact: IterativeGenerator, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps(SCENES[:3]))
    command = ["evaluate", str(compact.save_pretrained(tmp_path / "model")), "--conditions", str(lists)]
    command += ["--draws", "2", "--data", str(data), "--json", "--device"]
    reports = {}
    for device in ("cpu", GPU.type):
        with pretend_gpu() as gpu:
            assert main([*command, device]) == 0
        reports[device] = json.loads(capsys.readouterr().out)
        assert bool(gpu.waits) == (device == GPU.type), "the pictures come from there"
        del reports[device]["seconds"]
    numbers = {name: value for name, value in reports["cpu"].items() if isinstance(value, float)}
    assert {"accuracy", "exact", "object_f1", "preservation", "diversity"} <= numbers.keys()
    for name, value in numbers.items():
        assert reports[GPU.type][name] == pytest.approx(value, rel=1e-3), name


def test_a_batch_of_scenes_waits_for_a_gpu_when_it_is_drawn(generator: IterativeGenerator) -> None:
    with pretend_gpu() as gpu:
        generator = on_gpu(generator)
        places = [[(20.0, 30.0)] * len(scene) for scene in SCENES] if generator.config.places else None
        gpu.waits.clear()
        generator.generate(SCENES, seed=1, at=places)
    assert len(gpu.waits) == 1 + generator.config.places, "pictures and places"


def test_a_set_is_drawn_on_a_gpu(compact: IterativeGenerator, tmp_path: Path) -> None:
    lists = tmp_path / "lists.jsonl"
    lists.write_text("\n".join(map(json.dumps, SCENES[:3])))
    draw_set(compact, lists, tmp_path / "cpu", batch_size=2, progress=False)
    with pretend_gpu():
        draw_set(on_gpu(compact), lists, tmp_path / "gpu", batch_size=2, progress=False)
    assert (tmp_path / "gpu/00000.tar").read_bytes() == (tmp_path / "cpu/00000.tar").read_bytes()


@pytest.mark.parametrize(
    ("model", "read"),
    [
        (SceneClassifier, lambda model, images: model.probabilities(images)),
        (ObjectCounter, lambda model, images: model.count(images)),
        (ObjectCounter, lambda model, images: torch.cat(model.places(images))),
    ],
)
def test_pictures_are_read_on_a_gpu(model: Any, read: Callable[[Any, Tensor], Tensor], data: Path) -> None:
    images = SceneDataset(data, "train")[0].images
    wanted = read(model.from_pretrained(), images)
    with pretend_gpu():
        reader = model.from_pretrained().to(GPU)
        for given in (images, images.to(GPU)):
            found = read(reader, given)
            assert found.device == GPU
            torch.testing.assert_close(found.cpu(), wanted)


def test_classifiers_learn_on_a_gpu_to_tell_pictures_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    real, drawn = (torch.randint(low, low + 100, (96, 3, 16, 16), generator=rng).to(torch.uint8) for low in (0, 50))
    pictures = {"held_out_real": real[64:], "held_out_drawn": drawn[64:]}

    def trial(device: torch.device | str) -> ToldApart:
        return told_apart(real[:64], drawn[:64], **pictures, seeds=1, epochs=2, device=device, progress=False)

    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: False)
    wanted = trial("cpu")
    with pretend_gpu():
        found = trial(GPU)
    torch.testing.assert_close(found.real_scores, wanted.real_scores)
