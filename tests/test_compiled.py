"""torch.compile: a compiled generator draws the same scenes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from tiny import COMPACT, SCENES, assert_drawn_alike, lively_generator

from condgan import IterativeGenerator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]


@pytest.fixture
def compiled() -> Iterator[IterativeGenerator]:
    """A generator that is compiled with its first scene, as docs/performance.md says it is fastest."""
    generator = lively_generator(COMPACT)
    with torch._inductor.config.patch(freezing=True):
        generator.compile()
        yield generator
    torch.compiler.reset()


def test_a_compiled_generator_draws_the_same_scenes_and_is_compiled_once(compiled: IterativeGenerator) -> None:
    wanted = lively_generator(COMPACT).generate(SCENES, seed=3)
    torch._dynamo.utils.counters.clear()
    drawn = compiled.generate(SCENES, seed=3)
    assert_drawn_alike(wanted.trajectory, drawn.trajectory)
    compiled.generate(SCENES, seed=3, best_of=2, redraw="turn")
    compiled.add(drawn.image, ["blue cube"], at=[(20, 30)], seed=3)
    assert len([*compiled.stream(SCENES[2], seed=3)]) == 3
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 4, "empty scene, light, place and turn: each once for all turns and scenes"
    packed = torch._dynamo.utils.counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"]
    assert packed > 0, "weights are constants"
