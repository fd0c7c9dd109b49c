"""drawing.py: a picture depends on its own objects, places and seed only, and results say how they came about."""

from __future__ import annotations

import io
import json
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from condgan import Drawing, GeneratorConfig, IterativeGenerator, drawing
from condgan.classifier import SceneClassifierConfig
from condgan.drawing import CANDIDATE_STRIDE, MAX_SEED, Found, draw_turns, evaluating
from condgan.functional import encode_objects, roll_conditions, rollout
from condgan.images import load_image, to_pil, to_uint8

COMPACT = GeneratorConfig(
    width=4, z_dim=6, condition_dim=12, output="blend", places=True, noise_in_norm=True, light_components=3
)
REFERENCE = GeneratorConfig(width=4, z_dim=6, condition_dim=12)
SCENES = [
    ["red cube"],
    ["gray sphere", "blue cylinder"],
    ["cyan cube", "red cube", "green sphere"],
    ["yellow cylinder", "yellow cube", "brown sphere"],
    ["purple sphere"],
    ["blue cylinder", "gray sphere"],
    ["red cube", "green cube"],
]


def lively_generator(config: GeneratorConfig, seed: int = 0) -> IterativeGenerator:
    """A generator whose every part matters: no weight or statistic is that of a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = IterativeGenerator(config).eval()
        for parameter in generator.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for module in generator.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean += 0.1 * torch.randn_like(module.running_mean)
                module.running_var += 0.3 * torch.rand_like(module.running_var)
        assert generator.conv.bias is not None
        nn.init.zeros_(generator.conv.bias)  # half of each new picture is drawn, half of it is the previous one
        generator.canvas.mean += 0.3 * torch.randn_like(generator.canvas.mean)
        generator.canvas.components += 0.1 * torch.randn_like(generator.canvas.components)
        generator.canvas.grain_std += 0.05
    return generator


@pytest.fixture(scope="module")
def compact() -> IterativeGenerator:
    """Knows places."""
    return lively_generator(COMPACT)


@pytest.fixture(scope="module")
def reference() -> IterativeGenerator:
    """Does not know places."""
    return lively_generator(REFERENCE)


@pytest.fixture(scope="module", params=["compact", "reference"])
def generator(request: pytest.FixtureRequest) -> IterativeGenerator:
    model: IterativeGenerator = request.getfixturevalue(request.param)
    return model


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether more than a few pixels of two pictures differ by more than a grey level."""
    return ((first - second).abs() > 2 / 255).float().mean().item() > 0.05


# What a picture depends on


def test_a_picture_is_the_same_alone_in_a_batch_and_in_any_order(generator: IterativeGenerator) -> None:
    batch = generator.generate(SCENES, seed=40)
    assert batch.seeds == [40, 41, 42, 43, 44, 45, 46]
    turns = draw_turns(generator, SCENES[::-1], batch.seeds[::-1])
    assert torch.equal(turns.images.flip(0)[:, -1], batch.tensor)
    for i, scene in enumerate(SCENES):
        alone = generator.generate(scene, seed=40 + i)
        length = len(scene)
        assert torch.equal(alone.trajectory[0], batch.trajectory[i, : length + 1])
        assert torch.equal(alone.trajectory[0], turns.images[6 - i, : length + 1])
        if generator.config.places:
            assert alone.places is not None and batch.places is not None and turns.places is not None
            assert alone.places[0] == batch.places[i]
            assert alone.places[0] == [tuple(place) for place in turns.places[6 - i, :length].tolist()]
        else:
            assert alone.places is batch.places is turns.places is None


def test_a_picture_depends_on_all_that_it_should(generator: IterativeGenerator) -> None:
    base = generator.generate(["red cube", "blue sphere"], seed=1).trajectory[0]
    other_seed = generator.generate(["red cube", "blue sphere"], seed=2).trajectory[0]
    assert all(differ(base[turn], other_seed[turn]) for turn in range(3)), "light or grain, and noise"
    other_order = generator.generate(["blue sphere", "red cube"], seed=1).trajectory[0]
    assert torch.equal(base[0], other_order[0])
    assert differ(base[1], other_order[1]) and differ(base[2], other_order[2])
    other_last = generator.generate(["red cube", "red sphere"], seed=1).trajectory[0]
    assert torch.equal(base[:2], other_last[:2])
    assert differ(base[2], other_last[2])
    longer = generator.generate(["red cube", "blue sphere", "gray cube"], seed=1).trajectory[0]
    assert torch.equal(base, longer[:3])


def test_drawing_is_a_rollout_with_the_noise_of_the_seed(generator: IterativeGenerator) -> None:
    """The plain version: canvas, then for every turn three numbers for the place and z, from the picture's own seed."""
    scene = ["red cube", "blue sphere", "gray cube"]
    at = [(30.0, 20.0), (10.5, 50.0), (44.0, 44.0)] if generator.config.places else None
    result = generator.generate(scene, seed=9, at=at)
    rng = torch.Generator().manual_seed(9)
    light = torch.randn(1, generator.config.light_components, generator=rng)
    start = generator.canvas(light, torch.randn(1, 3, 64, 64, generator=rng))
    noise = []
    for _ in scene:
        torch.rand(3, generator=rng)
        noise.append(torch.randn(generator.z_dim, generator=rng))
    places = None if at is None else torch.tensor([at])
    with torch.no_grad():
        conditions, _ = roll_conditions(generator.encoder, encode_objects([scene]))
        wanted = rollout(generator, conditions, torch.stack(noise)[None], start, places)
    assert torch.equal(result.trajectory[:, 0], start)
    assert torch.equal(result.trajectory[:, 1:], wanted)


def test_stream_equals_generate(generator: IterativeGenerator) -> None:
    scene = ["red cube", "blue sphere", "gray cube"]
    result = generator.generate(scene, seed=3)
    turns = list(generator.stream(scene, seed=3))
    assert [turn.added for turn in turns] == scene
    for i, turn in enumerate(turns):
        assert torch.equal(turn.tensor, result.trajectory[0, i + 1])
        assert torch.equal(turn.previous, result.trajectory[0, i])
        assert turn.image.tobytes() == result.turns[0][i].tobytes()
        half = np.asarray(result.turns[0][i], int) - np.asarray(to_pil(turn.previous), int)
        assert np.abs(np.asarray(turn.difference) - 127.5 - half / 2).max() <= 1.1
        assert turn.seed == 3
    assert [turn.place for turn in turns] == ([None] * 3 if result.places is None else result.places[0])


def test_random_states_of_others_are_left_alone(generator: IterativeGenerator) -> None:
    def states() -> tuple[bytes, str, str]:
        torch_state = torch.random.get_rng_state().numpy().tobytes()
        return torch_state, repr(np.random.get_state()), repr(random.getstate())

    before = states()
    generator.generate(SCENES[:2], num_images=2)
    generator.generate("red cube", seed=0)
    generator.add(Image.new("RGB", (9, 9)), "red cube")
    list(generator.stream(["red cube", "blue sphere"]))
    assert states() == before


def test_the_state_of_torch_makes_no_difference(compact: IterativeGenerator) -> None:
    first = compact.generate("red cube", seed=1).tensor
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert torch.equal(compact.generate("red cube", seed=1).tensor, first)


# Seeds


def test_no_seed_is_a_fresh_one_that_is_reported(generator: IterativeGenerator) -> None:
    first, second = (generator.generate("red cube", num_images=2) for _ in range(2))
    assert first.seeds != second.seeds
    assert first.seeds[1] == first.seeds[0] + 1
    assert differ(first.tensor, second.tensor)
    assert torch.equal(generator.generate("red cube", seed=first.seeds[1]).tensor[0], first.tensor[1])
    turns = [*generator.stream(["red cube"]), *generator.stream(["red cube"])]
    assert turns[0].seed != turns[1].seed
    assert torch.equal(generator.generate("red cube", seed=turns[0].seed).tensor[0], turns[0].tensor)


def test_several_draws_of_several_scenes_have_a_seed_each(compact: IterativeGenerator) -> None:
    result = compact.generate(
        [["red cube"], ["blue sphere", "gray cube"]], num_images=2, seed=5, at=[None, [None, (8, 9)]]
    )
    assert result.seeds == [5, 6, 7, 8]
    assert result.conditions == [["red cube"]] * 2 + [["blue sphere", "gray cube"]] * 2
    assert result.places is not None
    assert [len(scene) for scene in result.places] == [1, 1, 2, 2]
    assert [scene[-1] == (8, 9) for scene in result.places] == [False, False, True, True]
    alone = compact.generate(["blue sphere", "gray cube"], seed=8, at=[None, (8, 9)])
    assert torch.equal(alone.tensor[0], result.tensor[3])


def test_seeds_of_numpy_and_the_largest_seed_are_fine(compact: IterativeGenerator) -> None:
    result = compact.generate("red cube", seed=np.int64(4), num_images=np.int32(2))
    assert result.seeds == [4, 5]
    assert {type(seed) for seed in result.seeds} == {int}, "JSON knows no other"
    assert compact.generate("red cube", seed=MAX_SEED, num_images=2).seeds == [MAX_SEED, 0]


def test_all_bits_of_a_seed_count(compact: IterativeGenerator) -> None:
    """PyTorch's own generator takes seed and seed + 2**32 for the same."""
    seeds = [7, 7 + 2**32, 7 + 2**33, 7 + 2**62, 8, 8 + 2**32]
    images = draw_turns(compact, [["red cube"]] * 6, seeds).images
    for i in range(6):
        for j in range(i):
            assert differ(images[i, 0], images[j, 0]), "light and grain"


@pytest.mark.parametrize("name", ["seed", "num_images", "best_of"])
def test_whole_numbers_have_to_be_that(compact: IterativeGenerator, name: str) -> None:
    for value in (1.0, "1", True, [1], torch.tensor(1.5)):
        with pytest.raises(TypeError, match=f"{name} must be a whole number, got "):
            compact.generate("red cube", **{name: value})
    for value in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"{name} must be between [01] and 2\*\*63 - 1, got {value}"):
            compact.generate("red cube", **{name: value})
    if name != "seed":
        with pytest.raises(ValueError, match=f"{name} must be between 1"):
            compact.generate("red cube", **{name: 0})


# Places


def test_asked_places_are_kept_and_reported(compact: IterativeGenerator) -> None:
    scene = ["red cube", "blue sphere", "gray cube"]
    drawn = compact.generate(scene, seed=2)
    result = compact.generate(scene, seed=2, at=[None, (45, 30.3), (0, 63)])
    assert drawn.places is not None and result.places is not None
    assert result.places[0][1:] == [(45.0, 30.3), (0.0, 63.0)]
    assert result.places[0][0] == drawn.places[0][0]
    assert torch.equal(result.trajectory[0, :2], drawn.trajectory[0, :2])
    assert differ(result.trajectory[0, 2], drawn.trajectory[0, 2])
    again = compact.generate(scene, seed=2, at=result.places[0])
    assert torch.equal(again.trajectory, result.trajectory), "reported places draw the picture again"
    streamed = list(compact.stream(scene, seed=2, at=[None, (45, 30.3), (0, 63)]))
    assert [turn.place for turn in streamed] == result.places[0]
    assert torch.equal(streamed[-1].tensor, result.tensor[0])


def test_drawn_places_are_inside_and_differ(compact: IterativeGenerator) -> None:
    result = compact.generate(["red cube", "blue sphere"], num_images=20, seed=0)
    assert result.places is not None
    places = [place for scene in result.places for place in scene]
    assert len(set(places)) == 40
    assert all(-0.5 <= value < 63.5 for place in places for value in place)


def test_places_may_be_of_numpy_or_torch(compact: IterativeGenerator) -> None:
    wanted = compact.generate("red cube", seed=1, at=[(7, 9)])
    for place in ([7, 9], np.array([7, 9]), torch.tensor([7, 9]), (np.float32(7), 9)):
        result = compact.generate("red cube", seed=1, at=[place])
        assert result.places == [[(7.0, 9.0)]]
        assert torch.equal(result.tensor, wanted.tensor)


def test_models_without_places_refuse_them(reference: IterativeGenerator) -> None:
    for call in (reference.generate, reference.stream, lambda *a, **k: reference.add(Image.new("L", (8, 8)), *a, **k)):
        with pytest.raises(
            ValueError, match="at was given, but this model does not know places; the default model does"
        ):
            call(["red cube"], at=[(3, 4)])
    with pytest.raises(ValueError, match="places were given, but this model does not know places"):
        draw_turns(reference, [["red cube"]], [0], places=[[(3, 4)]])


NAN = float("nan")


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ((45, 30), r"got \(45, 30\) for the objects \['red cube'\]"),
        ([(45, 30), None], "one entry an object"),
        ([], "one entry an object"),
        (5, "got 5 for the objects"),
        ([5], "got the entry 5"),
        ([(1, 2, 3)], r"got the entry \(1, 2, 3\)"),
        ([(1,)], r"got the entry \(1,\)"),
        (["45"], "got the entry '45'"),
        ([("4", "5")], "got the entry"),
        ([{"x": 1, "y": 2}], "got the entry"),
        ([(NAN, 3)], r"the place \(nan, 3\) is not inside the picture, x and y go from 0 to 63"),
        ([(3, NAN)], "is not inside"),
        ([(float("inf"), 3)], "is not inside"),
        ([(-1, 3)], "is not inside"),
        ([(3, 64)], "is not inside"),
        ([(63.5, 3)], "is not inside"),
    ],
)
def test_wrong_places_are_refused(compact: IterativeGenerator, at: Any, message: str) -> None:
    for draw in (compact.generate, compact.stream):
        with pytest.raises(ValueError, match=rf"^at\b.*{message}"):
            draw(["red cube"], at=at)


@pytest.mark.parametrize("at", [[(3, 4)], [[(3, 4)]], [[(3, 4)], None, None], [[(3, 4)], [None]], 3])
def test_a_batch_needs_a_list_of_places_a_scene(compact: IterativeGenerator, at: Any) -> None:
    with pytest.raises(ValueError, match=r"^at needs"):
        compact.generate([["red cube"], ["blue sphere", "gray cube"]], at=at)


# Names


def test_names_may_be_spelled_freely(compact: IterativeGenerator) -> None:
    wanted = compact.generate(["gray cube"], seed=1)
    for conditions in ("gray cube", ["Grey  CUBE"], ("gray cube",), [["gray\tcube"]], [np.str_("gray cube")]):
        result = compact.generate(conditions, seed=1)
        assert result.conditions == [["gray cube"]]
        assert torch.equal(result.tensor, wanted.tensor)


def test_the_last_object_asked_twice_is_drawn_twice(compact: IterativeGenerator) -> None:
    result = compact.generate(["red cube", "red cube"], seed=1)
    assert len(result.turns[0]) == 2
    assert differ(result.trajectory[0, 1], result.trajectory[0, 2])


@pytest.mark.parametrize(
    ("conditions", "error", "message"),
    [
        (None, TypeError, r"conditions must be a list of objects .* got None \(NoneType\)"),
        (7, TypeError, r"got 7 \(int\)"),
        ({"red cube": 1}, TypeError, r"\(dict\)"),
        ({"red cube"}, TypeError, r"\(set\)"),
        (b"red cube", TypeError, r"\(bytes\)"),
        (np.zeros(3), TypeError, r"\(ndarray\)"),
        ((name for name in ["red cube"]), TypeError, r"\(generator\)"),
        ([], ValueError, "conditions is empty: name at least one object"),
        ([[]], ValueError, r"conditions\[0\] is empty"),
        ([["red cube"], []], ValueError, r"conditions\[1\] is empty"),
        ([["red cube"], "blue sphere"], TypeError, r"mixes names and lists of names: .*make every scene a list"),
        ([["red cube"], None], TypeError, "mixes names"),
        ([None], TypeError, "an object is named by a string .* got None"),
        (["red cube", 3], TypeError, "got 3"),
        ([[["red cube"]]], TypeError, r"got \['red cube'\]"),
        ([{"red cube": 1}], TypeError, "got {'red cube': 1}"),
        ("", ValueError, "unknown object ''"),
        (["red cube", "  "], ValueError, "unknown object '  '"),
        (["red cubes"], ValueError, r"unknown object 'red cubes': did you mean 'red cube'\? .*model.vocabulary.names"),
    ],
)
def test_wrong_conditions_are_refused(
    compact: IterativeGenerator, conditions: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compact.generate(conditions)


def test_stream_refuses_at_once_what_it_cannot_draw(compact: IterativeGenerator) -> None:
    """Before the first turn is asked for."""
    with pytest.raises(ValueError, match="unknown object 'red cubes'"):
        compact.stream(["red cubes"])
    with pytest.raises(ValueError, match="stream draws one scene"):
        compact.stream([["red cube"], ["blue sphere"]])
    with pytest.raises(TypeError, match="seed must be"):
        compact.stream(["red cube"], seed=1.5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator, scene: generator.generate(scene),
        lambda generator, scene: generator.add(Image.new("RGB", (64, 64)), [scene]),
        lambda generator, scene: generator.stream(scene),
    ],
    ids=["generate", "add", "stream"],
)
def test_more_turns_than_trained_warn_where_they_are_asked(
    compact: IterativeGenerator, draw: Callable[..., Any]
) -> None:
    scene = ["red cube", "blue sphere", "gray cube", "cyan cube"]
    with pytest.warns(UserWarning, match="4 objects are asked, but .* trained on scenes of at most 3") as record:
        draw(compact, scene)
    assert [warning.filename for warning in record] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(compact, scene[:3])


def test_more_turns_than_trained_are_drawn(compact: IterativeGenerator) -> None:
    scene = ["red cube", "blue sphere", "gray cube", "cyan cube", "red cylinder"]
    with pytest.warns(UserWarning, match="5 objects are asked"):
        result = compact.generate(scene, seed=1)
    assert len(result.turns[0]) == 5
    assert all(differ(*result.trajectory[0, turn : turn + 2]) for turn in range(5))


# Modes and gradients


def test_drawing_is_in_eval_mode_and_leaves_every_mode_alone(generator: IterativeGenerator) -> None:
    wanted = generator.generate(SCENES[2], seed=6)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    generator.train()
    generator.prev_encoder.eval()  # frozen for fine-tuning
    modes = {name: module.training for name, module in generator.named_modules()}
    try:
        assert torch.equal(generator.generate(SCENES[2], seed=6).tensor, wanted.tensor)
        for i, turn in enumerate(generator.stream(SCENES[2], seed=6)):
            assert torch.equal(turn.tensor, wanted.trajectory[0, i + 1])
            assert {name: module.training for name, module in generator.named_modules()} == modes
            assert torch.is_grad_enabled()
        with pytest.raises(ValueError, match="start must be"):
            draw_turns(generator, [["red cube"]], [0], start=torch.zeros(1, 3, 8, 8))
        assert {name: module.training for name, module in generator.named_modules()} == modes
        assert all(torch.equal(before[name], tensor) for name, tensor in generator.state_dict().items())
    finally:
        generator.eval()


def test_evaluating_gives_modes_back_after_an_error() -> None:
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    module[1].eval()
    with pytest.raises(KeyError), evaluating(module):
        assert not any(part.training for part in module.modules())
        raise KeyError
    assert [part.training for part in module.modules()] == [True, True, False]


def test_nothing_that_is_drawn_has_a_gradient(generator: IterativeGenerator) -> None:
    assert all(parameter.requires_grad for parameter in generator.parameters())
    assert not generator.generate("red cube").trajectory.requires_grad
    start = torch.zeros(3, 64, 64, requires_grad=True)
    assert not generator.add(start, "red cube").trajectory.requires_grad
    for turn in generator.stream("red cube"):
        assert not turn.tensor.requires_grad


# Turns


def test_short_scenes_repeat_their_last_picture(compact: IterativeGenerator) -> None:
    turns = draw_turns(compact, SCENES[:3], [1, 2, 3])
    assert turns.images.shape == (3, 4, 3, 64, 64)
    assert turns.images.dtype == torch.float32
    assert turns.lengths.tolist() == [1, 2, 3]
    assert torch.equal(turns.images[0, 1:], turns.images[0, 1:2].expand(3, -1, -1, -1))
    assert torch.equal(turns.images[1, 2], turns.images[1, 3])
    assert turns.places is not None
    assert turns.places.isnan().all(2).tolist() == [[False, True, True], [False, False, True], [False, False, False]]


def test_a_batch_on_a_gpu_is_what_comes_one_by_one(
    compact: IterativeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn as on a GPU, many at once, of different lengths, with some places asked."""
    places: Any = [[None] * len(scene) for scene in SCENES]
    places[1] = [None, (20, 30)]
    places[4] = [(50, 10)]
    seeds = list(range(7))
    wanted = draw_turns(compact, SCENES, seeds, places=places)
    monkeypatch.setattr(drawing, "CPU_BATCH", 4)
    batched = draw_turns(compact, SCENES, seeds, places=places)
    torch.testing.assert_close(batched.images, wanted.images, rtol=0, atol=1e-4)
    torch.testing.assert_close(batched.places, wanted.places, rtol=0, atol=1e-4, equal_nan=True)
    assert torch.equal(batched.lengths, wanted.lengths)


def test_noise_does_not_depend_on_the_start(compact: IterativeGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    forward = IterativeGenerator.forward

    def watch(self: IterativeGenerator, z: Tensor, *args: Any) -> Tensor:
        seen.append(z)
        return forward(self, z, *args)

    monkeypatch.setattr(IterativeGenerator, "forward", watch)
    compact.generate(["red cube", "blue sphere"], seed=3)
    compact.add(torch.zeros(3, 64, 64), ["red cube", "blue sphere"], seed=3)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditions": [], "seeds": []}, "conditions is empty: give at least one list of objects"),
        ({"conditions": [["red cube"], []]}, "empty"),
        ({"seeds": [1]}, "seeds must be one a picture: got 1 seeds for 2 lists"),
        ({"seeds": [1, 2, 3]}, "got 3 seeds for 2 lists"),
        ({"places": [[None]]}, "places must be one list a picture"),
        ({"places": [[None], [None]]}, "places must be one list a picture, each with one"),
        ({"start": torch.zeros(1, 3, 64, 64)}, r"start must be \(2, 3, 64, 64\), got \(1, 3, 64, 64\)"),
        ({"start": torch.zeros(2, 3, 32, 32)}, r"start must be \(2, 3, 64, 64\), got \(2, 3, 32, 32\)"),
        ({"conditions": [["red cube"], ["red ball"]], "places": None}, "unknown object 'red ball'"),
    ],
)
def test_draw_turns_needs_one_of_everything_a_picture(
    compact: IterativeGenerator, arguments: dict[str, Any], message: str
) -> None:
    usual: dict[str, Any] = {"conditions": [["red cube"], ["blue sphere", "gray cube"]], "seeds": [1, 2]}
    with pytest.raises(ValueError, match=message):
        draw_turns(compact, **{**usual, **arguments})


# Results


def test_a_result_has_pictures_turns_and_tensors(generator: IterativeGenerator) -> None:
    result = generator.generate(SCENES[:3], seed=1)
    assert isinstance(result, Drawing)
    assert result.tensor.shape == (3, 3, 64, 64)
    assert result.tensor.dtype == torch.float32
    assert -1 <= result.tensor.min() < result.tensor.max() <= 1
    assert result.trajectory.abs().max() <= 1
    assert [(image.mode, image.size) for image in result.images] == [("RGB", (64, 64))] * 3
    assert result.image.tobytes() == result.images[0].tobytes()
    assert [len(turns) for turns in result.turns] == [1, 2, 3]
    for i, (image, turns) in enumerate(zip(result.images, result.turns, strict=True)):
        assert turns[-1].tobytes() == image.tobytes()
        assert np.array_equal(np.asarray(image), to_uint8(result.tensor[i]).permute(1, 2, 0).numpy())
    assert result.scores is None
    assert repr(result) == (
        "Drawing(3 x 64x64: ['red cube'] seed 1, ['gray sphere', 'blue cylinder'] seed 2, "
        "['cyan cube', 'red cube', 'green sphere'] seed 3)"
    )
    assert repr(generator.generate("red cube", num_images=4, seed=1)).endswith("['red cube'] seed 3, ...)")


def test_results_can_be_compared_and_kept_in_a_set(compact: IterativeGenerator) -> None:
    first, second = (compact.generate("red cube", seed=1) for _ in range(2))
    assert first != second and first == first
    assert len({first, second}) == 2


def test_a_grid_holds_every_picture(compact: IterativeGenerator) -> None:
    result = compact.generate(SCENES[:3], seed=1)
    sheet = result.grid()
    assert sheet.size == (64 + 2 + 64, 64 + 2 + 64)
    for i, image in enumerate(result.images):
        left, top = i % 2 * 66, i // 2 * 66
        assert sheet.crop((left, top, left + 64, top + 64)).tobytes() == image.tobytes()
    assert result.grid(columns=3).size == (3 * 66 - 2, 64)
    growing = result.grid(turns=True)
    assert growing.size == (4 * 66 - 2, 3 * 66 - 2)
    assert growing.crop((198, 66, 262, 130)).tobytes() == result.images[1].tobytes()
    assert growing.crop((0, 66, 64, 130)).tobytes() == to_pil(result.trajectory[1, 0]).tobytes()
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        result.grid(columns=0)


def test_notebooks_show_the_grid(compact: IterativeGenerator) -> None:
    result = compact.generate("red cube", num_images=2, seed=1)
    with Image.open(io.BytesIO(result._repr_png_())) as shown:
        assert shown.format == "PNG"
        assert shown.tobytes() == result.grid().tobytes()


# Files


def test_a_saved_png_tells_how_to_draw_it_again(generator: IterativeGenerator, tmp_path: Path) -> None:
    result = generator.generate(["red cube", "Grey sphere"], seed=11)
    assert result.save(tmp_path / "scene.png") == [tmp_path / "scene.png"]
    with Image.open(tmp_path / "scene.png") as saved:
        assert saved.tobytes() == result.image.tobytes()
        metadata = json.loads(saved.text["condgan"])
    assert metadata == {
        "conditions": ["red cube", "gray sphere"],
        "seed": 11,
        "places": None if result.places is None else [list(place) for place in result.places[0]],
    }
    again = generator.generate(metadata["conditions"], seed=metadata["seed"], at=metadata["places"])
    assert torch.equal(again.tensor, result.tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.png"]


def test_several_pictures_are_numbered(compact: IterativeGenerator, tmp_path: Path) -> None:
    result = compact.generate([["red cube"], ["blue sphere"]], seed=3)
    files = result.save(str(tmp_path / "my.scene.PNG"))
    assert files == [tmp_path / "my.scene-0.PNG", tmp_path / "my.scene-1.PNG"]
    for file, image, seed in zip(files, result.images, (3, 4), strict=True):
        with Image.open(file) as saved:
            assert saved.tobytes() == image.tobytes()
            assert json.loads(saved.text["condgan"])["seed"] == seed
    assert result.save(tmp_path / "one.png", index=1) == [tmp_path / "one.png"]
    with Image.open(tmp_path / "one.png") as saved:
        assert saved.tobytes() == result.images[1].tobytes()


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "gif", "bmp", "webp", "tif", "ppm"])
def test_other_formats_are_written_too(compact: IterativeGenerator, tmp_path: Path, ending: str) -> None:
    result = replace(compact.generate("red cube", seed=1), trajectory=torch.full((1, 2, 3, 64, 64), 0.2))
    result.save(tmp_path / f"scene.{ending}")
    with Image.open(tmp_path / f"scene.{ending}") as saved:
        assert np.abs(np.asarray(saved.convert("RGB")) - 153.0).max() <= 2
        assert "condgan" not in saved.info
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["scene", "scene.xyz", "scene.", "scene.psd", ".png"])
def test_an_ending_that_is_no_picture_format_is_refused(compact: IterativeGenerator, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"path must end like a picture file, such as scene\.png, got .*"):
        compact.generate("red cube").save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.* image format is deprecated:DeprecationWarning")
def test_every_known_ending_is_written_or_refused_clearly(compact: IterativeGenerator, tmp_path: Path) -> None:
    result = compact.generate("red cube")
    written = 0
    for ending in Image.registered_extensions():
        try:
            result.save(tmp_path / f"scene{ending}")
            written += 1
        except (OSError, ValueError) as error:
            assert f"scene{ending}'" in str(error), ending
            assert not (tmp_path / f"scene{ending}").exists()
    assert written == len(list(tmp_path.iterdir())) > 20


def test_a_place_that_cannot_be_written_is_named(compact: IterativeGenerator, tmp_path: Path) -> None:
    result = compact.generate("red cube")
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path, reason in (
        ("missing/scene.png", "No such file"),
        ("file/scene.png", "Not a directory"),
        ("folder.png", "Is a directory"),
    ):
        with pytest.raises(OSError, match=rf"cannot write '{tmp_path / path}': {reason}"):
            result.save(tmp_path / path)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png"}


def test_a_write_that_fails_leaves_the_old_file(
    compact: IterativeGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = compact.generate("red cube")
    result.save(tmp_path / "scene.png")
    before = (tmp_path / "scene.png").read_bytes()

    def run_out_of_space(self: Image.Image, path: Path, *args: Any, **options: Any) -> None:
        path.write_bytes(before[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", run_out_of_space)
    with pytest.raises(OSError, match=r"cannot write '.*scene\.png': No space left on device"):
        result.save(tmp_path / "scene.png")
    assert (tmp_path / "scene.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["scene.png"]


# Adding to a picture


def gradient_picture(size: tuple[int, int]) -> Image.Image:
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (200, 100), (3, 7)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "I", "F", "LA", "HSV"])
def test_objects_are_added_to_any_picture(compact: IterativeGenerator, mode: str, size: tuple[int, int]) -> None:
    picture = gradient_picture(size).convert(mode)
    result = compact.add(picture, "red cube", seed=7)
    assert torch.equal(result.trajectory[0, 0], load_image(picture, 64))
    assert result.tensor.shape == (1, 3, 64, 64)
    assert differ(result.trajectory[0, 0], result.tensor[0])
    assert result.conditions == [["red cube"]]
    assert result.seeds == [7]
    assert len(result.turns[0]) == 1


def test_equal_pictures_give_equal_results(generator: IterativeGenerator, tmp_path: Path) -> None:
    picture = gradient_picture((64, 64))
    picture.save(tmp_path / "a.png")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    images = {
        "PIL": picture,
        "RGBA": picture.convert("RGBA"),
        "path": tmp_path / "a.png",
        "string": str(tmp_path / "a.png"),
        "array": array,
        "uint8": tensor,
        "float": (tensor.float() / 127.5 - 1).contiguous(),
        "channels last": tensor.float() / 127.5 - 1,
    }
    wanted = generator.add(picture, ["red cube", "blue sphere"], seed=2)
    for name, image in images.items():
        result = generator.add(image, ["red cube", "blue sphere"], seed=2)
        assert torch.equal(result.trajectory, wanted.trajectory), name


def test_what_is_added_depends_on_the_picture(generator: IterativeGenerator) -> None:
    pictures = gradient_picture((64, 64)), Image.new("RGB", (64, 64), "gray")
    first, second = (generator.add(picture, "red cube", seed=2).tensor for picture in pictures)
    assert differ(first, second)
    assert torch.equal(generator.add(pictures[0], "red cube", seed=2).tensor, first)


def test_add_goes_on_from_a_result(compact: IterativeGenerator) -> None:
    base = compact.generate("red cube", seed=1)
    more = compact.add(base.tensor[0], ["blue sphere", "gray cube"], seed=2, num_images=3, at=[None, (9, 9)])
    assert more.seeds == [2, 3, 4]
    assert torch.equal(more.trajectory[:, 0], base.tensor.expand(3, -1, -1, -1))
    assert more.places is not None
    assert [scene[1] for scene in more.places] == [(9, 9)] * 3
    alone = compact.add(base.tensor[0], ["blue sphere", "gray cube"], seed=4, at=[None, (9, 9)])
    assert torch.equal(alone.tensor[0], more.tensor[2])


def test_add_refuses_what_is_no_picture(compact: IterativeGenerator, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="image must be a PIL picture"):
        compact.add(None, "red cube")
    with pytest.raises(ValueError, match="finite and in"):
        compact.add(torch.full((3, 64, 64), NAN), "red cube")
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        compact.add(tmp_path / "missing.png", "red cube")


# The verifier


class StubVerifier:
    """Answers by a fixed random projection of the picture."""

    config = SceneClassifierConfig()

    def __init__(self) -> None:
        self.weight = torch.randn(3 * 64 * 64, 24, generator=torch.Generator().manual_seed(5)) / 20
        self.shapes: list[tuple[int, ...]] = []

    def probabilities(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        return (images.flatten(1) @ self.weight).sigmoid()


@pytest.fixture
def verifier(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubVerifier]:
    stub = StubVerifier()
    monkeypatch.setattr(drawing, "_verifier", lambda: stub)
    yield stub


def exact_probability(verifier: StubVerifier, image: Tensor, objects: set[str]) -> float:
    """That just these objects are there, written out."""
    product = 1.0
    for name, p in zip(verifier.config.objects, verifier.probabilities(image[None])[0].tolist(), strict=True):
        product *= p if name in objects else 1 - p
    return product


def test_best_of_keeps_what_the_verifier_likes_best(compact: IterativeGenerator, verifier: StubVerifier) -> None:
    scenes = [["red cube"], ["gray sphere", "blue cylinder"], ["cyan cube", "red cube", "green sphere"]]
    at = [None, [None, (20, 21)], None]
    result = compact.generate(scenes, seed=100, best_of=4, at=at)
    assert result.scores is not None and result.places is not None
    chosen = set()
    for i, scene in enumerate(scenes):
        seeds = [100 + i + k * CANDIDATE_STRIDE for k in range(4)]
        candidates = [compact.generate(scene, seed=seed, at=at[i]) for seed in seeds]
        scores = [exact_probability(verifier, candidate.tensor[0], set(scene)) for candidate in candidates]
        best = int(np.argmax(scores))
        chosen.add(best)
        assert len(set(scores)) == 4
        assert result.seeds[i] == seeds[best]
        assert result.scores[i] == pytest.approx(scores[best], rel=1e-3)
        assert torch.equal(result.tensor[i], candidates[best].tensor[0]), "its seed draws it again"
        assert torch.equal(result.trajectory[i, : len(scene) + 1], candidates[best].trajectory[0])
        assert candidates[best].places == [result.places[i]]
    assert chosen != {0}, "the first candidates are not always the best here"


def test_best_of_is_the_same_alone_and_in_a_batch(compact: IterativeGenerator, verifier: StubVerifier) -> None:
    batch = compact.generate(["red cube"], num_images=3, seed=1, best_of=3)
    alone = compact.generate(["red cube"], seed=3, best_of=3)
    assert alone.seeds == batch.seeds[2:]
    assert torch.equal(alone.tensor[0], batch.tensor[2])


def test_best_of_one_asks_nobody(compact: IterativeGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("the verifier was loaded")

    monkeypatch.setattr(drawing, "_verifier", fail)
    assert compact.generate("red cube", best_of=1).scores is None


def test_best_of_add_asks_for_what_was_there_before_too(compact: IterativeGenerator, verifier: StubVerifier) -> None:
    picture = gradient_picture((64, 64))
    seen = verifier.probabilities(load_image(picture, 64)[None])[0] > 0.5
    before = {name for name, there in zip(verifier.config.objects, seen.tolist(), strict=True) if there}
    assert 0 < len(before) < 24
    result = compact.add(picture, ["red cube"], seed=8, best_of=3)
    candidates = [compact.add(picture, ["red cube"], seed=8 + k * CANDIDATE_STRIDE) for k in range(3)]
    scores = [exact_probability(verifier, candidate.tensor[0], before | {"red cube"}) for candidate in candidates]
    assert result.scores == pytest.approx([max(scores)], rel=1e-3)
    assert result.seeds == [8 + int(np.argmax(scores)) * CANDIDATE_STRIDE]


def test_verify_says_of_each_asked_object_whether_it_was_found(
    compact: IterativeGenerator, verifier: StubVerifier
) -> None:
    result = compact.generate(SCENES, seed=1)
    report = result.verify()
    probabilities = verifier.probabilities(result.tensor)
    found = []
    for scene, row, p in zip(SCENES, report, probabilities, strict=True):
        assert list(row) == scene
        for name, answer in row.items():
            assert isinstance(answer, Found)
            assert answer.probability == pytest.approx(p[verifier.config.objects.index(name)].item(), abs=1e-6)
            assert answer.found is (answer.probability > 0.5)
            found.append(answer.found)
    assert {True, False} == set(found)


def test_the_verifier_sees_every_model_in_its_own_size(verifier: StubVerifier) -> None:
    small = lively_generator(replace(COMPACT, image_size=32))
    result = small.generate("red cube", seed=1, best_of=2)
    assert result.tensor.shape == (1, 3, 32, 32)
    result.verify()
    assert verifier.shapes == [(1, 3, 64, 64)] * 3


def test_objects_that_the_verifier_does_not_know_are_named(verifier: StubVerifier) -> None:
    other = lively_generator(replace(COMPACT, image_size=32, objects=("green tree", "red cube")))
    for ask in (lambda: other.generate("green tree", best_of=2), other.generate("green tree").verify):
        with pytest.raises(ValueError, match=r"the bundled verifier, which knows i-CLEVR's .* 'green tree'"):
            ask()
    assert other.generate("red cube", best_of=2).scores is not None
