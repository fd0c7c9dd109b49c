"""What compiling brings: the shipped model and its peer, as they are, by torch.compile and by ONNX Runtime.

torch.compile needs a C++ compiler, ONNX Runtime the extra ``onnx``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import peer
from benchmarks.drawing import IN_A_ROW, SCENE
from benchmarks.measure import Row, interleaved, median, ratio
from condgan import IterativeGenerator


def run(rounds: int) -> Iterator[Row]:
    """All rows of this part; weights, and what layers make of them, become constants of what is compiled."""
    with torch._inductor.config.patch(freezing=True):
        yield from _rows(rounds)


def _rows(rounds: int) -> Iterator[Row]:
    generators = {name: IterativeGenerator.from_pretrained() for name in ("as it is", "compiled", "ONNX Runtime")}
    cases: dict[str, Callable[[], object]] = {
        name: partial(generator.generate, SCENE, seed=0) for name, generator in generators.items()
    }
    for name, options in (("compiled", {}), ("ONNX Runtime", {"backend": "onnxruntime"})):
        started = time.perf_counter()
        generators[name].compile(**options)
        cases[name]()
        yield Row("compiled", f"first scene, {name}, with compiling", time.perf_counter() - started, "s")
    times = interleaved(cases, 2 * rounds, IN_A_ROW)
    for name in cases:
        yield Row("compiled", f"scene of 3 turns, {name}", 1000 * median(times, name), "ms")
    for name in ("compiled", "ONNX Runtime"):
        yield Row("compiled", f"{name} against as it is", ratio(times, "as it is", name), "times faster")
    if not peer.is_installed():
        print(peer.MISSING, flush=True)
        return
    parameters = sum(p.numel() for p in generators["as it is"].parameters())
    for runtime in generators:
        cases[f"diffusion, {runtime}"], _ = peer.diffusion(parameters, runtime=runtime)
    times = interleaved(cases, max(3, rounds // 3), IN_A_ROW)
    for theirs in generators:
        yield Row("compiled", f"diffusion, {theirs}", 1000 * median(times, f"diffusion, {theirs}"), "ms")
    for theirs in generators:
        for ours in generators:
            if theirs in ("as it is", ours):
                name = f"shipped model, {ours}, against diffusion, {theirs}"
                yield Row("compiled", name, ratio(times, f"diffusion, {theirs}", ours), "times faster")
