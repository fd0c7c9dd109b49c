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

import torch

from condgan import IterativeGenerator
from condgan.batches import TrainingScenes
from condgan.datasets import SceneDataset
from condgan.evaluation import evaluate
from condgan.files import replacing
from condgan.presets import PRESETS, TrainConfig
from condgan.runs import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on")
parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
parser.add_argument("--images", type=int, default=15_000, help="pictures that each model is trained on")
parser.add_argument("--width", type=int, default=16, help="of generator and discriminator; the shipped ones: 24 and 32")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--draws", type=int, default=4, help="draws of each list")
parser.add_argument("--rows", nargs="+", metavar="ROW", help="names of the rows to train; the default is all")

MEASURES = ("accuracy", "exact", "frechet_distance", "retention")
NO_CORRECTION = "no-correction"
"""What corrects first turns is measured on finished weights, so this row is not trained: it is the whole recipe's."""


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
        "no-noise-in-norm": generator(noise_in_norm=False),
        "no-own-pictures": replace(base, own_pictures=0.0),
        "reference-objective": replace(base, objective="reference"),
    }


def base_recipe(images: int, width: int) -> TrainConfig:
    """The preset ``compact``, narrow and short: a third of the pictures for each of its three phases, no verifier."""
    preset, third = PRESETS["compact"], images // 3
    return replace(
        preset,
        generator=replace(preset.generator, width=width),
        discriminator=replace(preset.discriminator, width=width),
        images=images,
        reconstruction_images=third,
        decay_images=third,
        legibility_weight=0.0,
    )


def fitted_light(recipe: TrainConfig, data: str, out: Path) -> IterativeGenerator:
    """A fresh generator whose canvas and light are fitted to the scenes: minutes of work, the same for every row."""
    if not out.exists():
        generator = IterativeGenerator(recipe.generator)
        TrainingScenes(SceneDataset(data, "train"), generator, progress=True)
        generator.save_pretrained(out)
    return IterativeGenerator.from_pretrained(out)


def with_start(recipe: TrainConfig, lit: IterativeGenerator, out: Path) -> TrainConfig:
    """The recipe, from fresh weights of its seed that know the light already."""
    if not out.exists():
        torch.manual_seed(recipe.seed)
        generator = IterativeGenerator(recipe.generator)
        generator.canvas.load_state_dict(lit.canvas.state_dict())
        if generator.light is not None and lit.light is not None:
            generator.light.load_state_dict(lit.light.state_dict())
        generator.save_pretrained(out)
    return replace(recipe, init_generator=str(out))


def measured(
    config: TrainConfig, data: str, out: Path, lists: list[list[str]], draws: int, corrected: bool = True
) -> dict[str, float | None]:
    """Train a model, or go on with it, and measure it; what was measured before is read from its folder.

    Raises:
        SystemExit: it was measured with other settings.
    """
    settings = {"draws": draws, "images": config.images, "width": config.generator.width}
    whole, uncorrected = out / "report.json", out / "report-uncorrected.json"
    report = whole if corrected else uncorrected
    if not report.exists():
        over = whole.exists() or uncorrected.exists()
        model = IterativeGenerator.from_pretrained(out / "model") if over else train(data, out, config)
        if model.correction is not None and not corrected:
            model.correction.clear_()
        found = evaluate(model, lists, draws=draws, data=data).to_dict()
        with replacing(report) as partial:
            partial.write_text(json.dumps(found | {"settings": settings}))
    found = json.loads(report.read_text())
    if found.get("settings") != settings:
        raise SystemExit(f"{report} is of {found.get('settings')}, asked for is {settings}: choose another --out")
    return {name: found[name] for name in MEASURES}


def cell(values: list[float | None]) -> str:
    """Mean, lowest and highest; a measure is None where there are too few pictures for it."""
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "-"


def main() -> None:
    """Train and measure what is missing, then print the table."""
    args = parser.parse_args()
    if args.draws < 1:
        parser.error(f"--draws must be at least 1, got {args.draws}")
    recipes = variants(base_recipe(args.images, args.width))
    rows = [*recipes, NO_CORRECTION]
    unknown = set(args.rows or ()) - {*rows}
    if unknown:
        parser.error(f"--rows: no row is called {sorted(unknown)}; there are {', '.join(rows)}")
    test = SceneDataset(args.data, "test")
    lists = test.lists
    lit = fitted_light(recipes["everything"], args.data, args.out / "light")
    found: dict[str, list[dict[str, float | None]]] = {}
    for seed in range(args.seeds):
        for name in args.rows or rows:
            corrected = name != NO_CORRECTION
            recipe = name if corrected else "everything"
            out = args.out / f"{recipe}-{seed}"
            config = with_start(replace(recipes[recipe], seed=seed), lit, args.out / f"{recipe}-{seed}-start")
            found.setdefault(name, []).append(measured(config, args.data, out, lists, args.draws, corrected))
    print("| " + " | ".join(["row", *MEASURES]) + " |\n|" + "---|" * (1 + len(MEASURES)))
    for name, runs in found.items():
        print("| " + " | ".join([name, *(cell([run[measure] for run in runs]) for measure in MEASURES)]) + " |")


if __name__ == "__main__":
    main()
