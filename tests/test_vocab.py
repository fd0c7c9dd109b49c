"""Names to ids and back."""

from __future__ import annotations

import pytest
import torch

from condgan.functional import encode_objects
from condgan.vocab import ICLEVR_OBJECTS, Vocabulary


def test_the_default_objects_are_the_24_of_iclevr_cubes_first() -> None:
    assert len(Vocabulary()) == len(set(ICLEVR_OBJECTS)) == 24
    assert Vocabulary().names == ICLEVR_OBJECTS
    assert ICLEVR_OBJECTS[:2] == ("gray cube", "red cube")
    assert ICLEVR_OBJECTS[8:10] == ("gray sphere", "red sphere")
    assert ICLEVR_OBJECTS[-1] == "yellow cylinder"


@pytest.mark.parametrize("name", ["gray cube", "Grey Cube", "  GRAY\t cube ", "grey  CUBE\n"])
def test_case_and_spacing_and_the_other_gray_do_not_matter(name: str) -> None:
    assert Vocabulary().parse(name) == 0


def test_every_name_parses_to_its_place() -> None:
    vocabulary = Vocabulary()
    assert [vocabulary.parse(name) for name in vocabulary.names] == list(range(24))


@pytest.mark.parametrize(("name", "close"), [("red cubes", "red cube"), ("gren sphere", "green sphere"), ("", None)])
def test_an_unknown_name_is_shown_with_the_closest_one_and_where_the_names_are(name: str, close: str | None) -> None:
    with pytest.raises(ValueError, match="unknown object") as caught:
        Vocabulary().parse(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "model.vocabulary.names" in message
    assert "condgan info" in message
    assert close is None or f"did you mean {close!r}" in message


@pytest.mark.parametrize("name", [3, None, ["red cube"], b"red cube"])
def test_a_name_is_a_string(name: object) -> None:
    with pytest.raises(TypeError, match="named by a string such as") as caught:
        Vocabulary().parse(name)  # type: ignore[arg-type]
    assert repr(name) in str(caught.value)


def test_multi_hot_and_decode_are_inverse_and_ignore_order_and_repeats() -> None:
    vocabulary = Vocabulary()
    objects = vocabulary.multi_hot(["cyan sphere", "red cube", "Cyan  Sphere"])
    assert objects.dtype == torch.float32
    assert objects.sum() == 2
    assert vocabulary.decode(objects) == ["red cube", "cyan sphere"]
    assert torch.equal(objects, vocabulary.multi_hot(["red cube", "cyan sphere"]))
    assert torch.equal(vocabulary.multi_hot("red cube"), vocabulary.multi_hot(["red cube"]))
    assert vocabulary.decode(vocabulary.multi_hot([])) == []


def test_decode_takes_what_is_above_one_half() -> None:
    assert Vocabulary(["a", "b", "c"]).decode(torch.tensor([0.5, 0.51, 0.0])) == ["b"]


@pytest.mark.parametrize("shape", [(23,), (1, 24), ()])
def test_decode_refuses_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"objects must be \(24,\)"):
        Vocabulary().decode(torch.zeros(shape))


def test_a_vocabulary_of_your_own_has_ids_in_its_order() -> None:
    vocabulary = Vocabulary(["red ball", "gray box"])
    assert vocabulary.names == ("red ball", "gray box")
    assert [vocabulary.parse(name) for name in ("Red Ball", "grey box")] == [0, 1]
    with pytest.raises(ValueError, match="did you mean 'red ball'"):
        vocabulary.parse("red cube")


@pytest.mark.parametrize("name", ["Red Cube", "red  cube", " red", "grey cube", " "])
def test_names_are_spelled_so_that_they_can_be_found(name: str) -> None:
    with pytest.raises(ValueError, match="in lower case with single spaces") as caught:
        Vocabulary(["red cube", name])
    assert repr(name) in str(caught.value)


def test_names_may_come_one_by_one() -> None:
    assert Vocabulary(name for name in ("red ball", "gray box")).names == ("red ball", "gray box")  # type: ignore[arg-type]


def test_a_dict_says_the_ids_whatever_its_order() -> None:
    assert Vocabulary({"red ball": 1, "gray box": 0}).names == ("gray box", "red ball")
    assert encode_objects(["red ball"], {"red ball": 1, "gray box": 0}).tolist() == [[0, 1]]


@pytest.mark.parametrize("ids", [{"a": 1, "b": 2}, {"a": 0, "b": 0}, {"a": 0, "b": True}, {"a": 0, "b": None}])
def test_ids_are_0_to_one_less_than_there_are_names(ids: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"names: the ids of 2 objects must be 0 to 1, each once, got \{") as caught:
        Vocabulary(ids)
    assert repr(ids) in str(caught.value)


@pytest.mark.parametrize("names", [[], ["a", "b", "a"], [""]])
def test_names_are_there_and_told_apart(names: list[str]) -> None:
    with pytest.raises(ValueError, match="non-empty and unique") as caught:
        Vocabulary(names)
    assert repr(names) in str(caught.value)


@pytest.mark.parametrize("names", ["red cube", ["red cube", 3], None, 3, {"a", "b"}, frozenset("ab"), {3: 0}])
def test_names_are_a_sequence_of_strings(names: object) -> None:
    with pytest.raises(TypeError, match="names must be a sequence of strings"):
        Vocabulary(names)  # type: ignore[arg-type]


def test_repr_says_how_many_and_which() -> None:
    assert repr(Vocabulary()) == "Vocabulary(24 objects: gray cube, ..., yellow cylinder)"


def test_a_name_is_spelled_in_words() -> None:
    vocabulary = Vocabulary(["red cube", "blue cube", "red ball", "dot"])
    assert vocabulary.words == ("red", "cube", "blue", "ball", "dot")
    expected = [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert vocabulary.spelling().tolist() == expected
    assert len(Vocabulary().words) == 11
    assert (Vocabulary().spelling().sum(1) == 2).all()


@pytest.mark.parametrize("names", [["red cube", "cube red"], ["big cube", "big big cube"]])
def test_names_of_the_same_words_are_not_told_apart_by_them(names: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{names[0]!r} and {names[1]!r} have the same words: rename one"):
        Vocabulary(names).spelling()
