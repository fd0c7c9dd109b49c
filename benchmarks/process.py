"""What a process of its own costs: seconds until a picture is on the disk, and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Row, interleaved, median, peak_memory, python

LOAD = "from condgan import IterativeGenerator; generator = IterativeGenerator.from_pretrained()\n"
PROGRAMS = {
    "import torch": "import torch\n",
    "import condgan": "from condgan import *\n",
    "the shipped model loaded": LOAD,
    "1 scene drawn": LOAD + "generator.generate(['red cube', 'blue sphere', 'gray cylinder'])\n",
    "64 scenes drawn": LOAD + "generator.generate([['red cube', 'blue sphere', 'gray cylinder']] * 64)\n",
    "a training step of the reference": "from benchmarks.training import step_of_command; step_of_command(1)\n",
}


def start_up(rounds: int) -> Iterator[Row]:
    """Seconds to import and to draw from the command line, in alternating processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "scene.png")
        times = interleaved(
            {
                "import torch": lambda: python("-c", "import torch"),
                "import condgan": lambda: python("-c", "from condgan import *"),
                "condgan generate": lambda: python(
                    "-m", "condgan", "generate", "red cube", "blue sphere", "--out", out
                ),
            },
            rounds,
        )
    torch_seconds = median(times, "import torch")
    for name in times:
        yield Row("start-up", name, median(times, name), "s")
    yield Row("start-up", "import condgan over import torch", median(times, "import condgan") - torch_seconds, "s")
    share = median(times, "condgan generate") / (1.5 * torch_seconds + 1.5)
    yield Row("start-up", "condgan generate over 1.5 x import torch + 1.5 s", share, "share")


def memory(rounds: int) -> Iterator[Row]:
    """Peak memory of processes; once each, it hardly varies."""
    for name, program in PROGRAMS.items():
        yield Row("memory", name, peak_memory(program), "MiB")
