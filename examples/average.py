"""Average two generators of one family, weight by weight: often the mean has the strengths of both.

    condgan prepare iclevr
    python examples/average.py run-a/model run-b/model --noise-encoder run-a/noise-encoder --data iclevr --out mean

One must have been trained on from the other, or both from the same weights; the mean of strangers draws nothing. What
does not average, the statistics of batch norms and the correction of first turns, is measured anew, with the noise
encoder that both were trained with. J and K, earlier weights (docs/experiments.md has their letters) from which those
that ship were trained on, were made so.

Source: model soups, Wortsman et al. 2022, arXiv:2203.05482.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from condgan import IterativeGenerator
from condgan.batches import TrainingScenes
from condgan.calibration import correct_first_turns, recalibrate
from condgan.datasets import SceneDataset
from condgan.models import NoiseEncoder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("models", nargs=2, help="names, folders or hub ids of two generators")
parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on; its train split is used")
parser.add_argument(
    "--noise-encoder",
    help="that both were trained with, such as RUN/noise-encoder, or iclevr-64-noise-encoder of weights that shipped; "
    "models with a correction of first turns need it",
)
parser.add_argument("--share", type=float, default=0.5, help="of the second model, 0 to 1 (default: 0.5)")
parser.add_argument("--out", required=True, type=Path, help="folder to write, in 16 bits")


@torch.no_grad()
def average(one: IterativeGenerator, other: IterativeGenerator, share: float) -> IterativeGenerator:
    """The first generator, changed in place towards the second."""
    if one.config != other.config:
        raise ValueError(f"models: they must have one configuration, got {one.config} and {other.config}")
    weights = other.state_dict()
    for name, weight in one.state_dict().items():
        if weight.is_floating_point():
            weight.lerp_(weights[name], share)
    return one


def main() -> None:
    """Average, measure anew, write."""
    args = parser.parse_args()
    if not 0 <= args.share <= 1:
        parser.error(f"--share must be from 0 to 1, got {args.share}")
    one, other = (IterativeGenerator.from_pretrained(name) for name in args.models)
    if one.correction is not None and args.noise_encoder is None:
        parser.error("these models need --noise-encoder: that of another training gives their codes another meaning")
    data = SceneDataset(args.data, "train", image_size=one.image_size)
    if data.vocabulary.names != one.vocabulary.names:
        parser.error(f"--data: its objects.json must name the models' objects: {one.vocabulary.names}")
    generator = average(one, other, args.share)
    scenes = TrainingScenes(data, generator, fit_canvas=False)
    recalibrate(generator, F.one_hot(scenes.objects, scenes.num_objects).float())
    if generator.correction is not None:
        noise_encoder = NoiseEncoder.from_pretrained(args.noise_encoder)
        correct_first_turns(generator, noise_encoder, *scenes.first_turns)
    generator.save_pretrained(args.out, dtype=torch.float16)


if __name__ == "__main__":
    main()
