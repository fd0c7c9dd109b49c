"""requests.py: what users may call names, places and seeds, and what they are told when they ask for something else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from condgan import IterativeGenerator
from condgan.drawing import draw_turns
from condgan.requests import MAX_SEED, TooManyObjectsWarning

NAN = float("nan")


# Names


def test_names_may_be_spelled_freely(compact: IterativeGenerator) -> None:
    wanted = compact.generate(["gray cube"], seed=1)
    for conditions in ("gray cube", ["Grey  CUBE"], ("gray cube",), [["gray\tcube"]], [np.str_("gray cube")]):
        result = compact.generate(conditions, seed=1)
        assert result.conditions == [["gray cube"]]
        assert torch.equal(result.tensor, wanted.tensor)


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
    text = "4 objects are asked, but .* trained on scenes of at most 3"
    with pytest.warns(TooManyObjectsWarning, match=text) as record:
        draw(compact, scene)
    assert [warning.filename for warning in record] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(compact, scene[:3])


# Seeds


def test_seeds_of_numpy_and_the_largest_seed_are_fine(compact: IterativeGenerator) -> None:
    result = compact.generate("red cube", seed=np.int64(4), num_images=np.int32(2))
    assert result.seeds == [4, 5]
    assert {type(seed) for seed in result.seeds} == {int}, "JSON knows no other"
    assert compact.generate("red cube", seed=MAX_SEED, num_images=2).seeds == [MAX_SEED, 0]


@pytest.mark.parametrize("name", ["seed", "num_images", "best_of"])
def test_whole_numbers_have_to_be_that(compact: IterativeGenerator, name: str) -> None:
    for value in (1.0, "1", True, [1], torch.tensor(1.5)):
        with pytest.raises(TypeError, match=f"{name} must be a whole number, got "):
            compact.generate("red cube", **{name: value})
    most = r"2\*\*63 - 1" if name == "seed" else "1,000,000"  # more pictures than any memory holds
    for value in (-1, 2**63) if name == "seed" else (-1, 1_000_001, 10**14):
        with pytest.raises(ValueError, match=rf"{name} must be between [01] and {most}, got {value}"):
            compact.generate("red cube", **{name: value})
    with pytest.raises(ValueError, match=rf"{name} must be between [01] and {most}, got 10+\.\.\.0+$"):
        compact.generate("red cube", **{name: 10**400})
    if name != "seed":
        with pytest.raises(ValueError, match=f"{name} must be between 1"):
            compact.generate("red cube", **{name: 0})


# Places


def test_a_place_beyond_all_floats_is_refused(compact: IterativeGenerator) -> None:
    with pytest.raises(ValueError, match=r"at needs one entry an object, .*; got the entry \(10+\.\.\.0+, 3\)"):
        compact.generate("red cube", at=[(10**400, 3)])


def test_places_may_be_of_numpy_or_torch(compact: IterativeGenerator) -> None:
    wanted = compact.generate("red cube", seed=1, at=[(7, 9)])
    for place in ([7, 9], np.array([7, 9]), torch.tensor([7, 9]), (np.float32(7), 9)):
        result = compact.generate("red cube", seed=1, at=[place])
        assert result.places == [[(7.0, 9.0)]]
        assert torch.equal(result.tensor, wanted.tensor)


def test_all_places_may_be_one_array(compact: IterativeGenerator) -> None:
    asked = [(7.0, 9.0), (30.0, 20.0)]
    for at in (np.array(asked), torch.tensor(asked)):
        assert compact.generate(["red cube", "blue sphere"], seed=1, at=at).places == [asked]
    batch = compact.generate([["red cube", "blue sphere"]] * 2, seed=1, at=[torch.tensor(asked), None])
    assert batch.places[0] == asked


def test_models_without_places_refuse_them(reference: IterativeGenerator) -> None:
    for call in (reference.generate, reference.stream, lambda *a, **k: reference.add(Image.new("L", (8, 8)), *a, **k)):
        with pytest.raises(
            ValueError, match="at was given, but this model does not know places; the default model does"
        ):
            call(["red cube"], at=[(3, 4)])
    with pytest.raises(ValueError, match="places were given, but this model does not know places"):
        draw_turns(reference, [["red cube"]], [0], places=[[(3, 4)]])


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
        ([("a", 4, 5)], r"got the entry \('a', 4, 5\)"),
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
