"""Train the verifier or the judge on real i-CLEVR: the recipe of the two classifiers that ship.

python examples/train_classifier.py --data iclevr --role verifier --out runs/verifier

With --edited some pictures have objects of other scenes pasted in, often before or behind others: what hides what is
rare in real scenes, and most of what a classifier gets wrong.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F
from pasting import OBJECT, UNCLEAR, Scenes, add, empty_scenes, put, read_scenes, real_pictures, take
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from condgan.classifier import SceneClassifier, SceneClassifierConfig
from condgan.datasets import SceneDataset
from condgan.functional import local_mean
from condgan.precision import autocast
from condgan.vocab import ICLEVR_OBJECTS

BATCH_SIZE = 64


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


def edited_pictures(scenes: Scenes, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures with objects of other scenes pasted in.

    Returns:
        (N, 3, H, W) in [-1, 1]; what stands in each, (N, K) multi-hot; and (N, K), 0 for what is all but hidden: to
        find it or not is neither right nor wrong.
    """
    num_turns = scenes.regions.shape[1]
    rows = torch.randint(len(scenes.pixels), (size,), generator=rng)
    pictures = real_pictures(scenes, rows, torch.randint(num_turns + 1, (size,), generator=rng), spare=2)
    for slot, share in ((num_turns, 0.8), (num_turns + 1, 0.5)):
        chosen = (torch.rand(size, generator=rng) < share).nonzero().flatten()
        put(pictures, chosen, add(take(pictures, chosen), slot, scenes, rng, only_objects=True))
    named = F.one_hot(pictures.objects, len(ICLEVR_OBJECTS))  # (N, M, K)
    there, unclear = ((named * (pictures.kinds == kind)[:, :, None]).amax(1) for kind in (OBJECT, UNCLEAR))
    return pictures.images, there.float(), 1 - (unclear * (1 - there)).float()


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
    parser.add_argument("--init", help="name or folder of a classifier of this role to go on from")
    parser.add_argument("--steps", type=int, default=6000, help="steps of 64 pictures (default: 6000)")
    parser.add_argument("--edited", type=int, default=0, help="of these, pictures with pasted objects (default: 0)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="the highest, of AdamW (default: 0.002)")
    args = parser.parse_args()
    if not 0 <= args.edited <= BATCH_SIZE:
        parser.error(f"argument --edited: 0 to {BATCH_SIZE} pictures of a step, got {args.edited}")

    config, half, seed = ROLES[args.role]
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    train = SceneDataset(args.data, "train", half)
    validation = SceneDataset(args.data, "validation")
    targets = scene_targets(train)
    scenes = read_scenes(train, empty_scenes(train), fit_canvas=True) if args.edited else None
    model = SceneClassifier(config)
    if args.init is not None:
        model.load_state_dict(SceneClassifier.from_pretrained(args.init).state_dict())
    model = model.to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1)
    start = time.time()
    for step in range(1, args.steps + 1):
        rows = torch.randint(len(train), (BATCH_SIZE - args.edited,), generator=rng)
        turns = torch.randint(3, (BATCH_SIZE - args.edited,), generator=rng)
        images, wanted = train.pixels[rows, turns].float() / 127.5 - 1, targets[rows, turns]
        asked = torch.ones_like(wanted)
        if scenes is not None:
            edited = edited_pictures(scenes, args.edited, rng)
            images, wanted, asked = (torch.cat(pair) for pair in zip((images, wanted, asked), edited, strict=True))
        images = augment(images, rng)
        with autocast("cpu"):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        errors = F.binary_cross_entropy_with_logits(logits.float(), wanted, asked, reduction="none")
        loss = errors.sum(1).mean()
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
