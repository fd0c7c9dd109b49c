"""training.py: stages, skipped steps, averaged weights, batch norm recalibration."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from tiny import RUN, make_trainer
from torch._subclasses.fake_tensor import FakeTensorMode

from condgan import DiscriminatorConfig, GeneratorConfig, IterativeGenerator, SceneClassifier, precision, training
from condgan.batches import TrainingScenes, step_rng
from condgan.canvas import Canvas
from condgan.datasets import SceneDataset
from condgan.functional import local_mean
from condgan.images import GRAIN, LEVEL, from_uint8, to_uint8
from condgan.losses import Objective
from condgan.presets import PRESETS, TrainConfig
from condgan.training import MAX_SKIPPED_IN_A_ROW, TrainingDiverged, _as_seen
from condgan.vocab import Vocabulary


def test_both_networks_know_how_empty_scenes_are_lit(data: Path) -> None:
    trainer = make_trainer(data)
    empty = trainer.scenes.pixels[:, 0].float() / 127.5 - 1
    light = trainer.generator.light
    assert light is not None and trainer.discriminator.light is not None
    torch.testing.assert_close(light(empty).mean(0), torch.zeros(2), atol=0.1, rtol=0)
    torch.testing.assert_close(light(empty).var(0, correction=0), torch.ones(2), atol=0.2, rtol=0)
    assert torch.equal(trainer.discriminator.light(empty), light(empty))
    before = trainer.discriminator.light_bias.weight.clone()
    for trainer.images in (RUN.reconstruction_images,) * 2:
        trainer.train_step()
    assert not torch.equal(trainer.discriminator.light_bias.weight, before)
    assert torch.equal(trainer.ema_generator.light(empty), light(empty)), "what was fitted stays"


def test_the_default_device_makes_no_difference(data: Path) -> None:
    """Of a user whose tensors are made on a GPU unless told otherwise; here, where they would have no values."""
    expected, trainer, dataset = make_trainer(data), make_trainer(data), SceneDataset(data, "train")
    with torch.device("meta"):
        trainer.scenes = TrainingScenes(dataset, trainer.generator, fit_canvas=False)
    for images in (0, RUN.reconstruction_images):
        expected.images = trainer.images = images
        losses = expected.train_step()
        with torch.device("meta"):
            assert trainer.train_step() == losses
    for (name, weight), other in zip(
        expected.export().state_dict().items(), trainer.export().state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other), name


def test_the_stages_train_what_they_say(data: Path) -> None:
    trainer = make_trainer(data)
    before = {name: p.clone() for name, p in trainer.discriminator.named_parameters()}
    assert "discriminator" not in trainer.train_step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.discriminator.named_parameters())
    while not trainer.adversarial:
        trainer.train_step()
    generator = {name: p.clone() for name, p in trainer.generator.named_parameters()}
    losses = trainer.train_step()
    assert {"discriminator", "generator", "penalty", "reconstruction", "place", "mapping"} <= losses.keys()
    assert not any(torch.equal(p, before[name]) for name, p in trainer.discriminator.named_parameters() if p.ndim > 1)
    assert not any(torch.equal(p, generator[name]) for name, p in trainer.generator.named_parameters() if p.ndim > 1)
    assert all(p.requires_grad for p in trainer.discriminator.parameters())


@pytest.mark.parametrize("penalty_interval", [1, 2])
def test_one_backward_pass_of_a_zero_sum_game_is_as_good_as_two(
    penalty_interval: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(RUN, objective="reference", bf16=False, penalty_interval=penalty_interval)
    networks = []
    for zero_sum in (True, False):
        trainer = make_trainer(data, config)
        trainer.images, trainer.step = config.reconstruction_images, 1
        if not zero_sum:
            monkeypatch.setattr(Objective, "zero_sum", False)
        before = _backward_passes(trainer.discriminator.l6)
        trainer.train_step()
        networks.append((trainer, len(before)))
    (one, passes), (two, more) = networks
    assert passes < more
    for ours, theirs in ((one.generator, two.generator), (one.discriminator, two.discriminator)):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if q.grad is None:
                assert p.grad is None, name
            else:
                torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def _backward_passes(module: torch.nn.Module) -> list[None]:
    """Grows by one with every backward pass through a module."""
    passes: list[None] = []
    module.register_full_backward_hook(lambda *_: passes.append(None))
    return passes


def test_reconstruction_gets_nearer_to_the_real_pictures(data: Path) -> None:
    trainer = make_trainer(data, dataclasses.replace(RUN, reconstruction_images=10_000, lr_reconstruction=1e-2))
    batch = trainer.scenes.batch(0, 8, seed=0)

    @torch.no_grad()
    def error() -> float:
        conditions = trainer._conditions(batch)
        code = trainer._found_code(batch)
        fake = trainer.generator.synthesis(code, conditions, batch.prev_images, batch.places)
        return float(trainer._reconstruction_errors(fake, batch).mean())

    before = error()
    for _ in range(120):
        trainer.train_step()
    assert error() < 0.9 * before


@pytest.mark.whole_fits
def test_when_the_adversarial_stage_begins_the_mapping_knows_the_codes_that_are_found(data: Path) -> None:
    trainer = make_trainer(data, dataclasses.replace(RUN, reconstruction_images=360))
    batch = trainer.scenes.batch(0, 16, 0)

    @torch.no_grad()
    def surprise() -> float:
        return float(trainer._chance_losses(batch, trainer._conditions(batch), trainer._found_code(batch))["mapping"])

    while trainer.images < 351:
        trainer.train_step()
    before = surprise()
    trainer.train_step()
    assert trainer.adversarial
    assert surprise() < before - 0.3, "nats"
    pair = zip(trainer.generator.mapping.parameters(), trainer.ema_generator.mapping.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pair)


def test_found_codes_keep_a_little_room_and_unit_variance(data: Path) -> None:
    trainer = make_trainer(data)
    batch = trainer.scenes.batch(0, 4, 0)
    assert trainer.noise_encoder is not None
    with torch.no_grad():
        trainer.noise_encoder.linear.weight *= 1000  # a fresh one hardly sees a difference between pictures
        found = trainer.noise_encoder(batch.prev_images, batch.images, batch.places)
        code = trainer._found_code(batch)
    torch.testing.assert_close(found.var(0, unbiased=False), torch.ones(found.shape[1]), rtol=1e-2, atol=0)
    assert (code - found).std() == pytest.approx(0.15, rel=0.3)
    assert (code * found).mean(0).min() > 0.9


@pytest.mark.parametrize("mapping", [False, True])
def test_half_of_the_pictures_are_drawn_with_the_code_that_was_found(
    data: Path, mapping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(
        data, dataclasses.replace(RUN, generator=dataclasses.replace(RUN.generator, mapping=mapping))
    )
    synthesis, random_code = trainer.generator.synthesis, trainer._random_code
    drawn, random = [], []
    monkeypatch.setattr(
        trainer.generator, "synthesis", lambda code, *args: drawn.append(code) or synthesis(code, *args)
    )
    monkeypatch.setattr(trainer, "_random_code", lambda *args: random.append(random_code(*args)) or random[-1])
    for trainer.step in range(1, 21):
        trainer.images = RUN.reconstruction_images
        trainer.train_step()
    share = (torch.stack(drawn) == torch.stack(random)).all(2).float().mean()
    assert 0.35 < share < 0.65
    noise = torch.stack([trainer._noise(trainer.scenes.batch(0, 3, 0), "z") for trainer.step in range(1, 21)])
    assert torch.equal(torch.stack(random), noise) is not mapping, "a mapping maps, and nothing else does"


def test_the_mapping_learns_the_codes_that_are_found_and_nothing_else_feels_it(data: Path) -> None:
    trainer = make_trainer(data, dataclasses.replace(RUN, reconstruction_images=10_000, lr_reconstruction=3e-3))
    batch = trainer.scenes.batch(0, 4, 0)
    conditions, code = trainer._conditions(batch), trainer._found_code(batch)
    trainer._chance_losses(batch, conditions, code)["mapping"].backward()
    moved = {name for name, p in trainer.generator.named_parameters() if p.grad is not None}
    assert moved == {f"mapping.{name}" for name, _ in trainer.generator.mapping.named_parameters()}
    assert all(p.grad is None for p in trainer.noise_encoder.parameters())
    losses = [trainer.train_step()["mapping"] for _ in range(80)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 10, "nats, by one each"


def test_the_discriminator_sees_whole_levels_and_the_gradient_passes() -> None:
    rng = torch.Generator().manual_seed(0)
    before = from_uint8(torch.randint(90, 93, (2, 1, 32, 32), generator=rng).repeat(1, 3, 1, 1))
    drawn = (before + 0.4 * LEVEL).requires_grad_()
    seen = _as_seen(drawn, before, torch.rand(2, 2, 1, 32, 32, generator=rng))
    moved = (seen.detach() - before) / LEVEL
    torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-4)
    assert moved.mean().item() == pytest.approx(0.4, abs=0.05)
    assert (moved.round() == moved[:, :1].round()).all(), "what is gray stays gray: grain has no colour"
    seen.sum().backward()
    assert drawn.grad is not None
    assert (drawn.grad == 1).all()


def test_without_history_every_turn_is_read_as_a_first_one(data: Path) -> None:
    trainer = make_trainer(data, dataclasses.replace(RUN, history_dropout=1.0))
    batch = trainer.scenes.batch(0, 3, 0)
    objects, conditions = batch.objects, trainer._conditions(batch)
    for turn in range(3):
        first = trainer.generator.encoder(objects[:, turn])[0]
        torch.testing.assert_close(conditions.unflatten(0, (3, 3))[:, turn], first)
    rolled = make_trainer(data, dataclasses.replace(RUN, history_dropout=0.0))._conditions(batch)
    assert not torch.allclose(rolled, conditions)


def test_learning_rates_fall_to_a_tenth_at_the_end(data: Path) -> None:
    trainer = make_trainer(data, dataclasses.replace(RUN, images=1000, decay_images=400))
    rates = []
    for trainer.images in (0, 600, 800, 1000):
        trainer._set_learning_rates()
        rates.append(trainer.optimizers["generator"].param_groups[0]["lr"] / RUN.lr_generator)
    assert rates == pytest.approx([1, 1, 0.55, 0.1])


def test_changed_pixels_weigh_more_and_those_of_earlier_objects_most(data: Path) -> None:
    trainer = make_trainer(data)
    batch = trainer.scenes.batch(0, 3, 0)
    changed = (batch.images - batch.prev_images).abs().amax(1, keepdim=True) > 50 / 255
    weight = 1 + 4 * changed.float()
    for first in range(0, 9, 3):  # of each scene
        weight[first + 1][changed[first]] = 10
        weight[first + 2][changed[first] | changed[first + 1]] = 10
    error = 0.03 * torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))

    def distance(x: torch.Tensor) -> torch.Tensor:
        levels = 127.5 * x.abs()
        return torch.where(levels < 1, levels.square() / 2, levels - 0.5) / 127.5

    edges = (weight[..., 1:] * distance(error.diff(dim=3))).sum((1, 2, 3))
    edges = edges + (weight[:, :, 1:] * distance(error.diff(dim=2))).sum((1, 2, 3))
    colour = local_mean(error - error.mean(1, keepdim=True), 3).abs().sum((1, 2, 3))
    expected = ((weight * distance(error)).sum((1, 2, 3)) + edges + 40 * colour) / (3 * 32**2)  # of the window
    torch.testing.assert_close(trainer._reconstruction_errors(batch.images + error, batch), expected)
    found = torch.arange(9) % 2 == 0
    torch.testing.assert_close(trainer._reconstruction_errors(batch.images + error, batch, found), expected * found)


def test_empty_scenes_are_made_on_the_device_of_the_canvas() -> None:
    """Tensors without numbers stand for those of a GPU: they know where they would be."""
    with FakeTensorMode():
        generator = SimpleNamespace(
            canvas=Canvas(64, 2).to("cuda"),
            light=None,
            config=GeneratorConfig(light_components=2),
            vocabulary=Vocabulary(),
            image_size=64,
        )
        pixels = torch.zeros(5, 3, 3, 64, 64, dtype=torch.uint8)
        data = SimpleNamespace(pixels=pixels, objects=torch.zeros(5, 3), vocabulary=Vocabulary())
        scenes = TrainingScenes(cast(SceneDataset, data), cast(IterativeGenerator, generator), fit_canvas=False)
    assert generator.canvas.mean.device.type == "cuda"
    assert (scenes.pixels.device.type, scenes.pixels.shape) == ("cpu", (5, 4, 3, 64, 64))


def test_empty_scenes_have_grain_of_their_own(data: Path) -> None:
    trainer = make_trainer(data)
    dataset = SceneDataset(data, "train")
    empty = to_uint8(trainer.generator.canvas.remove_objects(from_uint8(dataset.pixels[:, 0]))).int()
    apart = trainer.scenes.pixels[:, 0].int() - empty
    assert apart.abs().max() == 1
    assert GRAIN / 2 < apart.ne(0).float().mean() < GRAIN


def test_what_is_reconstructed_of_a_faint_shadow_is_its_mean(data: Path) -> None:
    trainer = make_trainer(data)
    batch = trainer.scenes.batch(0, 3, 0)
    darker = torch.rand(batch.images.shape, generator=torch.Generator().manual_seed(0)) < 0.3  # by a level, in the data
    shadow = batch._replace(images=batch.images - darker / 127.5)
    losses = {k: trainer._reconstruction_errors(batch.images - k / 10 / 127.5, shadow).sum() for k in range(6)}
    assert min(losses, key=losses.__getitem__) == 3, "tenths of a level; the median would be 0"


def test_a_ghost_weighs_much_whatever_the_code(data: Path) -> None:
    trainer = make_trainer(data)
    batch = trainer.scenes.batch(0, 1, 0)
    changed = (batch.images - batch.prev_images).abs().amax(1) > 50 / 255
    row, column = changed[0].nonzero()[0].tolist()  # the uppermost changed pixel of the first turn
    neither = torch.zeros(3, dtype=torch.bool)
    for distance, is_ghost in ((3, False), (4, True)):
        fake = batch.images.clone()
        fake[0, :, row - distance, column] += 0.5
        ghost = 10 * 3 * 0.5 / (3 * 32**2)  # its value; the differences to its neighbours weigh as these do
        of_random = trainer._reconstruction_errors(fake, batch, neither)
        assert (of_random[0] > 0.9 * ghost) == is_ghost
        assert (of_random > 0).tolist() == [is_ghost, False, False]
        of_found = trainer._reconstruction_errors(fake, batch, ~neither)
        assert (of_found[0] > 0.9 * ghost) == is_ghost
        assert of_found[0] > 0


class Brightness(torch.nn.Module):
    """A verifier that finds every object where the picture is bright, and none where it is black."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 3 * images.mean((1, 2, 3))[:, None].expand(-1, 24)


def test_what_the_verifier_misreads_is_part_of_the_generators_loss(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "HIDDEN_LOSS", 1000.0)
    config = dataclasses.replace(RUN, verifier="a stub", legibility_weight=2.0)
    trainer = make_trainer(data, config, cast(SceneClassifier, Brightness().eval()))
    trainer.images = RUN.reconstruction_images
    batch = trainer.scenes.batch(0, RUN.batch_scenes, 0)
    black = torch.full_like(batch.images, -1.0)
    there = torch.tensor([1.0, 2.0, 3.0]).repeat(len(batch.objects))  # objects so far: nothing is forgotten
    nothing_seen = 24 * math.log1p(math.exp(-3)) + 3 * there
    torch.testing.assert_close(trainer._misread(black, batch), nothing_seen)
    losses = trainer._adversarial_losses(batch)
    trainer.config = dataclasses.replace(config, legibility_weight=0.0)
    without = trainer._adversarial_losses(batch)
    for names, loss in losses.minimised.items():
        more = 2 * losses.reported["misread"] if "generator" in names else torch.tensor(0.0)
        torch.testing.assert_close(loss - without.minimised[names], more)
    losses.reported["misread"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.generator.parameters())


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


@pytest.mark.parametrize("images", [0, RUN.reconstruction_images])
def test_a_skipped_step_leaves_everything_as_it_was(images: int, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(data)
    trainer.images = images
    good = trainer.scenes.batch
    before = {name: copy.deepcopy(network.state_dict()) for name, network in trainer.networks().items()}
    with monkeypatch.context() as patch:
        patch.setattr(trainer.scenes, "batch", lambda *args: good(*args)._replace(images=good(*args).images / 0))
        trainer.train_step()
    assert trainer.skipped == 1
    for name, network in trainer.networks().items():
        changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[name][key])}
        assert not changed, f"{name}: {changed}"
    trainer.train_step()
    for network in trainer.networks().values():
        assert all(value.isfinite().all() for value in network.state_dict().values())


def test_own_pictures_keep_what_the_turn_adds(data: Path) -> None:
    trainer = make_trainer(data)
    trainer.images = RUN.images  # the end of the schedule: every scene goes on from own pictures
    batch = trainer.scenes.batch(0, 3, 0)
    mixed = trainer._mix_own_pictures(batch)
    first = slice(0, None, 3)
    torch.testing.assert_close(mixed.prev_images[first], batch.prev_images[first])  # an empty scene is nobody's drawing
    assert not torch.equal(mixed.prev_images[1], batch.prev_images[1])
    changed = (batch.images - batch.prev_images).abs().amax(1, keepdim=True) > 50 / 255
    kept = (mixed.prev_images + batch.images - batch.prev_images).clamp(-1, 1)  # and what it shades
    torch.testing.assert_close(mixed.images, torch.where(changed, batch.images, kept), rtol=0, atol=0)


def test_the_average_has_the_half_life_it_says(data: Path) -> None:
    trainer = make_trainer(data, dataclasses.replace(RUN, ema_halflife_images=90))
    trainer.images = 100_000
    name = "l0.weight"
    start = trainer.ema_generator.state_dict()[name].clone()
    trainer.generator.l0.weight.data += 1
    for _ in range(10):
        trainer._update_average(9)
    torch.testing.assert_close(trainer.ema_generator.state_dict()[name], start + 0.5)


def test_configurations_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="objective must be one of"):
        dataclasses.replace(RUN, objective="wgan")
    with pytest.raises(ValueError, match="reconstruction_weight=1 needs a noise encoder that has learned"):
        dataclasses.replace(RUN, reconstruction_weight=1, reconstruction_images=0)
    with pytest.raises(ValueError, match="agree on places"):
        dataclasses.replace(RUN, discriminator=DiscriminatorConfig())
    with pytest.raises(ValueError, match="decay_images must not be negative, got -1"):
        dataclasses.replace(RUN, decay_images=-1)
    for name, value in (("lr_generator", -1.0), ("lr_encoder", math.inf), ("reconstruction_weight", math.nan)):
        with pytest.raises(ValueError, match=f"{name} must be a finite number, not negative, got {value}"):
            dataclasses.replace(RUN, **{name: value})
    with pytest.raises(ValueError, match="beta2 must be from 0 to less than 1, got 1"):
        dataclasses.replace(RUN, beta2=1.0)
    with pytest.raises(ValueError, match="own_pictures is a share, from 0 to 1, got 2"):
        dataclasses.replace(RUN, own_pictures=2)
    with pytest.raises(ValueError, match="penalty_interval must be at least 1, got 0"):
        dataclasses.replace(RUN, penalty_interval=0)
    with pytest.raises(ValueError, match="agree on image_size, got 64 and 32"):
        TrainConfig(discriminator=DiscriminatorConfig(image_size=32))
    with pytest.raises(ValueError, match="agree on window, got 32 and 40"):
        dataclasses.replace(RUN, discriminator=dataclasses.replace(RUN.discriminator, window=40))
    with pytest.raises(ValueError, match="agree on light_inputs, got 1 and 0"):
        TrainConfig(generator=GeneratorConfig(light_components=2, light_inputs=1))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("seed", "x", "int"),
        ("seed", True, "int"),
        ("images", 1.5, "int"),
        ("lr_generator", "1e-4", "float"),
        ("bf16", "no", "bool"),
        ("bf16", 1, "bool"),
        ("verifier", 3, "str"),
        ("generator", None, "GeneratorConfig"),
    ],
)
def test_a_field_of_another_type_is_refused_before_the_run(name: str, value: object, wanted: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be {wanted}, got {value!r}$"):
        dataclasses.replace(RUN, **{name: value})


def test_every_seed_up_to_the_largest_has_random_numbers_of_its_own() -> None:
    assert step_rng(18, 5, "").initial_seed() == (18 * 1_000_003 + 5) * 1_000_033
    seeds = (0, 1, 18_000_000, 18_500_000, 2**63 - 1)
    assert len({step_rng(dataclasses.replace(RUN, seed=seed).seed, 5, "own").initial_seed() for seed in seeds}) == 5
    drawn = [torch.rand(4, generator=step_rng(seed, 5, "own")) for seed in (0, 2**32, 2**33)]
    assert not drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2]) and not drawn[1].equal(drawn[2])
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"seed must be between 0 and 2\*\*63 - 1, got {seed}"):
            dataclasses.replace(RUN, seed=seed)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_networks_that_can_be_built(name: str) -> None:
    config = PRESETS[name]
    reference = (GeneratorConfig(), DiscriminatorConfig())
    assert ((config.generator, config.discriminator) == reference) == name.startswith("reference")
    if name == "compact":
        generator = IterativeGenerator(config.generator)
        assert 2 * sum(p.numel() for p in generator.state_dict().values()) < 15e6  # bytes in fp16


def test_places_and_codes_of_the_start_are_kept_where_the_rnn_learns_nothing(data: Path) -> None:
    source = {"init_generator": "somewhere", "init_noise_encoder": "somewhere"}  # which `runs` reads
    settled = dataclasses.replace(RUN, **source, reconstruction_images=0, lr_encoder=0.0)
    assert settled.keeps_chance
    for change in ({"lr_encoder": 1e-3}, {"init_generator": None}, {"reconstruction_images": 36}):
        assert not dataclasses.replace(settled, **change).keeps_chance
    trainer = make_trainer(data, settled)
    before = copy.deepcopy(trainer.generator)
    losses = [trainer.train_step() for _ in range(3)][-1]
    assert not {"place", "mapping"} & losses.keys()
    finished = trainer.finish(progress=False)
    for name in ("encoder", "place_model", "mapping"):
        learned = finished.get_submodule(name).parameters()
        for ours, theirs in zip(learned, before.get_submodule(name).parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    assert not torch.equal(finished.conv.weight, before.conv.weight)


def test_in_bfloat16_blocks_of_the_discriminator_are_and_its_logits_are_not(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: True)
    trainer = make_trainer(data, dataclasses.replace(RUN, bf16=True))
    trainer.images = RUN.reconstruction_images
    seen: dict[str, set[torch.dtype]] = {"generator": set(), "discriminator": set()}
    for name, dtypes in seen.items():
        for module in getattr(trainer, name).modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda _, __, output, dtypes=dtypes: dtypes.add(output.dtype))
    logits: set[torch.dtype] = set()
    for head in (trainer.discriminator.l6, trainer.discriminator.aux_objective):
        head.register_forward_hook(lambda _, __, output: logits.add(output.dtype))
    losses = trainer.train_step()
    assert all(map(math.isfinite, losses.values()))
    assert torch.bfloat16 in seen["generator"]
    assert seen["discriminator"] == {torch.bfloat16}
    assert logits == {torch.float32}
