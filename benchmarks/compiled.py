"""What torch.compile brings: the shipped model and its peer, each as it is and compiled. Needs a C++ compiler."""

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
    plain, compiled = IterativeGenerator.from_pretrained(), IterativeGenerator.from_pretrained()
    compiled.compile()
    cases: dict[str, Callable[[], object]] = {
        "plain": partial(plain.generate, SCENE, seed=0),
        "compiled": partial(compiled.generate, SCENE, seed=0),
    }
    started = time.perf_counter()
    cases["compiled"]()
    yield Row("compiled", "first scene, with compiling", time.perf_counter() - started, "s")
    times = interleaved(cases, 10 * rounds)
    yield Row("compiled", "scene of 3 turns, as it is", 1000 * median(times, "plain"), "ms")
    yield Row("compiled", "scene of 3 turns, compiled", 1000 * median(times, "compiled"), "ms")
    yield Row("compiled", "compiled against as it is", ratio(times, "plain", "compiled"), "times faster")
    if not peer.is_installed():
        print(peer.MISSING, flush=True)
        return
    parameters = sum(p.numel() for p in plain.parameters())
    cases["peer"], _ = peer.diffusion(parameters)
    cases["compiled peer"], _ = peer.diffusion(parameters, compiled=True)
    times = interleaved(cases, max(3, rounds // 3), IN_A_ROW)
    yield Row("compiled", "diffusion, as it is", 1000 * median(times, "peer"), "ms")
    yield Row("compiled", "diffusion, compiled", 1000 * median(times, "compiled peer"), "ms")
    for name, theirs, ours in (
        ("both as they are", "peer", "plain"),
        ("ours compiled, diffusion as it is", "peer", "compiled"),
        ("both compiled", "compiled peer", "compiled"),
    ):
        yield Row("compiled", f"shipped model against diffusion, {name}", ratio(times, theirs, ours), "times faster")
