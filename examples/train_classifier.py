"""Train the verifier or the judge on real i-CLEVR: the recipe of the two classifiers that ship.

python examples/train_classifier.py --data iclevr --role verifier --out runs/verifier
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from condgan.classifier import SceneClassifier, SceneClassifierConfig
from condgan.datasets import SceneDataset
from condgan.functional import local_mean
from condgan.precision import autocast

ROLES = {  # different architecture, different half of the train split, different seed
    "verifier": (SceneClassifierConfig((32, 64, 128, 192), (2, 2, 2, 2), "small", "evidence"), 0, 101),
    "judge": (SceneClassifierConfig((24, 48, 96, 160), (1, 2, 3, 2), "small", "evidence"), 1, 202),
}


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
    return F.one_hot(data.objects, len(data.vocabulary)).float().cumsum(1)


@torch.no_grad()
def score(model: SceneClassifier, data: SceneDataset) -> dict[str, float]:
    """Top-k accuracy (objects found / objects asked) and exact set at 0.5 over every picture of ``data``."""
    targets = scene_targets(data).flatten(0, 1)
    probabilities = model.probabilities(data.pixels.flatten(0, 1).float() / 127.5 - 1)
    found = 0.0
    for probability, target in zip(probabilities, targets, strict=True):
        found += float(target[probability.topk(int(target.sum())).indices].sum())
    exact = ((probabilities > 0.5) == (targets > 0.5)).all(1).float().mean()
    return {"pictures": len(targets), "accuracy": found / float(targets.sum()), "exact": float(exact)}


def main() -> None:
    """Parse the command line, train, report on the test split, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on")
    parser.add_argument("--role", required=True, choices=ROLES)
    parser.add_argument("--out", required=True, help="folder to write the classifier to")
    parser.add_argument("--steps", type=int, default=6000, help="steps of 64 pictures")
    args = parser.parse_args()

    config, half, seed = ROLES[args.role]
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    train = SceneDataset(args.data, "train", half)
    validation = SceneDataset(args.data, "validation")
    targets = scene_targets(train)
    model = SceneClassifier(config).to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps, pct_start=0.1)
    start = time.time()
    for step in range(1, args.steps + 1):
        scenes = torch.randint(len(train), (64,), generator=rng)
        turns = torch.randint(3, (64,), generator=rng)
        images = augment(train.pixels[scenes, turns].float() / 127.5 - 1, rng)
        with autocast("cpu"):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = (
            F.binary_cross_entropy_with_logits(logits.float(), targets[scenes, turns], reduction="none").sum(1).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if step % 250 == 0 or step == args.steps:
            report = {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.time() - start)}
            print(json.dumps(report | score(average.module, validation)), flush=True)
    classifier = average.module.eval()
    classifier.save_pretrained(args.out, dtype=torch.float16)
    print(json.dumps({"split": "test"} | score(classifier, SceneDataset(args.data, "test"))))


if __name__ == "__main__":
    main()
