"""Single turns beside the real ones, on the same real pictures and at the same places.

    python examples/turns.py --data iclevr

For each turn: how often the discriminator gives the real one the higher logit (0.5: it cannot tell them apart, as one
that has gone blind cannot either), how many pixels a turn changes and how far lower it puts the object. For finding
what gives a model away, of scenes of the train split: those of the validation and test splits have no part
in it. With --no-correction first turns are drawn as in training, without the correction that was measured at its end.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from tqdm import tqdm

from condgan import DiffDiscriminator, IterativeGenerator
from condgan.batches import TrainingScenes
from condgan.datasets import SceneDataset
from condgan.functional import changed_region, place_of_change, roll_conditions
from condgan.images import from_uint8, to_uint8

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on")
parser.add_argument("--model", help="name, folder or hub id of a generator; the default is the one that ships")
parser.add_argument("--discriminator", default="iclevr-64-discriminator", help="name, folder or hub id")
parser.add_argument("--scenes", type=int, default=2_000, help="scenes, the first of the train split")
parser.add_argument("--no-correction", action="store_true", help="draw first turns without their correction")

BATCH_SIZE = 50


@torch.no_grad()
def main() -> None:
    """Draw, judge and print."""
    args = parser.parse_args()
    generator = IterativeGenerator.from_pretrained(args.model)
    if args.no_correction and generator.correction is not None:
        generator.correction.clear_()
    discriminator = DiffDiscriminator.from_pretrained(args.discriminator)
    dataset = SceneDataset(args.data, "train", image_size=generator.image_size)
    if dataset.vocabulary.names != generator.vocabulary.names:
        parser.error(f"--data: its objects.json must name the model's objects: {generator.vocabulary.names}")
    if not 0 < args.scenes <= len(dataset):
        parser.error(f"--scenes must be from 1 to the {len(dataset)} of the train split, got {args.scenes}")
    scenes = TrainingScenes(dataset, generator, fit_canvas=False)
    objects = F.one_hot(scenes.objects[: args.scenes], scenes.num_objects).float()
    conditions, _ = roll_conditions(generator.encoder, objects)
    print("turn, real one preferred, pixels changed by the drawn and by the real one, lower by")
    for turn in range(scenes.objects.shape[1]):
        noise = torch.Generator().manual_seed(turn)
        measured = []
        for rows in tqdm(torch.arange(args.scenes).split(BATCH_SIZE), f"turn {turn + 1}"):
            before, real = (from_uint8(scenes.pixels[rows, i]) for i in (turn, turn + 1))
            condition = conditions[rows, turn]
            place = None if scenes.places is None else scenes.places[rows, turn]
            z = torch.randn(len(rows), generator.z_dim, generator=noise)
            drawn = from_uint8(to_uint8(generator(z, condition, before, place)))
            judged = discriminator.compare(before, (drawn, real), condition, place)
            areas = (changed_region(before, x).sum((1, 2)) for x in (drawn, real))
            lower = (place_of_change(before, drawn) - place_of_change(before, real))[:, 1]
            measured.append(torch.stack((judged[1].logits > judged[0].logits, *areas, lower), 1))
        preferred, of_drawn, of_real, lower = torch.cat(measured).nanmean(0).tolist()
        print(f"{turn + 1}: {preferred:.3f}, {of_drawn:.1f} and {of_real:.1f}, {lower:+.2f}")


if __name__ == "__main__":
    main()
