"""Train a generator and a discriminator in a loop of your own: the shortest honest run, on the public API only.

    condgan prepare iclevr
    python examples/train.py --data iclevr --steps 1000 --out my-model

The networks are the reference's, only narrower. `condgan train` adds what long runs need: averaged weights,
checkpoints, exact resuming, logs; and what the `compact` preset has: places, windows around them, a noise encoder.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from condgan import DiffDiscriminator, DiscriminatorConfig, GeneratorConfig, IterativeGenerator
from condgan.datasets import SceneDataset
from condgan.functional import roll_conditions
from condgan.losses import OBJECTIVES

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder that `condgan prepare` was run on")
parser.add_argument("--out", required=True, help="folder to write the trained generator to")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--width", type=int, default=16, help="64 is the reference's")
args = parser.parse_args()
try:
    Path(args.out).expanduser().mkdir(parents=True, exist_ok=True)
except (OSError, RuntimeError) as error:
    parser.error(f"--out: {args.out!r} cannot be written to: {error}")

torch.manual_seed(0)
data = SceneDataset(args.data, "train")
scenes = DataLoader(data, batch_size=min(8, len(data)), shuffle=True, drop_last=True)
names, turns, size = data.vocabulary.names, data.objects.shape[1], data.pixels.shape[-1]
generator = IterativeGenerator(GeneratorConfig(width=args.width, objects=names, num_turns=turns, image_size=size))
discriminator = DiffDiscriminator(DiscriminatorConfig(width=args.width, objects=names, image_size=size))
objective = OBJECTIVES["reference-code"]
generator_optimizer = torch.optim.Adam(generator.parameters(), 1e-4, betas=(0.0, 0.9))
discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), 4e-4, betas=(0.0, 0.9))


def endless(loader):
    """Batches of one epoch after the other."""
    while True:
        yield from loader


batches = endless(scenes)
progress = tqdm(range(args.steps))
for step in progress:
    batch = next(batches)

    # Every turn of every scene is one example: the picture before, the object to add, the picture after.
    canvas = torch.zeros_like(batch.images[:, :1])
    before = torch.cat((canvas, batch.images[:, :-1]), 1).flatten(0, 1)  # (N, 3, H, W)
    after = batch.images.flatten(0, 1)  # (N, 3, H, W)
    objects = batch.objects.flatten(0, 1)  # (N, K)
    conditions, _ = roll_conditions(generator.encoder, batch.objects)
    conditions = conditions.flatten(0, 1)  # (N, D)

    # The discriminator learns to tell what really followed from what was drawn.
    fake = generator(torch.randn(len(after), generator.z_dim), conditions, before)
    after.requires_grad_()
    real_out = discriminator(before, after, conditions.detach())
    fake_out = discriminator(before, fake.detach(), conditions.detach())
    discriminator_loss = objective.discriminator(
        real_logits=real_out.logits,
        fake_logits=fake_out.logits,
        real_object_logits=real_out.object_logits,
        objects=objects,
    ).mean()
    if step % 16 == 0:  # the gradient penalty, rarely but sixteenfold
        discriminator_loss = discriminator_loss + 16 * objective.penalty(real_logits=real_out.logits, real=after).mean()
    discriminator_optimizer.zero_grad()
    discriminator_loss.backward()
    discriminator_optimizer.step()

    # The generator learns to be taken for real.
    fake_out = discriminator(before, fake, conditions)
    generator_loss = objective.generator(
        fake_logits=fake_out.logits, fake_object_logits=fake_out.object_logits, objects=objects
    ).mean()
    generator_optimizer.zero_grad()
    generator_loss.backward()
    generator_optimizer.step()
    progress.set_postfix(discriminator=f"{discriminator_loss.item():.3f}", generator=f"{generator_loss.item():.3f}")

generator.eval().save_pretrained(args.out)
print("wrote", args.out)
