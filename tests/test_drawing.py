"""drawing.py: a picture depends on its own objects, places and seed only, however it is drawn."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SCENES, assert_drawn_alike, differ, gradient_picture
from torch import Tensor

from condgan import IterativeGenerator
from condgan.drawing import draw_turns
from condgan.functional import encode_objects, roll_conditions, rollout
from condgan.images import from_uint8, load_image, round_levels, to_pil, to_uint8

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


def test_a_drawing_can_be_learned_from_and_its_generator_too(generator: IterativeGenerator) -> None:
    result = generator.generate(SCENES[:2], seed=1)
    copied = copy.deepcopy(generator)
    learned = torch.nn.Conv2d(3, 1, 3)
    learned(result.tensor).sum().backward()
    assert learned.weight.grad is not None
    condition, _ = copied.encoder(torch.eye(24)[:2])
    place = torch.full((2, 2), 30.0) if copied.config.places else None
    copied(torch.randn(2, copied.z_dim), condition, result.tensor, place).sum().backward()
    assert copied.get_parameter("block1.c1.weight").grad is not None


def test_changed_weights_are_drawn_with_from_the_next_call_or_turn_on(generator: IterativeGenerator) -> None:
    generator, scene = copy.deepcopy(generator), ["red cube", "blue sphere"]
    before = generator.generate(scene, seed=3).trajectory[0]
    turns = generator.stream(scene, seed=3)
    assert torch.equal(next(turns).tensor, before[1])
    with torch.no_grad():
        for parameter in generator.get_submodule("block1.c1").parameters():
            parameter.data.mul_(-1)  # no version counter sees this
    assert differ(next(turns).tensor, before[2])
    assert differ(generator.generate(scene, seed=3).tensor[0], before[2])


def test_drawing_is_a_rollout_with_the_noise_of_the_seed(generator: IterativeGenerator) -> None:
    """The plain version: canvas, then for every turn three numbers for the place and z, from the picture's own seed."""
    scene = ["red cube", "blue sphere", "gray cube"]
    at = [(30.0, 20.0), (10.5, 50.0), (44.0, 44.0)] if generator.config.places else None
    result = generator.generate(scene, seed=9, at=at)
    rng = torch.Generator().manual_seed(9)
    light = torch.randn(1, generator.config.light_components, generator=rng)
    canvas = generator.canvas(light, torch.randn(1, 3, 64, 64, generator=rng))
    start = from_uint8(to_uint8(canvas))
    rest = (canvas - start).clamp(-0.5 / 127.5, 0.5 / 127.5)
    noise = []
    for _ in scene:
        torch.rand(3, generator=rng)
        noise.append(torch.randn(generator.z_dim, generator=rng))
    places = None if at is None else torch.tensor([at])
    with torch.no_grad():
        conditions, _ = roll_conditions(generator.encoder, encode_objects([scene]))
        wanted = rollout(generator, conditions, torch.stack(noise)[None], start, places, rest=rest)
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


def test_pictures_of_a_stream_are_its_users(generator: IterativeGenerator) -> None:
    """To scale one in place changes no later turn, nor what that says of the one before."""
    scene = ["red cube", "blue sphere", "gray cube"]
    expected = [(turn.previous, turn.tensor) for turn in generator.stream(scene, seed=3)]
    found = []
    for turn in generator.stream(scene, seed=3):
        found.append((turn.previous.clone(), turn.tensor.clone()))
        turn.tensor.add_(1).div_(2)
    for pair, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, pair, wanted))


def test_each_picture_has_lists_of_its_own(generator: IterativeGenerator) -> None:
    result = generator.generate("red cube", num_images=2, seed=1)
    result.conditions[0].append("blue sphere")
    result.metadata(1)["conditions"].append("gray cube")  # type: ignore[attr-defined]
    assert result.conditions == [["red cube", "blue sphere"], ["red cube"]]


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_makes_no_difference(generator: IterativeGenerator, dtype: torch.dtype) -> None:
    first = generator.generate(SCENES[2], seed=1).tensor
    at = None if generator.place_model is None else [(20.13, 30.37), *[None] * (len(SCENES[2]) - 1)]
    placed = generator.generate(SCENES[2], seed=1, at=at).tensor
    empty = generator.canvas.remove_objects(first)
    torch.set_default_dtype(dtype)
    try:
        fresh = IterativeGenerator(generator.config).float().eval()  # has drawn nothing yet
        fresh.load_state_dict(generator.state_dict())
        assert torch.equal(fresh.generate(SCENES[2], seed=1).tensor, first)
        assert torch.equal(fresh.generate(SCENES[2], seed=1, at=at).tensor, placed)
        assert torch.equal(fresh.canvas.remove_objects(first), empty)
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_makes_no_difference(generator: IterativeGenerator) -> None:
    first = generator.generate(SCENES[2], seed=1)
    best = generator.generate(SCENES[2], seed=1, best_of=2)
    other = IterativeGenerator(generator.config).eval()  # has drawn nothing yet
    other.load_state_dict(generator.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        drawn = other.generate(SCENES[2], seed=1)
        assert torch.equal(drawn.trajectory, first.trajectory)
        assert [turn.place for turn in other.stream(SCENES[2], seed=1)][-1] == (first.places or [[None]])[0][-1]
        assert drawn.verify() == first.verify()
        assert other.generate(SCENES[2], seed=1, best_of=2).scores == best.scores
    assert torch.equal(other.generate(SCENES[2], seed=1).tensor, first.tensor)


@pytest.mark.parametrize("assign", [False, True])
def test_a_generator_that_was_built_without_memory_draws_what_it_loads(
    generator: IterativeGenerator, assign: bool
) -> None:
    with torch.device("meta"):
        other = IterativeGenerator(generator.config).eval()
    if not assign:
        for tensor in other.to_empty(device="cpu").buffers():
            tensor.fill_(1)  # as likely as anything else
    other.load_state_dict(generator.state_dict(), assign=assign)
    assert torch.equal(other.generate(SCENES[2], seed=1).tensor, generator.generate(SCENES[2], seed=1).tensor)


def test_a_model_that_draws_no_numbers_says_so(generator: IterativeGenerator) -> None:
    generator = copy.deepcopy(generator)
    assert generator.conv.bias is not None
    generator.conv.bias.data.fill_(torch.nan)
    for draw in (
        generator.generate,
        lambda scene: generator.generate(scene, best_of=2, redraw="turn"),
        lambda scene: [*generator.stream(scene)],
    ):
        with pytest.raises(ValueError, match="the model draws NaN or infinity: its weights are damaged"):
            draw(SCENES[1])


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


def test_all_bits_of_a_seed_count(compact: IterativeGenerator) -> None:
    """PyTorch's own generator takes seed and seed + 2**32 for the same."""
    seeds = [7, 7 + 2**32, 7 + 2**33, 7 + 2**62, 8, 8 + 2**32]
    images = draw_turns(compact, [["red cube"]] * 6, seeds).images
    for i in range(6):
        for j in range(i):
            assert differ(images[i, 0], images[j, 0]), "light and grain"


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


# Names


def test_the_last_object_asked_twice_is_drawn_twice(compact: IterativeGenerator) -> None:
    result = compact.generate(["red cube", "red cube"], seed=1)
    assert len(result.turns[0]) == 2
    assert differ(result.trajectory[0, 1], result.trajectory[0, 2])


def test_stream_refuses_at_once_what_it_cannot_draw(compact: IterativeGenerator) -> None:
    """Before the first turn is asked for."""
    with pytest.raises(ValueError, match="unknown object 'red cubes'"):
        compact.stream(["red cubes"])
    with pytest.raises(ValueError, match="stream draws one scene"):
        compact.stream([["red cube"], ["blue sphere"]])
    with pytest.raises(TypeError, match="seed must be"):
        compact.stream(["red cube"], seed=1.5)


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


def test_nothing_that_is_drawn_has_a_gradient(generator: IterativeGenerator) -> None:
    assert all(parameter.requires_grad for parameter in generator.parameters())
    assert not generator.generate("red cube").trajectory.requires_grad
    start = torch.zeros(3, 64, 64, requires_grad=True)
    assert not generator.add(start, "red cube").trajectory.requires_grad
    for turn in generator.stream("red cube"):
        assert not turn.tensor.requires_grad


# Turns


def test_drawn_pictures_have_whole_levels(generator: IterativeGenerator) -> None:
    images = draw_turns(generator, SCENES[:3], [1, 2, 3]).images
    assert torch.equal(images, from_uint8(to_uint8(images)))


def test_short_scenes_repeat_their_last_picture(compact: IterativeGenerator) -> None:
    turns = draw_turns(compact, SCENES[:3], [1, 2, 3])
    assert turns.images.shape == (3, 4, 3, 64, 64)
    assert turns.images.dtype == torch.float32
    assert torch.equal(turns.images[0, 1:], turns.images[0, 1:2].expand(3, -1, -1, -1))
    assert torch.equal(turns.images[1, 2], turns.images[1, 3])
    assert turns.places is not None
    assert turns.places.isnan().all(2).tolist() == [[False, True, True], [False, False, True], [False, False, False]]


def test_a_batch_at_once_is_what_comes_one_by_one(compact: IterativeGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at once, of different lengths, with some places asked; so it is drawn on a GPU too."""
    places: Any = [[None] * len(scene) for scene in SCENES]
    places[1] = [None, (20, 30)]
    places[4] = [(50, 10)]
    wanted = compact.generate(SCENES, seed=0, at=places)
    together, forward = [], IterativeGenerator.forward

    def watch(self: IterativeGenerator, z: Tensor, *args: Any) -> Tensor:
        together.append(len(z))
        return forward(self, z, *args)

    monkeypatch.setattr(IterativeGenerator, "forward", watch)
    batched = compact.generate(SCENES, seed=0, at=places, batch_size=4)
    assert together == [4] * 3 + [3] * 2  # the last three have no more than two objects
    assert_drawn_alike(batched.trajectory, wanted.trajectory)
    assert batched.places is not None and wanted.places is not None
    for ours, theirs in zip(batched.places, wanted.places, strict=True):
        assert np.array(ours) == pytest.approx(np.array(theirs), rel=0, abs=1e-3)
    together.clear()
    start = batched.images[0]
    compact.add(start, "red cube", num_images=5, seed=0, batch_size=4)
    assert together == [4, 1]


def test_candidates_of_a_batch_at_once_are_those_that_come_one_by_one(compact: IterativeGenerator) -> None:
    wanted = compact.generate(SCENES, seed=8, best_of=3)
    batched = compact.generate(SCENES, seed=8, best_of=3, batch_size=3)
    assert batched.seeds == wanted.seeds
    assert_drawn_alike(batched.trajectory, wanted.trajectory)
    assert batched.scores == pytest.approx(wanted.scores, rel=1e-2)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-1, ValueError), ("4", TypeError), (2.0, TypeError)])
def test_a_batch_is_a_whole_number_of_pictures(size: Any, error: type[Exception], compact: IterativeGenerator) -> None:
    with pytest.raises(error, match="batch_size must be"):
        compact.generate(["red cube"], batch_size=size)


def test_a_batch_may_be_larger_than_all_that_is_drawn(compact: IterativeGenerator) -> None:
    """What is drawn counts, not what could be."""
    drawn = compact.generate(SCENES[:2], seed=0, batch_size=10**9)
    assert torch.equal(drawn.trajectory, compact.generate(SCENES[:2], seed=0, batch_size=2).trajectory)


def test_a_generator_of_doubles_draws_the_same(compact: IterativeGenerator) -> None:
    wanted = compact.generate(SCENES[2], seed=1).trajectory
    double = IterativeGenerator(compact.config).double().eval()
    double.load_state_dict(compact.state_dict())
    assert_drawn_alike(double.generate(SCENES[2], seed=1).trajectory, wanted)


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


# Adding to a picture


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
        compact.add(torch.full((3, 64, 64), float("nan")), "red cube")
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        compact.add(tmp_path / "missing.png", "red cube")


@pytest.mark.parametrize("seeds", [[7, 2**63 - 1], range(3, 5)])
def test_the_noise_of_seeds_is_what_their_scenes_are_drawn_from(
    compact: IterativeGenerator, seeds: Sequence[int]
) -> None:
    scene = ["red cube", "blue sphere"]
    light, grain, uniform, z = compact.noise(seeds, turns=3)
    assert torch.equal(compact.noise(seeds[1], turns=1).z[0], z[1, :1])
    for i, seed in enumerate(seeds):
        wanted = compact.generate(scene, seed=seed)
        with torch.no_grad():
            image, rest = round_levels(compact.canvas(light[i : i + 1], grain[i : i + 1]))
            assert torch.equal(image, wanted.trajectory[:, 0])
            conditions, _ = roll_conditions(compact.encoder, encode_objects([scene]))
            assert compact.place_model is not None
            light_seen = compact.read_light(image)
            first = compact.place_model(image, conditions[:, 0], uniform[i : i + 1, 0], light_seen)
            assert wanted.places is not None
            assert first.tolist()[0] == pytest.approx(wanted.places[0][0])
            places = torch.tensor(wanted.places)
            drawn = rollout(compact, conditions, z[i : i + 1, :2], image, places, rest=rest)
        assert torch.equal(drawn, wanted.trajectory[:, 1:])


def test_noise_of_what_is_no_seed_is_refused(generator: IterativeGenerator) -> None:
    for seeds in ([], ["red cube"], None, [None], [-1], 2**63):
        with pytest.raises((TypeError, ValueError), match="seed"):
            generator.noise(seeds, turns=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="turns"):
        generator.noise(7, turns=0)
