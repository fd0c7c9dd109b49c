"""Fine-tune a pretrained generator on your own pictures of the same objects, in a loop of your own.

    python examples/finetune.py --data my-scenes --out my-model

The folder has the i-CLEVR layout: images/NAME_0.png, NAME_1.png, ... and train.json, objects.json; its train split is
used, and objects.json names the model's objects in the same order. The loss is that of the first stage of the
`compact` preset: the generator is given the place of every object and must draw the real next picture. Models of
`condgan train` have a noise encoder beside them, which finds the code of that picture; without one the noise is random,
and a long training would learn the mean of all poses, which is blurred. What noise is mapped to stays as it was. The
correction of first turns was measured for the weights of before: it is taken away while they learn, and, with a noise
encoder, measured anew.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from condgan import IterativeGenerator, NoiseEncoder
from condgan.batches import TrainingScenes
from condgan.calibration import check_noise_encoder, correct_first_turns, recalibrate
from condgan.datasets import SceneDataset, augment_scene
from condgan.functional import changed_region, pixel_distance, place_of_change, roll_conditions
from condgan.prepare import prepare

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder in the i-CLEVR layout")
parser.add_argument("--out", required=True, help="folder to write the fine-tuned generator to")
parser.add_argument("--model", help="a name, folder or hub id; the default is the shipped model")
parser.add_argument(
    "--noise-encoder", help="of a model of `condgan train`: RUN/noise-encoder; the shipped model has one that ships"
)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--learning-rate", type=float, default=1e-4)
args = parser.parse_args()

generator = IterativeGenerator.from_pretrained(args.model).train()
shipped = args.model in (None, IterativeGenerator.default_pretrained)
name = args.noise_encoder or ("iclevr-64-noise-encoder" if shipped else None)
noise_encoder = NoiseEncoder.from_pretrained(name) if name else None  # without one, noise is random
if noise_encoder is not None:
    try:
        check_noise_encoder(noise_encoder, generator)
    except ValueError as error:
        parser.error(str(error))
try:
    Path(args.out).expanduser().mkdir(parents=True, exist_ok=True)
except (OSError, RuntimeError) as error:
    parser.error(f"--out: {args.out!r} cannot be written to: {error}")
data = SceneDataset(prepare(args.data, image_size=generator.image_size).path, "train")
if data.vocabulary.names != generator.vocabulary.names:
    raise SystemExit(f"{args.data}: its objects.json must name the model's objects: {generator.vocabulary.names}")
scenes = DataLoader(data, batch_size=8, shuffle=True)
if generator.mapping is not None:
    generator.mapping.requires_grad_(False)
optimizer = torch.optim.Adam(generator.parameters(), args.learning_rate, betas=(0.0, 0.99))
rng = torch.Generator().manual_seed(0)
if generator.correction is not None:
    generator.correction.clear_()  # what learns with it in place makes up for what it gets wrong
    if noise_encoder is None:
        print("warning: without --noise-encoder the model loses its correction of first turns", file=sys.stderr)

for epoch in range(args.epochs):
    progress = tqdm(scenes, desc=f"epoch {epoch + 1}/{args.epochs}")
    for batch in progress:
        # The empty scene that the first turn starts at, in the light of the first picture.
        empty = generator.canvas.remove_objects(batch.images[:, 0])
        images = augment_scene(torch.cat((empty[:, None], batch.images), 1), rng)  # (scenes, turns + 1, 3, H, W)
        before, after = images[:, :-1].flatten(0, 1), images[:, 1:].flatten(0, 1)
        changed = changed_region(before, after)
        visible = changed.any((1, 2))  # an object wholly behind others changes nothing: no place, nothing to learn
        conditions, _ = roll_conditions(generator.encoder, batch.objects)
        conditions = conditions.flatten(0, 1)[visible]
        before, after, changed = before[visible], after[visible], changed[visible]

        place = place_of_change(before, after) if generator.config.places else None
        if noise_encoder is None:
            drawn = generator(torch.randn(len(before), generator.z_dim, generator=rng), conditions, before, place)
        else:
            with torch.no_grad():
                code = noise_encoder(before, after, place)
            drawn = generator.synthesis(code, conditions, before, place)
        error = drawn - after
        weight = 1 + 4 * changed[:, None]
        loss = (weight * pixel_distance(error)).mean()
        # Differences between neighbours count, too: edges tell one pose of an object from another.
        loss = loss + (weight[:, :, :, 1:] * pixel_distance(error.diff(dim=3))).mean()
        loss = loss + (weight[:, :, 1:] * pixel_distance(error.diff(dim=2))).mean()
        if generator.place_model is not None:
            light = generator.read_light(before)
            loss = loss + 0.01 * generator.place_model.loss(before, conditions.detach(), place, light).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")

recalibrate(generator, F.one_hot(data.objects, len(data.vocabulary)).float())
if generator.correction is not None and noise_encoder is not None:
    first_turns = TrainingScenes(data, generator, fit_canvas=False).first_turns
    correct_first_turns(generator, noise_encoder, *first_turns)
generator.save_pretrained(args.out)
print("wrote", args.out)
