"""Cost against work: time and memory for 1 to 1,000 scenes and for 1 to 8 turns, with a plot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.measure import Row, interleaved, median, peak_memory
from benchmarks.process import LOAD
from condgan import IterativeGenerator
from condgan.requests import TooManyObjectsWarning
from condgan.vocab import ICLEVR_OBJECTS

SCENES = (1, 10, 100, 1000)
TURNS = (1, 2, 4, 8)
TURNS_SCENES = 10
"""Scenes that are drawn to see what a turn costs."""


def run(rounds: int, plot: Path | None = None) -> Iterator[Row]:
    """All rows of this part; the plot is written where it is asked for and matplotlib is installed."""
    generator = IterativeGenerator.from_pretrained()
    seconds: dict[str, dict[int, float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TooManyObjectsWarning)
        for what, numbers, repeats in (("scenes", SCENES, max(3, rounds // 3)), ("turns", TURNS, 3 * rounds)):
            cases = {str(n): partial(generator.generate, _request(what, n), seed=0) for n in numbers}
            times = interleaved(cases, repeats)  # turns are short, and a line through four of them shows every hiccup
            seconds[what] = {n: median(times, str(n)) for n in numbers}
    mebibytes = {n: peak_memory(f"{LOAD}generator.generate({_request('scenes', n)!r})\n") for n in SCENES}
    for n, value in seconds["scenes"].items():
        yield Row("work", f"{n} scenes of 3 turns, a scene", 1000 * value / n, "ms")
    fixed, slope = _line(seconds["turns"])
    for n, value in seconds["turns"].items():
        yield Row("work", f"{TURNS_SCENES} scenes of {n} turns, a scene", 1000 * value / TURNS_SCENES, "ms")
    off = max(abs(value / (fixed + slope * n) - 1) for n, value in seconds["turns"].items())
    yield Row("work", "turns: furthest from a straight line", 100 * off, "%")
    each = [seconds["scenes"][n] / n for n in SCENES[1:]]
    yield Row(
        "work", "scenes from 10 on: most by which the cost of one differs", 100 * (max(each) / min(each) - 1), "%"
    )
    for n, value in mebibytes.items():
        yield Row("work", f"{n} scenes, peak memory", value, "MiB")
    if plot is not None:
        _plot(seconds, mebibytes, plot)


def _request(what: str, n: int) -> list[list[str]]:
    """The lists of objects of one measurement."""
    return [list(ICLEVR_OBJECTS[:3])] * n if what == "scenes" else [list(ICLEVR_OBJECTS[:n])] * TURNS_SCENES


def _line(points: dict[int, float]) -> tuple[float, float]:
    """Intercept and slope of the least squares line through points."""
    n = len(points)
    x_mean, y_mean = sum(points) / n, sum(points.values()) / n
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points.items()) / sum((x - x_mean) ** 2 for x in points)
    return y_mean - slope * x_mean, slope


def _plot(seconds: dict[str, dict[int, float]], mebibytes: dict[int, float], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("the plot is skipped: `pip install matplotlib` to have it drawn", flush=True)
        return
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = (
        ("scenes of 3 turns", "seconds", seconds["scenes"], True),
        (f"turns of {TURNS_SCENES} scenes", "seconds", seconds["turns"], False),
        ("scenes of 3 turns", "peak memory, MiB", mebibytes, False),
    )
    for axes, (x, y, points, logarithmic) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot([*points], [*points.values()], "o-")
        axes.set(xlabel=x, ylabel=y)
        if logarithmic:
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
