"""Fit to a finished generator anew what a run fits at its end: codes, places, correction of first turns; and the light.

    condgan prepare iclevr
    python examples/refit.py --data iclevr --out refitted

The networks that draw do not change. For weights from before one of these parts was made as it is now: those that ship
were made so, a part at a time, with the noise encoder that they were trained with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from condgan import IterativeGenerator
from condgan.batches import TrainingScenes
from condgan.calibration import check_noise_encoder, code_turns, correct_first_turns, fit_mapping, fit_places
from condgan.datasets import SceneDataset
from condgan.images import from_uint8
from condgan.models import NoiseEncoder
from condgan.presets import PRESETS

PARTS = ("light", "codes", "places")
DROPOUT = PRESETS["compact"].history_dropout

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on; its train split is used")
parser.add_argument("--model", help="name, folder or hub id of a generator; the default is the one that ships")
parser.add_argument(
    "--noise-encoder", help="that it was trained with: RUN/noise-encoder; the shipped model has one that ships"
)
parser.add_argument(
    "--parts",
    nargs="*",
    choices=PARTS,
    default=PARTS,
    help="what to fit beside the correction, which depends on all of it (default: all)",
)
parser.add_argument("--place-epochs", type=int, default=8, help="how often the place model sees each turn")
parser.add_argument("--out", required=True, type=Path, help="folder to write, in 16 bits")


def main() -> None:
    """Fit and write."""
    args = parser.parse_args()
    if args.place_epochs < 1:
        parser.error(f"--place-epochs must be 1 or more, got {args.place_epochs}")
    if args.model not in (None, IterativeGenerator.default_pretrained) and not args.noise_encoder:
        parser.error("--model needs --noise-encoder: that of another training gives its codes another meaning")
    generator = IterativeGenerator.from_pretrained(args.model)
    noise_encoder = NoiseEncoder.from_pretrained(args.noise_encoder or "iclevr-64-noise-encoder")
    try:
        check_noise_encoder(noise_encoder, generator)
    except ValueError as error:
        parser.error(str(error))
    data = SceneDataset(args.data, "train", image_size=generator.image_size)
    if data.vocabulary.names != generator.vocabulary.names:
        parser.error(f"--data: its objects.json must name the model's objects: {generator.vocabulary.names}")
    if "light" in args.parts and generator.canvas.flow is not None:
        first = from_uint8(data.pixels[:, 0])
        generator.canvas.smooth_hidden(first)
        generator.canvas.fit_flow(first, data.objects[:, 0])
    scenes = TrainingScenes(data, generator, fit_canvas=False)
    turns = scenes.pixels, scenes.objects
    if "codes" in args.parts and generator.mapping is not None:
        fit_mapping(generator, code_turns(generator, noise_encoder, *turns, scenes.places), history_dropout=DROPOUT)
    if "places" in args.parts and scenes.places is not None:
        fit_places(generator, *turns, scenes.places, history_dropout=DROPOUT, epochs=args.place_epochs)
    if generator.correction is not None:
        correct_first_turns(generator, noise_encoder, *scenes.first_turns)
    generator.save_pretrained(args.out, dtype=torch.float16)


if __name__ == "__main__":
    main()
