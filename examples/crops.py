"""Told apart by what surrounds each object: a trial with less luck than that of whole pictures.

    python examples/crops.py --data iclevr

Squares of 32x32 pixels around the object of every turn, drawn and real, of scenes of the train split; fresh classifiers
as in `condgan evaluate --realism` see each of them 20 times and not 8. Small traces that a training on whole pictures
finds by chance are found here. With --view gray they see brightness only. For choosing between models and for finding
what gives them away: scenes of the validation and test splits have no part in it.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from condgan import IterativeGenerator
from condgan.functional import crop, crop_corners, places_of_turns
from condgan.images import from_uint8, to_uint8
from condgan.realism import told_apart
from condgan.scenes import SceneDrawer, as_real, open_real

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on")
parser.add_argument("--model", help="name, folder or hub id of a generator; the default is the one that ships")
parser.add_argument("--scenes", type=int, default=3_800, help="scenes of each kind, or as many as there are")
parser.add_argument("--held-out", type=int, default=800, help="how many of them the classifiers are tested on")
parser.add_argument("--epochs", type=int, default=20, help="how often a classifier sees each square")
parser.add_argument("--seeds", type=int, default=2, help="classifiers")
parser.add_argument("--view", choices=("colour", "gray"), default="colour")

SIDE = 32
BATCH_SIZE = 100


def squares(pictures: Tensor) -> Tensor:
    """Around each object: (S, T + 1, 3, H, W) uint8, an empty scene first, to (S, T, 3, 32, 32) uint8."""
    corners = crop_corners(places_of_turns(pictures).flatten(0, 1), pictures.shape[-1], SIDE)
    return crop(pictures[:, 1:].flatten(0, 1), corners, SIDE).unflatten(0, (len(pictures), -1))


def area_under_curve(real: Tensor, drawn: Tensor) -> float:
    """How often a real square has the higher score of two: 0.5 is chance."""
    ranks = torch.cat((real, drawn)).argsort().argsort().double()
    return float((ranks[: len(real)].sum() - len(real) * (len(real) - 1) / 2) / (len(real) * len(drawn)))


@torch.no_grad()
def main() -> None:
    """Draw, cut, train and print."""
    args = parser.parse_args()
    generator = IterativeGenerator.from_pretrained(args.model)
    data = open_real(args.data, generator.image_size, "train")
    scenes = min(args.scenes, len(data))
    if not 0 < args.held_out < scenes:
        parser.error(f"--held-out must be from 1 to one less than the {scenes} scenes, got {args.held_out}")
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:scenes]
    pictures = data.pixels[chosen]
    empty = to_uint8(generator.canvas.remove_objects(from_uint8(pictures[:, 0])))
    lists = data.lists
    drawer = SceneDrawer(generator, generator.vocabulary, 1, "picture", BATCH_SIZE, progress=True)
    drawn, _ = drawer.draw([lists[i] for i in chosen.tolist()], chosen.tolist())
    sets = [squares(torch.cat((empty[:, None], pictures), 1)), squares(as_real(drawn, generator).pictures)]
    if args.view == "gray":
        sets = [x.float().mean(2, keepdim=True).round().to(torch.uint8).expand_as(x) for x in sets]
    n, turns = args.held_out, sets[0].shape[1]
    learned, tested = ([x[part].flatten(0, 1) for x in sets] for part in (slice(n, None), slice(n)))
    with torch.enable_grad():
        found = told_apart(
            *learned,
            held_out_real=tested[0],
            held_out_drawn=tested[1],
            seeds=args.seeds,
            epochs=args.epochs,
            scene_size=turns,
        )
    scores = [x.view(n, turns) for x in (found.real_scores, found.drawn_scores)]
    areas = [area_under_curve(*(x[:, turn] for x in scores)) for turn in range(turns)]
    rates = ", ".join(f"{rate:.3f}" for rate in found.rates)
    low, high = found.rate_ci95
    print(f"right about {found.rate:.3f} ({low:.3f} to {high:.3f}) of {2 * n * turns} squares (seeds {rates})")
    print("area under the curve, mean scores of all seeds, turn by turn: " + ", ".join(f"{x:.3f}" for x in areas))


if __name__ == "__main__":
    main()
