"""Evaluation in a small world whose scores are known: squares on a gray floor, and a judge that reads them exactly."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from condgan import drawing, evaluation, layout, metrics, scenes
from condgan.classifier import SceneClassifier, SceneClassifierConfig
from condgan.configs import GeneratorConfig
from condgan.counter import ObjectCounter, ObjectCounterConfig
from condgan.datasets import DatasetError, scene_split
from condgan.drawing import Best, Turns
from condgan.evaluation import evaluate
from condgan.images import to_uint8
from condgan.models import IterativeGenerator
from condgan.report import MEASURES, EvaluationReport
from condgan.requests import TooManyObjectsWarning
from condgan.vocab import ICLEVR_OBJECTS, Vocabulary

SIZE = 64
DRIFT = 2
"""Grey levels by which every turn after the first darkens the picture of an honest drawer."""
LISTS = [["red cube"], ["gray cube", "cyan sphere"], ["red cube", "blue sphere", "yellow cylinder"], ["green cube"]]
DrawTurns = Callable[..., Turns]


def _floor(seed: int) -> Tensor:
    """The empty scene of a seed, (3, H, W) in grey levels: its own light, whole numbers from 80 to 119."""
    rng = torch.Generator().manual_seed(seed)
    return torch.full((3, SIZE, SIZE), float(torch.randint(80, 120, (), generator=rng)))


def _square(object_id: int) -> tuple[slice, slice, slice]:
    row, column = divmod(object_id, 6)
    return slice(None), slice(16 * row + 2, 16 * row + 8), slice(10 * column + 2, 10 * column + 8)


def _scene(names: Sequence[str], seed: int) -> Tensor:
    """The floor and the picture after every turn, (T + 1, 3, H, W) in grey levels."""
    pictures = [_floor(seed)]
    for turn in range(len(names)):
        picture = pictures[-1] - (DRIFT if turn else 40)  # the first turn is no turn from a picture to a picture
        for present in names[: turn + 1]:
            picture[_square(Vocabulary().parse(present))] = 250.0
        pictures.append(picture)
    return torch.stack(pictures)


def _honest(
    generator: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int], places: object = None
) -> Turns:
    scenes = [_scene(names, seed) for names, seed in zip(conditions, seeds, strict=True)]
    turns = max(len(scene) for scene in scenes)
    images = torch.stack([torch.cat([scene, scene[-1:].expand(turns - len(scene), -1, -1, -1)]) for scene in scenes])
    return Turns(images / 127.5 - 1, None)


def _forgetful(
    generator: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int], places: object = None
) -> Turns:
    """Leaves the last object of lists of three out."""
    return _honest(generator, [names[:2] for names in conditions], seeds)


def _one_light(
    generator: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int], places: object = None
) -> Turns:
    return _honest(generator, conditions, [0] * len(seeds))


class _Oracle(SceneClassifier):
    """Sees an object where the middle of its square is bright; its features are the light of a corner, and the sum."""

    def __init__(self) -> None:
        super().__init__(SceneClassifierConfig(widths=(4,), blocks=(1,), stem="small"))
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        middle = [images[_slices(object_id)].mean((1, 2, 3)) for object_id in range(24)]
        return (torch.stack(middle, 1) - 0.5) * 20

    def features(self, images: Tensor) -> Tensor:
        return torch.stack([images[:, 0, 0, 0], images.mean((1, 2, 3))], 1) * 127.5


def _slices(object_id: int) -> tuple[slice, ...]:
    return (slice(None), *_square(object_id))


class _Tally(ObjectCounter):
    """Counts bright squares."""

    def count(self, images: Tensor, batch_size: int = 256) -> Tensor:
        middles = torch.stack([images[_slices(object_id)].mean((1, 2, 3)) for object_id in range(24)], 1)
        return (middles > 0.5).sum(1)


@pytest.fixture
def generator() -> IterativeGenerator:
    return IterativeGenerator(GeneratorConfig(width=1, z_dim=4, condition_dim=4))


@pytest.fixture
def oracle() -> _Oracle:
    return _Oracle()


@pytest.fixture
def drawer(monkeypatch: pytest.MonkeyPatch) -> Callable[[DrawTurns], None]:
    def replace(draw_turns: DrawTurns) -> None:
        def drawn(*arguments: object, places: object, start: None, batch_size: None) -> Turns:
            return draw_turns(*arguments, places=places)

        monkeypatch.setattr(drawing, "draw_turns", drawn)

    return replace


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A folder with real scenes of the same world in the packed format: 12 of the test split, 8 of validation."""
    wanted = {"test": 12, "validation": 8, "train": 1}  # 21 scenes, as many as there are second objects
    second = [name for name in ICLEVR_OBJECTS if name not in ("red cube", "green cube", "gray sphere")]
    pictures: list[Tensor] = []
    entries: list[dict[str, object]] = []
    for number in itertools.count():
        name = f"scene_{number}"
        split = scene_split(name)
        if not wanted[split]:
            if not any(wanted.values()):
                break
            continue
        wanted[split] -= 1
        # Equal sets are found among first turns only.
        objects = [["red cube", "green cube"][number % 2], second[len(entries)], "gray sphere"]
        pictures.append(to_uint8(_scene(objects, 1000 + number)[1:] / 127.5 - 1))
        entries.append({"name": name, "objects": objects})
    array = torch.stack(pictures).numpy()
    np.save(tmp_path / f"condgan-{SIZE}.npy", array)
    index = {
        "format": "condgan-scenes",
        "version": 1,
        "image_size": SIZE,
        "sha256": None,
        "objects": list(ICLEVR_OBJECTS),
        "scenes": entries,
    }
    (tmp_path / f"condgan-{SIZE}.json").write_text(json.dumps(index))
    return tmp_path


Score = Callable[..., EvaluationReport]


@pytest.fixture
def score(
    generator: IterativeGenerator,
    oracle: _Oracle,
    drawer: Callable[[DrawTurns], None],
    packed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Score:
    """Evaluate a way of drawing, with the networks that read this world; ``data=packed`` where it says so."""

    def run(draw_turns: DrawTurns, lists: Sequence[Sequence[str]] = LISTS, real: bool = False, **options: object):
        drawer(draw_turns)
        options = {"draws": 2, "judge": oracle, "counter": _Tally(), "progress": False} | options
        return evaluate(options.pop("generator", generator), lists, data=packed if real else None, **options)

    # what cubes look like is tested with layouts; here no square is one
    monkeypatch.setattr(layout, "cube_rotation", lambda before, after: torch.full((len(after),), 45.0))
    return run


def _drawn(report: EvaluationReport, *names: str) -> list[float | None]:
    return [report.measures[name].drawn for name in names]


RIGHTNESS = ("accuracy", "exact", "object_precision", "object_recall", "object_f1", "count_accuracy", "retention")


def test_a_drawer_without_faults_scores_one(score: Score) -> None:
    report = score(_honest, draws=3)
    assert _drawn(report, *RIGHTNESS) == [1] * 7
    sizes = torch.tensor([len(names) for names in LISTS])
    assert report.measures["accuracy"].ci95 == metrics.share_interval(3 * sizes, 3 * sizes)
    ends = [report.measures[name].ci95 for name in RIGHTNESS]
    assert all(0.3 < low < high == 1 for low, high in ends), "four lists do not make it sure"
    assert [report.measures[name].samples for name in RIGHTNESS] == [21, 12, 21, 21, 21, 12, 9 + 3]
    assert (report.lists, report.objects_asked, report.draws, report.pictures) == (4, 7, 3, 12)
    assert (report.model, report.judge, report.conditions) == ("IterativeGenerator", "_Oracle", "given lists")
    assert (report.best_of, report.passes) == (1, 7 / 4)
    assert report.seconds > 0


def test_a_missing_object_costs_what_it_should(score: Score) -> None:
    # The third of the three highest outputs of a picture of two is any other object, never the missing one here: all
    # other middles are floor, equally dark, and the lowest id wins.
    report = score(_forgetful, draws=5)
    assert _drawn(report, *RIGHTNESS) == pytest.approx([6 / 7, 3 / 4, 1, 6 / 7, 12 / 13, 3 / 4, 1])
    sizes = torch.tensor([len(names) for names in LISTS])
    assert report.measures["accuracy"].ci95 == metrics.share_interval(5 * (sizes - (sizes == 3).int()), 5 * sizes)


def test_a_ghost_costs_precision_and_count(score: Score) -> None:
    """An object more than asked, seen by both networks."""
    report = score(lambda g, conditions, seeds, places: _with_ghost(conditions, seeds))
    assert _drawn(report, "object_recall", "exact", "count_accuracy") == [1, 0, 0]
    assert _drawn(report, "object_precision") == pytest.approx([7 / 11])


def _with_ghost(conditions: Sequence[Sequence[str]], seeds: Sequence[int]) -> Turns:
    turns = _honest(None, conditions, seeds)
    turns.images[(slice(None), slice(1, None), *_square(22))] = 1.0
    return turns


def test_an_object_that_is_lost_costs_retention(score: Score) -> None:
    """Every turn after the second wipes the first object out."""

    def lossy(g: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int], places: object) -> Turns:
        turns = _honest(g, conditions, seeds)
        for scene, names in zip(turns.images, conditions, strict=True):
            if len(names) == 3:
                scene[(slice(3, None), *_square(Vocabulary().parse(names[0])))] = -0.3
        return turns

    report = score(lossy)
    measure = report.measures["retention"]
    assert measure.drawn == pytest.approx(3 / 4)  # kept: one in the pair; one after turn 2 and one of two after turn 3
    assert measure.samples == 8
    assert measure.ci95 == metrics.share_interval(2 * torch.tensor([1, 2]), 2 * torch.tensor([1, 3]))


def test_pictures_of_other_lists_score_low(score: Score) -> None:
    shifted = {tuple(names): LISTS[(i + 1) % len(LISTS)] for i, names in enumerate(LISTS)}
    report = score(lambda g, conditions, seeds, places: _honest(g, [shifted[tuple(n)] for n in conditions], seeds))
    assert report.measures["accuracy"].drawn < 0.3
    assert report.measures["exact"].drawn == 0


def test_seeds_are_fixed_by_the_rule_and_results_do_not_depend_on_the_batch_size(score: Score) -> None:
    asked: list[tuple[tuple[str, ...], int]] = []

    def spy(g: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int], places: object) -> Turns:
        asked.extend(zip(map(tuple, conditions), seeds, strict=True))
        return _honest(g, conditions, seeds)

    reports = []
    for batch_size in (1, 5, 64):
        asked.clear()
        reports.append(score(spy, draws=3, real=True, seed=100, batch_size=batch_size))
        main, of_real = asked[: 3 * len(LISTS)], asked[3 * len(LISTS) :]
        expected = {(tuple(names), 100 + draw * len(LISTS) + i) for i, names in enumerate(LISTS) for draw in range(3)}
        assert len(main) == len(set(main))
        assert set(main) == expected
        # 12 test scenes, which a model that knows places draws a second time, and 8 of validation
        assert [seed for _, seed in of_real] == [*range(112, 124), *range(136, 144)]
    first, *others = [_flat(report) for report in reports]
    for other in others:
        assert other.keys() == first.keys()
        for key, value in first.items():
            assert other[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


def _flat(report: EvaluationReport) -> dict[str, object]:
    """All numbers of a report but its time, under one key each."""

    def walk(prefix: str, value: object) -> Iterator[tuple[str, object]]:
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if children is None:
            yield prefix, value
        else:
            for key, child in children:
                yield from walk(f"{prefix}/{key}", child)

    return {key: value for key, value in walk("", report.to_dict()) if key != "/seconds"}


def test_preservation_is_of_the_turns_after_a_scenes_first(score: Score) -> None:
    report = score(_honest)
    # not the 40 of the first turn, not the 0 of padding
    assert report.measures["preservation"].drawn == pytest.approx(DRIFT, abs=0.05)
    assert report.measures["preservation"].samples == 2 * 3
    # squares of 6x6 grown by 6 to 18x18, some cut by the border
    squares = [_square(Vocabulary().parse(names[turn])) for names in LISTS for turn in range(1, len(names))]
    areas = [
        (min(y.stop + 6, SIZE) - max(y.start - 6, 0)) * (min(x.stop + 6, SIZE) - max(x.start - 6, 0))
        for _, y, x in squares
    ]
    assert report.measures["changed_area"].drawn == pytest.approx(sum(areas) / len(areas) / SIZE**2)
    single = score(_honest, [["red cube"], ["blue cube"]])
    assert _drawn(single, "preservation", "changed_area", "retention") == [None] * 3


def test_turns_that_draw_nothing_preserve_nothing(score: Score) -> None:
    def idle(g: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int], places: object) -> Turns:
        turns = _honest(g, conditions, seeds)
        turns.images[:, 2:] = turns.images[:, 1:2]
        return turns

    report = score(idle)
    assert _drawn(report, "preservation", "changed_area") == [None, 0]


def test_pictures_are_measured_as_they_are_saved(score: Score) -> None:
    """A drift of 0.4 grey levels is gone in a file, and so is what lies beyond white."""

    def fine(g: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int], places: object) -> Turns:
        image = torch.full((len(seeds), 3, 3, SIZE, SIZE), 100.0)
        image[:, 2] += 0.4
        image[:, 2, :, 30:34, 30:34] = 200.0
        image[:, 1:, :, 0] = torch.tensor([300.0, 280.0])[:, None, None]
        return Turns(image / 127.5 - 1, None)

    report = score(fine, [["red cube", "blue cube"]])
    assert report.measures["preservation"].drawn == 0


def test_diversity_is_the_mean_distance_of_draws_of_a_list(score: Score) -> None:
    assert score(_one_light, draws=3).measures["diversity"].drawn == 0
    report = score(_honest, draws=3, seed=9)
    expected = []
    for i, names in enumerate(LISTS):
        final = [_scene(names, 9 + draw * len(LISTS) + i)[-1] for draw in range(3)]
        expected += [(a - b).square().mean().sqrt().item() for a, b in itertools.combinations(final, 2)]
    assert report.measures["diversity"].drawn == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert report.measures["diversity"].samples == len(expected)
    assert report.measures["diversity"].real is None
    assert _drawn(report, "diversity_ratio") == [None]
    assert _drawn(score(_honest, draws=1), "diversity") == [None]


def test_real_pictures_are_measured_in_the_same_way(score: Score) -> None:
    report = score(_forgetful, real=True)
    assert report.measures["accuracy"].drawn < 1
    assert [report.measures[name].real for name in RIGHTNESS] == [1] * 7
    assert report.real_pictures == 36
    assert report.measures["preservation"].real == pytest.approx(DRIFT, abs=0.05)
    assert report.measures["preservation_ratio"].drawn == pytest.approx(1, abs=0.05)
    assert 0.03 < report.measures["changed_area"].real < 18 * 18 / SIZE**2 + 1e-6


def test_a_packed_file_is_read_like_its_folder(generator: IterativeGenerator, packed: Path) -> None:
    of_folder, of_file = (
        scenes.read_real(path, generator, Vocabulary()) for path in (packed, packed / f"condgan-{SIZE}.npy")
    )
    assert torch.equal(of_folder.test.pictures, of_file.test.pictures)
    assert of_folder.lists == of_file.lists
    assert (len(of_file.test.pictures), len(of_file.validation.pictures)) == (12, 8)
    assert of_file.test.asked.sum(2).tolist() == [[1, 2, 3]] * 12


def test_the_default_device_makes_no_difference(score: Score) -> None:
    """Of a user whose tensors are made on a GPU unless told otherwise; here, where they would have no values."""
    expected = score(_honest, real=True).to_dict()
    with torch.device("meta"):
        found = score(_honest, real=True).to_dict()
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


def test_real_diversity_compares_lists_of_equal_size(score: Score, packed: Path) -> None:
    """Real pairs of equal lists, of all splits, exist among first turns only: only lists of one object have a ratio."""
    report = score(_honest, draws=4, real=True)
    entries = json.loads((packed / f"condgan-{SIZE}.json").read_text())["scenes"]
    firsts: dict[str, list[Tensor]] = {}
    for scene, pixels in zip(entries, np.load(packed / f"condgan-{SIZE}.npy"), strict=True):
        firsts.setdefault(scene["objects"][0], []).append(torch.from_numpy(pixels[0]).float())
    pairs = [
        (a - b).square().mean().sqrt().item() for group in firsts.values() for a, b in itertools.combinations(group, 2)
    ]
    assert report.measures["diversity"].real == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    low, high = report.measures["diversity_ratio"].ci95 or (0, 0)
    ratio = report.measures["diversity_ratio"].drawn
    assert 0 < low < ratio < high, "two lists of real pairs are not sure what real diversity is"
    singles = score(_honest, [LISTS[0], LISTS[3]], real=True).measures
    assert singles["diversity_ratio"].drawn == pytest.approx(singles["diversity"].drawn / singles["diversity"].real)
    threes = score(_honest, [LISTS[2]], real=True).measures
    assert (threes["diversity"].real, threes["diversity_ratio"].drawn) == (None, None)
    assert score(_one_light, draws=4, real=True).measures["diversity_ratio"].drawn == 0


# --- controls -----------------------------------------------------------------------------------------------------


def test_controls_are_told_from_an_honest_drawer(score: Score) -> None:
    report = score(_honest, draws=8, real=True)
    for name in RIGHTNESS[:6]:
        measure = report.measures[name]
        assert measure.shuffled < 0.9, name
        assert measure.blank == (None if name == "object_precision" else pytest.approx(0, abs=0.3)), name
    assert report.measures["retention"].blank is None
    assert report.measures["preservation"].blank is None
    assert report.measures["changed_area"].blank == 0
    assert report.measures["diversity"].blank > 0
    assert all(report.is_told(name) for name in MEASURES if "diversity" not in name)  # here all that varies is light


def test_a_measure_that_a_control_passes_is_not_used(score: Score) -> None:
    class Generous(_Tally):
        def count(self, images: Tensor, batch_size: int = 256) -> Tensor:
            return torch.ones(len(images), dtype=torch.int64)

    report = score(_honest, counter=Generous())
    assert not report.is_told("count_accuracy")
    assert report.to_dict()["measures"]["count_accuracy"]["used"] is False
    (line,) = [line for line in str(report).splitlines() if line.startswith("count accuracy")]
    assert line.endswith(" *")
    assert "\n* not used: a control does as well" in str(report)
    assert report.is_told("accuracy")


def test_no_picture_is_shuffled_to_its_own_list(score: Score) -> None:
    apart = [["red cube", "blue sphere"], ["green cube", "cyan sphere"], ["gray cylinder"]]
    assert score(_honest, apart, draws=5).measures["object_recall"].shuffled == 0


def test_lists_that_all_ask_for_the_same_cannot_be_shuffled(score: Score) -> None:
    report = score(_honest, [["red cube", "blue sphere"], ["blue sphere", "red cube"]], draws=2)
    for name in ("accuracy", "exact", "object_f1"):
        assert report.measures[name].shuffled is None, name
        assert report.is_told(name), name


def test_lists_of_one_length_cannot_be_shuffled_where_objects_are_counted(score: Score) -> None:
    report = score(_honest, [["red cube", "blue sphere"], ["green cube", "red cube"]], draws=2)
    measure = report.measures["count_accuracy"]
    assert (measure.drawn, measure.shuffled) == (1, None)
    assert report.is_told("count_accuracy")
    assert report.measures["accuracy"].shuffled < 1


def test_one_list_cannot_be_shuffled_and_says_nothing_of_others(score: Score) -> None:
    report = score(_honest, LISTS[2:3], draws=5)
    for name in ("accuracy", "exact", "retention", "preservation", "diversity"):
        measure = report.measures[name]
        assert measure.drawn is not None, name
        assert (measure.shuffled, measure.ci95) == (None, None), name
    assert report.to_dict()["accuracy_ci95"] is None
    assert "accuracy" in str(report)


def test_objects_asked_twice_are_counted_twice(score: Score) -> None:
    class Two(_Tally):
        def count(self, images: Tensor, batch_size: int = 256) -> Tensor:
            return torch.full((len(images),), 2)

    twice = [["red cube", "red cube"], ["blue sphere", "blue sphere"]]
    assert score(_honest, twice, counter=Two()).measures["count_accuracy"].drawn == 1
    assert score(_honest, [["red cube"], ["blue sphere"]], counter=Two()).measures["count_accuracy"].drawn == 0


@pytest.mark.parametrize("count", [5, 256, 300, 1000])
def test_the_blank_control_is_of_scenes_from_first_to_last(count: int) -> None:
    numbers = torch.arange(count).view(-1, 1, 1).expand(-1, 1, 1)
    pictures = (numbers % 251).to(torch.uint8)[:, :, :, None, None].expand(-1, 2, 3, 1, 1)
    blank = evaluation._blank(scenes.Scenes(pictures, numbers))
    chosen = blank.objects.flatten()
    assert len(chosen) == min(count, 256)
    assert chosen[0] == 0
    assert count - 1 - chosen[-1] <= count // 256
    assert chosen.diff().max() <= -(-count // 256), "evenly"
    assert blank.pictures[:, 1, 0, 0, 0].tolist() == (chosen % 251).tolist()


# --- looks --------------------------------------------------------------------------------------------------------


def _copies(packed: Path, split: str, lighter: int = 0) -> DrawTurns:
    """Draws the real pictures of the lists of a split, all a little lighter; what it does not know, honestly."""
    index = json.loads((packed / f"condgan-{SIZE}.json").read_text())["scenes"]
    pixels = torch.from_numpy(np.load(packed / f"condgan-{SIZE}.npy")).float()
    known = {
        tuple(scene["objects"]): pictures
        for scene, pictures in zip(index, pixels, strict=True)
        if scene_split(scene["name"]) == split
    }

    def draw(g: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int], places: object) -> Turns:
        turns = _honest(g, conditions, seeds)
        for scene, names in zip(turns.images, conditions, strict=True):
            if tuple(names) in known:
                scene[1:] = (known[tuple(names)] + lighter) / 127.5 - 1
        return turns

    return draw


LOOKS = ("frechet_distance", "kernel_distance", "precision", "recall", "coverage")


def test_pictures_that_are_real_ones_are_on_the_floor(score: Score, packed: Path) -> None:
    """The floor is of the validation scenes, and scenes drawn for the same lists are held against it."""
    report = score(_copies(packed, "validation"), real=True)
    assert [report.measures[name].samples for name in LOOKS] == [24, 24, 8, 8, 8]  # validation has 8 scenes of 3
    floors = [report.measures[name].real for name in LOOKS]
    assert _drawn(report, *LOOKS) == pytest.approx(floors, rel=1e-6)
    assert floors[0] > 1 and floors[1] > 0
    assert score(_copies(packed, "test"), real=True).measures[LOOKS[0]].drawn != pytest.approx(floors[0], rel=0.01)
    lighter = score(_copies(packed, "validation", lighter=40), real=True)
    for name in LOOKS[:2]:
        assert lighter.measures[name].drawn > report.measures[name].drawn + 0.1, name
    low, high = lighter.measures["frechet_distance"].ci95
    assert low < lighter.measures["frechet_distance"].drawn < high
    assert lighter.measures["coverage"].ci95 is None, "half of 8 scenes fill no neighbourhood"
    for name in LOOKS:
        assert report.is_told(name), name


def test_copies_of_training_pictures_are_found(score: Score, packed: Path) -> None:
    honest = score(_honest, real=True).measures
    assert honest["memorisation_ratio"].drawn > 0.5
    (training,) = scenes.read_real(
        packed, IterativeGenerator(GeneratorConfig(width=1, z_dim=4, condition_dim=4)), Vocabulary()
    ).training

    def memorised(g: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int], places: object) -> Turns:
        turns = _honest(g, conditions, seeds)
        turns.images[:, -1] = training[-1].float() / 127.5 - 1
        return turns

    copied = score(memorised, real=True).measures
    assert copied["memorisation_ratio"].drawn == pytest.approx(0, abs=1e-3)
    assert copied["memorisation_nearer"].drawn == 1
    assert copied["memorisation_nearer"].ci95 == (1, 1)
    assert copied["memorisation_nearer"].real < 0.5
    assert copied["memorisation_p"].drawn < 0.001 < honest["memorisation_p"].drawn


# --- layout and asked places --------------------------------------------------------------------------------------


def test_layouts_of_drawn_and_real_scenes_are_compared(score: Score) -> None:
    report = score(_honest, real=True)
    assert report.layout.keys() >= {"place_later", "area_later", "overlap", "visible", "out_of_view", "rotation"}
    assert report.layout["area_later"].distance == 0  # all squares are equal
    assert (report.layout["place_later"].drawn, report.layout["place_later"].real) == (24, 24)
    assert report.layout["place_later"].distance == pytest.approx(0, abs=1e-6)  # each object has its own square

    def large(g: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int], places: object) -> Turns:
        turns = _honest(g, conditions, seeds)
        turns.images[:, 3:, :, 40:60, 40:60] = 1.0
        return turns

    larger = score(large, real=True).layout["area_later"]
    assert larger.distance == pytest.approx(0.5)
    assert larger.p_value < 0.01
    assert score(_honest).layout == {}


def test_first_turns_are_seen_as_real_ones_are_whatever_they_were_drawn_on(score: Score, packed: Path) -> None:
    copies = _copies(packed, "test")

    def on_white(g: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int], places: object) -> Turns:
        turns = copies(g, conditions, seeds, places)
        turns.images[:, 0] = 1.0
        return turns

    report = score(on_white, real=True)
    firsts = {name: report.layout[name].distance for name in report.layout if name.endswith("_first")}
    assert firsts == dict.fromkeys(("place_first", "area_first", "width_first", "height_first"), 0)
    knowing = IterativeGenerator(GeneratorConfig(width=1, z_dim=4, condition_dim=4, places=True))
    assert score(on_white, generator=knowing, real=True).measures["place_error_p95"].drawn == 0


def test_asked_places_are_those_of_real_scenes_and_missing_them_costs(score: Score, packed: Path) -> None:
    knowing = IterativeGenerator(GeneratorConfig(width=1, z_dim=4, condition_dim=4, places=True))
    asked: list[Sequence[Sequence[tuple[float, float]]]] = []

    def obedient(
        g: object,
        conditions: Sequence[Sequence[str]],
        seeds: Sequence[int],
        places: Sequence[Sequence[tuple[float, float]]] | None,
    ) -> Turns:
        turns = _honest(g, conditions, seeds)
        if places is not None:
            asked.append(places)
            for scene, row in zip(turns.images, places, strict=True):
                for turn, (x, y) in enumerate(row):
                    scene[turn + 1] = scene[turn]
                    left, top = round(x) + 2, round(y)
                    scene[turn + 1, :, top - 1 : top + 2, left - 1 : left + 2] = 0.9
        return turns

    report = score(obedient, generator=knowing, real=True)
    real = scenes.read_real(packed, knowing, Vocabulary())
    torch.testing.assert_close(torch.tensor(asked[0]), real.places)
    measure = report.measures["place_error"]
    assert measure.drawn == pytest.approx(2, abs=0.75)  # 2 to the right of the nearest pixel
    assert measure.samples == 36
    assert measure.real == 0
    assert measure.shuffled > measure.drawn
    assert measure.blank == pytest.approx(SIZE * 2**0.5)
    assert report.measures["place_error_p95"].drawn >= measure.drawn
    assert score(_honest, real=True).measures["place_error"].drawn is None  # it knows no places
    assert score(_honest, generator=knowing).measures["place_error"].drawn is None  # no real places are known


# --- best of n ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("redraw", "passes"), [("picture", 3 * 7 / 4), ("turn", None)])
def test_best_of_is_told_and_costs_passes(
    score: Score, monkeypatch: pytest.MonkeyPatch, redraw: str, passes: float | None
) -> None:
    calls: list[tuple[str, int]] = []

    def best(kind: str) -> Callable[..., Best]:
        def draw_best(
            g: object, lists: Sequence[Sequence[str]], seeds: list[int], best_of: int, **options: object
        ) -> Best:
            calls.append((kind, best_of))
            turns = _honest(g, lists, seeds)
            factor = best_of if kind == "picture" else 1
            return Best(turns.images, None, seeds, None, [[factor] * len(names) for names in lists])

        return draw_best

    monkeypatch.setattr(drawing, "best_pictures", best("picture"))
    monkeypatch.setattr(drawing, "best_turns", best("turn"))

    def never(*args: object, **options: object) -> Turns:
        raise AssertionError("a single draw")

    report = score(never, best_of=3, redraw=redraw)
    assert set(calls) == {(redraw, 3)}
    assert (report.best_of, report.redraw) == (3, redraw)
    assert report.passes == passes or (passes is None and report.passes == 7 / 4)
    assert f"the best of 3 by the verifier, by {redraw}: {report.passes:.2f} passes" in str(report)


# --- the rest -----------------------------------------------------------------------------------------------------


def test_real_generator_and_networks_are_left_as_they_were(generator: IterativeGenerator) -> None:
    judge = SceneClassifier(SceneClassifierConfig(widths=(4, 4), blocks=(1, 1), stem="small"))
    models = [generator, judge, ObjectCounter(ObjectCounterConfig(widths=(4, 4)))]
    for model in models:
        model.train()
    before = [value.clone() for model in models for value in model.state_dict().values()]
    random_state = torch.get_rng_state()
    first, second = (
        evaluate(generator, LISTS, draws=2, judge=judge, counter=models[2], batch_size=n, progress=False)
        for n in (3, 8)
    )
    assert dataclasses.replace(first, seconds=0.0) == dataclasses.replace(second, seconds=0.0)
    assert 0 <= first.measures["accuracy"].drawn <= 1
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(model.training for model in models)
    after = [value for model in models for value in model.state_dict().values()]
    assert all(map(torch.equal, before, after))


def test_judge_runs_in_eval_mode(score: Score, oracle: _Oracle) -> None:
    oracle.train()
    score(_honest, draws=1)
    assert oracle.modes and not any(oracle.modes)
    assert oracle.training


def test_names_load_the_shipped_networks(score: Score, oracle: _Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(model: nn.Module) -> Callable[[str], nn.Module]:
        def from_pretrained(name: str) -> nn.Module:
            loaded.append(name)
            return model

        return from_pretrained

    monkeypatch.setattr(SceneClassifier, "from_pretrained", load(oracle))
    monkeypatch.setattr(ObjectCounter, "from_pretrained", load(_Tally()))
    with pytest.warns(UserWarning, match="judge: .judge. has the weights of the verifier, which has a part"):
        report = score(_honest, judge="judge", counter="counter", model_name="small")
    assert loaded == ["judge", "counter", "verifier"]
    assert (report.judge, report.model) == ("judge", "small")


def test_report_is_json_and_a_table(score: Score, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test.json"
    file.write_text(json.dumps(LISTS))
    report = score(_honest, file, real=True, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "drawing" in captured.err
    fields = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert fields.keys() >= {field.name for field in dataclasses.fields(EvaluationReport)}
    assert fields.keys() >= {
        *("model", "conditions", "draws", "judge", "accuracy", "accuracy_ci95", "exact", "exact_ci95", "object_f1"),
        *("real_accuracy", "real_exact", "frechet_distance", "preservation", "diversity", "seconds"),
    }
    assert fields["conditions"] == "test.json"
    low, high = fields["accuracy_ci95"]
    assert 0 < low < high == 1
    assert (fields["accuracy"], fields["real_accuracy"], fields["matched_accuracy"]) == (1, 1, 1)
    assert fields["measures"].keys() == MEASURES.keys()
    assert fields["measures"]["accuracy"]["ci95"] == [low, high]
    lines = str(report).splitlines()
    assert all(len(line) <= 100 for line in lines)
    (accuracy,) = [line.split() for line in lines if line.startswith("accuracy")]
    assert accuracy[:8] == ["accuracy", "1.000", f"{low:.3f}", "..", "1.000", "14", "1.000", "1.000"]
    assert f"{report.measures['preservation'].drawn:.3f}" in str(report)
    silent = score(_honest, file, draws=1)
    assert capsys.readouterr().err == ""
    assert " -" in str(silent)


def test_what_does_not_fit_is_refused_before_anything_is_drawn(score: Score, packed: Path, tmp_path: Path) -> None:
    def never(*args: object, **options: object) -> Turns:
        raise AssertionError("nothing should be drawn")

    strange = IterativeGenerator(GeneratorConfig(width=1, z_dim=4, condition_dim=4, objects=("red cube", "pink cone")))
    for options, message in (
        ({"draws": 0}, "draws must be between 1 and 1,000,000, got 0"),
        ({"batch_size": -1}, r"batch_size must be between 1 and 2\*\*63 - 1, got -1"),
        ({"best_of": 0}, "best_of must be between 1 and 1,000,000, got 0"),
        ({"redraw": "scene"}, "redraw must be 'picture' or 'turn', got 'scene'"),
        ({"lists": []}, "conditions is empty"),
        ({"lists": [["red cub"]]}, "did you mean 'red cube'"),
        (
            {"lists": [["pink cone"]], "generator": strange},
            r"judge: '_Oracle' was not trained on all objects of the",
        ),
        ({"seed": -1}, "seed must be between"),
    ):
        with pytest.raises(ValueError, match=message):
            score(never, **options)
    for options, message in (
        ({"draws": "3"}, "draws must be a whole number, got '3'"),
        ({"draws": 1.5}, "draws must be a whole number, got 1.5"),
        ({"lists": None}, "conditions must be a list of objects .* got None"),
        ({"lists": 3}, "conditions must be a list of objects .* got 3"),
        ({"lists": [3]}, "got 3"),
        ({"judge": 5}, "judge must be of class SceneClassifier, or the name of one, got 5"),
        ({"counter": None}, "counter must be of class ObjectCounter"),
    ):
        with pytest.raises(TypeError, match=message):
            score(never, **options)
    with pytest.raises(DatasetError, match=r"nowhere\.npy.*condgan prepare"):
        _read(tmp_path / "nowhere.npy")
    index = json.loads((packed / f"condgan-{SIZE}.json").read_text())
    small = np.load(packed / f"condgan-{SIZE}.npy")[..., :32, :32]
    np.save(tmp_path / "small.npy", small)
    (tmp_path / "small.json").write_text(json.dumps(index | {"image_size": 32}))
    with pytest.raises(ValueError, match=r"small\.npy.* pictures of 32 pixels, but the generator draws 64"):
        _read(tmp_path / "small.npy")
    with pytest.raises(ValueError, match="no scene of the test split"):
        _read(_without(packed, "test"))


def test_long_lists_are_warned_of(score: Score) -> None:
    with pytest.warns(TooManyObjectsWarning, match="5 objects are asked"):
        score(_honest, lists=[["red cube"], ["red cube", "blue sphere", "gray cube", "cyan sphere", "red sphere"]])


def test_real_pictures_that_are_damaged_are_not_measured(score: Score, packed: Path) -> None:
    index = packed / f"condgan-{SIZE}.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"sha256": "0" * 64}))
    with pytest.raises(DatasetError, match="differs from its checksum"):
        score(_honest, real=True)


def test_a_list_that_cannot_be_read_is_named(generator: IterativeGenerator, tmp_path: Path) -> None:
    (tmp_path / "lists.json").write_text('[["red cube"], ["pink cube"]]')
    with pytest.raises(DatasetError, match=r"lists\.json, entry 1: unknown object 'pink cube'"):
        evaluate(generator, tmp_path / "lists.json")


def _without(packed: Path, split: str) -> Path:
    """The packed file, of the same name, without the scenes of a split."""
    index, pixels = packed / f"condgan-{SIZE}.json", packed / f"condgan-{SIZE}.npy"
    content = json.loads(index.read_text())
    keep = [i for i, scene in enumerate(content["scenes"]) if scene_split(scene["name"]) != split]
    np.save(pixels, np.load(pixels)[keep])
    index.write_text(json.dumps(content | {"scenes": [content["scenes"][i] for i in keep], "sha256": None}))
    return pixels


def test_without_validation_scenes_there_are_no_floors(score: Score, packed: Path) -> None:
    """What needs none is measured; a small set often has no scene of that split."""
    _without(packed, "validation")
    with pytest.warns(UserWarning, match="no scene of the validation split, .* layout are not measured"):
        report = score(_forgetful, real=True)
    assert [report.measures[name].real for name in RIGHTNESS] == [1] * 7
    assert report.measures["diversity_ratio"].drawn is not None
    assert _drawn(report, *LOOKS, "memorisation_p") == [None] * (len(LOOKS) + 1)
    assert report.layout == {}
    assert "layout, 0 alike" not in str(report)


def _read(path: Path) -> object:
    """What ``evaluate`` does with ``data`` before it draws."""
    return scenes.read_real(path, IterativeGenerator(GeneratorConfig(width=1, z_dim=4, condition_dim=4)), Vocabulary())
