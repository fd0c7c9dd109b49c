"""Drawing: the reference's networks beside the plain way and the machine's limit, the shipped model beside its peer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import peer, plain
from benchmarks.measure import DTYPES, Row, dispatched, interleaved, matrix_product, median, operations, ratio
from condgan import IterativeGenerator

SCENE = ["red cube", "blue sphere", "gray cylinder"]
IN_A_ROW = 5
"""Pictures that the shipped model and its peer draw in each round; the median counts, as for one who draws several."""
AT_ONCE = 8
"""Pictures that pass both at once where many are drawn: with 64 at once the peer takes longer for each."""


def reference_generator() -> IterativeGenerator:
    """The reference's networks in eval mode; a fresh norm ignores its condition, so the weights are shaken."""
    torch.manual_seed(0)
    generator = IterativeGenerator().eval().requires_grad_(False)
    for module in generator.modules():
        if isinstance(module, nn.Linear):
            module.weight += 0.02 * torch.randn_like(module.weight)
    return generator


def turn_input(generator: IterativeGenerator, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, conditions and previous pictures of N turns."""
    z, condition = torch.randn(n, generator.z_dim), torch.randn(n, generator.config.condition_dim)
    return z, condition, torch.rand(n, 3, 64, 64) * 2 - 1


def fast_turn(
    generator: IterativeGenerator, dtype: torch.dtype, z: Tensor, condition: Tensor, before: Tensor
) -> Callable[[], object]:
    """One turn as a user gets it with ``.to(dtype).to(memory_format=torch.channels_last)``."""
    ours = copy.deepcopy(generator).to(dtype).to(memory_format=torch.channels_last)
    return partial(ours, z.to(dtype), condition.to(dtype), before)


@torch.no_grad()
def reference(rounds: int) -> Iterator[Row]:
    """Turns a second of the reference's networks at batch 1, 8 and 64."""
    usual = reference_generator()
    for n in (1, 8, 64):
        z, condition, before = turn_input(usual, n)
        cases: dict[str, Callable[[], object]] = {"plain": partial(plain.turn, usual, z, condition, before)}
        cases |= {name: fast_turn(usual, dtype, z, condition, before) for name, dtype in DTYPES.items()}
        work = operations(cases["float32"])
        less = work / operations(cases["plain"])
        limits = {name: matrix_product(dtype) for name, dtype in DTYPES.items()}
        times = interleaved({**cases, **{f"limit {name}": limit for name, (limit, _) in limits.items()}}, rounds)
        yield Row("drawing", f"reference, batch {n}, plain", n / median(times, "plain"), "turns/s", 1.0)
        for name, (_, multiplied) in limits.items():
            share = work / multiplied * ratio(times, f"limit {name}", name)
            faster = ratio(times, "plain", name)
            yield Row("drawing", f"reference, batch {n}, {name}", n / median(times, name), "turns/s", faster, share)
    yield Row("drawing", "reference, arithmetic of the plain way that is left", less, "share")


@torch.no_grad()
def steps(rounds: int) -> Iterator[Row]:
    """What each step away from the plain way brought, at batch 64."""
    n, usual = 64, reference_generator()
    z, condition, before = turn_input(usual, n)
    cases: list[Callable[[], object]] = [partial(plain.turn, usual, z, condition, before, steps) for steps in range(3)]
    cases += [fast_turn(usual, dtype, z, condition, before) for dtype in DTYPES.values()]
    names = ("plain", *plain.STEPS)[: len(cases)]  # bfloat16 is the last
    times = interleaved(dict(zip(names, cases, strict=True)), rounds)
    for name in names[1:]:
        yield Row("steps", name, n / median(times, name), "turns/s", ratio(times, "plain", name))


def shipped(rounds: int) -> Iterator[Row]:
    """The shipped model: latency of a scene of three turns, scenes a second, and the peer."""
    generator = IterativeGenerator.from_pretrained()

    def draws(count: int, batch_size: int | None = None) -> Callable[[], object]:
        return partial(generator.generate, [SCENE] * count, seed=0, batch_size=batch_size)

    times = interleaved({"one": draws(1)}, 10 * rounds)
    yield Row("drawing", "shipped model, latency of a scene of 3 turns", 1000 * median(times, "one"), "ms")
    yield Row("drawing", "shipped model, operations of a scene of 3 turns", dispatched(draws(1)), "dispatched")
    cases = {f"batch {n}": (n, draws(n)) for n in (1, 8, 64)}
    cases |= {f"64 scenes, {n} at once": (64, draws(64, n)) for n in (8, 16, 64)}
    times = interleaved({name: case for name, (_, case) in cases.items()}, rounds)
    for name, (count, _) in cases.items():
        yield Row("drawing", f"shipped model, {name}", count / median(times, name), "scenes/s")
    if not peer.is_installed():
        print(peer.MISSING, flush=True)
        return
    size = sum(p.numel() for p in generator.parameters())
    for batch_size, in_a_row, what in ((1, IN_A_ROW, "one picture"), (AT_ONCE, 1, f"{AT_ONCE} pictures at once")):
        diffuse, parameters = peer.diffusion(size, batch_size=batch_size)
        both = {"peer": diffuse, "ours": draws(batch_size, batch_size)}
        times = interleaved(both, max(3, rounds // 3), in_a_row)
        name = f"diffusion of {parameters / 1e6:.1f} M parameters, DDIM {peer.STEPS} steps, {what}"
        yield Row("drawing", name, 1000 * median(times, "peer") / batch_size, "ms a picture")
        yield Row("drawing", f"shipped model against it, {what}", ratio(times, "peer", "ours"), "times faster")


def run(rounds: int) -> Iterator[Row]:
    """All rows of this part."""
    yield from reference(rounds)
    yield from shipped(rounds)
