"""A generator in a folder of ONNX files, for programs without PyTorch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from condgan import __version__
from condgan.files import replace_files
from condgan.hub import CARD_NAME
from condgan.images import LEVEL
from condgan.models import IterativeGenerator
from condgan.onnx import OPSET, Graph, Sessions, export_graph, graphs_of, need_packages, plain_copy
from condgan.remote import CONFIG_NAME, WEIGHTS_NAME

TOLERANCE = 1e-3
"""How far outputs of graphs may be from PyTorch's, pictures aside: places in pixels, conditions as they are."""


class Export(NamedTuple):
    """What :func:`export` has written."""

    folder: Path
    files: dict[str, int]
    """Bytes of each file."""
    levels: float
    """How far a picture of the graphs was from PyTorch's at most, in 256 levels; 1 where rounding went another way."""


def export(generator: IterativeGenerator, folder: str | Path, *, progress: bool = False) -> Export:
    """Write a generator as ONNX files, for programs without PyTorch, and its config and a README with an example.

    The graphs are run beside the generator first, on two pictures each. A ``README.md`` that is there stays.

    Args:
        generator: left as it is; the files are in float32 whatever it is in.
        folder: made if it is not there.
        progress: show a progress bar on stderr.

    Raises:
        ModuleNotFoundError: a package of the extra ``onnx`` is not installed.
        OSError: the folder cannot be written.
        RuntimeError: the graphs do not draw what the generator draws.
        ValueError: the folder has a checkpoint, whose config would be replaced.
    """
    need_packages()
    folder = Path(folder).expanduser()
    if (folder / WEIGHTS_NAME).exists():
        raise ValueError(f"{folder} has a checkpoint in it: give another folder, such as {folder / 'onnx'}")
    folder.mkdir(parents=True, exist_ok=True)  # nobody wants to hear after a minute that it cannot be made
    generator = plain_copy(generator)
    graphs = graphs_of(generator)
    bar = tqdm(graphs.items(), desc="exporting", unit="graph", file=sys.stderr, disable=not progress)
    contents = {name: export_graph(graph) for name, graph in bar}
    levels = _compare(generator, graphs, Sessions(contents))
    files = {CONFIG_NAME: generator.config_json(), **{f"{name}.onnx": content for name, content in contents.items()}}
    if not (folder / CARD_NAME).exists():
        files[CARD_NAME] = _readme(graphs, generator.config.objects[:2]).encode()
    replace_files(folder, files)
    return Export(folder, {name: len(content) for name, content in files.items()}, levels)


@torch.no_grad()
def _compare(generator: IterativeGenerator, graphs: Mapping[str, Graph], sessions: Sessions) -> float:
    """Draw two pictures with the graphs and without, each graph on the same inputs; how far they are apart in levels.

    Raises:
        RuntimeError: pictures are more than a level apart, or other outputs more than rounding explains.
    """
    noise = generator.noise([0, 1], 1)
    middle = (generator.image_size - 1) / 2
    known = {
        "light": noise.light,
        "grain": noise.grain,
        "objects": torch.eye(len(generator.vocabulary))[[0, -1]],
        "hidden": torch.zeros(2, generator.config.condition_dim),
        "z": noise.z[:, 0],
        "uniform": noise.uniform[:, 0],
        "at": torch.tensor([[math.nan, math.nan], [middle, middle]]),
    }
    furthest = 0.0
    for name, graph in graphs.items():  # each reads what those before it gave
        expected = graph.module(*(known[wanted] for wanted in graph.inputs))
        for output, ours, theirs in zip(graph.outputs, expected, sessions.run(name, known), strict=True):
            apart = float((ours - theirs).abs().max())
            if output == "next_image":
                furthest = max(furthest, apart / LEVEL)
            if not apart <= (1.5 * LEVEL if output in ("next_image", "next_rest") else TOLERANCE):
                raise RuntimeError(
                    f"the graph {name!r} is {apart:.3g} off in {output!r}: other versions of torch, onnxscript or "
                    "onnxruntime may do better; nothing was written"
                )
            known[output.removeprefix("next_")] = ours
    return furthest


def _readme(graphs: Mapping[str, Graph], objects: Sequence[str]) -> str:
    """Text of the folder's ``README.md``, with a program that draws."""

    def shaped(name: str, shape: Sequence[int]) -> str:
        return f"`{name}` ({', '.join(map(str, ['N', *shape]))})"

    rows = "\n".join(
        f"| `{name}.onnx` | {', '.join(shaped(*item) for item in graph.inputs.items())} | "
        f"{', '.join(f'`{output}`' for output in graph.outputs)} |"
        for name, graph in graphs.items()
    )
    random = {"uniform": "rng.random((1, 3), dtype=np.float32)", "at": "np.full((1, 2), np.nan, np.float32)"}

    def given(name: str, indent: int = 0) -> str:
        """What the program gives a graph, line by line if indented."""
        inputs = graphs[name].inputs
        values = {
            key: f"normal({', '.join(map(str, shape))})" if key in ("grain", "light", "z") else random.get(key, key)
            for key, shape in inputs.items()
        }
        items = [f'"{key}": {value}' for key, value in values.items()]
        margin = "\n" + " " * indent
        return f"{{{margin}    {f',{margin}    '.join(items)},{margin}}}" if indent else f"{{{', '.join(items)}}}"

    return f"""# Graphs of a condgan generator

Written by condgan {__version__}, opset {OPSET}, float32. They draw scenes turn by turn: an empty scene, and then for
each object the RNN and a turn.

| file | inputs | outputs |
|---|---|---|
{rows}

Pictures are in [-1, 1], at 256 levels; `rest` is what rounding to these took, which the next turn gets. `grain`,
`light` and `z` are standard normal, `uniform` is in [0, 1), `objects` has a 1 at each object of the turn, in the order
of `objects` in `config.json`, and `hidden` begins with zeros. `at` is where the object goes, in pixels (x, y); NaN
leaves it to the model.

```python
import json

import numpy as np
import onnxruntime
from PIL import Image

names = json.load(open("{CONFIG_NAME}"))["objects"]
empty, encoder, turn = (onnxruntime.InferenceSession(f"{{name}}.onnx") for name in ("empty", "encoder", "turn"))
rng = np.random.default_rng(7)


def normal(*shape):
    return rng.standard_normal((1, *shape), dtype=np.float32)


image, rest = empty.run(None, {given("empty")})
hidden = np.zeros((1, {graphs["encoder"].inputs["hidden"][0]}), np.float32)
for name in {json.dumps(objects)}:
    objects = np.eye(len(names), dtype=np.float32)[[names.index(name)]]
    condition, hidden = encoder.run(None, {given("encoder")})
    image, rest, *place = turn.run(None, {given("turn", 4)})
pixels = ((image[0].transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
Image.fromarray(pixels).save("scene.png")
```
"""
