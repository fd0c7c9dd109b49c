"""The networks: the reference's architecture row by row, equality with plain versions, a grid of configs."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reference
import safetensors.torch
import torch
import torch.nn.functional as F
from reference import randomise
from tiny import COMPACT, lively_generator
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import is_parametrized

from condgan import ObjectCounterConfig, SceneClassifierConfig, models
from condgan.configs import DiscriminatorConfig, GeneratorConfig, NoiseEncoderConfig
from condgan.functional import encode_objects, window_corners
from condgan.layers import ConditionalBatchNorm2d, ConditionProjector, DisBlock, GenBlock
from condgan.models import DiffDiscriminator, IterativeGenerator, NoiseEncoder
from condgan.parts import LEAST_LIKELY, ConditionRNN, NoiseMapping, PlaceModel, PreviousImageEncoder
from condgan.presets import PRESETS
from condgan.vocab import Vocabulary

GENERATORS = [
    GeneratorConfig(width=4),
    GeneratorConfig(width=4, output="blend"),
    GeneratorConfig(width=4, output="blend", places=True, noise_in_norm=True, light_components=2, z_dim=7),
    GeneratorConfig(width=4, places=True, condition_dim=12, objects=("dot", "dash")),
    GeneratorConfig(image_size=32, width=4, noise_in_norm=True, mapping=True, z_dim=6),
    GeneratorConfig(image_size=32, width=4, output="blend", places=True),
    GeneratorConfig(image_size=128, width=4),
    GeneratorConfig(image_size=128, width=4, output="blend", places=True, noise_in_norm=True),
]
WINDOWED_GENERATORS = [
    GeneratorConfig(
        width=4,
        z_dim=7,
        output="blend",
        places=True,
        window=40,
        noise_in_norm=True,
        mapping=True,
        light_components=4,
        light_inputs=3,
    ),
    GeneratorConfig(width=4, z_dim=7, places=True, window=40),
    GeneratorConfig(image_size=32, width=4, output="blend", places=True, window=32),
    GeneratorConfig(image_size=128, width=4, output="blend", places=True, window=24),
]
DISCRIMINATORS = [
    DiscriminatorConfig(width=4),
    DiscriminatorConfig(width=4, places=True, condition_dim=12, objects=("dot", "dash")),
    DiscriminatorConfig(width=4, spectral_norm=False),
    DiscriminatorConfig(image_size=32, width=4, places=True),
    DiscriminatorConfig(image_size=128, width=4),
]
WINDOWED_DISCRIMINATORS = [
    DiscriminatorConfig(width=4, places=True, window=40, spectral_norm=False),
    DiscriminatorConfig(width=4, places=True, window=40, spectral_norm=False, light_inputs=3),
    DiscriminatorConfig(image_size=32, width=4, places=True, window=32),
]
NOISE_ENCODERS = [
    NoiseEncoderConfig(width=4, z_dim=6, places=True, window=40),
    NoiseEncoderConfig(width=4, z_dim=5, places=True),
    NoiseEncoderConfig(image_size=32, width=4, z_dim=6),
]


def config_name(config: GeneratorConfig | DiscriminatorConfig | NoiseEncoderConfig) -> str:
    default = type(config)()
    changed = {k: v for k, v in vars(config).items() if v != getattr(default, k) and k not in ("width", "objects")}
    return ",".join(f"{key}={value}" for key, value in changed.items()) or "default"


every_generator = pytest.mark.parametrize("config", GENERATORS + WINDOWED_GENERATORS, ids=config_name)
every_discriminator = pytest.mark.parametrize("config", DISCRIMINATORS + WINDOWED_DISCRIMINATORS, ids=config_name)
every_noise_encoder = pytest.mark.parametrize("config", NOISE_ENCODERS, ids=config_name)


def generator_input(
    config: GeneratorConfig, n: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor | None, ...]:
    """z, condition, previous picture, place."""
    rng = torch.Generator().manual_seed(3)
    z = torch.randn(n, config.z_dim, generator=rng)
    condition = torch.randn(n, config.condition_dim, generator=rng)
    prev_image = torch.rand(n, 3, config.image_size, config.image_size, generator=rng) * 2 - 1
    place = torch.rand(n, 2, generator=rng) * (config.image_size - 1) if config.places else None
    return tuple(None if x is None else x.to(dtype) for x in (z, condition, prev_image, place))


def discriminator_input(
    config: DiscriminatorConfig, n: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor | None, ...]:
    """Previous picture, picture, condition, place."""
    rng = torch.Generator().manual_seed(4)
    prev_image, image = torch.rand(2, n, 3, config.image_size, config.image_size, generator=rng) * 2 - 1
    condition = torch.randn(n, config.condition_dim, generator=rng)
    place = torch.rand(n, 2, generator=rng) * (config.image_size - 1) if config.places else None
    return tuple(None if x is None else x.to(dtype) for x in (prev_image, image, condition, place))


def noise_encoder_input(config: NoiseEncoderConfig, n: int = 4) -> tuple[Tensor | None, ...]:
    """Previous picture, picture, place."""
    rng = torch.Generator().manual_seed(5)
    prev_image, image = torch.rand(2, n, 3, config.image_size, config.image_size, generator=rng) * 2 - 1
    contrast, level = torch.rand(2, n, 3, 1, 1, generator=rng)  # or one picture of noise looks like the other
    place = torch.rand(n, 2, generator=rng) * (config.image_size - 1) if config.places else None
    return prev_image, contrast * image + (1 - contrast) * level, place


def lively_noise_encoder(config: NoiseEncoderConfig) -> NoiseEncoder:
    """Its noise varies by far more than the epsilon of its norm, unlike that of a fresh one."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        encoder = NoiseEncoder(config)
        randomise(encoder)
        encoder.linear.weight *= 100
    return encoder


def item(arguments: tuple[Tensor | None, ...], i: int) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x[i : i + 1] for x in arguments)


@contextmanager
def recording(module: nn.Module) -> Iterator[dict[str, list[tuple[tuple[Tensor, ...], Tensor]]]]:
    """Inputs and outputs of every call of every submodule, by its name."""
    calls: dict[str, list[tuple[tuple[Tensor, ...], Tensor]]] = {}
    hooks = [
        submodule.register_forward_hook(
            lambda _, inputs, output, name=name: calls.setdefault(name, []).append((inputs, output))
        )
        for name, submodule in module.named_modules()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


# The reference's architecture, row by row


@pytest.fixture(scope="module")
def reference_generator() -> IterativeGenerator:
    return IterativeGenerator().eval()


@pytest.fixture(scope="module")
def reference_discriminator() -> DiffDiscriminator:
    return DiffDiscriminator().eval()


def check_convolution(layer: nn.Module, inputs: int, outputs: int, kernel: int, padding: int) -> None:
    assert isinstance(layer, nn.Conv2d)
    assert (layer.in_channels, layer.out_channels) == (inputs, outputs)
    assert (layer.kernel_size, layer.padding, layer.stride) == ((kernel,) * 2, (padding,) * 2, (1, 1))
    assert (layer.dilation, layer.groups) == ((1, 1), 1)
    assert layer.bias is not None
    assert layer.weight.shape == (outputs, inputs, kernel, kernel)


def check_linear(layer: nn.Module, inputs: int, outputs: int) -> None:
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (inputs, outputs)
    assert layer.bias is not None


def check_conditional_norm(layer: nn.Module, channels: int) -> None:
    assert isinstance(layer, ConditionalBatchNorm2d)
    assert [name for name, _ in layer.named_children()] == ["bn", "fc"]
    assert isinstance(layer.bn, nn.BatchNorm2d)
    assert (layer.bn.num_features, layer.bn.affine, layer.bn.eps, layer.bn.momentum) == (channels, False, 1e-5, 0.1)
    check_linear(layer.fc, 256, 2 * channels)


def test_the_generator_has_the_modules_of_the_reference(reference_generator: IterativeGenerator) -> None:
    generator = reference_generator
    check_linear(generator.c_proj, 256, 256)
    check_linear(generator.l0, 356, 16384)
    for name, inputs, outputs in (
        ("block1", 1024, 512),
        ("block2", 1024, 256),
        ("block3", 256, 128),
        ("block4", 128, 64),
    ):
        block = generator.get_submodule(name)
        assert isinstance(block, GenBlock)
        assert {key for key, _ in block.named_children()} == {"cbn1", "cbn2", "c0", "c1", "c2"}
        check_conditional_norm(block.cbn1, inputs)
        check_conditional_norm(block.cbn2, outputs)
        check_convolution(block.c0, inputs, outputs, 1, 0)
        check_convolution(block.c1, inputs, outputs, 3, 1)
        check_convolution(block.c2, outputs, outputs, 3, 1)
    assert not hasattr(generator, "block5")
    assert isinstance(generator.bn, nn.BatchNorm2d)
    assert (generator.bn.num_features, generator.bn.affine) == (64, True)
    assert isinstance(generator.ac, nn.LeakyReLU)
    assert generator.ac.negative_slope == 0.01
    check_convolution(generator.conv, 64, 3, 3, 1)
    assert isinstance(generator.tanh, nn.Tanh)
    assert generator.place_model is None


def test_the_condition_network_is_what_the_reference_used(reference_generator: IterativeGenerator) -> None:
    encoder = reference_generator.encoder
    assert [name for name, _ in encoder.named_children()] == ["embedding", "gru", "norm"]
    assert encoder.embedding.weight.shape == (24, 256)
    assert (encoder.gru.input_size, encoder.gru.hidden_size) == (256, 256)
    assert encoder.norm.normalized_shape == (256,)


def test_the_previous_picture_becomes_512_channels_at_8x8(reference_generator: IterativeGenerator) -> None:
    encoder = reference_generator.prev_encoder
    assert isinstance(encoder, PreviousImageEncoder)
    assert [(c.in_channels, c.out_channels) for c in encoder.convs] == [(3, 64), (64, 128), (128, 512)]
    assert all((c.kernel_size, c.stride, c.bias) == ((4, 4), (2, 2), None) for c in encoder.convs)
    assert [norm.num_features for norm in encoder.norms] == [64, 128, 512]


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_without_a_window_the_coarsest_features_are_as_wide_at_every_size(size: int, blend: bool) -> None:
    """Saved models of all sizes have these shapes."""
    config = GeneratorConfig(image_size=size, width=2, condition_dim=3, output="blend" if blend else "tanh")
    generator = IterativeGenerator(config)
    channels = {32: [2, 16], 64: [2, 4, 16], 128: [2, 4, 8, 16]}[size]
    assert [conv.out_channels for conv in generator.prev_encoder.convs] == channels
    before = [generator.get_submodule(f"block{i}").c0.out_channels for i in range(1, generator.num_blocks)]
    joined = channels[::-1] if blend else [16] + [0] * (len(channels) - 1)
    inputs = [generator.get_submodule(f"block{i}").c0.in_channels for i in range(2, generator.num_blocks + 1)]
    assert inputs == [own + extra for own, extra in zip(before, joined, strict=True)]
    assert generator.l0.out_features == {32: 8, 64: 16, 128: 16}[size] * 2 * 4**2


@torch.no_grad()
def test_the_generator_grows_the_maps_of_the_reference(reference_generator: IterativeGenerator) -> None:
    z, condition, prev_image, _ = generator_input(reference_generator.config, 1)
    with recording(reference_generator) as calls:
        image = reference_generator(z, condition, prev_image)
    assert image.shape == (1, 3, 64, 64)
    assert calls["c_proj"][0][0][0] is condition
    l0_input = calls["l0"][0][0][0]
    assert torch.equal(l0_input[:, :100], z)
    assert torch.equal(l0_input[:, 100:], calls["c_proj"][0][1])
    for name, before, after in (
        ("block1", (1, 1024, 4, 4), (1, 512, 8, 8)),
        ("block2", (1, 1024, 8, 8), (1, 256, 16, 16)),
        ("block3", (1, 256, 16, 16), (1, 128, 32, 32)),
        ("block4", (1, 128, 32, 32), (1, 64, 64, 64)),
    ):
        ((inputs, output),) = calls[name]
        assert (inputs[0].shape, output.shape) == (before, after), name
        assert inputs[1] is condition
    assert torch.equal(calls["block1"][0][0][0].flatten(1), calls["l0"][0][1])
    joined, previous = calls["block2"][0][0][0], calls["prev_encoder"][0][1][-1]
    assert previous.shape == (1, 512, 8, 8)
    assert torch.equal(joined[:, :512], calls["block1"][0][1])
    assert torch.equal(joined[:, 512:], previous)
    order = [name for name in calls if name in ("bn", "ac", "conv", "tanh")]
    assert order == ["bn", "ac", "conv", "tanh"]
    assert torch.equal(calls["tanh"][0][1], image)


def test_the_discriminator_has_the_modules_of_the_reference(reference_discriminator: DiffDiscriminator) -> None:
    discriminator = reference_discriminator
    widths = [3, 64, 128, 256, 512, 1024]
    for i, (inputs, outputs) in enumerate(pairwise(widths), 1):
        block = discriminator.get_submodule(f"block{i}")
        assert isinstance(block, DisBlock)
        assert {key for key, _ in block.named_children()} == {"c0", "c1", "c2"}
        check_convolution(block.c0, inputs, outputs, 1, 0)
        check_convolution(block.c1, inputs, outputs, 3, 1)
        check_convolution(block.c2, outputs, outputs, 3, 1)
    assert not hasattr(discriminator, "block6")
    check_linear(discriminator.l6, 1024, 1)
    assert isinstance(discriminator.condition_projector, ConditionProjector)
    check_linear(discriminator.condition_projector.l1, 256, 1024)
    check_linear(discriminator.condition_projector.l2, 1024, 1024)
    first, relu, second = discriminator.aux_objective
    check_linear(first, 1024, 256)
    assert isinstance(relu, nn.ReLU)
    check_linear(second, 256, 24)


def test_every_weight_of_the_discriminator_has_spectral_norm(reference_discriminator: DiffDiscriminator) -> None:
    layers = [m for m in reference_discriminator.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 5 * 3 + 1 + 2 + 2
    assert all(is_parametrized(layer, "weight") for layer in layers)
    names = {name.rsplit(".", 1)[1] for name, _ in reference_discriminator.named_parameters()}
    assert names == {"original", "bias"}  # and no weight beside them


@torch.no_grad()
def test_the_discriminator_subtracts_after_its_third_block(reference_discriminator: DiffDiscriminator) -> None:
    prev_image, image, condition, _ = discriminator_input(reference_discriminator.config, 1)
    with recording(reference_discriminator) as calls:
        output = reference_discriminator(prev_image, image, condition)
    assert (output.logits.shape, output.object_logits.shape) == ((1,), (1, 24))
    shapes = {f"block{i}": tuple(calls[f"block{i}"][0][1].shape[1:]) for i in range(1, 6)}
    assert shapes == {
        "block1": (64, 32, 32),
        "block2": (128, 16, 16),
        "block3": (256, 8, 8),
        "block4": (512, 4, 4),
        "block5": (1024, 2, 2),
    }
    assert torch.equal(calls["block1"][0][0][0], torch.cat((prev_image, image)))
    before, after = calls["block3"][0][1]
    assert torch.equal(calls["block4"][0][0][0], (after - before)[None])


# Equality with the plain versions


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", GENERATORS[:5] + WINDOWED_GENERATORS[:2], ids=config_name)
@torch.no_grad()
def test_a_turn_equals_the_plain_version(config: GeneratorConfig, training: bool) -> None:
    generator = randomise(IterativeGenerator(config)).double().train(training)
    arguments = generator_input(config, dtype=torch.float64)
    expected = reference.generate_turn(generator, *arguments)
    tolerance = 1e-10 if config.window is None else 1e-5  # whose coordinates are rounded to float32
    torch.testing.assert_close(generator(*arguments), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", DISCRIMINATORS[:3] + WINDOWED_DISCRIMINATORS, ids=config_name)
@torch.no_grad()
def test_a_judgement_equals_the_plain_version(config: DiscriminatorConfig, training: bool) -> None:
    discriminator = randomise(DiffDiscriminator(config)).double().train(training)
    arguments = discriminator_input(config, dtype=torch.float64)
    output = discriminator(*arguments)
    logits, object_logits = reference.discriminate(discriminator, *arguments)  # after it: the vectors it left behind
    tolerance = 1e-9 if config.window is None else 1e-5  # whose coordinates are rounded to float32
    torch.testing.assert_close(output.logits, logits, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(output.object_logits, object_logits, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("training", [False, True])
@every_noise_encoder
@torch.no_grad()
def test_found_noise_equals_the_plain_version(config: NoiseEncoderConfig, training: bool) -> None:
    encoder = lively_noise_encoder(config).train(training)
    arguments = noise_encoder_input(config)
    expected = reference.find_noise(encoder, *arguments)
    torch.testing.assert_close(encoder(*arguments), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("config_class", [GeneratorConfig, DiscriminatorConfig])
def test_names_of_objects_may_be_a_list(config_class: type[GeneratorConfig] | type[DiscriminatorConfig]) -> None:
    listed, config = config_class(objects=["red cube", "pink cone"]), config_class(objects=("red cube", "pink cone"))
    assert listed == config
    assert hash(listed) == hash(config)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float16, 0.05), (torch.bfloat16, 0.3)])
@torch.no_grad()
def test_found_noise_is_of_the_dtype_of_the_network(dtype: torch.dtype, tolerance: float) -> None:
    config = NoiseEncoderConfig(width=4, z_dim=6, places=True, window=40)
    encoder = lively_noise_encoder(config)
    *pictures, place = noise_encoder_input(config)
    expected = encoder(*pictures, place)
    found = encoder.to(dtype)(*pictures, place)
    assert found.dtype == encoder.train()(*pictures, place).dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_place_logits_equal_the_plain_version() -> None:
    model = randomise(PlaceModel(32, 5, light_inputs=3, channels=4)).double()
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    condition, light = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    expected = reference.place_logits(model, image, condition, light)
    torch.testing.assert_close(model.distribution(image, condition, light)[0], expected)
    dark = reference.place_logits(model, image, condition, torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(model.distribution(image, condition)[0], dark)


def test_the_light_that_was_read_before_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GeneratorConfig(width=4, z_dim=7, condition_dim=5, output="blend", light_components=4, light_inputs=3)
    generator = randomise(IterativeGenerator(config)).eval()
    z, condition, prev_image, place = generator_input(config)
    light = generator.read_light(prev_image)
    assert light is not None
    expected = generator(z, condition, prev_image, place)
    monkeypatch.setattr(generator, "read_light", None)
    assert torch.equal(generator(z, condition, prev_image, place, light), expected)
    with pytest.raises(ValueError, match=r"light must be \(2, 3\), got \(1, 3\)"):
        generator(z, condition, prev_image, place, light[:1])


# The condition network


def test_the_order_of_the_objects_in_a_turn_does_not_matter_and_that_of_turns_does() -> None:
    rnn = randomise(ConditionRNN(24, 8)).double()
    vocabulary_order = encode_objects(["red cube", "cyan sphere"]).sum(0, keepdim=True)
    other_order = encode_objects(["cyan sphere", "red cube"]).sum(0, keepdim=True)
    condition, hidden = rnn(vocabulary_order)
    assert torch.equal(rnn(other_order)[0], condition)
    (expected,), last = reference.condition_rnn(rnn, [{1, 14}])
    torch.testing.assert_close(condition[0], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(hidden[0], last, atol=1e-12, rtol=0)
    first, second = encode_objects(["red cube"]), encode_objects(["cyan sphere"])
    assert not torch.allclose(rnn(first, rnn(second)[1])[0], rnn(second, rnn(first)[1])[0])


def test_with_words_an_object_is_the_sum_of_the_words_of_its_name() -> None:
    spelling = Vocabulary().spelling()
    rnn = randomise(ConditionRNN(24, 8, spelling)).double()
    assert rnn.embedding.weight.shape == (11, 8)
    plain = ConditionRNN(24, 8).double()
    plain.load_state_dict(
        {k: v for k, v in rnn.state_dict().items() if k not in ("spelling", "embedding.weight")}, strict=False
    )
    with torch.no_grad():
        plain.embedding.weight.copy_(spelling.double() @ rnn.embedding.weight)
    turns = [{1, 14}, {5}, {23}]
    expected, last = reference.condition_rnn(plain, turns)
    hidden = None
    for turn, condition in zip(turns, expected, strict=True):
        objects = torch.zeros(1, 24)
        objects[0, [*turn]] = 1
        given, hidden = rnn(objects, hidden)
        torch.testing.assert_close(given[0], condition, atol=1e-12, rtol=0)
    assert hidden is not None
    torch.testing.assert_close(hidden[0], last, atol=1e-12, rtol=0)


def test_with_words_a_pair_is_told_from_what_was_learned_of_others() -> None:
    """The RNN learns to say colour and shape of 20 of the 24 objects, and says them of the others."""
    vocabulary = Vocabulary()
    colour, shape = torch.arange(24) % 8, torch.arange(24) // 8
    unseen = [vocabulary.parse(name) for name in ("red cube", "blue sphere", "green cylinder", "yellow cube")]
    seen = [i for i in range(24) if i not in unseen]
    right = {}
    for words in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            rnn = ConditionRNN(24, 32, vocabulary.spelling() if words else None)
            head = nn.Linear(32, 11)
        optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], 3e-3)
        for _ in range(150):
            said = head(rnn(torch.eye(24)[seen])[0])
            loss = F.cross_entropy(said[:, :8], colour[seen]) + F.cross_entropy(said[:, 8:], shape[seen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        said = head(rnn(torch.eye(24)[unseen])[0])
        both = (said[:, :8].argmax(1) == colour[unseen]) & (said[:, 8:].argmax(1) == shape[unseen])
        right[words] = int(both.sum())
    assert right == {True: 4, False: 0}


def test_words_are_of_the_default_dtype_as_all_weights_are() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        condition, _ = ConditionRNN(24, 8, Vocabulary().spelling())(torch.eye(24))
    finally:
        torch.set_default_dtype(torch.float32)
    assert condition.dtype == torch.float64


def test_a_generator_with_words_is_stored_with_them(tmp_path: Path) -> None:
    generator = lively_generator(replace(COMPACT, words=True))
    assert generator.encoder.embedding.weight.shape == (11, COMPACT.condition_dim)
    loaded = IterativeGenerator.from_pretrained(generator.save_pretrained(tmp_path))
    assert loaded.config.words
    scene = ["red cube", "blue sphere"]
    assert torch.equal(loaded.generate(scene, seed=1).tensor, generator.generate(scene, seed=1).tensor)


def test_the_condition_is_normalised_and_the_hidden_state_goes_on_without() -> None:
    condition, hidden = ConditionRNN(24, 64)(torch.eye(24))
    torch.testing.assert_close(condition.mean(1), torch.zeros(24), atol=1e-5, rtol=0)
    torch.testing.assert_close(condition.var(1, correction=0), torch.ones(24), atol=1e-2, rtol=0)
    assert hidden.abs().max() < 1
    assert not torch.allclose(condition, hidden, atol=0.1)


@pytest.mark.parametrize(
    ("objects", "hidden", "message"),
    [
        (torch.zeros(2, 23), None, r"objects must be \(N, 24\), got \(2, 23\)"),
        (torch.zeros(24), None, r"objects must be \(N, 24\), got \(24,\)"),
        (torch.zeros(2, 3, 24), None, r"objects must be \(N, 24\), got \(2, 3, 24\)"),
        (torch.zeros(2, 24), torch.zeros(1, 8), r"hidden must be \(2, 8\), got \(1, 8\)"),
        (torch.zeros(2, 24), torch.zeros(2, 9), r"hidden must be \(2, 8\), got \(2, 9\)"),
    ],
)
def test_the_condition_network_names_bad_input(objects: Tensor, hidden: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionRNN(24, 8)(objects, hidden)


# Gradients of each sample by itself


def per_sample_gradients(network: nn.Module, arguments: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """Of a number that all outputs go into, as ``torch.func`` finds them for all samples at once: (N, ...) each."""
    weights, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    given = [x for x in arguments if x is not None]

    def energy(weights: dict[str, Tensor], *sample: Tensor) -> Tensor:
        output = torch.func.functional_call(network, (weights, buffers), tuple(x[None] for x in sample))
        parts = (output,) if isinstance(output, Tensor) else output
        return torch.stack([(part * part).sum() for part in parts]).sum()

    return torch.func.vmap(torch.func.grad(energy), (None, *(0 for _ in given)))(weights, *given)


def check_per_sample_gradients(network: nn.Module, arguments: tuple[Tensor | None, ...]) -> None:
    network = network.double().eval()
    found = per_sample_gradients(network, arguments)
    for i in range(2):
        output = network(*item(arguments, i))
        parts = (output,) if isinstance(output, Tensor) else output
        energy = torch.stack([(part * part).sum() for part in parts]).sum()
        names, weights = zip(*network.named_parameters(), strict=True)
        expected = torch.autograd.grad(energy, weights, allow_unused=True)
        assert sum(gradient is not None and bool(gradient.any()) for gradient in expected) > 10
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(
                found[name][i], torch.zeros_like(found[name][i]) if gradient is None else gradient
            )


@every_generator
def test_gradients_of_each_sample_of_a_generator(config: GeneratorConfig) -> None:
    check_per_sample_gradients(randomise(IterativeGenerator(config)), generator_input(config, dtype=torch.float64))


@every_discriminator
def test_gradients_of_each_sample_of_a_discriminator(config: DiscriminatorConfig) -> None:
    check_per_sample_gradients(randomise(DiffDiscriminator(config)), discriminator_input(config, dtype=torch.float64))


@every_noise_encoder
def test_gradients_of_each_sample_of_a_noise_encoder(config: NoiseEncoderConfig) -> None:
    arguments = tuple(None if x is None else x.double() for x in noise_encoder_input(config))
    check_per_sample_gradients(lively_noise_encoder(config), arguments)


# Every generator


@every_generator
@torch.no_grad()
def test_generators_of_all_kinds_draw_in_range_and_alike_alone_and_in_a_batch(config: GeneratorConfig) -> None:
    generator = randomise(IterativeGenerator(config))
    arguments = generator_input(config)
    image = generator(*arguments)
    assert image.shape == (2, 3, config.image_size, config.image_size)
    assert image.dtype == torch.float32
    assert image.std() > 0.01
    assert image.abs().max() <= 1
    assert (generator.image_size, generator.z_dim) == (config.image_size, config.z_dim)
    assert generator.num_turns == config.num_turns
    assert generator.vocabulary.names == config.objects
    assert generator.encoder(torch.eye(len(config.objects)))[0].shape == (len(config.objects), config.condition_dim)
    assert generator.canvas.components.shape == (config.light_components, 3, config.image_size, config.image_size)
    for i in range(2):
        torch.testing.assert_close(generator(*item(arguments, i)), image[i : i + 1], atol=1e-4, rtol=0)


@every_generator
def test_large_batches_pass_in_parts_and_are_the_same_pictures(
    config: GeneratorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = randomise(IterativeGenerator(config))
    arguments = generator_input(config, 5)
    side = config.window or config.image_size
    monkeypatch.setattr(models, "LARGEST_MAP", 2 * 4 * config.width * side**2)  # two turns in float32
    with recording(generator) as whole:
        image = generator(*arguments)
    assert [len(output) for _, output in whole["conv"]] == [5]
    with recording(generator) as parts, torch.no_grad():
        in_parts = generator(*arguments)
    assert [len(output) for _, output in parts["conv"]] == [2, 2, 1]
    assert max(output.nelement() for _, output in parts["ac"]) * 4 == models.LARGEST_MAP
    torch.testing.assert_close(in_parts, image.detach(), atol=1e-4, rtol=0)
    monkeypatch.setattr(models, "LARGEST_MAP", 1)
    with torch.no_grad():
        torch.testing.assert_close(generator(*arguments), image.detach(), atol=1e-4, rtol=0)
        assert len(generator(*(None if x is None else x[:0] for x in arguments))) == 0


@pytest.mark.parametrize("gradients", [False, True])
def test_a_generator_is_exported_for_any_number_of_pictures(gradients: bool) -> None:
    generator, n = lively_generator(COMPACT), torch.export.Dim("N", min=2, max=1000)
    with torch.set_grad_enabled(gradients):
        condition = generator.encoder(torch.eye(24)[:3])[0].detach()
        arguments = torch.randn(3, generator.z_dim), condition, torch.zeros(3, 3, 64, 64), torch.full((3, 2), 30.0)
        two = tuple(x[:2] for x in arguments)
        exported = torch.export.export(generator, two, dynamic_shapes=({0: n},) * 4, strict=False).module()
        torch.testing.assert_close(exported(*arguments), generator(*arguments), atol=1e-4, rtol=0)


def test_the_networks_of_training_are_exported_for_any_number_of_pictures() -> None:
    preset, n = PRESETS["compact"], torch.export.Dim("N", min=2, max=1000)
    assert preset.noise_encoder is not None
    discriminator = randomise(DiffDiscriminator(replace(preset.discriminator, width=4)))
    noise_encoder = randomise(NoiseEncoder(replace(preset.noise_encoder, width=4)))
    before, after = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    condition, place = torch.randn(3, preset.discriminator.condition_dim), torch.full((3, 2), 30.0)
    for network, arguments in (
        (discriminator, (before, after, condition, place)),
        (noise_encoder, (before, after, place)),
    ):
        two = tuple(x[:2] for x in arguments)
        dynamic = ({0: n},) * len(two)
        exported = torch.export.export(network, two, dynamic_shapes=dynamic, strict=False).module()
        torch.testing.assert_close(exported(*arguments), network(*arguments), atol=1e-4, rtol=1e-4)


@every_generator
@torch.no_grad()
def test_every_input_of_a_generator_makes_a_difference(config: GeneratorConfig) -> None:
    generator = randomise(IterativeGenerator(config))
    arguments = generator_input(config)
    image = generator(*arguments)
    for i, argument in enumerate(arguments):
        if argument is not None:
            changed = (*arguments[:i], argument.flip(0), *arguments[i + 1 :])
            assert (generator(*changed) - image).abs().max() > 1e-4, i


@torch.no_grad()
def test_a_turn_is_the_mapping_and_then_the_synthesis() -> None:
    generator = randomise(IterativeGenerator(WINDOWED_GENERATORS[0]))
    assert generator.mapping is not None
    z, condition, prev_image, place = generator_input(generator.config)
    prev_image = 0.1 * prev_image  # all within what light may do
    light = generator.read_light(prev_image)
    assert light is not None
    code = generator.mapping(z, condition, place, light)
    assert torch.equal(
        generator.synthesis(code, condition, prev_image, place), generator(z, condition, prev_image, place)
    )
    known = [z, condition, place, light]
    for i, value in enumerate(known):
        other = generator.mapping(*known[:i], value.flip(0) + 1, *known[i + 1 :])
        assert (other - code).abs().amin(1).max() > 1e-3, "every number depends on noise, object, place and light"
    with pytest.raises(ValueError, match=r"z must be \(2, 7\), got \(2, 6\)"):
        generator.synthesis(code[:, :6], condition, prev_image, place)


@torch.no_grad()
def test_the_loss_of_a_mapping_is_how_unlikely_a_code_is() -> None:
    mapping = randomise(NoiseMapping(WINDOWED_GENERATORS[0])).double()
    z, condition, _, place = generator_input(WINDOWED_GENERATORS[0], dtype=torch.float64)
    known = condition, place, torch.randn(2, 3, dtype=torch.float64)
    jacobians = [
        torch.autograd.functional.jacobian(lambda z, n=n: mapping(z[None], *(x[n, None] for x in known))[0], z[n])
        for n in range(2)
    ]
    stretch = torch.linalg.slogdet(torch.stack(jacobians)).logabsdet
    assert stretch.abs().min() > 1e-3
    normal = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    torch.testing.assert_close(mapping.loss(mapping(z, *known), *known), stretch - normal)


@every_generator
def test_every_parameter_of_a_generator_gets_a_finite_gradient(config: GeneratorConfig) -> None:
    generator = randomise(IterativeGenerator(config)).train()
    z, _, prev_image, place = generator_input(config)
    prev_image.requires_grad_()
    condition, hidden = generator.encoder(torch.eye(len(config.objects))[:2])
    condition, _ = generator.encoder(torch.eye(len(config.objects))[-2:], hidden)
    loss = generator(z, condition, prev_image, place).square().sum()
    if generator.place_model is not None:
        light = generator.read_light(prev_image)
        loss = loss + generator.place_model.loss(prev_image, condition, place, light).sum()
    loss.backward()
    for name, parameter in (*generator.named_parameters(), ("prev_image", prev_image)):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name.endswith("bias") or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("size", [32, 64, 128])
@torch.no_grad()
def test_blended_generators_see_the_previous_picture_at_every_resolution(size: int) -> None:
    config = GeneratorConfig(image_size=size, width=2, z_dim=2, condition_dim=3, output="blend", places=True)
    generator = IterativeGenerator(config).eval()
    with recording(generator) as calls:
        generator(*generator_input(config))
    features = calls["prev_encoder"][0][1]
    assert [tuple(f.shape[2:]) for f in features] == [(s, s) for s in (64, 32, 16, 8) if s < size]
    for i, feature in enumerate(reversed(features), 2):
        assert torch.equal(calls[f"block{i}"][0][0][0][:, -feature.shape[1] :], feature)
    assert calls["prev_encoder"][0][0][0].shape[1] == 4  # the picture and the place
    assert torch.equal(calls["conv"][0][0][0][:, -4:], calls["prev_encoder"][0][0][0])


@torch.no_grad()
def add_nothing_faint(generator: IterativeGenerator) -> None:
    for parameter in generator.conv.parameters():
        parameter[4:] = 0


@torch.no_grad()
def test_where_the_mask_is_shut_the_previous_picture_stays_bit_for_bit() -> None:
    config = GENERATORS[2]
    generator = randomise(IterativeGenerator(config))
    arguments = generator_input(config)
    assert not torch.equal(generator(*arguments), arguments[2])
    generator.conv.bias[3] = -1000.0
    add_nothing_faint(generator)
    assert torch.equal(generator(*arguments), arguments[2])
    generator.conv.bias[4:] = torch.tensor([0.5, 0.0, -2.0])  # levels
    levels = 127.5 * (generator(*arguments) - arguments[2]).mean((0, 2, 3))
    torch.testing.assert_close(levels, torch.tensor([0.5, 0.0, -2.0]), rtol=0, atol=0.02)
    generator.conv.bias[3] = 1000.0
    add_nothing_faint(generator)
    generator.conv.bias[:3] = torch.tensor([1000.0, -1000.0, 1000.0])
    expected = torch.tensor([1.0, -1.0, 1.0])[:, None, None].expand_as(arguments[2])
    assert torch.equal(generator(*arguments), expected)


@torch.no_grad()
def test_a_fresh_blended_generator_keeps_most_of_the_previous_picture() -> None:
    config = GENERATORS[1]
    torch.manual_seed(0)
    generator = IterativeGenerator(config).eval()
    arguments = generator_input(config)
    assert generator.conv.bias[3] == -2
    drawn = generator(*arguments)
    assert (drawn - arguments[2]).abs().mean() < 0.25


@pytest.mark.parametrize("config", [GENERATORS[0], GENERATORS[2], WINDOWED_GENERATORS[0]], ids=config_name)
@torch.no_grad()
def test_a_generator_in_bfloat16_draws_on_a_finer_picture_and_keeps_its_dtype(config: GeneratorConfig) -> None:
    generator = randomise(IterativeGenerator(config))
    z, condition, prev_image, place = generator_input(config)
    expected = generator(z, condition, prev_image, place)
    generator.to(torch.bfloat16)
    z, condition = z.bfloat16(), condition.bfloat16()
    image = generator(z, condition, prev_image, place)
    assert image.dtype == torch.float32
    assert (image - expected).abs().mean() < 0.05
    assert generator(z, condition, prev_image.bfloat16(), place).dtype == torch.bfloat16
    if config.output == "blend":
        generator.conv.bias[3] = -1000.0
        add_nothing_faint(generator)
        assert torch.equal(generator(z, condition, prev_image, place), prev_image)  # not rounded to bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 6)}, r"z must be \(2, 7\), got \(2, 6\)"),
        ({"z": torch.zeros(1, 7)}, r"z must be \(2, 7\), got \(1, 7\)"),
        ({"condition": torch.zeros(2, 24)}, r"condition must be \(2, 256\), got \(2, 24\)"),
        ({"prev_image": torch.zeros(2, 3, 32, 32)}, r"prev_image must be \(N, 3, 64, 64\), got \(2, 3, 32, 32\)"),
        ({"prev_image": torch.zeros(3, 64, 64)}, r"prev_image must be \(N, 3, 64, 64\), got \(3, 64, 64\)"),
        ({"place": None}, r"place must be \(2, 2\) pixels \(x, y\), got None"),
        ({"place": torch.zeros(2)}, r"place must be \(2, 2\) pixels \(x, y\), got \(2,\)"),
    ],
)
def test_the_generator_names_bad_input(change: dict[str, Any], message: str) -> None:
    generator = IterativeGenerator(GENERATORS[2]).eval()
    arguments = dict(zip(("z", "condition", "prev_image", "place"), generator_input(GENERATORS[2]), strict=True))
    with pytest.raises(ValueError, match=message):
        generator(**(arguments | change))


def test_models_without_places_refuse_one() -> None:
    generator, discriminator = IterativeGenerator(GENERATORS[0]), DiffDiscriminator(DISCRIMINATORS[0])
    with pytest.raises(ValueError, match="this model does not know places"):
        generator(*generator_input(GENERATORS[0])[:3], torch.zeros(2, 2))
    with pytest.raises(ValueError, match="this model does not know places"):
        discriminator(*discriminator_input(DISCRIMINATORS[0])[:3], torch.zeros(2, 2))


# Windows


@pytest.mark.parametrize("config", WINDOWED_GENERATORS, ids=config_name)
@torch.no_grad()
def test_a_turn_changes_nothing_outside_its_window(config: GeneratorConfig) -> None:
    generator = randomise(IterativeGenerator(config))
    if config.output == "blend":
        nn.init.constant_(generator.conv.bias, 100.0)  # the mask is open everywhere
    z, condition, prev_image, place = generator_input(config, n=6)
    before = prev_image.clone()
    image = generator(z, condition, prev_image, place)
    assert torch.equal(prev_image, before)
    changed = (image != prev_image).any(1)
    corners = window_corners(place, config.image_size, config.window)
    for drawn, (x, y) in zip(changed, corners.tolist(), strict=True):
        inside = torch.zeros_like(drawn)
        inside[y : y + config.window, x : x + config.window] = True
        assert torch.equal(drawn, inside)


@torch.no_grad()
def test_networks_with_a_window_see_nothing_else() -> None:
    generator_config, judge_config, encoder_config = (
        WINDOWED_GENERATORS[0],
        WINDOWED_DISCRIMINATORS[0],
        NOISE_ENCODERS[0],
    )
    generator, judge = randomise(IterativeGenerator(generator_config)), randomise(DiffDiscriminator(judge_config))
    encoder = randomise(NoiseEncoder(encoder_config))
    z, condition, prev_image, place = generator_input(generator_config)
    judge_condition, image = torch.randn(2, judge_config.condition_dim), prev_image.flip(0)
    other = [picture.clone().neg() for picture in (prev_image, image)]
    outside = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    for mask, (x, y) in zip(outside, window_corners(place, 64, 40).tolist(), strict=True):
        mask[:, y : y + 40, x : x + 40] = False
    other_prev, other_image = (torch.where(outside, o, p) for o, p in zip(other, (prev_image, image), strict=True))
    light = generator.read_light(prev_image)  # all that is seen of what is outside
    drawn, other_drawn = (generator(z, condition, p, place, light) for p in (prev_image, other_prev))
    assert torch.equal(drawn.masked_select(~outside), other_drawn.masked_select(~outside))
    assert torch.equal(other_drawn.masked_select(outside), other_prev.masked_select(outside))
    judged, other_judged = (
        judge(p, i, judge_condition, place) for p, i in ((prev_image, image), (other_prev, other_image))
    )
    assert torch.equal(judged.logits, other_judged.logits)
    assert torch.equal(judged.object_logits, other_judged.object_logits)
    assert torch.equal(encoder(prev_image, image, place), encoder(other_prev, other_image, place))


@pytest.mark.parametrize("config", WINDOWED_GENERATORS[:2], ids=config_name)
@torch.no_grad()
def test_a_window_of_40_pixels_grows_from_a_map_of_5x5(config: GeneratorConfig) -> None:
    generator = IterativeGenerator(config).eval()
    with recording(generator) as calls:
        generator(*generator_input(config))
    sides = [calls[f"block{i}"][0][1].shape[-1] for i in (1, 2, 3)]
    assert calls["block1"][0][0][0].shape == (2, 32, 5, 5)
    assert sides == [10, 20, 40]
    assert not hasattr(generator, "block4")
    features = calls["prev_encoder"][0][1]
    assert [tuple(f.shape[1:]) for f in features] == [(8, 20, 20), (16, 10, 10)]  # as many as the generator has there
    assert calls["conv"][0][1].shape[2:] == (40, 40)


@torch.no_grad()
def test_in_a_window_the_networks_see_the_place_the_coordinates_and_what_is_fine() -> None:
    generator, judge = IterativeGenerator(WINDOWED_GENERATORS[0]), DiffDiscriminator(WINDOWED_DISCRIMINATORS[0])
    z, condition, prev_image, _ = generator_input(generator.config)
    place = torch.tensor([[31.5, 31.5], [0.0, 63.0]])  # windows from (12, 16) and (0, 24)
    prev_image[1] = 0.1
    prev_image[1, 1, 40, 10] = 1.0
    with recording(generator.eval()) as calls:
        generator(z, condition, prev_image, place)
    seen = calls["prev_encoder"][0][0][0]
    with recording(judge.eval()) as calls:
        judge(prev_image, prev_image.flip(0), torch.zeros(2, 256), place)
    assert seen.shape == (2, 9, 40, 40)
    assert torch.equal(calls["block1"][0][0][0][:2], seen)
    assert torch.equal(seen[0, :3], prev_image[0, :, 16:56, 12:52])
    blob = seen[0, 3]  # highest at the four pixels around (31.5 - 12, 31.5 - 16)
    assert (blob == blob.max()).nonzero().tolist() == [[15, 19], [15, 20], [16, 19], [16, 20]]
    assert seen[1, 3, 39, 0] == 1
    for n, (left, top) in enumerate([(12, 16), (0, 24)]):
        axis = 2 * torch.arange(64) / 63 - 1
        torch.testing.assert_close(seen[n, 4], axis[left : left + 40].expand(40, -1), atol=1e-6, rtol=0)
        torch.testing.assert_close(seen[n, 5], axis[top : top + 40, None].expand(-1, 40), atol=1e-6, rtol=0)
    fine = torch.zeros(3, 40, 40)
    fine[1, 15:18, 9:12] = -1.0  # one pixel 0.9 brighter: 10 * 0.9 / 9 less than the mean around it
    fine[1, 16, 10] = 8.0
    torch.testing.assert_close(seen[1, 6:], fine, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "window"), [(s, w) for s in (32, 64, 128) for w in range(16, s + 1, 8)])
@torch.no_grad()
def test_every_window_that_a_config_takes_can_be_drawn_and_judged(size: int, window: int) -> None:
    shape: dict[str, Any] = {"image_size": size, "width": 2, "places": True, "window": window}
    config = GeneratorConfig(condition_dim=3, z_dim=2, output="blend", **shape)
    z, condition, prev_image, place = generator_input(config, n=1)
    image = IterativeGenerator(config).eval()(z, condition, prev_image, place)
    assert (image != prev_image).any(1).sum() == window**2
    judge = DiffDiscriminator(DiscriminatorConfig(condition_dim=3, **shape))
    assert judge(prev_image, image, condition, place).logits.isfinite().all()
    assert NoiseEncoder(NoiseEncoderConfig(z_dim=2, **shape)).eval()(prev_image, image, place).shape == (1, 2)


# Every discriminator


@every_discriminator
@torch.no_grad()
def test_discriminators_of_all_kinds_judge_alike_alone_and_in_a_batch(config: DiscriminatorConfig) -> None:
    discriminator = randomise(DiffDiscriminator(config))
    arguments = discriminator_input(config)
    logits, object_logits = discriminator(*arguments)
    assert logits.shape == (2,)
    assert object_logits.shape == (2, len(config.objects))
    for i in range(2):
        alone = discriminator(*item(arguments, i))
        torch.testing.assert_close(alone.logits, logits[i : i + 1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(alone.object_logits, object_logits[i : i + 1], atol=1e-4, rtol=1e-4)


@every_discriminator
def test_every_parameter_of_a_discriminator_gets_a_finite_gradient(config: DiscriminatorConfig) -> None:
    discriminator = DiffDiscriminator(config).train()
    if discriminator.light is not None:
        discriminator.light.components.normal_(0, 0.1)
    arguments = discriminator_input(config)
    image = arguments[1].requires_grad_()
    output = discriminator(*arguments)
    (slope,) = torch.autograd.grad(output.logits.sum(), image, create_graph=True)
    (output.logits.sum() + output.object_logits.square().sum() + slope.square().sum()).backward()
    for name, parameter in (*discriminator.named_parameters(), ("image", image)):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name.endswith("bias") or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("spectral", [True, False])
def test_spectral_norm_is_everywhere_or_nowhere(spectral: bool) -> None:
    discriminator = DiffDiscriminator(DiscriminatorConfig(width=4, spectral_norm=spectral))
    layers = [m for m in discriminator.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(is_parametrized(layer) == spectral for layer in layers)


without_light = [config for config in DISCRIMINATORS + WINDOWED_DISCRIMINATORS if not config.light_inputs]


@pytest.mark.parametrize("config", without_light, ids=config_name)
@torch.no_grad()
def test_nothing_but_zeros_is_left_where_nothing_changed(config: DiscriminatorConfig) -> None:
    discriminator = randomise(DiffDiscriminator(config))
    prev_image, image, condition, place = discriminator_input(config)
    condition, place = condition[:1].expand(2, -1), None if place is None else place[:1].expand(2, -1)
    with recording(discriminator) as calls:
        same = discriminator(prev_image, prev_image, condition, place)
    assert (calls["block4"][0][0][0] == 0).all()
    torch.testing.assert_close(same.logits[0], same.logits[1])  # whatever the picture
    assert torch.equal(same.object_logits[0], same.object_logits[1])
    changed = discriminator(prev_image, image, condition, place)
    assert (changed.logits - same.logits).abs().max() > 1e-4


@torch.no_grad()
def test_the_difference_is_local() -> None:
    config = DISCRIMINATORS[0]
    discriminator = randomise(DiffDiscriminator(config))
    prev_image, _, condition, _ = discriminator_input(config)
    image = prev_image.clone()
    image[:, :, :8, :8] *= -1
    with recording(discriminator) as calls:
        discriminator(prev_image, image, condition)
    difference = calls["block4"][0][0][0]  # (2, 4 width, 8, 8), three blocks of reach 6 or so pixels at their own scale
    assert (difference[:, :, 0, 0] != 0).any()
    assert (difference[:, :, 5:, 5:] == 0).all()


@pytest.mark.parametrize("config", [DISCRIMINATORS[0], DISCRIMINATORS[3], WINDOWED_DISCRIMINATORS[0]], ids=config_name)
@torch.no_grad()
def test_comparing_several_pictures_equals_judging_each(config: DiscriminatorConfig) -> None:
    discriminator = randomise(DiffDiscriminator(config))
    prev_image, image, condition, place = discriminator_input(config)
    images = [image, image.flip(3), prev_image]
    outputs = discriminator.compare(prev_image, images, condition, place)
    assert len(outputs) == 3
    for output, picture in zip(outputs, images, strict=True):
        alone = discriminator(prev_image, picture, condition, place)
        torch.testing.assert_close(output.logits, alone.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output.object_logits, alone.object_logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(outputs[0].logits, outputs[1].logits)


@torch.no_grad()
def test_under_autocast_a_judgement_has_the_precision_of_the_weights_whatever_that_of_the_condition() -> None:
    discriminator = randomise(DiffDiscriminator(DISCRIMINATORS[1])).eval()
    *pictures, condition, place = discriminator_input(DISCRIMINATORS[1])
    with torch.autocast("cpu", torch.bfloat16):
        expected, output = (
            discriminator(*pictures, c, place) for c in (condition.bfloat16().float(), condition.bfloat16())
        )
    assert output.logits.dtype == output.object_logits.dtype == torch.float32
    assert torch.equal(output.logits, expected.logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("config", [DISCRIMINATORS[1], WINDOWED_DISCRIMINATORS[0]], ids=config_name)
@torch.no_grad()
def test_the_discriminator_keeps_the_dtype(config: DiscriminatorConfig, dtype: torch.dtype) -> None:
    discriminator = randomise(DiffDiscriminator(config)).to(dtype)
    output = discriminator(*discriminator_input(config, dtype=dtype))
    assert output.logits.dtype == output.object_logits.dtype == dtype
    assert output.logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prev_image": torch.zeros(2, 3, 32, 32)}, r"prev_image must be \(2, 3, 64, 64\), got \(2, 3, 32, 32\)"),
        ({"image": torch.zeros(2, 3, 32, 32)}, r"image must be \(2, 3, 64, 64\), got \(2, 3, 32, 32\)"),
        ({"image": torch.zeros(1, 3, 64, 64)}, r"image must be \(2, 3, 64, 64\), got \(1, 3, 64, 64\)"),
        ({"image": torch.zeros(3, 64, 64)}, r"image must be \(2, 3, 64, 64\), got \(3, 64, 64\)"),
        ({"condition": torch.zeros(2, 24)}, r"condition must be \(2, 12\), got \(2, 24\)"),
        ({"condition": torch.zeros(1, 12)}, r"condition must be \(2, 12\), got \(1, 12\)"),
        ({"place": None}, r"place must be \(2, 2\) pixels \(x, y\), got None"),
        ({"place": torch.zeros(1, 2)}, r"place must be \(2, 2\) pixels \(x, y\), got \(1, 2\)"),
    ],
)
def test_the_discriminator_names_bad_input(change: dict[str, Any], message: str) -> None:
    discriminator = DiffDiscriminator(DISCRIMINATORS[1]).eval()
    names = ("prev_image", "image", "condition", "place")
    arguments = dict(zip(names, discriminator_input(DISCRIMINATORS[1]), strict=True))
    with pytest.raises(ValueError, match=message):
        discriminator(**(arguments | change))


def test_there_must_be_a_picture_to_compare() -> None:
    prev_image, _, condition, _ = discriminator_input(DISCRIMINATORS[0])
    with pytest.raises(ValueError, match="images is empty"):
        DiffDiscriminator(DISCRIMINATORS[0]).compare(prev_image, [], condition)


# Noise encoders


@every_noise_encoder
def test_over_a_batch_found_noise_has_mean_0_and_variance_1(config: NoiseEncoderConfig) -> None:
    encoder = lively_noise_encoder(config).train()
    noise = encoder(*noise_encoder_input(config, n=8))
    assert noise.shape == (8, config.z_dim)
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise.mean(0), torch.zeros(config.z_dim), atol=1e-4, rtol=0)
    torch.testing.assert_close(noise.var(0, correction=0), torch.ones(config.z_dim), atol=0.01, rtol=0)
    assert not list(encoder.norm.parameters())


@every_noise_encoder
@torch.no_grad()
def test_found_noise_depends_on_every_input(config: NoiseEncoderConfig) -> None:
    encoder = lively_noise_encoder(config)
    arguments = noise_encoder_input(config)
    noise = encoder(*arguments)
    for i, argument in enumerate(arguments):
        if argument is not None:
            changed = (*arguments[:i], argument.flip(0), *arguments[i + 1 :])
            assert (encoder(*changed) - noise).abs().max() > 1e-4, i


@every_noise_encoder
@torch.no_grad()
def test_in_eval_mode_found_noise_is_that_of_each_turn_alone(config: NoiseEncoderConfig) -> None:
    encoder = lively_noise_encoder(config)
    arguments = noise_encoder_input(config)
    state = copy.deepcopy(encoder.state_dict())
    noise = encoder(*arguments)
    assert torch.equal(encoder(*arguments), noise)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    for i in range(4):
        torch.testing.assert_close(encoder(*item(arguments, i)), noise[i : i + 1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        encoder.train()(*item(arguments, 0))


@torch.no_grad()
def test_the_running_statistics_of_found_noise_are_those_of_what_was_seen() -> None:
    config = NOISE_ENCODERS[2]
    encoder = lively_noise_encoder(config).train()
    arguments = noise_encoder_input(config, n=16)
    for _ in range(200):
        noise = encoder(*arguments)
    torch.testing.assert_close(encoder.eval()(*arguments), noise * (15 / 16) ** 0.5, atol=0.02, rtol=0.02)


@every_noise_encoder
def test_every_parameter_of_a_noise_encoder_gets_a_finite_gradient(config: NoiseEncoderConfig) -> None:
    encoder = lively_noise_encoder(config).train()
    prev_image, image, place = noise_encoder_input(config)
    prev_image, image = prev_image.clone().requires_grad_(), image.clone().requires_grad_()
    target = torch.randn(4, config.z_dim, generator=torch.Generator().manual_seed(0))
    (encoder(prev_image, image, place) * target).sum().backward()
    for name, parameter in (*encoder.named_parameters(), ("prev_image", prev_image), ("image", image)):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name.endswith("bias") or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_found_noise_under_autocast_is_float32_and_nearly_the_same(training: bool) -> None:
    config = NOISE_ENCODERS[0]
    encoder = lively_noise_encoder(config)
    encoder.train(training)
    arguments = noise_encoder_input(config, n=8)
    expected = encoder(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        noise = encoder(*arguments)
    assert noise.dtype == torch.float32
    assert torch.stack((noise, expected)).flatten(1).corrcoef()[0, 1] > 0.9


@every_noise_encoder
@torch.no_grad()
def test_a_saved_noise_encoder_finds_the_same_noise(config: NoiseEncoderConfig, tmp_path: Path) -> None:
    encoder = lively_noise_encoder(config).train()
    arguments = noise_encoder_input(config)
    encoder(*arguments)
    loaded = NoiseEncoder.from_pretrained(encoder.save_pretrained(tmp_path))
    assert loaded.config == config
    assert torch.equal(loaded(*arguments), encoder.eval()(*arguments))
    assert loaded.norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prev_image": torch.zeros(4, 3, 32, 32)}, r"prev_image must be \(4, 3, 64, 64\), got \(4, 3, 32, 32\)"),
        ({"image": torch.zeros(1, 3, 64, 64)}, r"image must be \(4, 3, 64, 64\), got \(1, 3, 64, 64\)"),
        ({"image": torch.zeros(3, 64, 64)}, r"image must be \(4, 3, 64, 64\), got \(3, 64, 64\)"),
        ({"place": None}, r"place must be \(4, 2\) pixels \(x, y\), got None"),
        ({"place": torch.zeros(4)}, r"place must be \(4, 2\) pixels \(x, y\), got \(4,\)"),
    ],
)
def test_the_noise_encoder_names_bad_input(change: dict[str, Any], message: str) -> None:
    arguments = dict(zip(("prev_image", "image", "place"), noise_encoder_input(NOISE_ENCODERS[0]), strict=True))
    with pytest.raises(ValueError, match=message):
        NoiseEncoder(NOISE_ENCODERS[0])(**(arguments | change))


def test_a_noise_encoder_without_places_takes_none() -> None:
    prev_image, image, _ = noise_encoder_input(NOISE_ENCODERS[2])
    with pytest.raises(ValueError, match="this model does not know places"):
        NoiseEncoder(NOISE_ENCODERS[2])(prev_image, image, torch.zeros(4, 2))


# Places


def peaked_place_model(size: int = 32) -> PlaceModel:
    """Its logits are its prior: four cells of probability 1/2, 1/4, 1/8, 1/8 and nothing elsewhere.

    The point in the cell is as good as uniform.
    """
    model = PlaceModel(size, 5, channels=2).eval()
    with torch.no_grad():
        model.in_cell.bias.view(-1, 5)[:, 3:] = 8.0
        nn.init.zeros_(model.conv5.weight)
        nn.init.zeros_(model.conv5.bias)
        model.prior.fill_(-math.inf)
        for (row, column), probability in PEAKS.items():
            model.prior[row, column] = math.log(probability) + 3.0  # a softmax does not see what all have in common
    return model


PEAKS = {(0, 0): 0.5, (3, 11): 0.25, (10, 2): 0.125, (15, 15): 0.125}  # (row, column) of cells of 2x2 pixels


def test_the_loss_of_known_logits_is_the_logarithm_of_the_cells_probability() -> None:
    model = peaked_place_model().double()
    with torch.no_grad():
        model.in_cell.bias.view(-1, 5)[:, 3:] = 1000.0
    places = torch.tensor([[0.0, 0.0], [1.99, 1.0], [22.0, 6.0], [23.9, 7.9], [4.0, 20.0], [31.0, 31.0], [22.0, 8.0]])
    n = len(places)
    losses = model.loss(torch.zeros(n, 3, 32, 32).double(), torch.zeros(n, 5).double(), places)
    expected = torch.tensor([2, 2, 4, 4, 8, 8, math.inf]).double().log()
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    fresh = PlaceModel(32, 5).loss(torch.zeros(1, 3, 32, 32), torch.zeros(1, 5), torch.tensor([[3.0, 9.0]]))
    assert 0.5 * math.log(256) < fresh.item() < 2 * math.log(256)


@torch.no_grad()
def test_places_are_drawn_as_often_as_their_cells_are_probable() -> None:
    n = 4000
    uniform = torch.rand(n, 3, generator=torch.Generator().manual_seed(0))
    places = peaked_place_model()(torch.zeros(n, 3, 32, 32), torch.zeros(n, 5), uniform)
    columns, rows = (places / 2).long().unbind(1)
    chi_square = 0.0
    for (row, column), probability in PEAKS.items():
        here = places[(rows == row) & (columns == column)]
        chi_square += (len(here) - n * probability) ** 2 / (n * probability)
        if (row, column) != (15, 15):  # whose far side is not in the picture
            corner = torch.tensor([column, row]) * 2
            torch.testing.assert_close((here - corner).mean(0), torch.ones(2), atol=0.1, rtol=0)
            torch.testing.assert_close((here - corner).std(0), torch.full((2,), 3**-0.5), atol=0.05, rtol=0)
    assert chi_square < 16.3  # three degrees of freedom: exceeded once in a thousand
    assert sum(int(((rows == r) & (columns == c)).sum()) for r, c in PEAKS) == n
    assert ((places >= 0) & (places <= 31)).all()  # where `at=` may ask for it


@torch.no_grad()
def test_the_extremes_of_the_uniform_numbers_stay_in_cells_that_can_be() -> None:
    model = peaked_place_model()
    model.prior[0, 0] = -math.inf
    almost_one = 1 - 2.0**-24
    uniform = torch.tensor([[0.0, 0.0, 0.0], [almost_one] * 3])
    places = model(torch.zeros(2, 3, 32, 32), torch.zeros(2, 5), uniform)
    torch.testing.assert_close(places, torch.tensor([[22.0, 6.0], [31.0, 31.0]]), atol=1e-5, rtol=0)
    assert places.max() <= 31


@torch.no_grad()
def test_cells_that_are_hardly_ever_drawn_are_never_drawn() -> None:
    model = peaked_place_model()
    uniform = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    image, condition = torch.zeros(4000, 3, 32, 32), torch.zeros(4000, 5)
    expected = model(image, condition, uniform)
    likeliest = math.log(0.5) + 3.0
    model.prior.clamp_(min=likeliest + math.log(0.9 * LEAST_LIKELY))  # 252 cells, together a quarter
    torch.testing.assert_close(model(image, condition, uniform), expected)
    model.prior.clamp_(min=likeliest + math.log(1.1 * LEAST_LIKELY))
    assert (model(image, condition, uniform) != expected).any()


@torch.no_grad()
def test_a_drawn_place_depends_on_its_own_picture_condition_and_numbers() -> None:
    model = randomise(PlaceModel(32, 5))
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(3, 3, 32, 32, generator=rng) * 2 - 1
    condition, uniform = torch.randn(3, 5, generator=rng), torch.rand(3, 3, generator=rng)
    places = model(image, condition, uniform)
    for i in range(3):
        alone = model(image[i : i + 1], condition[i : i + 1], uniform[i : i + 1])
        torch.testing.assert_close(alone, places[i : i + 1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_is_drawn_most_often_is_what_the_loss_likes_best() -> None:
    torch.manual_seed(0)
    model = randomise(PlaceModel(32, 5))
    nn.init.normal_(model.prior, std=3.0)
    nn.init.zeros_(model.in_cell.weight)
    with torch.no_grad():
        model.in_cell.bias.view(-1, 5)[:, 3:] = 8.0  # points as good as uniform
    image, condition = torch.rand(1, 3, 32, 32).expand(500, -1, -1, -1), torch.randn(1, 5).expand(500, -1)
    places = model(image, condition, torch.rand(500, 3))
    losses = model.loss(image, condition, places)
    logits = model.distribution(image[:1], condition[:1])[0].flatten()
    entropy = -(logits.softmax(0) * logits.log_softmax(0))
    assert abs(losses.mean() - entropy.sum()) < 4 * losses.std() / 500**0.5  # cross-entropy of a model with itself


def test_the_point_in_a_cell_is_drawn_as_the_loss_says() -> None:
    """Three peaks by hand, logistic distributions cut off at 0 and 1, and the density integrates to one."""
    model = peaked_place_model()
    shares = (0.5, 0.3, 0.2)
    peaks, scales = [(0.7, 0.2), (0.3, 0.8), (0.5, 0.5)], [(0.05, 0.3), (0.1, 0.02), (0.3, 0.2)]
    with torch.no_grad():
        model.prior.fill_(-math.inf)
        model.prior[3, 11] = math.log(0.6)
        model.prior[2, 4] = math.log(0.4)  # so that the number that chooses a peak is not that which chooses the cell
        said = [
            [math.log(share), *(math.log(p / (1 - p)) for p in peak), *(math.log(math.expm1(s - 0.001)) for s in scale)]
            for share, peak, scale in zip(shares, peaks, scales, strict=True)
        ]
        model.in_cell.bias.copy_(torch.tensor(said).flatten())
        n = 10_000
        uniform = torch.rand(n, 3, generator=torch.Generator().manual_seed(0))
        places = model(torch.zeros(n, 3, 32, 32), torch.zeros(n, 5), uniform)
    corner = torch.tensor([11, 3])
    points = places[(places[:, 0] > 20)] / 2 - corner
    assert ((points >= 0) & (points <= 1)).all()

    def share_below(x: float, peak: float, scale: float) -> float:
        low, here, high = (1 / (1 + math.exp((peak - edge) / scale)) for edge in (0, x, 1))
        return (here - low) / (high - low)

    for x, y in ((0.75, 0.4), (0.3, 0.79), (0.65, 0.8)):
        below = (points < torch.tensor([x, y])).float()
        both = below.prod(1).mean()  # x and y of a peak are independent, of several they are not
        expected = torch.tensor(
            [
                [share_below(x, peak[0], scale[0]), share_below(y, peak[1], scale[1])]
                for peak, scale in zip(peaks, scales, strict=True)
            ]
        )
        torch.testing.assert_close(below.mean(0), torch.tensor(shares) @ expected, atol=0.02, rtol=0)
        torch.testing.assert_close(both, torch.tensor(shares) @ expected.prod(1), atol=0.02, rtol=0)
    steps = (torch.arange(100) + 0.5) / 100
    grid = torch.cartesian_prod(steps, steps)
    losses = model.loss(torch.zeros(len(grid), 3, 32, 32), torch.zeros(len(grid), 5), (grid + corner) * 2)
    torch.testing.assert_close(losses.neg().exp().mean(), torch.tensor(0.6), atol=0.01, rtol=0)


@torch.no_grad()
def test_peaks_are_drawn_from_the_cell_at_hand() -> None:
    """The share of a peak differs from cell to cell, so what is drawn is what the distribution of that cell says."""
    torch.manual_seed(0)
    model = randomise(PlaceModel(32, 5))
    image, condition = torch.rand(1, 3, 32, 32), torch.randn(1, 5)
    logits, points = model.distribution(image, condition)
    likeliest = logits.flatten().argmax().item()
    model.prior.flatten()[likeliest] += 100.0  # always this cell
    n = 4000
    places = model(image.expand(n, -1, -1, -1), condition.expand(n, -1), torch.rand(n, 3))
    row, column = divmod(likeliest, 16)
    share, peak, scale = (x[0, ..., row, column] for x in points)
    low, high = (-peak / scale).sigmoid(), ((1 - peak) / scale).sigmoid()
    point = places / 2 - torch.tensor([column, row])
    for x in (0.25, 0.5, 0.75):
        below = (((x - peak) / scale).sigmoid() - low) / (high - low)  # (M, 2)
        torch.testing.assert_close((point < x).float().mean(0), share.exp() @ below, atol=0.04, rtol=0)


@pytest.mark.parametrize("bad", ["place", "uniform"])
def test_the_place_model_names_bad_input(bad: str) -> None:
    model = PlaceModel(32, 5)
    image, condition = torch.zeros(2, 3, 32, 32), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=rf"{bad} must be \(2, [23]\), got \(1, 2\)"):
        (model.loss if bad == "place" else model)(image, condition, torch.zeros(1, 2))


# Configs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 48}, r"image_size must be one of \(32, 64, 128\), got 48"),
        ({"image_size": 64.0}, "image_size must be one of .* got 64.0"),
        ({"width": 0}, "width must be an int of at least 1, got 0"),
        ({"width": 2.5}, "width must be an int of at least 1, got 2.5"),
        ({"width": 10**20}, "width must be at most 65,536, got 1000"),
        ({"width": True}, "width must be an int of at least 1, got True"),
        ({"condition_dim": -1}, "condition_dim must be an int of at least 1, got -1"),
        ({"z_dim": -1}, "z_dim must be an int of at least 0, got -1"),
        ({"num_turns": 0}, "num_turns must be an int of at least 1, got 0"),
        ({"light_components": -1}, "light_components must be an int of at least 0, got -1"),
        ({"light_inputs": -1}, "light_inputs must be an int of at least 0, got -1"),
        ({"light_inputs": 3}, "light_inputs=3 needs light that varies: light_components is 0"),
        ({"mapping": True, "z_dim": 1}, "mapping needs a z_dim of at least 2, got 1"),
        ({"output": "sigmoid"}, "output must be 'tanh' or 'blend', got 'sigmoid'"),
    ],
)
def test_a_config_that_describes_no_model_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratorConfig(**fields)
    if set(fields) <= {"image_size", "width", "condition_dim"}:
        with pytest.raises(ValueError, match=message):
            DiscriminatorConfig(**fields)


@pytest.mark.parametrize("config_class", [GeneratorConfig, DiscriminatorConfig, NoiseEncoderConfig])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 40}, r"window is a square around a place: it needs places=True, got window=40, places=False"),
        ({"window": 36, "places": True}, "multiple of 8 from 16 to image_size, which is 64, got 36"),
        ({"window": 72, "places": True}, "from 16 to image_size, which is 64, got 72"),
        ({"window": 64, "places": True, "image_size": 32}, "from 16 to image_size, which is 32, got 64"),
        ({"window": 8, "places": True}, "from 16 to .* got 8"),
        ({"window": 0, "places": True}, "from 16 to .* got 0"),
        ({"window": -40, "places": True}, "from 16 to .* got -40"),
        ({"window": 40.0, "places": True}, r"from 16 to .* got 40\.0"),
        ({"window": True, "places": True}, "from 16 to .* got True"),
    ],
)
def test_a_window_that_cannot_be_is_refused(config_class: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 48}, r"image_size must be one of \(32, 64, 128\), got 48"),
        ({"width": 0}, "width must be an int of at least 1, got 0"),
        ({"z_dim": 0}, "z_dim must be an int of at least 1, got 0"),
        ({"z_dim": 2.0}, r"z_dim must be an int of at least 1, got 2\.0"),
    ],
)
def test_a_config_of_no_noise_encoder_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseEncoderConfig(**fields)


def test_a_vocabulary_with_repeats_is_refused() -> None:
    with pytest.raises(ValueError, match="non-empty and unique"):
        IterativeGenerator(GeneratorConfig(width=4, objects=("a", "a")))


def test_configs_are_frozen_and_compare_by_value() -> None:
    config = GeneratorConfig(width=4)
    with pytest.raises(AttributeError):
        config.width = 8  # type: ignore[misc]
    assert config == GeneratorConfig(width=4) != GeneratorConfig()
    assert DiscriminatorConfig() == DiscriminatorConfig(spectral_norm=True)


def test_the_defaults_agree_between_the_networks() -> None:
    generator, discriminator = GeneratorConfig(), DiscriminatorConfig()
    for name in ("image_size", "width", "condition_dim", "objects", "places", "window"):
        assert getattr(generator, name) == getattr(discriminator, name), name
    for name in ("image_size", "z_dim", "places", "window"):
        assert getattr(generator, name) == getattr(NoiseEncoderConfig(), name), name


# Copies


@pytest.mark.parametrize("kind", ["generator", "discriminator"])
@torch.no_grad()
def test_a_deep_copy_does_the_same_and_shares_nothing(kind: str) -> None:
    if kind == "generator":
        model, arguments = randomise(IterativeGenerator(GENERATORS[2])), generator_input(GENERATORS[2])
    else:
        model, arguments = randomise(DiffDiscriminator(DISCRIMINATORS[1])), discriminator_input(DISCRIMINATORS[1])
    twin = copy.deepcopy(model)
    output, twin_output = model(*arguments), twin(*arguments)
    torch.testing.assert_close(twin_output, output, atol=0, rtol=0)
    randomise(twin, seed=1)
    torch.testing.assert_close(model(*arguments), output, atol=0, rtol=0)


def test_safetensors_stores_a_generator(tmp_path: Path, reference_generator: IterativeGenerator) -> None:
    safetensors.torch.save_model(reference_generator, str(tmp_path / "weights.safetensors"))
    stored = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert torch.equal(stored["l0.weight"], reference_generator.l0.weight)


@pytest.mark.parametrize("window", [None, 32])
def test_a_discriminator_in_bfloat16_judges_pictures_in_float32(window: int | None) -> None:
    config = DiscriminatorConfig(width=8, condition_dim=6, window=window, places=window is not None)
    fine = randomise(DiffDiscriminator(config)).eval()
    coarse = copy.deepcopy(fine).bfloat16()
    generator = torch.Generator().manual_seed(0)
    before, condition = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1, torch.randn(4, 6, generator=generator)
    after = (before + 0.05 * torch.randn(before.shape, generator=generator)).clamp(-1, 1)
    place = None if window is None else torch.full((4, 2), 30.0)
    with torch.no_grad():
        expected, found = (network(before, after, condition, place).logits for network in (fine, coarse))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


@pytest.mark.parametrize("config", [None, "compact"])
def test_networks_pass_the_device_meta(config: str | None) -> None:
    """Shapes and operations can be counted without a value being made."""
    preset = PRESETS["compact" if config else "reference"]
    with torch.device("meta"):
        networks = IterativeGenerator(preset.generator), DiffDiscriminator(preset.discriminator)
        pictures, place = torch.zeros(2, 3, 64, 64), torch.zeros(2, 2) if config else None
        condition = torch.zeros(2, preset.generator.condition_dim)
        drawn = networks[0](torch.zeros(2, preset.generator.z_dim), condition, pictures, place)
        assert drawn.shape == (2, 3, 64, 64)
        assert networks[1](pictures, drawn, condition, place).logits.shape == (2,)


@pytest.mark.parametrize(
    ("config", "field", "value", "message"),
    [
        (GeneratorConfig, "places", "no", "places must be bool, got 'no'"),
        (GeneratorConfig, "mapping", 0, "mapping must be bool, got 0"),
        (GeneratorConfig, "objects", "red cube", r"objects must be tuple\[str, ...\], got 'red cube'"),
        (DiscriminatorConfig, "spectral_norm", None, "spectral_norm must be bool, got None"),
        (NoiseEncoderConfig, "places", 1, "places must be bool, got 1"),
        (SceneClassifierConfig, "stem", "smal", r"stem must be Literal\['imagenet', 'small'\], got 'smal'"),
        (SceneClassifierConfig, "image_size", 64.5, "image_size must be int, got 64.5"),
        (SceneClassifierConfig, "blocks", (1, 1, 1, 0), r"widths and blocks must be at least 1, got .* \(1, 1, 1, 0\)"),
        (ObjectCounterConfig, "widths", (16, 0), r"widths must be at least 1, got \(16, 0\)"),
        (ObjectCounterConfig, "image_size", 1.5, "image_size must be int, got 1.5"),
    ],
)
def test_fields_of_configs_are_of_their_types(config: type[Any], field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**{field: value})


# What others put in place of parts, and how they derive from classes


class Doubled(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = 2 * self.base(x)
        return output


@torch.no_grad()
def test_another_block_in_a_discriminator_works_under_autocast_and_hooks_see_pictures() -> None:
    config = DiscriminatorConfig(width=4, spectral_norm=False)
    discriminator, arguments = randomise(DiffDiscriminator(config)), discriminator_input(config)
    calls: list[int] = []
    hook = discriminator.block2.register_forward_hook(lambda module, given, output: calls.append(len(output)))
    with torch.autocast("cpu", torch.bfloat16):
        discriminator(*arguments)
    hook.remove()
    assert calls == [4], "both pictures at once"
    discriminator.block2 = Doubled(discriminator.block2)
    exact = discriminator(*arguments).logits
    with torch.autocast("cpu", torch.bfloat16):
        coarse = discriminator(*arguments).logits
    assert (coarse - exact).abs().max() < 0.1 * exact.abs().max()


def test_gradients_of_each_sample_of_a_discriminator_under_autocast() -> None:
    config = DiscriminatorConfig(width=4, spectral_norm=False)
    discriminator, arguments = randomise(DiffDiscriminator(config)).eval(), discriminator_input(config)
    exact = per_sample_gradients(discriminator, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = per_sample_gradients(discriminator, arguments)
    name = "block1.c1.weight"
    assert (coarse[name] - exact[name]).norm() < 0.1 * exact[name].norm()


def test_linear_layers_can_be_pruned_and_normalised_everywhere() -> None:
    for change in (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ):
        generator = lively_generator(COMPACT)
        generator.l0.weight.data = generator.l0.weight.data.contiguous()  # as docs/performance.md says
        for layer in [part for part in generator.modules() if type(part) is nn.Linear]:
            change(layer)
        assert generator.generate("red cube", seed=0).tensor.isfinite().all()


def test_a_config_of_another_kind_is_refused() -> None:
    for wrong in ("iclevr-64", {"width": 4}, 16, DiscriminatorConfig()):
        with pytest.raises(TypeError, match=r"config must be a GeneratorConfig or None, got .*from_pretrained"):
            IterativeGenerator(wrong)  # type: ignore[arg-type]


def test_a_derived_class_loads_what_its_base_has_learned(tmp_path: Path) -> None:
    class Mine(IterativeGenerator):
        pass

    lively_generator(COMPACT).save_pretrained(tmp_path / "base")
    mine = Mine.from_pretrained(tmp_path / "base")
    assert type(mine) is Mine
    mine.save_pretrained(tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["model_type"] == "Mine"
    Mine.from_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"holds the model type Mine, wanted is IterativeGenerator"):
        IterativeGenerator.from_pretrained(tmp_path / "mine")
