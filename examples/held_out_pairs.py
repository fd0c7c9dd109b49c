"""Train without a few pairs of colour and shape, then ask for them: does the model put together what it knows?

    condgan prepare iclevr
    python examples/held_out_pairs.py --data iclevr --out pairs --images 60000
    python examples/held_out_pairs.py --data iclevr --out words --images 60000 --words

Scenes with a held-out pair are left out of training, and so is the verifier's word, since the verifier knows all
pairs; everything else is as in `condgan train --preset compact`. An interrupted run goes on with the same command. Red,
and cubes, are still seen, only never together.

Without --words the RNN has one embedding for each of the 24 pairs, and that of a pair which was never asked stays the
random one of the start. With it the RNN knows "red" and "cube", and a red cube is the sum of the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condgan import IterativeGenerator, SceneClassifier
from condgan.datasets import SceneDataset
from condgan.drawing import draw_turns
from condgan.images import from_uint8, to_uint8
from condgan.measures import ratio
from condgan.presets import PRESETS
from condgan.runs import train

HELD_OUT = ("red cube", "blue sphere", "green cylinder", "yellow cube")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on")
parser.add_argument("--out", required=True, type=Path, help="folder of the run; the model is in its folder model")
parser.add_argument("--hold-out", nargs="+", default=HELD_OUT, metavar="OBJECT", help=f"default: {', '.join(HELD_OUT)}")
parser.add_argument("--images", type=int, default=200_000, help="pictures to train on")
parser.add_argument("--width", type=int, help="of the generator; the default is that of the preset compact")
parser.add_argument("--words", action="store_true", help="embed the words of a name, not the pair")
parser.add_argument("--draws", type=int, default=64, help="pictures of each object, alone and beside two others")


def ask(generator: IterativeGenerator, judge: SceneClassifier, scenes: list[list[str]], seed: int) -> Tensor:
    """The judge's probabilities (N, K) for one draw of every list, as in a file."""
    turns = draw_turns(generator, scenes, range(seed, seed + len(scenes)))
    return judge.probabilities(from_uint8(to_uint8(turns.images[:, -1])))


def score(
    generator: IterativeGenerator, judge: SceneClassifier, group: Sequence[str], others: Sequence[str], draws: int
) -> dict[str, Any]:
    """How often the objects of ``group`` are drawn: alone, and as the third after two of ``others``."""
    names = judge.config.objects
    rng = np.random.default_rng(0)
    wanted = [name for name in group for _ in range(draws)]
    alone = ask(generator, judge, [[name] for name in wanted], seed=0).argmax(1)
    drawn = [names[i] for i in alone]
    first_two = [rng.permutation([other for other in others if other != name])[:2].tolist() for name in wanted]
    scenes = [[*two, name] for two, name in zip(first_two, wanted, strict=True)]
    beside = ask(generator, judge, scenes, seed=len(wanted))
    parts = [(a.split(), b.split()) for a, b in zip(drawn, wanted, strict=True)]
    report: dict[str, Any] = {"objects": len(group), "pictures": len(wanted)}
    for name, hits in (
        ("found", [a == b for a, b in zip(drawn, wanted, strict=True)]),
        ("right_colour", [a[0] == b[0] for a, b in parts]),
        ("right_shape", [a[1] == b[1] for a, b in parts]),
        ("found_as_third", [bool(row[names.index(b)] > 0.5) for row, b in zip(beside, wanted, strict=True)]),
    ):
        values = torch.tensor(hits, dtype=torch.float64)
        share = ratio(values, torch.ones_like(values), len(group), share=True)
        report[name], report[f"{name}_ci95"] = share.value, share.ci95 and list(share.ci95)
    return report


def main() -> None:
    """Train, ask, and print one JSON object: held-out pairs beside the others."""
    args = parser.parse_args()
    if args.draws < 1:
        parser.error(f"--draws must be at least 1, got {args.draws}")
    scenes = SceneDataset(args.data, "train")
    kept = scenes.without(args.hold_out)
    names = scenes.vocabulary.names
    held_out = [names[scenes.vocabulary.parse(name)] for name in args.hold_out]
    print(f"training on {len(kept)} of {len(scenes)} scenes, without {', '.join(held_out)}", file=sys.stderr)
    config = PRESETS["compact"]
    width = config.generator.width if args.width is None else args.width
    config = dataclasses.replace(
        config,
        generator=dataclasses.replace(config.generator, width=width, words=args.words),
        images=args.images,
        legibility_weight=0.0,  # the verifier knows all pairs
    )
    generator = train(kept, args.out, config)
    judge = SceneClassifier.from_pretrained("judge")
    seen = [name for name in names if name not in held_out]
    report = {
        "scenes": len(kept),
        "images": args.images,
        "held_out": score(generator, judge, held_out, seen, args.draws),
        "seen": score(generator, judge, seen, seen, args.draws),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
