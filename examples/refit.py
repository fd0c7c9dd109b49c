"""Fit to a finished generator anew: the light of empty scenes, where objects stand, and the correction of first turns.

    condgan prepare iclevr
    python examples/refit.py --data iclevr --out refitted

Neither the networks that draw nor the codes change. For weights from before canvases were without the tints of objects,
before the place model knew the light, and before corrections bent with it: those that ship were made so, with the noise
encoder that they were trained with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from condgan import IterativeGenerator
from condgan.batches import TrainingScenes
from condgan.calibration import correct_first_turns, fit_places
from condgan.datasets import SceneDataset
from condgan.images import from_uint8
from condgan.models import NoiseEncoder
from condgan.presets import PRESETS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on; its train split is used")
parser.add_argument("--model", help="name, folder or hub id of a generator; the default is the one that ships")
parser.add_argument("--noise-encoder", default="iclevr-64-noise-encoder", help="that it was trained with")
parser.add_argument(
    "--place-epochs", type=int, default=8, help="how often the place model sees each turn; 0: not at all"
)
parser.add_argument("--out", required=True, type=Path, help="folder to write, in 16 bits")


def main() -> None:
    """Fit and write."""
    args = parser.parse_args()
    if args.place_epochs < 0:
        parser.error(f"--place-epochs must be 0 or more, got {args.place_epochs}")
    generator = IterativeGenerator.from_pretrained(args.model)
    data = SceneDataset(args.data, "train")
    if generator.canvas.flow is not None:
        first = from_uint8(data.pixels[:, 0])
        generator.canvas.smooth_hidden(first)
        generator.canvas.fit_flow(first, data.objects[:, 0])
    scenes = TrainingScenes(data, generator, fit_canvas=False)
    if scenes.places is not None and args.place_epochs:
        dropout = PRESETS["compact"].history_dropout
        turns = scenes.pixels, scenes.objects, scenes.places
        fit_places(generator, *turns, history_dropout=dropout, epochs=args.place_epochs)
    if generator.correction is not None:
        noise_encoder = NoiseEncoder.from_pretrained(args.noise_encoder)
        correct_first_turns(generator, noise_encoder, *scenes.first_turns)
    generator.save_pretrained(args.out, dtype=torch.float16)


if __name__ == "__main__":
    main()
