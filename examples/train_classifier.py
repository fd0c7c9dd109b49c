"""Train the verifier or the judge on real i-CLEVR: the recipe of the two classifiers that ship.

python examples/train_classifier.py --data iclevr --role verifier --out runs/verifier
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from condgan.classifier import SceneClassifier, SceneClassifierConfig
from condgan.datasets import SceneDataset
from condgan.functional import changed_region, local_mean
from condgan.images import from_uint8
from condgan.metrics import multilabel_accuracy
from condgan.precision import autocast


class Role(NamedTuple):
    """What makes the two classifiers differ."""

    config: SceneClassifierConfig
    half: int
    """Of the train split."""
    seed: int
    steps: int
    """Of 64 pictures."""
    composed: bool
    """Whether pictures are also stretched and put together from two."""


ROLES = {
    "verifier": Role(SceneClassifierConfig((32, 64, 128, 192), (2, 2, 2, 2), "small", "evidence"), 0, 101, 6000, False),
    "judge": Role(SceneClassifierConfig((40, 80, 128, 192), (2, 3, 3, 2), "small", "evidence"), 1, 202, 9000, True),
}
CHANGED_LEVELS = 25
"""A pixel of an object, its shadow or its reflection differs from the picture before by more grey levels than this."""
MARGIN = 8
"""Columns at either border in which no two pictures are put together."""


class Pictures:
    """The pictures of a split: what stands in each, and between which columns.

    Args:
        data: S scenes of three turns.
    """

    def __init__(self, data: SceneDataset) -> None:
        self.pixels = data.pixels
        self.kinds = F.one_hot(data.objects, len(data.vocabulary)).float()  # (S, T, K)
        self.targets = scene_targets(data)
        pixels = data.pixels.float()
        empty = pixels[:, 0].median(0).values.expand_as(pixels[:, :1])
        before = torch.cat((empty, pixels[:, :-1]), 1)
        changed = changed_region(before.flatten(0, 1), pixels.flatten(0, 1), CHANGED_LEVELS)  # all in grey levels
        changed = changed.unflatten(0, data.objects.shape)  # (S, T, H, W)
        columns = changed.sum(2).cumsum(2) / changed.sum((2, 3)).clamp(min=1)[..., None]  # share to the left
        self.first, self.last = (columns < 0.02).sum(2), (columns < 0.98).sum(2)  # (S, T); stray pixels do not count

    def draw(self, composed: bool, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """64 pictures, (64, 3, H, W) in [-1, 1], and what stands in them, (64, K)."""
        scenes = torch.randint(len(self.pixels), (64,), generator=rng)
        turns = torch.randint(self.pixels.shape[1], (64,), generator=rng)
        images, targets = from_uint8(self.pixels[scenes, turns]), self.targets[scenes, turns]
        if not composed:
            return images, targets
        images, targets = self._compose(images, targets, scenes, turns, rng)
        return stretch(images, rng), targets

    def _compose(
        self, images: Tensor, targets: Tensor, scenes: Tensor, turns: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Every second picture, where it can be: the left of it and the right of another, with no object cut."""
        n, columns = len(scenes), torch.arange(images.shape[-1])
        other = torch.randperm(n, generator=rng)
        there = torch.arange(self.pixels.shape[1]) <= turns[:, None]  # (n, T)
        first, last = self.first[scenes], self.last[scenes]
        in_object = (columns >= first[..., None] - 1) & (columns <= last[..., None] + 1)
        taken = (in_object & there[..., None]).any(1)  # (n, W)
        free = ~taken & ~taken[other]
        free[:, :MARGIN] = free[:, -MARGIN:] = False
        chosen = free.any(1) & (torch.rand(n, generator=rng) < 0.5)
        line = torch.multinomial(torch.where(free.any(1, keepdim=True), free.float(), 1.0), 1, generator=rng)  # (n, 1)
        left = (there & (last < line)).float()[..., None] * self.kinds[scenes]
        right = (there[other] & (first[other] > line)).float()[..., None] * self.kinds[scenes[other]]
        both = torch.where((columns < line)[:, None, None], images, images[other])
        images = torch.where(chosen[:, None, None, None], both, images)
        return images, torch.where(chosen[:, None], (left.sum(1) + right.sum(1)).clamp(max=1), targets)


def stretch(images: Tensor, rng: torch.Generator) -> Tensor:
    """Every second picture larger or smaller by up to 12 %, its height by up to 5 % more or less than its width."""
    n = len(images)
    width = torch.empty(n).uniform_(0.88, 1.12, generator=rng)
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = width, width * torch.empty(n).uniform_(0.95, 1.05, generator=rng)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    stretched = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return torch.where((torch.rand(n, generator=rng) < 0.5)[:, None, None, None], stretched, images)


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Flips, shifts of up to 4 px, slight brightness and blur: (N, 3, H, W) in [-1, 1] to the same."""
    n, _, height, width = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, 1, 1, 1).uniform_(low, high, generator=rng)

    images = torch.where(uniform(0, 1) < 0.5, images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4), mode="replicate")
    offsets = torch.randint(0, 9, (n, 2), generator=rng).tolist()
    images = torch.stack([p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, offsets, strict=True)])
    blurred = local_mean(images, 3)
    images = images + (blurred - images) * uniform(-0.5, 0.7).clamp(min=0)
    images = images * uniform(0.9, 1.1) + uniform(-0.05, 0.05)
    return images + 0.02 * uniform(0, 1) * torch.randn(images.shape, generator=rng)


def scene_targets(data: SceneDataset) -> Tensor:
    """What stands in each picture: (S, T, K) multi-hot, the objects of this turn and of the turns before."""
    return F.one_hot(data.objects, len(data.vocabulary)).float().cummax(1).values


@torch.no_grad()
def score(model: SceneClassifier, data: SceneDataset) -> dict[str, float]:
    """Top-k accuracy (objects found / objects asked) and exact set at 0.5 over every picture of ``data``."""
    targets = scene_targets(data).flatten(0, 1)
    probabilities = model.probabilities(from_uint8(data.pixels.flatten(0, 1)))
    accuracy = multilabel_accuracy(probabilities, targets)
    exact = ((probabilities > 0.5) == (targets > 0.5)).all(1).float().mean()
    return {"pictures": len(targets), "accuracy": accuracy, "exact": float(exact)}


def main() -> None:
    """Parse the command line, train, report on the test split, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on")
    parser.add_argument("--role", required=True, choices=ROLES)
    parser.add_argument("--out", required=True, help="folder to write the classifier to")
    parser.add_argument("--steps", type=int, help="steps of 64 pictures; by default those of the one that ships")
    args = parser.parse_args()
    try:
        Path(args.out).expanduser().mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        parser.error(f"--out: {args.out!r} cannot be written to: {error}")

    role = ROLES[args.role]
    steps = role.steps if args.steps is None else args.steps
    torch.manual_seed(role.seed)
    rng = torch.Generator().manual_seed(role.seed)
    train = Pictures(SceneDataset(args.data, "train", role.half))
    validation = SceneDataset(args.data, "validation")
    image_size, names = validation.pixels.shape[-1], validation.vocabulary.names
    config = dataclasses.replace(role.config, image_size=image_size, objects=names)
    model = SceneClassifier(config).to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    start = time.time()
    for step in range(1, steps + 1):
        images, targets = train.draw(role.composed, rng)
        images = augment(images, rng)
        with autocast("cpu"):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if step % 250 == 0 or step == steps:
            report = {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.time() - start)}
            print(json.dumps(report | score(average.module, validation)), flush=True)
    classifier = average.module.eval()
    classifier.save_pretrained(args.out, dtype=torch.float16)
    print(json.dumps({"split": "test"} | score(classifier, SceneDataset(args.data, "test"))))


if __name__ == "__main__":
    main()
