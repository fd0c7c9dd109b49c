"""What each part of the shipped model brings: small models, each with one part left out, on equally many pictures.

    python examples/ablations.py --data iclevr --out ablations

Every row is trained with every seed, and what it draws for the lists of the test scenes is measured: by the judge,
which only reports, and by its distance to real pictures. The table shows means over seeds and, in brackets, the lowest
and the highest. What is in the folder already is not trained again: stop and go on whenever you like, or share the rows
among machines with --rows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from condgan.datasets import SceneDataset
from condgan.evaluation import evaluate
from condgan.runs import train
from condgan.training import PRESETS, TrainConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on")
parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
parser.add_argument("--images", type=int, default=15_000, help="pictures that each model is trained on")
parser.add_argument("--width", type=int, default=16, help="of generator and discriminator; the shipped ones: 24 and 32")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--draws", type=int, default=4, help="draws of each list")
parser.add_argument("--rows", nargs="+", metavar="ROW", help="names of the rows to train; the default is all")

MEASURES = ("accuracy", "exact", "frechet_distance", "retention")


def variants(base: TrainConfig) -> dict[str, TrainConfig]:
    """The whole recipe, and the recipe with one thing changed, by the names of their rows."""

    def generator(**changes: Any) -> TrainConfig:
        return replace(base, generator=replace(base.generator, **changes))

    def both(**changes: Any) -> TrainConfig:
        networks = {name: replace(getattr(base, name), **changes) for name in ("generator", "discriminator")}
        return replace(base, **networks)

    alone = generator(mapping=False)  # without codes there is nothing that a mapping could learn
    return {
        "everything": base,
        "no-reconstruction": replace(alone, reconstruction_images=0, reconstruction_weight=0.0),
        "no-reconstruction-later": replace(base, reconstruction_weight=0.0),
        "no-mapping": alone,
        "no-window": both(window=None),
        "no-light": both(light_inputs=0),
        "no-correction": generator(correction=False),
        "no-noise-in-norm": generator(noise_in_norm=False),
        "no-own-pictures": replace(base, own_pictures=0.0),
        "reference-objective": replace(base, objective="reference"),
    }


def base_recipe(images: int, width: int) -> TrainConfig:
    """The preset ``compact``, narrow and short: a third of the pictures for each of its three phases."""
    preset, third = PRESETS["compact"], images // 3
    return replace(
        preset,
        generator=replace(preset.generator, width=width),
        discriminator=replace(preset.discriminator, width=width),
        images=images,
        reconstruction_images=third,
        decay_images=third,
    )


def measured(config: TrainConfig, data: str, out: Path, lists: list[list[str]], draws: int) -> dict[str, float | None]:
    """Train a model, or go on with it, and measure it; what was measured before is read from its folder."""
    report = out / "report.json"
    if not report.exists():
        model = train(data, out, config)
        found = evaluate(model, lists, draws=draws, data=data).to_dict()
        partial = report.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(report)
    found = json.loads(report.read_text())
    return {name: found[name] for name in MEASURES}


def cell(values: list[float | None]) -> str:
    """Mean, lowest and highest; a measure is None where there are too few pictures for it."""
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "-"


def main() -> None:
    """Train and measure what is missing, then print the table."""
    args = parser.parse_args()
    rows = variants(base_recipe(args.images, args.width))
    unknown = set(args.rows or ()) - rows.keys()
    if unknown:
        parser.error(f"--rows: no row is called {sorted(unknown)}; there are {', '.join(rows)}")
    test = SceneDataset(args.data, "test")
    lists = [[test.vocabulary.names[i] for i in scene] for scene in test.objects.tolist()]
    found: dict[str, list[dict[str, float | None]]] = {}
    for seed in range(args.seeds):
        for name in args.rows or rows:
            config, out = replace(rows[name], seed=seed), args.out / f"{name}-{seed}"
            found.setdefault(name, []).append(measured(config, args.data, out, lists, args.draws))
    print("| " + " | ".join(["row", *MEASURES]) + " |\n|" + "---|" * (1 + len(MEASURES)))
    for name, runs in found.items():
        print("| " + " | ".join([name, *(cell([run[measure] for run in runs]) for measure in MEASURES)]) + " |")


if __name__ == "__main__":
    main()
