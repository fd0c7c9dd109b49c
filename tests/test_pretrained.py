"""The checkpoints inside the package: they load without a network, are small, and draw what they are asked for."""

from __future__ import annotations

import dataclasses
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import condgan
from condgan import DiffDiscriminator, IterativeGenerator, NoiseEncoder, SceneClassifier
from condgan.drawing import draw_turns
from condgan.functional import changed_region, place_of_change
from condgan.metrics import exact_set, multilabel_accuracy
from condgan.presets import PRESETS
from condgan.vocab import ICLEVR_OBJECTS

SHIPPED = Path(condgan.__file__).parent / "pretrained"


@pytest.fixture(scope="module")
def generator() -> IterativeGenerator:
    return IterativeGenerator.from_pretrained()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a shipped checkpoint asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_shipped_names_load_by_name() -> None:
    assert condgan.list_pretrained() == ["iclevr-64", "iclevr-64-reference-narrow"]
    assert condgan.list_pretrained("SceneClassifier") == ["judge", "verifier"]
    assert not IterativeGenerator.from_pretrained("iclevr-64").training
    verifier, judge = SceneClassifier.from_pretrained(), SceneClassifier.from_pretrained("judge")
    assert verifier.config != judge.config
    generator = IterativeGenerator.from_pretrained()
    compact = PRESETS["compact"]  # so that a run can go on from them
    assert generator.config == compact.generator
    assert DiffDiscriminator.from_pretrained("iclevr-64-discriminator").config == compact.discriminator
    assert NoiseEncoder.from_pretrained("iclevr-64-noise-encoder").config == compact.noise_encoder


def test_the_shipped_generator_draws_a_picture_again_from_the_code_that_is_found_in_it(
    generator: IterativeGenerator,
) -> None:
    finder = NoiseEncoder.from_pretrained("iclevr-64-noise-encoder")
    drawn = generator.generate(["red cube"], num_images=24, at=[(32, 28)], seed=0)
    before, after = drawn.trajectory.unbind(1)
    place = place_of_change(before, after)
    condition, _ = generator.encoder(generator.vocabulary.multi_hot(["red cube"]).expand(24, -1))
    with torch.no_grad():
        code = finder(before, after, place)
        own = (generator.synthesis(code, condition, before, place) - after).abs().mean()
        another = (generator.synthesis(code.roll(1, 0), condition, before, place) - after).abs().mean()
    assert own < 0.8 * another, "the pose of a cube is in the code"


def test_sizes_are_those_of_a_small_package() -> None:
    size = {file.parent.name: file.stat().st_size for file in SHIPPED.glob("*/model.safetensors")}
    assert size["iclevr-64"] < 15e6
    assert size["iclevr-64-reference-narrow"] < 3e6
    assert size["verifier"] < 5e6
    assert size["judge"] < 5e6
    assert size["iclevr-64"] + size["verifier"] + size["judge"] < 20e6
    assert sum(size.values()) < 27e6


@pytest.mark.parametrize("name", [folder.name for folder in sorted(SHIPPED.iterdir())])
def test_every_checkpoint_has_a_card(name: str) -> None:
    card = (SHIPPED / name / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: mit" in card
    for heading in ("## Training data", "## Results", "## Limits"):
        assert heading in card


def test_the_default_model_draws_what_it_is_asked_for(generator: IterativeGenerator) -> None:
    """A floor far below the published figure, which needs more draws and the judge."""
    rng = random.Random(0)
    scenes = [rng.sample(ICLEVR_OBJECTS, 1 + i % 3) for i in range(60)]
    images = draw_turns(generator, scenes, range(60)).images[:, -1]
    asked = torch.stack([generator.vocabulary.multi_hot(scene) for scene in scenes])
    logits = SceneClassifier.from_pretrained().probabilities(images).logit(1e-6)
    assert multilabel_accuracy(logits, asked) > 0.96
    assert exact_set(logits, asked).float().mean() > 0.88
    assert multilabel_accuracy(logits, asked.roll(1, 0)) < 0.5  # the measure can fail


def test_the_reference_that_ships_is_that_of_its_preset_and_knows_a_little() -> None:
    baseline, preset = IterativeGenerator.from_pretrained("iclevr-64-reference-narrow"), PRESETS["reference-code"]
    assert baseline.config == dataclasses.replace(preset.generator, width=4)
    rng = random.Random(0)
    scenes = [rng.sample(ICLEVR_OBJECTS, 1 + i % 3) for i in range(60)]
    images = draw_turns(baseline, scenes, range(60)).images[:, -1]
    asked = torch.stack([baseline.vocabulary.multi_hot(scene) for scene in scenes])
    logits = SceneClassifier.from_pretrained().probabilities(images).logit(1e-6)
    assert multilabel_accuracy(logits, asked) > 2 * multilabel_accuracy(logits, asked.roll(1, 0))


def test_the_same_picture_alone_in_a_batch_and_in_reversed_order(generator: IterativeGenerator) -> None:
    rng = random.Random(1)
    scenes = [rng.sample(ICLEVR_OBJECTS, 1 + i % 3) for i in range(7)]
    batch = generator.generate(scenes, seed=40)
    backwards = draw_turns(generator, scenes[::-1], batch.seeds[::-1]).images[:, -1].flip(0)
    assert torch.equal(batch.tensor, backwards)
    for i, scene in enumerate(scenes):
        assert torch.equal(generator.generate(scene, seed=40 + i).tensor[0], batch.tensor[i])


def test_drawing_imports_no_compiler() -> None:
    """It takes longer than all else that a short program does."""
    probe = (
        "import sys, condgan; condgan.IterativeGenerator.from_pretrained().generate(['red cube'], seed=0)\n"
        "print([name for name in sys.modules if name.startswith(('torch._dynamo', 'torch._inductor'))])"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_object_comes_where_it_is_asked_and_the_rest_stays(generator: IterativeGenerator) -> None:
    places = [(16.0, 20.0), (45.0, 30.0), (30.0, 45.0), (50.0, 40.0)]
    result = generator.generate([["red cube", "blue sphere"]] * 4, at=[[None, place] for place in places], seed=0)
    before, after = result.trajectory[:, 1], result.trajectory[:, 2]
    centre = place_of_change(before, after)
    assert (centre - torch.tensor(places)).abs().max() < 3
    changed = changed_region(before, after).float()[:, None]
    untouched = torch.nn.functional.max_pool2d(changed, 17, 1, 8) == 0
    drift = (after - before).abs().masked_select(untouched.expand_as(after)).mean() * 127.5
    assert drift < 0.5  # grey levels; real pictures differ by as much


def test_light_differs_from_picture_to_picture(generator: IterativeGenerator) -> None:
    first, second = generator.generate(["gray cube"], num_images=2, seed=0).trajectory[:, 0]
    assert (first - second).abs().mean() * 127.5 > 1


def test_bfloat16_draws_nearly_the_same(generator: IterativeGenerator) -> None:
    place = [(40.0, 30.0)]
    exact = generator.generate(["red cube"], at=place, seed=3).tensor
    coarse = IterativeGenerator.from_pretrained().to(torch.bfloat16).generate(["red cube"], at=place, seed=3).tensor
    assert (exact - coarse).abs().mean() < 0.01


@torch.no_grad()
def test_in_bfloat16_the_discriminator_still_tells_draws_apart(generator: IterativeGenerator) -> None:
    discriminator = DiffDiscriminator.from_pretrained("iclevr-64-discriminator")
    condition, _ = generator.encoder(torch.eye(24)[:16])
    before = generator.generate([["gray sphere"]] * 16, seed=0).tensor
    place = torch.tensor([[20.0, 40.0]]).expand(16, 2)
    noise = torch.randn(2, 16, generator.z_dim, generator=torch.Generator().manual_seed(0))
    images = [generator(z, condition, before, place) for z in noise]
    one, other = discriminator.compare(before, images, condition, place)
    with torch.autocast("cpu", torch.bfloat16):
        coarse, coarse_other = discriminator.compare(before, images, condition, place)
    assert coarse.logits.dtype == coarse.object_logits.dtype == torch.float32
    difference = one.logits - other.logits
    error = coarse.logits - coarse_other.logits - difference
    assert error.norm() < 0.4 * difference.norm()  # 0.2 of it; 2.6 if features of pictures were subtracted


def test_generate_works_offline_from_another_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "condgan", "generate", "red cube", "blue sphere", "--seed", "7"]
    subprocess.run([*command, "--out", "scene.png"], check=True, cwd=tmp_path)
    alone = IterativeGenerator.from_pretrained().generate(["red cube", "blue sphere"], seed=7).image
    with Image.open(tmp_path / "scene.png") as picture:
        assert picture.tobytes() == alone.tobytes()
