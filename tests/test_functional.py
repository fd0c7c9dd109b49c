"""The functional API: sequences against turns rolled by hand, places and crops against cases worked out on paper."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from reference import randomise
from torch import Tensor, nn

from condgan.configs import GeneratorConfig
from condgan.functional import (
    CHANGE_THRESHOLD,
    SCENES_AT_ONCE,
    changed_region,
    crop,
    crop_corners,
    encode_objects,
    evaluating,
    paste,
    place_map,
    place_of_change,
    places_of_turns,
    roll_conditions,
    rollout,
    window_corners,
)
from condgan.images import from_uint8
from condgan.models import IterativeGenerator
from condgan.parts import ConditionRNN
from condgan.vocab import ICLEVR_OBJECTS, Vocabulary

SCENES = [{0}, {5}, {7}], [{2}, {23}], [{9}]  # ids of every turn of three scenes


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_hot_scenes(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.eye(24, dtype=dtype)[[i for ids in scene for i in ids]] for scene in SCENES]


def padded(sequences: list[Tensor], turns: int) -> Tensor:
    out = sequences[0].new_zeros(len(sequences), turns, sequences[0].shape[1])
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = sequence
    return out


@pytest.fixture(scope="module")
def encoder() -> ConditionRNN:
    return randomise(ConditionRNN(24, 6)).double()


@pytest.fixture(scope="module")
def generator() -> IterativeGenerator:
    return randomise(IterativeGenerator(GeneratorConfig(image_size=32, width=4, z_dim=7, condition_dim=6))).double()


@pytest.fixture(scope="module")
def place_generator() -> IterativeGenerator:
    config = GeneratorConfig(image_size=32, width=4, z_dim=7, condition_dim=6, output="blend", places=True)
    return randomise(IterativeGenerator(config)).double()


# encode_objects


def test_names_become_one_hot_rows() -> None:
    one = encode_objects(["Red Cube", "grey sphere"])
    assert one.dtype == torch.float32
    assert torch.equal(one, torch.eye(24)[[1, 8]])
    assert torch.equal(encode_objects("red cube"), torch.eye(24)[[1]])


def test_scenes_of_different_lengths_are_padded_with_zero_rows() -> None:
    batch = encode_objects([["red cube"], ("gray cube", "cyan sphere", "red cube")])
    assert batch.shape == (2, 3, 24)
    assert torch.equal(batch[0], torch.cat((torch.eye(24)[[1]], torch.zeros(2, 24))))
    assert torch.equal(batch[1], encode_objects(["gray cube", "cyan sphere", "red cube"]))


@pytest.mark.parametrize("vocabulary", [("a", "b", "c"), Vocabulary(["a", "b", "c"])])
def test_the_vocabulary_may_be_given(vocabulary: Any) -> None:
    assert encode_objects(["C", "a"], vocabulary).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], ValueError, "names has an empty list"),
        ([["red cube"], []], ValueError, "names has an empty list"),
        (["red cub"], ValueError, "did you mean 'red cube'"),
        ([["red cube"], ["green cubes"]], ValueError, "did you mean 'green cube'"),
        (["red cube", 3], TypeError, "named by a string such as .* got 3"),
        ([["red cube", None]], TypeError, "named by a string such as .* got None"),
        ([["red cube"], "red cube"], TypeError, "mixes objects and lists"),
        ([[["red cube"]]], TypeError, "named by a string"),
        (None, TypeError, "names must be a list of objects .* got None"),
        ({"red cube"}, TypeError, "names must be a list"),  # a set has no order
        (torch.zeros(2, 24), TypeError, "names must be a list"),
    ],
)
def test_wrong_names_are_refused(names: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode_objects(names)


# roll_conditions


def test_rolling_equals_the_plain_recurrence(encoder: ConditionRNN) -> None:
    outputs, hidden = roll_conditions(encoder, one_hot_scenes(torch.float64))
    assert outputs.shape == (3, 3, 6)
    for scene, output, last in zip(SCENES, outputs, hidden, strict=True):
        expected, expected_hidden = reference.condition_rnn(encoder, scene)
        torch.testing.assert_close(output[: len(scene)], torch.stack(expected), atol=1e-12, rtol=0)
        torch.testing.assert_close(last, expected_hidden, atol=1e-12, rtol=0)
        assert (output[len(scene) :] == 0).all()


def test_rolling_equals_stepping_by_hand(encoder: ConditionRNN) -> None:
    (objects, *_) = one_hot_scenes(torch.float64)
    outputs, last = roll_conditions(encoder, objects[None])
    hidden = None
    for turn in range(3):
        output, hidden = encoder(objects[turn : turn + 1], hidden)
        torch.testing.assert_close(outputs[:, turn], output, atol=1e-12, rtol=0)
    torch.testing.assert_close(last, hidden, atol=1e-12, rtol=0)


@pytest.mark.parametrize("turns", [3, 4, 6])
def test_a_list_and_a_padded_batch_are_alike_whatever_the_padding(encoder: ConditionRNN, turns: int) -> None:
    outputs, hidden = roll_conditions(encoder, one_hot_scenes(torch.float64))
    more, same = roll_conditions(encoder, padded(one_hot_scenes(torch.float64), turns))
    assert torch.equal(more[:, :3], outputs)
    assert (more[:, 3:] == 0).all()
    assert torch.equal(same, hidden)


def test_alone_or_in_a_batch_a_sequence_is_the_same(encoder: ConditionRNN) -> None:
    outputs, hidden = roll_conditions(encoder, one_hot_scenes(torch.float64))
    for i, sequence in enumerate(one_hot_scenes(torch.float64)):
        output, last = roll_conditions(encoder, [sequence])
        torch.testing.assert_close(outputs[i, : len(sequence)], output[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(hidden[i], last[0], atol=1e-12, rtol=0)


def test_going_on_from_a_hidden_state_equals_one_long_roll(encoder: ConditionRNN) -> None:
    conditions = padded(one_hot_scenes(torch.float64), 4)  # scenes end in the first part, in the second, between
    whole, last = roll_conditions(encoder, conditions)
    first, hidden = roll_conditions(encoder, conditions[:, :2])
    second, end = roll_conditions(encoder, conditions[:, 2:], hidden)
    assert torch.equal(torch.cat((first, second), 1), whole)
    assert torch.equal(end, last)


def test_padding_alone_leaves_the_hidden_state_as_it_was(encoder: ConditionRNN) -> None:
    hidden = torch.randn(2, 6, dtype=torch.float64, generator=rng())
    outputs, same = roll_conditions(encoder, torch.zeros(2, 3, 24), hidden)
    assert (outputs == 0).all()
    assert torch.equal(same, hidden)
    assert (roll_conditions(encoder, torch.zeros(2, 3, 24))[1] == 0).all()


def test_objects_may_be_integers_or_booleans(encoder: ConditionRNN) -> None:
    expected = roll_conditions(encoder, one_hot_scenes())[0]
    for dtype in (torch.int64, torch.bool):
        assert torch.equal(roll_conditions(encoder, [x.to(dtype) for x in one_hot_scenes()])[0], expected)


def test_gradient_flows_through_all_turns_but_not_out_of_padding(encoder: ConditionRNN) -> None:
    conditions = padded(one_hot_scenes(torch.float64), 4).requires_grad_()
    hidden = torch.randn(3, 6, dtype=torch.float64, generator=rng()).requires_grad_()
    outputs, last = roll_conditions(encoder, conditions, hidden)
    weight = torch.randn(outputs.shape, generator=rng(1), dtype=torch.float64)
    ((outputs * weight).sum() + last.sum()).backward()
    per_turn = conditions.grad.abs().sum(2)
    for scene, row in zip(SCENES, per_turn, strict=True):
        assert (row[: len(scene)] > 0).all()
        assert (row[len(scene) :] == 0).all()
    assert (hidden.grad.abs().sum(1) > 0).all()


def test_any_network_of_the_signature_can_be_rolled() -> None:
    def running_sum(objects: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = objects if hidden is None else hidden + objects
        return 10 * total, total

    conditions = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [0.0], [0.0]]])
    outputs, hidden = roll_conditions(running_sum, conditions)
    assert outputs[..., 0].tolist() == [[10, 30, 60], [40, 0, 0]]
    assert hidden.tolist() == [[6], [4]]


@pytest.mark.parametrize(
    ("conditions", "hidden", "message"),
    [
        (torch.zeros(3, 24), None, r"conditions must be \(N, T, K\) .* got \(3, 24\)"),
        (torch.zeros(2, 0, 24), None, r"T of at least 1, got \(2, 0, 24\)"),
        ([], None, r"conditions must be a tensor \(N, T, K\) or a list of tensors \(T, K\)"),
        ([torch.zeros(3, 24), torch.zeros(2, 23)], None, r"one K, got shapes \[\(3, 24\), \(2, 23\)\]"),
        ([torch.zeros(24)], None, r"got shapes \[\(24,\)\]"),
        (torch.ones(2, 3, 23), None, r"objects must be \(N, 24\), got \(2, 23\)"),
        (torch.full((2, 3, 24), math.nan), None, "conditions holds NaN"),
        (torch.ones(2, 3, 24), torch.zeros(3, 6), r"hidden must be \(2, H\), got \(3, 6\)"),
        (torch.ones(2, 3, 24), torch.zeros(2, 5), r"hidden must be \(2, 6\), got \(2, 5\)"),
        (torch.ones(2, 3, 24), torch.full((2, 6), math.inf), "hidden holds NaN or infinity"),
    ],
)
def test_wrong_sequences_are_refused(encoder: ConditionRNN, conditions: Any, hidden: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roll_conditions(encoder, conditions, hidden)


@pytest.mark.parametrize(
    ("conditions", "hidden", "message"),
    [
        ([["red cube"]], None, "conditions must be a tensor .* got a list of list"),
        (None, None, "conditions must be a tensor .* got NoneType"),
        (torch.ones(2, 3, 24).numpy(), None, "conditions must be a tensor .* got a list of ndarray"),
        (torch.ones(2, 3, 24), torch.zeros(2, 6).numpy(), "hidden must be a tensor, got ndarray"),
    ],
)
def test_sequences_of_no_tensors_are_refused(encoder: ConditionRNN, conditions: Any, hidden: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        roll_conditions(encoder, conditions, hidden)


def test_multi_hots_may_be_bytes(encoder: ConditionRNN) -> None:
    objects = padded(one_hot_scenes(torch.float64), 4)
    as_bytes, _ = roll_conditions(lambda x, hidden: encoder(x.double(), hidden), objects.byte())
    assert torch.equal(as_bytes, roll_conditions(encoder, objects)[0])


def test_sequences_may_come_one_by_one(encoder: ConditionRNN) -> None:
    expected = roll_conditions(encoder, one_hot_scenes(torch.float64))[0]
    assert torch.equal(roll_conditions(encoder, (x for x in one_hot_scenes(torch.float64)))[0], expected)


# rollout


def inputs(turns: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Objects (3, T, 24) of scenes that end after 3, 2 and 1 turns; noise; start pictures."""
    start = torch.rand(3, 3, 32, 32, generator=rng(1), dtype=torch.float64) * 2 - 1
    z = torch.randn(3, turns, 7, generator=rng(2), dtype=torch.float64)
    return padded(one_hot_scenes(torch.float64), turns), z, start


def places(turns: int = 3) -> Tensor:
    return torch.rand(3, turns, 2, generator=rng(3), dtype=torch.float64) * 31


@torch.no_grad()
def test_rollout_equals_a_loop_by_hand_scene_by_scene(generator: IterativeGenerator) -> None:
    objects, z, start = inputs()
    images = rollout(generator, objects, z, start)
    assert images.shape == (3, 3, 3, 32, 32)
    for n, scene in enumerate(SCENES):
        image, hidden = start[n : n + 1], None
        for turn in range(3):
            if turn < len(scene):
                condition, hidden = generator.encoder(objects[n : n + 1, turn], hidden)
                image = generator(z[n : n + 1, turn], condition, image)
            torch.testing.assert_close(images[n, turn], image[0], atol=1e-10, rtol=0)


@torch.no_grad()
def test_rollout_takes_any_encoder_for_its_own(generator: IterativeGenerator) -> None:
    class Other(nn.Module):
        """A generator that has something else under the name ``encoder``, and is given conditions."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(3, 3, 1)

        def forward(self, z: Tensor, condition: Tensor, image: Tensor, place: Tensor | None = None) -> Tensor:
            return (self.encoder(image) + condition.mean()).tanh()

    assert rollout(Other(), torch.ones(2, 3, 5), torch.zeros(2, 7), torch.zeros(3, 8, 8)).shape == (2, 3, 3, 8, 8)


@torch.no_grad()
def test_rollout_hands_each_turn_its_place(place_generator: IterativeGenerator) -> None:
    objects, z, start = inputs()
    where = places()
    images = rollout(place_generator, objects, z, start, where)
    conditions, _ = roll_conditions(place_generator.encoder, objects)
    image = start[:1]
    for turn in range(3):
        image = place_generator(z[:1, turn], conditions[:1, turn], image, where[:1, turn])
        torch.testing.assert_close(images[:1, turn], image, atol=1e-10, rtol=0)


@torch.no_grad()
def test_padding_leaves_the_picture_and_the_other_scenes_as_they_were(place_generator: IterativeGenerator) -> None:
    objects, z, start = inputs(5)
    where = places(5)
    where[:, 3:] = math.nan  # what drawing reports for turns that a scene does not have
    images = rollout(place_generator, objects, z, start, where)
    for n, scene in enumerate(SCENES):
        for turn in range(len(scene), 5):
            assert torch.equal(images[n, turn], images[n, len(scene) - 1])
    shorter = rollout(place_generator, objects[:, :3], z[:, :3], start, where[:, :3])
    torch.testing.assert_close(images[:, :3], shorter, atol=1e-12, rtol=0)


def test_padding_has_no_part_in_training(generator: IterativeGenerator) -> None:
    objects, z, start = inputs(5)

    def trained(turns: int, noise: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        learner = copy.deepcopy(generator).train()
        noise = noise[:, :turns].clone().requires_grad_()
        images = rollout(learner, objects[:, :turns], noise, start)
        (gradient,) = torch.autograd.grad(images[:, -1].square().sum(), noise)
        return images[:, -1].detach(), learner.state_dict(), gradient

    wanted, state, gradient = trained(3, z)
    other = z.clone()
    for n, scene in enumerate(SCENES):
        other[n, len(scene) :] = 9
    found, state_after, gradient_after = trained(5, other)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient_after[:, :3], gradient, atol=1e-12, rtol=0)
    assert not gradient_after[:, 3:].any()
    assert all(map(torch.equal, state_after.values(), state.values()))


def test_noise_stays_noise_beside_whole_numbers() -> None:
    def shade(z: Tensor, condition: Tensor, image: Tensor) -> Tensor:
        return image + z.mean(1)[:, None, None, None]

    objects = torch.eye(24, dtype=torch.long)[None, :2]
    images = rollout(shade, objects, torch.full((1, 2, 4), 0.25), torch.zeros(3, 8, 8))
    assert images[0, :, 0, 0, 0].tolist() == [0.25, 0.5]


@torch.no_grad()
def test_objects_and_what_they_roll_to_give_the_same_pictures(generator: IterativeGenerator) -> None:
    objects, z, start = inputs()
    rolled, _ = roll_conditions(generator.encoder, objects)
    assert torch.equal(rollout(generator, rolled, z, start), rollout(generator, objects, z, start))


@torch.no_grad()
def test_conditions_as_long_as_there_are_objects_are_not_rolled_twice() -> None:
    config = GeneratorConfig(image_size=32, width=4, z_dim=7, condition_dim=24)
    generator = randomise(IterativeGenerator(config)).double()
    objects, z, start = inputs()
    rolled, _ = roll_conditions(generator.encoder, objects)
    assert torch.equal(rollout(generator, rolled, z, start), rollout(generator, objects, z, start))


@torch.no_grad()
def test_one_noise_a_scene_is_used_in_every_turn(generator: IterativeGenerator) -> None:
    objects, z, start = inputs()
    once = rollout(generator, objects, z[:, 0], start)
    assert torch.equal(once, rollout(generator, objects, z[:, :1].expand(-1, 3, -1), start))
    assert not torch.equal(once, rollout(generator, objects, z, start))


@torch.no_grad()
def test_one_start_picture_serves_all_scenes(generator: IterativeGenerator) -> None:
    objects, z, start = inputs()
    expected = rollout(generator, objects, z, start[:1].expand(3, -1, -1, -1))
    assert torch.equal(rollout(generator, objects, z, start[0]), expected)
    assert torch.equal(rollout(generator, objects, z, start[:1]), expected)


@torch.no_grad()
def test_the_callback_sees_every_turn(generator: IterativeGenerator) -> None:
    seen: list[tuple[int, Tensor]] = []

    def look(turn: int, image: Tensor) -> None:
        seen.append((turn, image.clone()))
        image.zero_()  # what is handed out is not what the next turn is drawn on

    images = rollout(generator, *inputs(), callback=look)
    assert [turn for turn, _ in seen] == [0, 1, 2]
    assert torch.equal(torch.stack([image for _, image in seen], 1), images)
    assert torch.equal(rollout(generator, *inputs()), images)


@torch.no_grad()
def test_any_generator_of_three_arguments_can_be_rolled() -> None:
    images = rollout(
        lambda z, c, image: image + 0.1 * c.mean() + z.mean(),
        torch.ones(2, 3, 5),
        torch.zeros(2, 7),
        torch.zeros(3, 8, 8),
    )
    torch.testing.assert_close(images[:, :, 0, 0, 0], torch.tensor([[0.1, 0.2, 0.3]] * 2))


@torch.no_grad()
def test_without_places_each_object_stands_where_the_place_model_puts_it(place_generator: IterativeGenerator) -> None:
    objects, z, start = inputs()
    put: list[Tensor] = []
    assert place_generator.place_model is not None
    hook = place_generator.place_model.register_forward_hook(lambda module, given, place: put.append(place))
    images = rollout(place_generator, objects, z, start)
    hook.remove()
    assert torch.equal(rollout(place_generator, objects, z, start, torch.stack(put, 1)), images)
    assert not torch.equal(rollout(place_generator, objects, z.flip(2), start, torch.stack(put, 1)), images)
    few = rollout(place_generator, objects, z.flip(2), start)
    assert not torch.equal(few, images), "other noise, other places"


@torch.no_grad()
def test_sequences_and_noise_of_other_kinds_are_rolled_alike(generator: IterativeGenerator) -> None:
    objects, z, start = inputs()
    assert torch.equal(
        rollout(generator, one_hot_scenes(torch.float64), z, start), rollout(generator, objects, z, start)
    )
    coarse = z.half()
    assert torch.equal(rollout(generator, objects, coarse, start), rollout(generator, objects, coarse.double(), start))


@pytest.mark.parametrize("name", ["z", "start", "places", "rest"])
def test_arrays_are_told_from_tensors(generator: IterativeGenerator, name: str) -> None:
    objects, z, start = inputs()
    arguments: dict[str, Any] = {"z": z, "start": start, name: start.numpy()}
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got ndarray"):
        rollout(generator, objects, **arguments)


def test_the_last_picture_has_a_gradient_to_everything_before_it(place_generator: IterativeGenerator) -> None:
    objects, z, start = inputs(4)
    where = places(4).masked_fill(objects.any(2).logical_not()[:, :, None], math.nan)
    leaves = [x.clone().requires_grad_() for x in (objects, z, start, where)]
    rollout(place_generator, *leaves)[:, -1].square().sum().backward()
    for name, leaf in zip(("objects", "z", "start", "places"), leaves, strict=True):
        assert leaf.grad.isfinite().all(), name
        for n, scene in enumerate(SCENES):
            if name == "start":
                assert leaf.grad[n].abs().sum() > 0
            else:
                assert (leaf.grad[n, : len(scene)].abs().sum(1) > 0).all(), name
                assert (leaf.grad[n, len(scene) :] == 0).all(), name
    place_generator.zero_grad()


def test_any_generator_of_the_signature_can_be_rolled_out() -> None:
    def painter(z: Tensor, condition: Tensor, prev_image: Tensor, place: Tensor | None = None) -> Tensor:
        assert place is None
        return (prev_image + (z + condition)[:, :1, None, None]).clamp(-1, 1)

    conditions = torch.tensor([[[0.25], [0.5]], [[-0.5], [0.0]]])
    images = rollout(painter, conditions, torch.zeros(2, 1), torch.zeros(3, 4, 4))
    assert images[:, :, 0, 0, 0].tolist() == [[0.25, 0.75], [-0.5, -0.5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditions": torch.zeros(3, 24)}, r"conditions must be \(N, T, D\) .* got \(3, 24\)"),
        ({"conditions": torch.zeros(3, 0, 24)}, r"T of at least 1, got \(3, 0, 24\)"),
        ({"conditions": torch.full((3, 3, 24), math.nan)}, "conditions holds NaN"),
        ({"conditions": torch.ones(3, 3, 5)}, r"condition must be \(3, 6\), got \(3, 5\)"),
        ({"z": torch.zeros(3, 2, 7)}, r"z must be \(3, 3, Z\) or \(3, Z\), got \(3, 2, 7\)"),
        ({"z": torch.zeros(2, 7)}, r"z must be \(3, 3, Z\) or \(3, Z\), got \(2, 3, 7\)"),
        ({"z": torch.zeros(7)}, r"z must be .* got \(7,\)"),
        ({"z": torch.zeros(3, 8)}, r"z must be \(3, 7\), got \(3, 8\)"),
        ({"z": torch.full((3, 7), math.inf)}, "z holds NaN or infinity"),
        ({"start": torch.zeros(2, 3, 32, 32)}, r"start must be \(3, 3, H, W\) or \(3, H, W\), got \(2, 3, 32, 32\)"),
        ({"start": torch.zeros(32, 32)}, r"start must be .* got \(32, 32\)"),
        ({"start": torch.zeros(3, 3, 16, 16)}, r"prev_image must be \(N, 3, 32, 32\), got \(3, 3, 16, 16\)"),
        ({"start": torch.full((3, 32, 32), math.nan)}, "start holds NaN"),
        ({"start": torch.full((3, 32, 32), 255.0)}, r"start must be in \[-1, 1\], got values up to 255"),
        ({"start": torch.zeros(3, 32, 32, dtype=torch.uint8)}, r"start must be floating point in .* got torch.uint8"),
        ({"rest": torch.rand(3, 1, 1)}, r"rest must be \(3, 3, 32, 32\), got \(3, 1, 1\)"),
        ({"rest": torch.full((3, 3, 32, 32), math.nan)}, "rest holds NaN"),
        ({"places": torch.zeros(3, 2)}, r"places must be \(3, 3, 2\), got \(3, 2\)"),
        ({"places": torch.full((3, 3, 2), math.nan)}, "places holds NaN"),
    ],
)
def test_wrong_input_of_rollout_is_named(
    place_generator: IterativeGenerator, change: dict[str, Tensor], message: str
) -> None:
    conditions, z, start = inputs()
    arguments = {"conditions": conditions, "z": z, "start": start, "places": places()}
    with pytest.raises(ValueError, match=message):
        rollout(place_generator, **(arguments | change))


# Where something changed


def picture_pair(size: int = 8, n: int = 1) -> tuple[Tensor, Tensor]:
    before = torch.full((n, 3, size, size), -0.1)
    return before, before.clone()


def test_a_pixel_changed_when_one_channel_moved_far_enough() -> None:
    before, after = picture_pair()
    after[0, 0, 1, 2] += 2 * CHANGE_THRESHOLD
    after[0, 2, 3, 4] -= 2 * CHANGE_THRESHOLD
    after[0, :, 5, 6] += 0.9 * CHANGE_THRESHOLD  # all three, not enough
    assert changed_region(before, after).nonzero().tolist() == [[0, 1, 2], [0, 3, 4]]
    assert changed_region(before, after, 0.8 * CHANGE_THRESHOLD).sum() == 3


def test_the_place_of_a_change_is_the_centroid_x_first() -> None:
    before, after = picture_pair(n=3)
    after[0, :, 2, 5] = 1.0  # row 2, column 5
    after[1, :, 1:3, 4:8] = 1.0  # rows 1 and 2, columns 4 to 7
    where = place_of_change(before, after)
    assert where.dtype == torch.float32
    assert where[:2].tolist() == [[5.0, 2.0], [5.5, 1.5]]
    assert where[2].isnan().all()


def test_the_place_of_a_change_equals_the_plain_version_also_under_autocast() -> None:
    before, after = picture_pair(24, 2)
    after += 0.3 * torch.randn(after.shape, generator=rng())
    expected = torch.tensor(
        [reference.place_of_change(b, a, CHANGE_THRESHOLD) for b, a in zip(before, after, strict=True)]
    )
    torch.testing.assert_close(place_of_change(before, after), expected, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(place_of_change(before, after), expected, atol=1e-5, rtol=0)


def test_places_of_whole_scenes_are_those_of_each_pair_and_the_middle_where_nothing_changed() -> None:
    pixels = torch.randint(0, 256, (SCENES_AT_ONCE + 3, 3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    pixels[1, 2] = pixels[1, 1]
    places = places_of_turns(pixels)
    for turn in range(2):
        expected = place_of_change(from_uint8(pixels[:, turn]), from_uint8(pixels[:, turn + 1]))
        if turn == 1:
            assert expected[1].isnan().all()
            expected[1] = 3.5
        assert torch.equal(places[:, turn], expected)


@pytest.mark.parametrize("function", [changed_region, place_of_change])
def test_pictures_to_compare_have_one_shape(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3, 8, 8\) and \(1, 3, 8, 8\)"):
        function(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"prev_image and image must both be \(N, 3, H, W\)"):
        function(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))


# Maps of places


def test_a_blob_is_one_at_its_place_and_falls_off_like_a_gaussian() -> None:
    blob = place_map(torch.tensor([[5.0, 2.0]]), 16)
    assert blob.shape == (1, 1, 16, 16)
    assert blob[0, 0, 2, 5] == 1
    assert blob.argmax() == 2 * 16 + 5
    torch.testing.assert_close(blob[0, 0, 2, 8].item(), math.exp(-0.5))  # one sigma to the right
    torch.testing.assert_close(blob[0, 0, 5, 8].item(), math.exp(-1.0))  # and one down
    torch.testing.assert_close(place_map(torch.tensor([[5.0, 2.0]]), 16, sigma=1.0)[0, 0, 2, 6].item(), math.exp(-0.5))


def test_blobs_equal_the_plain_version_between_pixels_and_outside_the_picture() -> None:
    where = torch.tensor([[0.0, 0.0], [3.25, 11.5], [-2.0, 20.0], [15.0, 7.9]], dtype=torch.float64)
    torch.testing.assert_close(place_map(where, 16), reference.place_map(where.tolist(), 16), atol=1e-12, rtol=0)


def test_the_blob_can_be_moved_by_its_gradient() -> None:
    where = torch.tensor([[5.3, 2.1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: place_map(p, 8), where)


# Crops


@pytest.mark.parametrize(
    ("place", "corner"),
    [
        ((31.0, 31.0), (24, 24)),  # an even size has no middle pixel: 31 - 7.5 is 23.5, rounded to even
        ((31.5, 20.5), (24, 13)),  # between two pixels: exactly the middle
        ((0.0, 63.0), (0, 48)),  # moved inside
        ((7.4, 55.6), (0, 48)),
        ((9.0, 54.9), (2, 47)),
    ],
)
def test_corners_of_crops_by_hand(place: tuple[float, float], corner: tuple[int, int]) -> None:
    corners = crop_corners(torch.tensor([place]), image_size=64, crop_size=16)
    assert corners.dtype == torch.int64
    assert corners.tolist() == [list(corner)]


@pytest.mark.parametrize("crop_size", [1, 15, 16, 32])
def test_a_crop_lies_inside_and_its_place_is_in_the_middle_where_it_can_be(crop_size: int) -> None:
    where = torch.rand(50, 2, generator=rng()) * 31
    corners = crop_corners(where, 32, crop_size)
    assert (corners >= 0).all()
    assert (corners + crop_size <= 32).all()
    off = (where - (corners + (crop_size - 1) / 2)).abs()
    free = (corners > 0) & (corners + crop_size < 32)
    assert (off[free] <= 0.5 + 1e-5).all()


def test_a_crop_is_a_slice_of_each_picture() -> None:
    images = torch.randn(3, 2, 9, 9, generator=rng())
    corners = torch.tensor([[0, 4], [5, 0], [2, 3]])
    expected = torch.stack(
        [image[:, y : y + 4, x : x + 4] for image, (x, y) in zip(images, corners.tolist(), strict=True)]
    )
    assert torch.equal(crop(images, corners, 4), expected)


def test_gradient_flows_back_to_the_pixels_that_were_cut_out() -> None:
    images = torch.randn(1, 3, 6, 6, requires_grad=True)
    crop(images, torch.tensor([[1, 2]]), 3).sum().backward()
    expected = torch.zeros(1, 3, 6, 6)
    expected[:, :, 2:5, 1:4] = 1
    assert torch.equal(images.grad, expected)


def test_the_place_of_a_change_is_found_in_the_crop_around_it() -> None:
    before, after = picture_pair(32)
    after[0, :, 10:13, 25:28] = 1.0
    where = place_of_change(before, after)
    corners = crop_corners(where, 32, 16)
    inside = place_of_change(crop(before, corners, 16), crop(after, corners, 16))
    assert torch.equal(inside, where - corners)


# Windows


@pytest.mark.parametrize(
    ("place", "corner"),
    [
        ((31.5, 31.5), (12, 16)),  # the middle of the picture, moved down by 4 pixels
        ((25.2, 23.4), (6, 8)),  # 25.2 - 19.5 and 23.4 + 4 - 19.5, rounded
        ((0.0, 0.0), (0, 0)),  # moved inside
        ((63.0, 63.0), (24, 24)),
        ((31.5, 50.0), (12, 24)),
    ],
)
def test_corners_of_windows_by_hand(place: tuple[float, float], corner: tuple[int, int]) -> None:
    corners = window_corners(torch.tensor([place]), image_size=64, window=40)
    assert corners.dtype == torch.int64
    assert corners.tolist() == [list(corner)]


@pytest.mark.parametrize(("image_size", "window"), [(32, 16), (64, 40), (64, 64), (128, 56)])
def test_windows_are_where_the_plain_version_says_and_hold_their_place(image_size: int, window: int) -> None:
    where = torch.rand(200, 2, generator=rng(), dtype=torch.float64) * (image_size - 1)
    corners = window_corners(where, image_size, window)
    assert corners.tolist() == [list(reference.window_corner(xy, image_size, window)) for xy in where.tolist()]
    assert ((corners >= 0) & (corners + window <= image_size)).all()
    inside = where - corners
    assert ((inside >= 0) & (inside <= window - 1)).all()


# Pasting


def patches_to_paste(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (3, 2, 9, 9), squares of side 4, and where they go."""
    images = torch.randn(3, 2, 9, 9, generator=rng(), dtype=dtype)
    patches = torch.randn(3, 2, 4, 4, generator=rng(1), dtype=dtype)
    return images, patches, torch.tensor([[0, 4], [5, 0], [2, 3]])


def test_pasting_equals_writing_into_slices() -> None:
    images, patches, corners = patches_to_paste()
    expected = images.clone()
    for picture, patch, (x, y) in zip(expected, patches, corners.tolist(), strict=True):
        picture[:, y : y + 4, x : x + 4] = patch
    before = images.clone()
    pasted = paste(images, patches, corners)
    assert torch.equal(pasted, expected)
    assert torch.equal(images, before)
    assert pasted.data_ptr() != images.data_ptr()


def test_pasting_is_the_reverse_of_cropping() -> None:
    images, patches, corners = patches_to_paste()
    assert torch.equal(crop(paste(images, patches, corners), corners, 4), patches)
    assert torch.equal(paste(images, crop(images, corners, 4), corners), images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_single_picture_is_cut_and_pasted_as_in_a_batch(dtype: torch.dtype) -> None:
    images, patches, corners = patches_to_paste(dtype)
    cut, pasted = crop(images, corners, 4), paste(images, patches, corners)
    for i in range(len(images)):
        one = images[i : i + 1]
        before, part = one.clone(), crop(one, corners[i : i + 1], 4)
        assert torch.equal(part, cut[i : i + 1])
        assert torch.equal(paste(one, patches[i : i + 1], corners[i : i + 1]), pasted[i : i + 1])
        part.zero_()  # a copy
        assert torch.equal(one, before)


@pytest.mark.parametrize("n", [1, 2])
def test_squares_beyond_the_picture_are_refused(n: int) -> None:
    images, patches = torch.zeros(n, 3, 9, 9), torch.zeros(n, 3, 4, 4)
    corners = torch.tensor([[0, 0], [6, 2]])[-n:]
    for wrong in (corners, corners - 7, corners.flip(1)):
        with pytest.raises(ValueError, match=r"corners: squares of 4x4 must lie inside pictures of 9x9, got corners"):
            crop(images, wrong, 4)
        with pytest.raises(ValueError, match=r"corners: squares of 4x4 must lie inside pictures of 9x9, got corners"):
            paste(images, patches, wrong)


def test_pasting_works_on_views_and_on_pictures_stored_channels_last() -> None:
    images, patches, corners = patches_to_paste()
    expected = paste(images, patches, corners)
    last = (x.to(memory_format=torch.channels_last) for x in (images, patches))
    assert torch.equal(paste(*last, corners), expected)
    one = images[:1].expand(3, -1, -1, -1)  # one start picture for all scenes: the same memory three times
    assert torch.equal(paste(one, patches, corners), paste(one.clone(), patches, corners))
    assert torch.equal(one[1], images[0])


def test_gradient_flows_to_the_squares_and_to_the_pictures_around_them() -> None:
    images, patches, corners = (x.requires_grad_() if x.is_floating_point() else x for x in patches_to_paste())
    upstream = torch.randn(images.shape, generator=rng(2))
    (paste(images, patches, corners) * upstream).sum().backward()
    assert torch.equal(patches.grad, crop(upstream, corners, 4))
    assert torch.equal(images.grad, paste(upstream, torch.zeros(3, 2, 4, 4), corners))


def test_pasting_and_cropping_pass_the_gradient_checks() -> None:
    images, patches, corners = (x[:2] for x in patches_to_paste(torch.float64))
    images, patches = images[:, :1].clone().requires_grad_(), patches[:, :1].clone().requires_grad_()

    def squares(images: Tensor, patches: Tensor) -> Tensor:
        return paste(images, patches, corners).square() * crop(images, corners, 4).mean()

    assert torch.autograd.gradcheck(squares, (images, patches))
    assert torch.autograd.gradgradcheck(squares, (images, patches))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crop_corners(torch.zeros(2, 2), 16, 17), "crop_size must be between 1 and image_size, which is 16"),
        (lambda: crop_corners(torch.zeros(2, 2), 16, 0), "crop_size must be between 1"),
        (lambda: crop_corners(torch.zeros(2), 16, 8), r"places must be \(N, 2\), got \(2,\)"),
        (lambda: crop(torch.zeros(3, 1, 8, 8), torch.zeros(2, 2).long(), 4), r"corners must be \(3, 2\), got \(2, 2\)"),
        (lambda: window_corners(torch.zeros(2, 2), 16, 24), "between 1 and image_size, which is 16, got 24"),
        (lambda: window_corners(torch.zeros(2, 3), 16, 8), r"places must be \(N, 2\), got \(2, 3\)"),
        (
            lambda: paste(torch.zeros(3, 1, 8, 8), torch.zeros(3, 1, 4, 4), torch.zeros(2, 2).long()),
            r"corners must be \(3, 2\), got \(2, 2\)",
        ),
        (lambda: place_map(torch.zeros(2), 16), r"place must be \(N, 2\), got \(2,\)"),
        (lambda: place_map(torch.zeros(2, 3), 16), r"place must be \(N, 2\), got \(2, 3\)"),
    ],
)
def test_wrong_places_and_crops_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_names_and_ids_of_this_file_mean_the_same() -> None:
    names = [[ICLEVR_OBJECTS[i] for ids in scene for i in ids] for scene in SCENES]
    assert torch.equal(encode_objects(names), padded(one_hot_scenes(), 3))


def test_evaluating_gives_modes_back_after_an_error() -> None:
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    module[1].eval()
    with pytest.raises(KeyError), evaluating(module):
        assert not any(part.training for part in module.modules())
        raise KeyError
    assert [part.training for part in module.modules()] == [True, True, False]


def test_a_module_that_several_evaluate_learns_again_when_the_last_is_done() -> None:
    """As two threads that draw with one generator do."""
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    module[1].eval()
    first, second = evaluating(module), evaluating(module)
    for block in (first, second):
        block.__enter__()
    first.__exit__(None, None, None)
    assert not any(part.training for part in module.modules())
    second.__exit__(None, None, None)
    assert [part.training for part in module.modules()] == [True, True, False]
