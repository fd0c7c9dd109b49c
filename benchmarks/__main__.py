"""``python -m benchmarks``: measure everything, print a table, write a JSON file.

Run it from the repository's root on a machine that does nothing else, with as many threads as there are cores.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

import condgan
from benchmarks import compiled, drawing, loading, process, scaling, training, work
from benchmarks.measure import Row


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "condgan": condgan.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def markdown(rows: Sequence[Row], where: dict[str, object]) -> str:
    """The table of docs/performance.md."""
    lines = [", ".join(f"{key} {value}" for key, value in where.items()) + ".", ""]
    lines += ["| part | what | value | against the plain way | of the limit |", "|---|---|---|---|---|"]
    for row in rows:
        faster = "" if row.ratio is None else f"{row.ratio:.2f} x"
        limit = "" if row.limit is None else f"{100 * row.limit:.0f} %"
        lines.append(f"| {row.part} | {row.name} | {row.value:.3g} {row.unit} | {faster} | {limit} |")
    return "\n".join(lines)


def _as_json(value: object) -> object:
    """JSON has no NaN, which stands for what this machine cannot measure."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plot_endings() -> list[str]:
    """What matplotlib can write; nothing where there is none, which then draws no plot either."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        return []
    return [f".{ending}" for ending in sorted(FigureCanvasBase.filetypes)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="how often each case is run (default: 9)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write, anew after each part")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture to write: cost against work")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/performance.md")
    parts: dict[str, Callable[[int], Iterator[Row]]] = {
        "drawing": drawing.run,
        "steps": drawing.steps,
        "compiled": compiled.run,
        "training": training.run,
        "ranks": scaling.run,
        "loading": loading.run,
        "start-up": process.start_up,
        "memory": process.memory,
        "work": work.run,
    }
    parser.add_argument("--parts", nargs="+", choices=parts, default=[*parts], help="only these parts")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"argument --rounds: must be at least 1, got {args.rounds}")
    if args.plot is not None and "work" not in args.parts:
        parser.error("argument --plot: shows the part work, which is not asked for")
    for option in ("out", "plot"):
        path = getattr(args, option)
        if path is not None and not path.parent.is_dir():
            parser.error(f"argument --{option}: there is no folder {str(path.parent)!r}")
        if path is not None and path.is_dir():
            parser.error(f"argument --{option}: {str(path)!r} is a folder, it must be a file")
    if args.plot is not None and (known := _plot_endings()) and args.plot.suffix.lower() not in known:
        parser.error(f"argument --plot: {str(args.plot)!r} must end in one of {', '.join(known)}")
    where = machine()
    parts["work"] = partial(work.run, plot=args.plot)
    rows = []
    for part in args.parts:
        for row in parts[part](args.rounds):
            rows.append(row)
            if not args.markdown:
                print(*markdown([row], {}).splitlines()[-1:], flush=True)
        if args.out is not None:
            known = [{name: _as_json(value) for name, value in row._asdict().items()} for row in rows]
            args.out.write_text(json.dumps({"machine": where, "rows": known}, indent=1, allow_nan=False) + "\n")
    if args.markdown:
        print(markdown(rows, where))


if __name__ == "__main__":
    main()
