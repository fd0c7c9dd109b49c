"""A generator as ONNX graphs, and ONNX Runtime to draw with them, which on CPUs draws single pictures faster.

There are three: the empty scene, the RNN, and one turn. Random numbers are inputs, so every graph is a function.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from condgan.configs import GeneratorConfig
from condgan.drawing import DrawnTurn, SceneModel, TurnNoise, empty_scene, turn_of

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OPSET = 20
INT32, INT64 = 6, 7
"""Numbers that ONNX has for types."""


class GraphModel(SceneModel, Protocol):
    """What becomes graphs; :class:`condgan.IterativeGenerator` is one."""

    @property
    def config(self) -> GeneratorConfig: ...


ModelT = TypeVar("ModelT", bound=GraphModel)


class Graph(NamedTuple):
    """A function that becomes a graph: a module of named inputs (N, ...) and outputs (N, ...), all float32."""

    module: nn.Module
    inputs: Mapping[str, tuple[int, ...]]
    """Shape of each without N."""
    outputs: list[str]


class _EmptyScene(nn.Module):
    def __init__(self, generator: SceneModel) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, grain: Tensor, light: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return empty_scene(self.generator, grain.new_zeros(grain.shape[0], 0) if light is None else light, grain)


class _OneTurn(nn.Module):
    def __init__(self, generator: SceneModel) -> None:
        super().__init__()
        self.generator = generator

    def forward(
        self,
        image: Tensor,
        rest: Tensor,
        condition: Tensor,
        z: Tensor,
        uniform: Tensor | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        noise = TurnNoise(z.new_zeros(z.shape[0], 0) if uniform is None else uniform, z)
        drawn = turn_of(self.generator, image, rest, condition, noise, at)
        return tuple(x for x in drawn if x is not None)


def graphs_of(generator: GraphModel) -> dict[str, Graph]:
    """The functions that draw scenes, by the names of their files.

    - ``empty``: ``grain`` (N, 3, H, W) and, if the generator's light varies, ``light`` (N, L), both standard normal, to
      ``next_image`` (N, 3, H, W) in [-1, 1], at 256 levels, and ``next_rest``, what rounding to them took.
    - ``encoder``: ``objects`` (N, K) of 0 and 1 and ``hidden`` (N, D), zeros at first, to ``condition`` (N, D) and
      ``next_hidden``.
    - ``turn``: ``image``, ``rest``, ``condition``, ``z`` (N, z_dim), standard normal, and, if the generator knows
      places, ``uniform`` (N, 3) in [0, 1) and ``at`` (N, 2), asked places in pixels (x, y), NaN where the place is
      drawn; to ``next_image``, ``next_rest`` and ``place``.
    """
    config = generator.config
    picture = 3, config.image_size, config.image_size
    light = {"light": (config.light_components,)} if config.light_components else {}
    where = {"uniform": (3,), "at": (2,)} if config.places else {}
    scene = {"image": picture, "rest": picture, "condition": (config.condition_dim,), "z": (config.z_dim,)}
    told = {"objects": (len(generator.vocabulary),), "hidden": (config.condition_dim,)}
    drawn = ["next_image", "next_rest"]
    return {
        "empty": Graph(_EmptyScene(generator), {"grain": picture, **light}, drawn),
        "encoder": Graph(cast(nn.Module, generator.encoder), told, ["condition", "next_hidden"]),
        "turn": Graph(_OneTurn(generator), {**scene, **where}, [*drawn, *(["place"] if config.places else [])]),
    }


def export_graph(graph: Graph) -> bytes:
    """The bytes of an ONNX file, for any N; needs the extra ``onnx`` (:func:`need_packages`)."""
    import onnxscript.optimizer

    two = tuple(torch.zeros(2, *shape) for shape in graph.inputs.values())
    for_any_n = tuple({0: torch.export.Dim.DYNAMIC} for _ in two)
    with torch.no_grad(), _quiet():
        exported = torch.export.export(graph.module, two, dynamic_shapes=for_any_n, strict=False)
        program: Any = torch.onnx.export(
            exported,
            input_names=[*graph.inputs],
            output_names=graph.outputs,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,  # would look for patterns of other networks, which takes longer than all else
            verbose=False,
            custom_translation_table={
                torch.ops.aten.linalg_solve_ex.default: _solve,
                torch.ops.aten.searchsorted.Tensor: _count,
            },
        )
        onnxscript.optimizer.fold_constants(program.model)
        onnxscript.optimizer.remove_unused_nodes(program.model)
    content: bytes = program.model_proto.SerializeToString()
    return content


def _solve(a: Any, b: Any, left: bool = True, check_errors: bool = False) -> tuple[Any, Any]:
    """In ONNX ``torch.linalg.solve_ex`` of well conditioned (N, K, K) and (N, K, 1), by elimination, unrolled."""
    op = _operators()
    size = a.shape[1]
    system = op.Concat(a, b, axis=2)
    for k in range(size):  # becomes the k-th row of the solved system, and 0 in the k-th column of all others
        row, column = op.Gather(system, _ints(k), axis=1), op.Gather(system, _ints(k), axis=2)
        unit = op.Unsqueeze(op.Constant(value_floats=[float(i == k) for i in range(size)]), _ints(1))
        row = op.Div(row, op.Gather(row, _ints(k), axis=2))
        system = op.Sub(system, op.Mul(op.Sub(column, unit), row))
    found = op.Gather(system, _ints(size), axis=2)
    return found, op.Cast(op.ReduceSum(found, _ints(1, 2), keepdims=0), to=INT32)


def _count(ordered: Any, values: Any, right: bool = False, **_: object) -> Any:
    """In ONNX ``torch.searchsorted`` with ``right=True``: how many of (N, P) are not above each of (N, Q)."""
    assert right
    op = _operators()
    below = op.LessOrEqual(op.Unsqueeze(ordered, _ints(1)), op.Unsqueeze(values, _ints(2)))
    return op.ReduceSum(op.Cast(below, to=INT64), _ints(2), keepdims=0)


def _operators() -> Any:
    from onnxscript import opset20

    return opset20


def _ints(*values: int) -> Any:
    return _operators().Constant(value_ints=values)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell those who develop them."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def need_packages() -> None:
    """Raise a ModuleNotFoundError unless the packages of the extra ``onnx`` are there."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"ONNX graphs need packages that are not there: pip install {' '.join(missing)}")


class Sessions:
    """Draws pictures with ONNX Runtime, on the CPU.

    With one thread: in a scene there is little for a second one to do, and where both wait actively for work, as they
    do, those of ONNX Runtime and of PyTorch keep each other from the cores.

    Args:
        contents: graphs by their names in :func:`graphs_of`, as :func:`export_graph` gives them.
    """

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._sessions = {
            name: onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            for name, content in contents.items()
        }

    def run(self, name: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of a graph, given its inputs by name, on the CPU; what it does not read is left out."""
        session = self._sessions[name]
        read = [wanted.name for wanted in session.get_inputs()]
        given = {name: np.ascontiguousarray(inputs[name].numpy()) for name in read}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    def empty_scene(self, light: Tensor, grain: Tensor) -> tuple[Tensor, Tensor]:
        """As :func:`condgan.drawing.empty_scene`."""
        image, rest = self.run("empty", {"light": light, "grain": grain})
        return image, rest

    def turn(self, image: Tensor, rest: Tensor, condition: Tensor, noise: TurnNoise, asked: Tensor | None) -> DrawnTurn:
        """As :func:`condgan.drawing.turn_of`."""
        at = noise.uniform.new_full((len(image), 2), math.nan) if asked is None else asked
        scene = {"image": image, "rest": rest, "condition": condition}
        drawn, left, *place = self.run("turn", {**scene, **noise._asdict(), "at": at})
        return DrawnTurn(drawn, left, place[0] if place else None)


def compiled(generator: GraphModel) -> Sessions:
    """What ``IterativeGenerator.compile(backend="onnxruntime")`` draws with.

    Raises:
        ModuleNotFoundError: a package of the extra ``onnx`` is not installed.
        ValueError: the generator is not in float32 on the CPU.
    """
    weight = next(generator.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ValueError(
            f'backend="onnxruntime" is for generators in float32 on the CPU, this one is {weight.dtype} on '
            f"{weight.device}: compile it before it is moved or converted, or leave the backend out"
        )
    need_packages()
    graphs = graphs_of(plain_copy(generator))
    return Sessions({name: export_graph(graphs[name]) for name in ("empty", "turn")})


def plain_copy(generator: ModelT) -> ModelT:
    """A copy in eval mode, in float32, on the CPU."""
    module: Any = copy.deepcopy(generator)
    copied: ModelT = module.to("cpu", torch.float32).eval()
    return copied
