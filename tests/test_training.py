"""training.py: stages, skipped steps, averaged weights, batch norm recalibration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import RUN

from condgan import DiscriminatorConfig, GeneratorConfig, IterativeGenerator
from condgan.datasets import SceneDataset
from condgan.models import DiffDiscriminator
from condgan.training import (
    MAX_SKIPPED_IN_A_ROW,
    PRESETS,
    TrainConfig,
    Trainer,
    TrainingDiverged,
    TrainingScenes,
    recalibrate,
)


def make_trainer(data: Path, config: TrainConfig = RUN) -> Trainer:
    torch.manual_seed(config.seed)
    generator, discriminator = IterativeGenerator(config.generator), DiffDiscriminator(config.discriminator)
    return Trainer(config, TrainingScenes(SceneDataset(data, "train"), generator), generator, discriminator)


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
    trainer = make_trainer(data, dataclasses.replace(RUN, reconstruction_images=10_000, lr_reconstruction=4e-3))
    batch = trainer.scenes.batch(0, 8, seed=0)

    @torch.no_grad()
    def error() -> float:
        conditions = trainer._conditions(batch.objects)
        fake = trainer.generator(trainer._noise(batch, "z"), conditions, batch.prev_images, batch.places)
        return float(trainer._reconstruction_errors(fake, batch).mean())

    before = error()
    for _ in range(60):
        trainer.train_step()
    assert error() < 0.9 * before


def test_the_nearest_of_several_draws_is_taken(data: Path) -> None:
    trainer = make_trainer(data, dataclasses.replace(RUN, candidates=5))
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
    trainer = make_trainer(data, dataclasses.replace(RUN, reconstruction_images=1000))
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


def test_own_pictures_keep_what_the_turn_adds(data: Path) -> None:
    trainer = make_trainer(data)
    trainer.images = RUN.images  # the end of the schedule: every scene goes on from own pictures
    batch = trainer.scenes.batch(0, 3, 0)
    mixed = trainer._mix_own_pictures(batch)
    first = slice(0, None, 3)
    torch.testing.assert_close(mixed.prev_images[first], batch.prev_images[first])  # an empty scene is nobody's drawing
    assert not torch.equal(mixed.prev_images[1], batch.prev_images[1])
    changed = (batch.images - batch.prev_images).abs().amax(1, keepdim=True) > 50 / 255
    torch.testing.assert_close(mixed.images, torch.where(changed, batch.images, mixed.prev_images), rtol=0, atol=0)


def test_the_average_has_the_half_life_it_says(data: Path) -> None:
    trainer = make_trainer(data, dataclasses.replace(RUN, ema_halflife_images=90))
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


def test_configurations_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="objective must be one of"):
        dataclasses.replace(RUN, objective="wgan")
    with pytest.raises(ValueError, match="agree on places"):
        dataclasses.replace(RUN, discriminator=DiscriminatorConfig())
    with pytest.raises(ValueError, match="penalty_interval must be at least 1, got 0"):
        dataclasses.replace(RUN, penalty_interval=0)
    with pytest.raises(ValueError, match="judges crops around places"):
        TrainConfig(discriminator=DiscriminatorConfig(image_size=32))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_networks_that_can_be_built(name: str) -> None:
    config = PRESETS[name]
    reference = (GeneratorConfig(), DiscriminatorConfig())
    assert ((config.generator, config.discriminator) == reference) == name.startswith("reference")
    if name == "compact":
        generator = IterativeGenerator(config.generator)
        assert 2 * sum(p.numel() for p in generator.state_dict().values()) < 15e6  # bytes in fp16
