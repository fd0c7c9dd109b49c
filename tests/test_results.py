"""results.py: pictures, files that say how they were drawn, and what the verifier says."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import COMPACT, SCENES, assert_drawn_alike, differ, gradient_picture, lively_generator
from torch import Tensor

from condgan import Drawing, IterativeGenerator, drawing, results
from condgan.classifier import SceneClassifierConfig
from condgan.drawing import CANDIDATE_STRIDE, random_source
from condgan.functional import encode_objects, roll_conditions
from condgan.images import load_image, round_levels, round_turn, to_pil, to_uint8
from condgan.results import Found


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
    with pytest.raises(ValueError, match=r"columns must be between 1 and .*, got 0"):
        result.grid(columns=0)
    with pytest.raises(TypeError, match=r"columns must be a whole number, got 2\.0"):
        result.grid(columns=2.0)


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
        with pytest.raises(OSError, match=rf"cannot write '{tmp_path / path}' \({reason}.*yours to write"):
            result.save(tmp_path / path)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png"}


def test_a_write_that_fails_leaves_the_old_file(
    compact: IterativeGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = compact.generate("red cube")
    result.save(tmp_path / "scene.png")
    before = (tmp_path / "scene.png").read_bytes()

    def run_out_of_space(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", run_out_of_space)
    with pytest.raises(OSError, match=r"cannot write '.*scene\.png' \(No space left on device\): the folder must"):
        result.save(tmp_path / "scene.png")
    assert (tmp_path / "scene.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["scene.png"]


@pytest.mark.parametrize("ending", ["h5", "xbm"])
def test_a_format_that_cannot_be_written_is_not_blamed_on_the_folder(
    compact: IterativeGenerator, tmp_path: Path, ending: str
) -> None:
    with pytest.raises(ValueError, match=rf"scene\.{ending}' is of a format that cannot hold .*choose another"):
        compact.generate("red cube").save(tmp_path / f"scene.{ending}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (2, ValueError, "index must be below 2, the number of pictures, got 2"),
        (-1, ValueError, "index must be between 0 and"),
        (True, TypeError, "index must be a whole number, got True"),
    ],
)
def test_only_pictures_that_are_there_are_written(
    compact: IterativeGenerator, tmp_path: Path, index: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compact.generate("red cube", num_images=2).save(tmp_path / "scene.png", index=index)


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
    monkeypatch.setattr(results, "_verifier", lambda: stub)
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
    assert (result.draws, result.passes) == ([[4], [4, 4], [4, 4, 4]], [4, 8, 12])


def test_best_of_is_the_same_alone_and_in_a_batch(compact: IterativeGenerator, verifier: StubVerifier) -> None:
    batch = compact.generate(["red cube"], num_images=3, seed=1, best_of=3)
    alone = compact.generate(["red cube"], seed=3, best_of=3)
    assert alone.seeds == batch.seeds[2:]
    assert torch.equal(alone.tensor[0], batch.tensor[2])


def test_scores_are_the_same_alone_and_in_a_batch_bit_for_bit(compact: IterativeGenerator) -> None:
    batch = compact.generate(SCENES, seed=1, best_of=2)
    for i, scene in enumerate(SCENES):
        alone = compact.generate(scene, seed=1 + i, best_of=2)
        assert alone.scores is not None and batch.scores is not None
        assert alone.scores[0] == batch.scores[i]
        assert alone.verify()[0] == batch.verify()[i]


def test_best_of_one_asks_nobody(compact: IterativeGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("the verifier was loaded")

    monkeypatch.setattr(results, "_verifier", fail)
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


# Turns that failed


def candidates_of_a_turn(
    generator: IterativeGenerator, scene: list[str], turn: int, image: Tensor, seed: int, count: int
) -> list[tuple[Tensor, Tensor]]:
    """The plain version: pictures and places of a turn with the random numbers that the pictures of seed, seed + 2**32
    and so on have for it."""
    condition = roll_conditions(generator.encoder, encode_objects([scene]))[0][:, turn]
    image = image[None].contiguous(memory_format=torch.channels_last)  # as drawing has it: for the last bits
    found = []
    for k in range(count):
        rng = random_source(seed + k * CANDIDATE_STRIDE)
        torch.randn(generator.config.light_components, generator=rng)
        torch.randn(3, 64, 64, generator=rng)
        for _ in range(turn + 1):
            uniform, z = torch.rand(3, generator=rng), torch.randn(generator.z_dim, generator=rng)
        assert generator.place_model is not None
        place = generator.place_model(image, condition, uniform[None], generator.read_light(image))
        found.append((generator(z[None], condition, image, place)[0], place[0]))
    return found


def find_half_of_the_turns_good(
    monkeypatch: pytest.MonkeyPatch, generator: IterativeGenerator, scenes: list[list[str]], seed: int
) -> float:
    """Set the threshold so that the stub finds about half of the candidates good, and return it."""
    scores: list[Tensor] = []

    def note(images: Tensor, target: Tensor) -> Tensor:
        found = results.exact_probability(images, target)
        scores.append(found.clone())
        return found

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "exact_probability", note)
        patch.setattr(drawing, "GOOD_TURN", 2.0)
        generator.generate(scenes, seed=seed, num_images=2, best_of=2, redraw="turn")
    between = torch.cat(scores).quantile(0.5).item()  # an even number of scores: none is on the threshold
    monkeypatch.setattr(drawing, "GOOD_TURN", between)
    return between


@torch.no_grad()
def test_a_turn_is_drawn_until_it_is_good_and_goes_on_from_the_best(
    compact: IterativeGenerator, verifier: StubVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [["red cube", "blue sphere", "gray cube"], ["cyan cube"], ["green cylinder", "gray sphere"]]
    good = find_half_of_the_turns_good(monkeypatch, compact, scenes, 41)
    result = compact.generate(scenes, seed=41, num_images=2, best_of=4, redraw="turn")
    assert result.seeds == [*range(41, 41 + 6)]
    assert result.scores is not None and result.places is not None and result.draws is not None
    for i, scene in enumerate(result.conditions):
        image = result.trajectory[i, 0]
        rng = random_source(41 + i)
        light = torch.randn(1, compact.config.light_components, generator=rng)
        start, rest = round_levels(compact.canvas(light, torch.randn(1, 3, 64, 64, generator=rng)))
        assert torch.equal(image, start[0])
        for turn in range(len(scene)):
            drawn = candidates_of_a_turn(compact, scene, turn, image, 41 + i, 4)
            rounded = [round_turn(image, candidate, rest[0]) for candidate, _ in drawn]
            candidates = [(candidate, place) for (candidate, _), (_, place) in zip(rounded, drawn, strict=True)]
            asked = set(scene[: turn + 1])
            scores = [exact_probability(verifier, candidate, asked) for candidate, _ in candidates]
            first_good = next((k for k, score in enumerate(scores) if score >= good), None)
            best = int(np.argmax(scores)) if first_good is None else first_good
            assert result.draws[i][turn] == (4 if first_good is None else first_good + 1)
            image, place = result.trajectory[i, turn + 1], result.places[i][turn]
            torch.testing.assert_close(image, candidates[best][0], rtol=0, atol=1e-5)
            rest = rounded[best][1][None]
            assert place == pytest.approx(candidates[best][1].tolist(), abs=1e-4)
        assert result.scores[i] == pytest.approx(scores[best], rel=1e-3)
        assert torch.equal(result.tensor[i], image), "a short scene keeps its last picture"
    assert {1, 4} < {n for draws in result.draws for n in draws}, "good at once, never good, and between"
    assert result.passes == [sum(draws) for draws in result.draws]


def test_only_the_turn_that_failed_is_drawn_again(
    generator: IterativeGenerator, verifier: StubVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, answers = ["red cube", "blue sphere", "gray cube"], [0.95, 0.2, 0.5, 0.9, 0.99]
    wanted = [scene[:1], scene[:2], scene[:2], scene[:2], scene]

    def answer(images: Tensor, target: Tensor) -> Tensor:
        assert target[0].nonzero().flatten().tolist() == sorted(map(verifier.config.objects.index, wanted.pop(0)))
        return torch.tensor([answers.pop(0)], dtype=torch.float64)

    monkeypatch.setattr(drawing, "exact_probability", answer)
    plain = generator.generate(scene, seed=5)
    result = generator.generate(scene, seed=5, best_of=8, redraw="turn")
    assert torch.equal(result.trajectory[0, :2], plain.trajectory[0, :2])
    assert differ(result.trajectory[0, 2], plain.trajectory[0, 2])
    assert differ(result.trajectory[0, 3], plain.trajectory[0, 3]), "it was drawn on another picture"
    assert (result.draws, result.passes, result.scores) == ([[1, 3, 1]], [5], [0.99])
    assert (plain.draws, plain.passes, plain.scores) == ([[1, 1, 1]], [3], None)
    if plain.places is not None and result.places is not None:
        assert [a == b for a, b in zip(plain.places[0], result.places[0], strict=True)][:2] == [True, False]


def test_a_scene_without_failed_turns_is_the_usual_one(
    generator: IterativeGenerator, verifier: StubVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "GOOD_TURN", 0.0)
    plain = generator.generate(SCENES, seed=5)
    result = generator.generate(SCENES, seed=5, best_of=8, redraw="turn")
    assert torch.equal(result.trajectory, plain.trajectory)
    assert (result.seeds, result.places, result.draws) == (plain.seeds, plain.places, plain.draws)


def test_redrawn_turns_are_the_same_alone_in_a_batch_and_from_a_file(
    compact: IterativeGenerator, verifier: StubVerifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_half_of_the_turns_good(monkeypatch, compact, SCENES[:3], 60)
    at = [None, [None, (20, 21)], None]
    batch = compact.generate(SCENES[:3], seed=60, at=at, best_of=3, redraw="turn")
    for i, scene in enumerate(SCENES[:3]):
        alone = compact.generate(scene, seed=60 + i, at=at[i], best_of=3, redraw="turn")
        assert torch.equal(alone.trajectory[0], batch.trajectory[i, : len(scene) + 1])
        assert batch.scores is not None and batch.draws is not None and batch.places is not None
        assert (alone.scores, alone.draws) == ([batch.scores[i]], [batch.draws[i]])
        assert alone.places == [batch.places[i]]
        with Image.open(alone.save(tmp_path / "scene.png")[0]) as saved:
            told = json.loads(saved.text["condgan"])
        del told["places"]  # of the turns that were kept
        again = compact.generate(told.pop("conditions"), **told)
        assert torch.equal(again.tensor, alone.tensor)
    assert max(n for draws in batch.draws or [] for n in draws) > 1


def test_redrawn_turns_of_a_batch_at_once_are_those_that_come_one_by_one(
    compact: IterativeGenerator, verifier: StubVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_half_of_the_turns_good(monkeypatch, compact, SCENES, 61)
    wanted = compact.generate(SCENES, seed=61, best_of=3, redraw="turn")
    batched = compact.generate(SCENES, seed=61, best_of=3, redraw="turn", batch_size=4)
    assert_drawn_alike(batched.trajectory, wanted.trajectory)
    assert batched.draws == wanted.draws
    assert batched.scores == pytest.approx(wanted.scores, rel=1e-2)


def test_turns_on_a_given_picture_are_asked_for_what_was_there_before_too(
    compact: IterativeGenerator, verifier: StubVerifier
) -> None:
    picture = gradient_picture((64, 64))
    seen = verifier.probabilities(load_image(picture, 64)[None])[0] > 0.5
    before = {name for name, there in zip(verifier.config.objects, seen.tolist(), strict=True) if there}
    result = compact.add(picture, ["red cube", "blue sphere"], seed=8, best_of=3, redraw="turn")
    score = exact_probability(verifier, result.tensor[0], before | {"red cube", "blue sphere"})
    assert result.scores == pytest.approx([score], rel=1e-3)
    assert result.draws == [[3, 3]]


def test_what_is_drawn_again_is_a_picture_or_a_turn(compact: IterativeGenerator) -> None:
    with pytest.raises(ValueError, match="redraw must be 'picture' or 'turn', got 'turns'"):
        compact.generate("red cube", best_of=2, redraw="turns")  # type: ignore[arg-type]


def test_verify_says_of_each_asked_object_whether_it_was_found(
    compact: IterativeGenerator, verifier: StubVerifier
) -> None:
    result = compact.generate(SCENES, seed=1)
    report = result.verify()
    probabilities = torch.cat([verifier.probabilities(image[None]) for image in result.tensor])
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
    small = lively_generator(replace(COMPACT, image_size=32, window=32))
    result = small.generate("red cube", seed=1, best_of=2)
    assert result.tensor.shape == (1, 3, 32, 32)
    result.verify()
    assert verifier.shapes == [(1, 3, 64, 64)] * 3


def test_objects_that_the_verifier_does_not_know_are_named(verifier: StubVerifier) -> None:
    other = lively_generator(replace(COMPACT, image_size=32, window=32, objects=("green tree", "red cube")))
    for ask in (lambda: other.generate("green tree", best_of=2), other.generate("green tree").verify):
        with pytest.raises(ValueError, match=r"verifier knows i-CLEVR's objects only, not all of .*'green tree'"):
            ask()
    assert other.generate("red cube", best_of=2).scores is not None
