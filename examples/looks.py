"""Do the distances that say how real pictures look rank what we know?

    python examples/looks.py iclevr-64 iclevr-64-reference-narrow --data iclevr

Fréchet and kernel distance, as in `condgan evaluate`, of several sets of pictures to the real ones of the test split:
other real ones, which are the floor; these, blurred a little; scenes that each of the models draws for the same lists
of objects; and the empty scenes that the last model began with. Eyes put these sets in an order, and so should
whatever measures how real pictures look. In brackets 95 % intervals.
"""

from __future__ import annotations

import argparse

import torch

from condgan import IterativeGenerator
from condgan.measures import Score, looks, scene_features
from condgan.realism import BLUR_SIGMA, blur
from condgan.scenes import SceneDrawer, read_real

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("models", nargs="+", metavar="MODEL", help="names, folders or hub ids of generators")
parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on")

BATCH_SIZE = 100


def text(score: Score, digits: int) -> str:
    """A value and its 95 % interval."""
    assert score.ci95 is not None, "there are three scenes at least"
    low, high = score.ci95
    return f"{score.value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


@torch.no_grad()
def main() -> None:
    """Read, draw, measure and print."""
    args = parser.parse_args()
    generators = {name: IterativeGenerator.from_pretrained(name) for name in args.models}
    first = generators[args.models[0]]
    if any(generator.image_size != first.image_size for generator in generators.values()):
        parser.error("MODEL: all models must draw pictures of one size")
    real = read_real(args.data, first, first.vocabulary)
    if real.validation is None or min(map(len, (real.test.pictures, real.validation.pictures, real.training))) < 3:
        parser.error("--data: three scenes of each split are needed at least; prepare more scenes")
    count = min(len(real.test.pictures), len(real.validation.pictures))
    others = real.validation.pictures[:count, 1:]
    blurred = blur(others.flatten(0, 1)).view_as(others)
    sets = {"other real pictures": others, f"the same, blurred by {BLUR_SIGMA:g} pixels": blurred}
    for name, generator in generators.items():
        drawer = SceneDrawer(generator, first.vocabulary, 1, "picture", BATCH_SIZE, progress=True)
        drawn, _ = drawer.draw(real.validation_lists[:count], range(count))
        sets[name] = drawn.pictures[:, 1:]
    sets["empty scenes"] = drawn.pictures[:, :1].expand_as(others)

    features = scene_features({"test": real.test.pictures[:count, 1:], **sets}, real.training)
    print("| pictures | Fréchet distance | kernel distance |\n|---|---|---|")
    for name in sets:
        scores = looks(features[name], features["test"])
        print(f"| {name} | {text(scores['frechet_distance'], 2)} | {text(scores['kernel_distance'], 3)} |")


if __name__ == "__main__":
    main()
