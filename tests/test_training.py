"""Training: exact resuming, stages, skipped steps, batch norm recalibration."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scenes import write_iclevr_layout

from condgan import DiscriminatorConfig, GeneratorConfig, IterativeGenerator
from condgan.datasets import SceneDataset
from condgan.models import DiffDiscriminator
from condgan.prepare import prepare
from condgan.training import (
    CHECKPOINT,
    MAX_SKIPPED_IN_A_ROW,
    PRESETS,
    RunLog,
    TrainConfig,
    Trainer,
    TrainingDiverged,
    TrainingScenes,
    recalibrate,
    train,
)

TINY = TrainConfig(
    generator=GeneratorConfig(
        width=4, z_dim=4, condition_dim=8, output="blend", places=True, noise_in_norm=True, light_components=2
    ),
    discriminator=DiscriminatorConfig(image_size=32, width=4, condition_dim=8, places=True, spectral_norm=False),
    objective="relativistic",
    images=72,
    reconstruction_images=36,
    batch_scenes=3,
    candidates=2,
    penalty_interval=2,
    own_pictures=1.0,
    preservation_weight=1.0,
    bf16=False,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_iclevr_layout(tmp_path_factory.mktemp("data"), num_scenes=24, image_size=(64, 64))
    return prepare(folder, progress=False).path


def make_trainer(data: Path, config: TrainConfig = TINY) -> Trainer:
    torch.manual_seed(config.seed)
    generator, discriminator = IterativeGenerator(config.generator), DiffDiscriminator(config.discriminator)
    return Trainer(config, TrainingScenes(SceneDataset(data, "train"), generator), generator, discriminator)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / CHECKPOINT)


def test_a_killed_run_goes_on_to_the_very_same_numbers(data: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, resume, compare bit for bit with a run that nobody disturbed."""
    config = dataclasses.replace(TINY, images=540, reconstruction_images=180)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "import dataclasses\n"
        "from condgan import training\n"
        "from test_training import TINY\n"
        "training.recalibrate = lambda generator, objects: None  # slow, and of the exported copy only\n"
        "config = dataclasses.replace(TINY, images=540, reconstruction_images=180)\n"
        "training.train(sys.argv[1], sys.argv[2], config, device='cpu', checkpoint_seconds=1, progress=False)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, str(script), str(data), str(tmp_path / "killed")]
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / CHECKPOINT).exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with safe_open(tmp_path / "killed" / CHECKPOINT, "pt") as file:
        reached = json.loads(file.metadata()["counters"])["images"]
    assert 0 < reached < config.images
    assert subprocess.run(command, env=environment).returncode == 0
    train(data, tmp_path / "whole", config, device="cpu", progress=False)

    killed, whole = tensors(tmp_path / "killed"), tensors(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(killed[name], whole[name])] == []
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed/log.jsonl").read_text().splitlines()]
    assert steps == [20, 40, 60]


def test_a_run_can_be_lengthened_but_not_changed(data: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(TINY, images=18)
    train(data, tmp_path, short, device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"another run: lr_generator was 0\.0001 and is 0\.5"):
        train(data, tmp_path, dataclasses.replace(short, lr_generator=0.5), device="cpu", progress=False)
    train(data, tmp_path, dataclasses.replace(short, images=27), device="cpu", progress=False)
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["counters"])["images"] == 27


def test_a_run_leaves_a_model_a_log_and_pictures(data: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    generator = train(data, tmp_path, TINY, device="cpu", progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    loaded = IterativeGenerator.from_pretrained(tmp_path / "model")
    scene = ["red cube", "blue sphere"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), generator.buffers(), strict=True))
    drawn = generator.generate(scene, seed=1).tensor  # in channels_last, hence not the very same bits
    torch.testing.assert_close(loaded.generate(scene, seed=1).tensor, drawn, rtol=0, atol=1e-5)
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["000000072.png"]
    assert not list(tmp_path.glob("*.partial"))


def test_the_stages_train_what_they_say(data: Path) -> None:
    trainer = make_trainer(data)
    before = {name: p.clone() for name, p in trainer.discriminator.named_parameters()}
    assert "discriminator" not in trainer.train_step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.discriminator.named_parameters())
    while not trainer.adversarial:
        trainer.train_step()
    generator = {name: p.clone() for name, p in trainer.generator.named_parameters()}
    losses = trainer.train_step()
    assert {"discriminator", "generator", "penalty", "preservation", "place"} <= losses.keys()
    assert not any(torch.equal(p, before[name]) for name, p in trainer.discriminator.named_parameters() if p.ndim > 1)
    assert not any(torch.equal(p, generator[name]) for name, p in trainer.generator.named_parameters() if p.ndim > 1)
    assert all(p.requires_grad for p in trainer.discriminator.parameters())


def test_reconstruction_gets_nearer_to_the_real_pictures(data: Path) -> None:
    trainer = make_trainer(data, dataclasses.replace(TINY, reconstruction_images=10_000, lr_reconstruction=4e-3))
    batch = trainer.scenes.batch(0, 8, seed=0)

    @torch.no_grad()
    def error() -> float:
        conditions = trainer._conditions(batch.objects)
        fake = trainer.generator(trainer._noise(batch, "z"), conditions, batch.prev_images, batch.places)
        return float(trainer._reconstruction_errors(fake, batch).mean())

    before = error()
    for _ in range(60):
        trainer.train_step()
    assert error() < 0.8 * before


def test_the_nearest_of_several_draws_is_taken(data: Path) -> None:
    trainer = make_trainer(data, dataclasses.replace(TINY, candidates=5))
    for parameter in trainer.generator.parameters():  # a generator that uses its noise
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    trainer.generator.eval()
    batch = trainer.scenes.batch(0, 3, 0)
    conditions = trainer._conditions(batch.objects).detach()

    def error(z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            fake = trainer.generator(z, conditions, batch.prev_images, batch.places)
        return trainer._reconstruction_errors(fake, batch)

    candidates = torch.stack([error(trainer._noise(batch, f"candidate {i}")) for i in range(5)])
    assert candidates.std(0).min() > 0
    torch.testing.assert_close(error(trainer._nearest_noise(batch, conditions)), candidates.amin(0))


def test_changed_pixels_weigh_more(data: Path) -> None:
    trainer = make_trainer(data)
    batch = trainer.scenes.batch(0, 3, 0)
    changed = (batch.images - batch.prev_images).abs().amax(1, keepdim=True) > 50 / 255
    off = batch.images + 0.1 * changed
    share = changed.float().mean((1, 2, 3))
    torch.testing.assert_close(trainer._reconstruction_errors(off, batch), 5 * 0.1 * share)


def test_every_epoch_is_a_permutation_and_the_places_are_where_things_changed(data: Path) -> None:
    scenes = make_trainer(data).scenes
    count = len(scenes.pixels)
    seen = torch.cat([scenes.batch(step, 1, seed=0).images[2:3] for step in range(count)])
    assert len(torch.unique(seen.flatten(1), dim=0)) == len(torch.unique(scenes.pixels[:, 3].flatten(1), dim=0))
    batch = scenes.batch(0, 4, seed=0)
    assert batch.places is not None
    middle = batch.places.unflatten(0, (4, 3))[:, 0]
    assert (middle - 31.5).abs().max() < 12  # the first object stands at the centre
    assert not torch.equal(scenes.batch(0, 4, seed=1).images, batch.images)


def test_steps_that_are_not_finite_are_skipped_then_stop_the_run(data: Path) -> None:
    trainer = make_trainer(data, dataclasses.replace(TINY, reconstruction_images=1000))
    weights = {name: p.clone() for name, p in trainer.generator.named_parameters()}
    good = trainer._reconstruction_errors
    trainer._reconstruction_errors = lambda fake, batch: good(fake, batch) * float("nan")  # type: ignore[method-assign]
    for i in range(MAX_SKIPPED_IN_A_ROW - 1):
        trainer.train_step()
        assert trainer.skipped == i + 1
    assert all(torch.equal(p, weights[name]) for name, p in trainer.generator.named_parameters())
    trainer._reconstruction_errors = good  # type: ignore[method-assign]
    trainer.train_step()
    assert trainer.skipped_in_a_row == 0
    assert trainer.skipped == MAX_SKIPPED_IN_A_ROW - 1
    trainer._reconstruction_errors = lambda fake, batch: good(fake, batch) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(TrainingDiverged, match="5 updates in a row"):
        for _ in range(MAX_SKIPPED_IN_A_ROW):
            trainer.train_step()


def test_a_diverged_run_names_its_last_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_reconstruction_errors", lambda self, fake, batch: fake.sum((1, 2, 3)) / 0)
    with pytest.raises(TrainingDiverged, match="there is no checkpoint yet"):
        train(data, tmp_path, dataclasses.replace(TINY, reconstruction_images=1000), device="cpu", progress=False)


def test_own_pictures_keep_what_the_turn_adds(data: Path) -> None:
    trainer = make_trainer(data)
    trainer.images = TINY.images  # the end of the schedule: every scene goes on from own pictures
    batch = trainer.scenes.batch(0, 3, 0)
    mixed = trainer._mix_own_pictures(batch)
    first = slice(0, None, 3)
    torch.testing.assert_close(mixed.prev_images[first], batch.prev_images[first])  # an empty scene is nobody's drawing
    assert not torch.equal(mixed.prev_images[1], batch.prev_images[1])
    changed = (batch.images - batch.prev_images).abs().amax(1, keepdim=True) > 50 / 255
    torch.testing.assert_close(mixed.images, torch.where(changed, batch.images, mixed.prev_images), rtol=0, atol=0)


def test_the_average_has_the_half_life_it_says(data: Path) -> None:
    trainer = make_trainer(data, dataclasses.replace(TINY, ema_halflife_images=90))
    trainer.images = 100_000
    name = "l0.weight"
    start = trainer.ema_generator.state_dict()[name].clone()
    trainer.generator.l0.weight.data += 1
    for _ in range(10):
        trainer._update_average(9)
    torch.testing.assert_close(trainer.ema_generator.state_dict()[name], start + 0.5)


def test_recalibrated_statistics_are_those_of_own_scenes(data: Path) -> None:
    trainer = make_trainer(data)
    generator = trainer.ema_generator
    for module in generator.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.fill_(1000.0)
    objects = torch.nn.functional.one_hot(trainer.scenes.objects, 24).float()
    recalibrate(generator, objects, batches=2, batch_size=4)
    assert not generator.training
    seen: list[torch.Tensor] = []
    hook = generator.bn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    generator.generate([["red cube", "blue cube", "gray cube"]] * 8, seed=0)
    hook.remove()
    mean = torch.cat(seen).mean((0, 2, 3))
    spread = torch.cat(seen).std((0, 2, 3))
    assert ((generator.bn.running_mean - mean).abs() < spread).all()
    assert all(m.momentum == 0.1 for m in generator.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_a_log_that_ran_ahead_of_the_checkpoint_is_cut_back(tmp_path: Path) -> None:
    lines = [{"step": s, "images": 9 * s} for s in (20, 40, 60)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 80, "ima')
    with RunLog(tmp_path, images=400):
        pass
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [20, 40]


def test_configurations_that_cannot_work_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="objective must be one of"):
        dataclasses.replace(TINY, objective="wgan")
    with pytest.raises(ValueError, match="agree on places"):
        dataclasses.replace(TINY, discriminator=DiscriminatorConfig())
    with pytest.raises(ValueError, match="penalty_interval must be at least 1, got 0"):
        dataclasses.replace(TINY, penalty_interval=0)
    with pytest.raises(ValueError, match="judges crops around places"):
        TrainConfig(discriminator=DiscriminatorConfig(image_size=32))
    large = dataclasses.replace(TINY, generator=dataclasses.replace(TINY.generator, image_size=128))
    with pytest.raises(ValueError, match=r"condgan prepare DATA_DIR --image-size 128"):
        train(data, tmp_path, large, device="cpu", progress=False)


def test_a_damaged_checkpoint_or_a_file_for_a_folder_says_what_to_do(data: Path, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"is damaged .* delete it to start the run again"):
        train(data, tmp_path, TINY, device="cpu", progress=False)
    with pytest.raises(OSError, match="out: cannot make the folder"):
        train(data, tmp_path / CHECKPOINT, TINY, device="cpu", progress=False)


def test_a_run_can_start_from_trained_networks(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "first", dataclasses.replace(TINY, images=18), device="cpu", progress=False)
    config = dataclasses.replace(
        TINY,
        images=9,
        lr_reconstruction=0.0,
        init_generator=str(tmp_path / "first/model"),
        init_discriminator=str(tmp_path / "first/discriminator"),
    )
    train(data, tmp_path / "second", config, device="cpu", progress=False)
    first, second = (IterativeGenerator.from_pretrained(tmp_path / run / "model") for run in ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"init_generator: .* has the configuration"):
        train(data, tmp_path / "third", dataclasses.replace(PRESETS["compact"], init_generator=config.init_generator))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_networks_that_can_be_built(name: str) -> None:
    config = PRESETS[name]
    reference = (GeneratorConfig(), DiscriminatorConfig())
    assert ((config.generator, config.discriminator) == reference) == name.startswith("reference")
    if name == "compact":
        generator = IterativeGenerator(config.generator)
        assert 2 * sum(p.numel() for p in generator.state_dict().values()) < 15e6  # bytes in fp16
