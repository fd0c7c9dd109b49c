"""What a generator does beyond what it was trained for.

    python examples/beyond.py --data iclevr --markdown --sheet beyond

Longer lists, the same object twice, one turn drawn again and again, and objects added to pictures from elsewhere. The
judge, which only reports, says which objects are there. Every row has its number of pictures and a 95 % interval
over what was asked; nothing is selected.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from condgan import IterativeGenerator, ObjectCounter, SceneClassifier, Vocabulary, metrics
from condgan.datasets import SceneDataset
from condgan.drawing import draw_turns, random_source
from condgan.functional import changed_region, encode_objects, roll_conditions
from condgan.images import from_uint8, grid, load_image, to_pil, to_uint8
from condgan.measures import ratio

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on; its test split is used")
parser.add_argument("--model", help="a name, folder or hub id; the default is the shipped model")
parser.add_argument("--lists", type=int, default=256, help="lists of objects in each experiment")
parser.add_argument("--redraws", type=int, default=64, help="draws of one turn")
parser.add_argument("--photo", type=Path, help="a picture of your own to add to; the default is synthetic photos")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--json", action="store_true", help="print one JSON object")
parser.add_argument("--markdown", action="store_true", help="print the table of docs/beyond.md")
parser.add_argument("--sheet", type=Path, metavar="DIR", help="folder to write sheets of the first pictures to")

Scenes = list[list[str]]


def random_lists(names: tuple[str, ...], count: int, length: int, seed: int) -> Scenes:
    """Lists of distinct objects, all alike probable."""
    rng = np.random.default_rng([seed, length])
    return [[names[i] for i in rng.permutation(len(names))[:length]] for _ in range(count)]


def synthetic_photo(seed: int, size: int = 192) -> Image.Image:
    """A colourful picture with soft shapes and some texture, like no scene of i-CLEVR: waves of every scale, noise."""
    rng = np.random.default_rng([seed, 77])
    x, y = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    picture = np.zeros((size, size, 3))
    for scale in (1, 2, 4, 8, 16, 32):
        angle, phase, weight = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi, 3), rng.normal(0, 1, 3)
        wave = 2 * np.pi * scale * (x * np.cos(angle) + y * np.sin(angle))
        picture += weight * np.sin(wave[:, :, None] + phase) / scale**1.5
    picture += rng.normal(0, 0.02, picture.shape)
    low, high = np.quantile(picture, (0.01, 0.99))
    return Image.fromarray(((picture - low) / (high - low) * 175 + 40).clip(0, 255).astype(np.uint8))


class Experiments:
    """Draws, judges and keeps one row a question."""

    def __init__(self, generator: IterativeGenerator, sheet: Path | None, seed: int) -> None:
        self.generator = generator
        self.judge = SceneClassifier.from_pretrained("judge")
        self.names = generator.vocabulary.names
        self.sheet = sheet
        self.seed = seed
        self.rows: list[dict[str, Any]] = []

    def add_row(self, name: str, asked: Scenes, pictures: Tensor, **more: float) -> None:
        """Judge pictures (N, 3, H, W), N a multiple of the number of lists: all draws of a list follow each other."""
        vocabulary = Vocabulary(self.judge.config.objects)
        draws = len(pictures) // len(asked)
        objects = torch.stack([vocabulary.multi_hot(scene) for scene in asked]).repeat_interleave(draws, 0)
        pictures = from_uint8(to_uint8(pictures))  # as in a file
        logits = self.judge.probabilities(pictures).logit(1e-7)
        found, exact = metrics.top_k_found(logits, objects), metrics.exact_set(logits, objects).double()
        row: dict[str, Any] = {"experiment": name, "lists": len(asked), "pictures": len(pictures)}
        for measure, values, weights in (
            ("accuracy", found.double(), objects.sum(1).double()),
            ("exact", exact, torch.ones_like(exact)),
        ):
            share = ratio(values, weights, len(asked), share=True)
            row[measure], row[f"{measure}_ci95"] = share.value, share.ci95 and list(share.ci95)
        self.rows.append(row | more)
        print(json.dumps(self.rows[-1]), file=sys.stderr, flush=True)
        if self.sheet is not None:
            self.sheet.mkdir(parents=True, exist_ok=True)
            file = "".join(letter if letter.isalnum() else "-" for letter in name) + ".png"
            grid([to_pil(picture) for picture in pictures[:64]], 8).save(self.sheet / file)

    def draw(self, scenes: Scenes, start: Tensor | None = None) -> Tensor:
        """One draw of every list, (N, T + 1, 3, H, W)."""
        return draw_turns(self.generator, scenes, range(self.seed, self.seed + len(scenes)), start=start).images

    @torch.no_grad()
    def draw_last(
        self, scenes: Scenes, before: Tensor, seeds: range, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The last turn of every list on a given picture (N, 3, H, W), the RNN told of all turns: picture and place."""
        generator = self.generator
        conditions, _ = roll_conditions(generator.encoder, encode_objects(scenes, generator.vocabulary))
        pictures, places = [], []
        for i, seed in enumerate(seeds):
            rng = random_source(seed)
            uniform, z = torch.rand(1, 3, generator=rng), torch.randn(1, generator.z_dim, generator=rng)
            image, condition, place = before[i : i + 1], conditions[i : i + 1, -1], None
            light = generator.read_light(image)
            if generator.place_model is not None:
                place = generator.place_model(image, condition, uniform, light) if at is None else at[i : i + 1]
                places.append(place)
            pictures.append(generator(z, condition, image, place, light))
        return torch.cat(pictures), torch.cat(places) if places else None


def longer_lists(run: Experiments, count: int) -> None:
    """Lists of 3 objects, as in training, and of 4 and 5."""
    for length in (3, 4, 5):
        scenes = random_lists(run.names, count, length, run.seed)
        run.add_row(f"{length} objects", scenes, run.draw(scenes)[:, -1])
    for length in (4, 5):
        scenes = random_lists(run.names, count, length, run.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that these are more than in training is the point
            best = run.generator.generate(scenes, seed=run.seed, best_of=8, redraw="turn")
        passes = sum(best.passes or []) / len(scenes)
        run.add_row(f"{length} objects, failed turns redrawn", scenes, best.tensor, passes=passes)


def repeated_objects(run: Experiments, count: int) -> None:
    """The last object is there already; for comparison, it is not.

    The judge cannot count. So it is shown what the last turn changed, alone: the empty scene plus that difference.
    """
    counter = ObjectCounter.from_pretrained("counter")
    pairs = random_lists(run.names, count, 2, run.seed)
    for name, scenes in (
        ("two objects", pairs),
        ("the same object twice", [[first, first] for first, _ in pairs]),
        ("an object, another, the first again", [[first, second, first] for first, second in pairs]),
    ):
        turns = run.draw(scenes)
        counted = float((counter.count(turns[:, -1]) == len(scenes[0])).double().mean())
        run.add_row(name, [list(dict.fromkeys(scene)) for scene in scenes], turns[:, -1], counted=counted)
        last = (turns[:, 0] + turns[:, -1] - turns[:, -2]).clamp(-1, 1)
        run.add_row(f"{name}: the last one alone", [scene[-1:] for scene in scenes], last)


def one_turn_again(run: Experiments, real: SceneDataset, redraws: int, bases: int = 16) -> None:
    """The third object on real pictures of two, many times each: does it vary, and is it right every time?"""
    scenes = real.lists[:bases]
    pictures = from_uint8(real.pixels[:bases])
    all_scenes = [scene for scene in scenes for _ in range(redraws)]
    before = pictures[:, 1].repeat_interleave(redraws, 0)
    seeds = range(run.seed, run.seed + len(all_scenes))

    def spread(places: Tensor) -> float:  # standard deviation in pixels, of x and y together
        return float(places.var(-2).mean().sqrt())

    def diversity(drawn: Tensor) -> float:
        return sum(metrics.diversity(draws) for draws in drawn.split(redraws)) / len(scenes)

    drawn, places = run.draw_last(scenes=all_scenes, before=before, seeds=seeds)
    more = {"diversity": diversity(drawn)}
    if places is not None:
        more["place_spread"] = spread(places.unflatten(0, (-1, redraws)))
    run.add_row("one turn again and again", scenes, drawn, **more)
    if places is not None:
        at = places[::redraws].repeat_interleave(redraws, 0)
        drawn, _ = run.draw_last(scenes=all_scenes, before=before, seeds=seeds, at=at)
        run.add_row("one turn again and again, at one place", scenes, drawn, diversity=diversity(drawn))


def other_pictures(run: Experiments, real: SceneDataset, count: int, photo: Path | None) -> None:
    """`add` on real pictures of two objects, on plain gray and on photos."""
    size = run.generator.image_size
    scenes = real.lists[:count]
    pictures = from_uint8(real.pixels[:count])
    run.add_row("real pictures of three objects", scenes, pictures[:, 2])
    added = run.draw([scene[2:] for scene in scenes], pictures[:, 1])[:, -1]
    run.add_row("real picture of two objects, the third added", scenes, added)
    drawn, _ = run.draw_last(scenes, pictures[:, 1], range(run.seed, run.seed + len(scenes)))
    run.add_row("the same, the RNN told of the first two", scenes, drawn)

    # A real object on the same pictures, cut out where the first turn changed the empty scene: what the judge can see.
    asked = [scene[:1] for scene in scenes]
    empty = run.generator.canvas.remove_objects(pictures[:, 0])
    objects = changed_region(empty, pictures[:, 0])[:, None]
    gray = load_image(Image.new("RGB", (size, size), (128, 128, 128)), size)[None]
    if photo is None:
        photos = torch.stack([load_image(synthetic_photo(run.seed + i), size) for i in range(16)])
    else:
        photos = load_image(photo, size)[None]
    for name, starts in (("plain gray", gray), ("synthetic photo" if photo is None else "photo", photos)):
        before = starts[torch.arange(len(asked)) % len(starts)]
        run.add_row(f"{name}, nothing added", asked, before)
        run.add_row(f"{name}, a real object pasted", asked, torch.where(objects, pictures[:, 0], before))
        added = run.draw(asked, before)[:, -1]
        run.add_row(f"{name}, one object added", asked, added)
        changed = changed_region(before, added)[:, None]
        run.add_row(f"{name}, one object added: cut out onto gray", asked, torch.where(changed, added, gray))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/beyond.md."""
    lines = ["| experiment | pictures | accuracy | exact set | also |", "|---|---|---|---|---|"]
    notes = {
        "passes": "{:.2f} passes a picture",
        "counted": "{:.3f} have the right number of objects",
        "diversity": "{:.1f} grey levels between two draws",
        "place_spread": "places spread by {:.1f} px",
    }
    for row in rows:
        cells = [row["experiment"], f"{row['pictures']:,}"]
        for measure in ("accuracy", "exact"):
            interval = row[f"{measure}_ci95"]
            cells.append(f"{row[measure]:.3f}" + (" ({:.3f} to {:.3f})".format(*interval) if interval else ""))
        cells.append("; ".join(text.format(row[key]) for key, text in notes.items() if key in row))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run every experiment and print its rows."""
    args = parser.parse_args()
    if args.redraws < 2:
        parser.error(f"--redraws must be at least 2, which are compared, got {args.redraws}")
    if args.photo is not None:
        try:
            load_image(args.photo, 64)  # what is wrong with it shows now
        except (OSError, ValueError) as error:
            parser.error(f"--photo: {error}")
    generator = IterativeGenerator.from_pretrained(args.model)
    real = SceneDataset(args.data, "test")
    run = Experiments(generator, args.sheet, args.seed)
    longer_lists(run, args.lists)
    repeated_objects(run, args.lists)
    one_turn_again(run, real, args.redraws)
    other_pictures(run, real, args.lists, args.photo)
    if args.json:
        print(json.dumps({"model": args.model or IterativeGenerator.default_pretrained, "rows": run.rows}))
    if args.markdown:
        print(markdown(run.rows))


if __name__ == "__main__":
    main()
