"""onnx.py and export.py: graphs draw what the generator draws, in this process and without PyTorch."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import COMPACT, REFERENCE, SCENES, lively_generator
from torch import Tensor

from condgan import GeneratorConfig, IterativeGenerator, cli, export
from condgan.functional import encode_objects, roll_conditions
from condgan.images import LEVEL
from condgan.onnx import Graph, Sessions, export_graph, graphs_of

GENERATORS = {
    "reference": REFERENCE,
    "compact": COMPACT,
    "no light": replace(COMPACT, light_inputs=0, light_components=0),
    "whole pictures": replace(COMPACT, window=None, output="tanh", mapping=False, correction=False),
}
SMALL = replace(REFERENCE, image_size=32)
slow = pytest.mark.slow
every_generator = pytest.mark.parametrize("config", GENERATORS.values(), ids=GENERATORS)


def compile_(generator: IterativeGenerator) -> IterativeGenerator:
    compiled = copy.deepcopy(generator)
    compiled.compile(backend="onnxruntime")
    return compiled


def levels_apart(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs() / LEVEL


@slow
@every_generator
@torch.no_grad()
def test_onnx_runtime_draws_the_same_scenes(config: GeneratorConfig) -> None:
    generator = lively_generator(config)
    compiled = compile_(generator)
    ours, theirs = (x.generate(SCENES, num_images=2, seed=5) for x in (generator, compiled))
    assert compiled.graphs is not None
    apart = levels_apart(ours.trajectory, theirs.trajectory)
    assert float(ours.trajectory.std()) > 0
    assert apart.max() < 1.5  # a level, where rounding went another way
    assert (apart > 0.5).float().mean() < 1e-3
    if config.places:
        assert ours.places is not None and theirs.places is not None
        for ours_put, theirs_put in zip(ours.places, theirs.places, strict=True):
            np.testing.assert_allclose(ours_put, theirs_put, atol=1e-3)
        at = [[(20.0, 30.5), *[None] * (len(scene) - 1)] for scene in SCENES]
        ours, theirs = (x.generate(SCENES, seed=5, at=at) for x in (generator, compiled))
        assert levels_apart(ours.trajectory, theirs.trajectory).max() < 1.5
        assert [scene[0] for scene in theirs.places or []] == [(20.0, 30.5)] * len(SCENES)
    ours, theirs = (x.add(ours.image, ["red cube", "blue sphere"], seed=3) for x in (generator, compiled))
    assert levels_apart(ours.trajectory, theirs.trajectory).max() < 1.5


def count_runs(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    runs: list[str] = []
    run = sessions.run

    def counted(name: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        runs.append(name)
        return run(name, inputs)

    monkeypatch.setattr(sessions, "run", counted)
    return runs


def test_single_pictures_are_drawn_by_the_graphs_and_batches_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = lively_generator(SMALL)
    before = generator.generate(SCENES[:3], seed=1, batch_size=3)
    one_by_one = generator.generate(SCENES[:3], seed=1)
    generator.compile(backend="onnxruntime")
    assert isinstance(generator.graphs, Sessions)
    runs = count_runs(generator.graphs, monkeypatch)
    assert torch.equal(generator.generate(SCENES[:3], seed=1, batch_size=3).tensor, before.tensor)
    assert runs == []
    generator.generate(SCENES[:3], seed=1)
    assert runs == ["empty", "turn", "empty", "turn", "turn", "empty", "turn", "turn", "turn"]
    # What a graph was made of must not change, so a copy has none, nor has a generator that is moved or converted.
    assert copy.deepcopy(generator).graphs is None
    assert pickle.loads(pickle.dumps(generator)).graphs is None
    assert generator.graphs is not None
    generator.to(torch.float64)
    assert generator.graphs is None
    assert torch.equal(generator.float().generate(SCENES[:3], seed=1).tensor, one_by_one.tensor)


def test_other_generators_are_not_compiled_for_onnx_runtime() -> None:
    generator = IterativeGenerator(replace(REFERENCE, width=1)).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 on the CPU, this one is torch\.bfloat16 on cpu"):
        generator.compile(backend="onnxruntime")
    assert generator.graphs is None


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=f"pip install {missing}$"):
        lively_generator(SMALL).compile(backend="onnxruntime")
    assert cli.main(["export", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip().endswith(f"pip install {missing}")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_written_over(tmp_path: Path) -> None:
    folder = lively_generator(SMALL).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has a checkpoint in it: give another folder"):
        export.export(lively_generator(REFERENCE), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@slow
def test_the_shipped_model_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "exported"
    assert cli.main(["export", "--format", "onnx", "--out", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "iclevr-64" and report["format"] == "onnx" and report["out"] == str(folder)
    names = ["README.md", "config.json", "empty.onnx", "encoder.onnx", "turn.onnx"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert report["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert report["furthest_levels"] <= 1
    # Its README's program draws both objects, though nothing of PyTorch can be imported.
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    forbidden = "import sys\nsys.modules['torch'] = None\n"
    subprocess.run([sys.executable, "-c", forbidden + program], cwd=folder, check=True, timeout=120)
    from condgan import SceneClassifier
    from condgan.images import to_tensor

    picture = to_tensor(Image.open(folder / "scene.png"))
    verifier = SceneClassifier.from_pretrained()
    found = dict(zip(verifier.config.objects, verifier.probabilities(picture[None])[0].tolist(), strict=True))
    assert {name for name, probability in found.items() if probability > 0.5} == {"gray cube", "red cube"}


@torch.no_grad()
def test_graphs_take_any_number_of_pictures_and_say_what_they_read() -> None:
    generator = lively_generator(SMALL)
    graphs = graphs_of(generator)
    assert list(graphs) == ["empty", "encoder", "turn"]
    sessions = Sessions({name: export_graph(graph) for name, graph in graphs.items()})
    for n in (1, 3):
        noise = generator.noise(range(n), 1)
        image, rest = sessions.run("empty", {"grain": noise.grain})
        objects = encode_objects([["red cube"]] * n)
        hidden = torch.zeros(n, SMALL.condition_dim)
        condition, _ = sessions.run("encoder", {"objects": objects[:, 0], "hidden": hidden})
        torch.testing.assert_close(condition, roll_conditions(generator.encoder, objects)[0][:, 0])
        inputs = {"image": image, "rest": rest, "condition": condition, "z": noise.z[:, 0]}
        drawn, _ = sessions.run("turn", inputs)
        expected = generator.generate([["red cube"]] * n, seed=0)
        assert levels_apart(drawn, expected.tensor).max() < 1.5


@slow
def test_graphs_that_draw_something_else_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = lively_generator(SMALL)

    def damaged(graph: Graph) -> bytes:
        for parameter in graph.module.parameters():
            parameter.data *= 0.9
        content = export_graph(graph)
        for parameter in graph.module.parameters():
            parameter.data /= 0.9
        return content

    monkeypatch.setattr(export, "export_graph", damaged)
    with pytest.raises(RuntimeError, match=r"off in .*nothing was written"):
        export.export(generator, tmp_path / "out")
    assert [*(tmp_path / "out").iterdir()] == []


@slow
def test_a_readme_that_is_there_stays(tmp_path: Path) -> None:
    generator = lively_generator(SMALL)
    (tmp_path / "README.md").write_text("mine")
    found = export.export(generator, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert [*found.files] == ["config.json", "empty.onnx", "encoder.onnx", "turn.onnx"]
    assert found.levels <= 1
