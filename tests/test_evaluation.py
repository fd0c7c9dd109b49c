"""Evaluation in a small world whose scores are known: squares on a gray floor, and a judge that reads them exactly."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from condgan import evaluation, metrics
from condgan.classifier import SceneClassifier, SceneClassifierConfig
from condgan.datasets import scene_split
from condgan.drawing import Turns
from condgan.evaluation import EvaluationReport, evaluate
from condgan.images import to_uint8
from condgan.models import GeneratorConfig, IterativeGenerator
from condgan.vocab import ICLEVR_OBJECTS, Vocabulary

SIZE = 64
DRIFT = 2
"""Grey levels by which every turn after the first darkens the picture of an honest drawer."""
LISTS = [["red cube"], ["gray cube", "cyan sphere"], ["red cube", "blue sphere", "yellow cylinder"], ["green cube"]]
DrawTurns = Callable[[object, Sequence[Sequence[str]], Sequence[int]], Turns]


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


def _honest(generator: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int]) -> Turns:
    scenes = [_scene(names, seed) for names, seed in zip(conditions, seeds, strict=True)]
    turns = max(len(scene) for scene in scenes)
    images = torch.stack([torch.cat([scene, scene[-1:].expand(turns - len(scene), -1, -1, -1)]) for scene in scenes])
    return Turns(images / 127.5 - 1, torch.tensor([len(names) for names in conditions]), None)


def _forgetful(generator: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int]) -> Turns:
    """Leaves the last object of lists of three out."""
    return _honest(generator, [names[:2] for names in conditions], seeds)


def _one_light(generator: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int]) -> Turns:
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


@pytest.fixture
def generator() -> IterativeGenerator:
    return IterativeGenerator(GeneratorConfig(width=1, z_dim=4, condition_dim=4))


@pytest.fixture
def oracle() -> _Oracle:
    return _Oracle()


@pytest.fixture
def drawer(monkeypatch: pytest.MonkeyPatch) -> Callable[[DrawTurns], None]:
    return lambda draw_turns: monkeypatch.setattr(evaluation, "draw_turns", draw_turns)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A folder with real scenes of the same world in the packed format: 12 of the test split, 8 of validation."""
    wanted = {"test": 12, "validation": 8, "train": 1}  # 21 scenes, as many as there are second objects
    second = [name for name in ICLEVR_OBJECTS if name not in ("red cube", "green cube", "gray sphere")]
    pictures: list[Tensor] = []
    scenes: list[dict[str, object]] = []
    for number in itertools.count():
        name = f"scene_{number}"
        split = scene_split(name)
        if not wanted[split]:
            if not any(wanted.values()):
                break
            continue
        wanted[split] -= 1
        # Equal sets are found among first turns only.
        objects = [["red cube", "green cube"][number % 2], second[len(scenes)], "gray sphere"]
        pictures.append(to_uint8(_scene(objects, 1000 + number)[1:] / 127.5 - 1))
        scenes.append({"name": name, "objects": objects})
    array = torch.stack(pictures).numpy()
    np.save(tmp_path / f"condgan-{SIZE}.npy", array)
    index = {
        "format": "condgan-scenes",
        "version": 1,
        "image_size": SIZE,
        "sha256": "",
        "objects": list(ICLEVR_OBJECTS),
        "scenes": scenes,
    }
    (tmp_path / f"condgan-{SIZE}.json").write_text(json.dumps(index))
    return tmp_path


def test_a_drawer_without_faults_scores_one(
    generator: IterativeGenerator, oracle: _Oracle, drawer: Callable[[DrawTurns], None]
) -> None:
    drawer(_honest)
    report = evaluate(generator, LISTS, draws=3, judge=oracle, progress=False)
    assert (report.accuracy, report.exact, report.object_f1) == (1, 1, 1)
    assert report.accuracy_ci95 == report.exact_ci95 == (1, 1)
    assert (report.lists, report.objects_asked, report.draws, report.pictures) == (4, 7, 3, 12)
    assert (report.model, report.judge, report.conditions) == ("IterativeGenerator", "_Oracle", "given lists")
    assert report.seconds > 0


def test_a_missing_object_costs_what_it_should(
    generator: IterativeGenerator, oracle: _Oracle, drawer: Callable[[DrawTurns], None]
) -> None:
    drawer(_forgetful)
    # The third of the three highest outputs of a picture of two is any other object, never the missing one here: all
    # other middles are floor, equally dark, and the lowest id wins.
    report = evaluate(generator, LISTS, draws=5, judge=oracle, progress=False)
    assert report.accuracy == pytest.approx(6 / 7)
    assert report.exact == 3 / 4
    assert report.object_f1 == pytest.approx(2 * 6 / (6 + 7))
    low, high = report.accuracy_ci95
    assert 2 / 3 <= low < 6 / 7 < high == 1
    assert low == pytest.approx(2 / 3, abs=0.1)  # a resample may well hold the faulty list only or twice


def test_pictures_of_other_lists_score_low(
    generator: IterativeGenerator, oracle: _Oracle, drawer: Callable[[DrawTurns], None]
) -> None:
    shifted = {tuple(names): LISTS[(i + 1) % len(LISTS)] for i, names in enumerate(LISTS)}
    drawer(lambda g, conditions, seeds: _honest(g, [shifted[tuple(names)] for names in conditions], seeds))
    report = evaluate(generator, LISTS, draws=2, judge=oracle, progress=False)
    assert report.accuracy < 0.3
    assert report.exact == 0


def test_seeds_are_fixed_by_the_rule_and_results_do_not_depend_on_the_batch_size(
    generator: IterativeGenerator, oracle: _Oracle, drawer: Callable[[DrawTurns], None], packed: Path
) -> None:
    asked: list[tuple[tuple[str, ...], int]] = []

    def spy(g: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int]) -> Turns:
        asked.extend(zip(map(tuple, conditions), seeds, strict=True))
        return _honest(g, conditions, seeds)

    drawer(spy)
    reports = []
    for batch_size in (1, 5, 64):
        asked.clear()
        reports.append(
            evaluate(
                generator,
                LISTS,
                draws=3,
                judge=oracle,
                verifier=oracle,
                data=packed,
                seed=100,
                batch_size=batch_size,
                progress=False,
            )
        )
        main, matched = asked[: 3 * len(LISTS)], asked[3 * len(LISTS) :]
        expected = {(tuple(names), 100 + draw * len(LISTS) + i) for i, names in enumerate(LISTS) for draw in range(3)}
        assert len(main) == len(set(main))
        assert set(main) == expected
        assert [seed for _, seed in matched] == list(range(112, 124))
    first, *others = [report.to_dict() | {"seconds": 0} for report in reports]
    for other in others:
        for key, value in first.items():
            assert other[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


def test_preservation_is_of_the_turns_after_a_scenes_first(
    generator: IterativeGenerator, oracle: _Oracle, drawer: Callable[[DrawTurns], None]
) -> None:
    drawer(_honest)
    report = evaluate(generator, LISTS, draws=2, judge=oracle, progress=False)
    assert report.preservation == pytest.approx(DRIFT, abs=0.05)  # not the 40 of the first turn, not the 0 of padding
    # squares of 6x6 grown by 6 to 18x18, some cut by the border
    squares = [_square(Vocabulary().parse(names[turn])) for names in LISTS for turn in range(1, len(names))]
    areas = [
        (min(y.stop + 6, SIZE) - max(y.start - 6, 0)) * (min(x.stop + 6, SIZE) - max(x.start - 6, 0))
        for _, y, x in squares
    ]
    assert report.changed_area == pytest.approx(sum(areas) / len(areas) / SIZE**2)
    single = evaluate(generator, [["red cube"], ["blue cube"]], draws=2, judge=oracle, progress=False)
    assert single.preservation is None
    assert single.changed_area is None


def test_pictures_are_measured_as_they_are_saved(
    generator: IterativeGenerator, oracle: _Oracle, drawer: Callable[[DrawTurns], None]
) -> None:
    """A drift of 0.4 grey levels is gone in a file, and so is what lies beyond white."""

    def fine(g: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int]) -> Turns:
        image = torch.full((len(seeds), 3, 3, SIZE, SIZE), 100.0)
        image[:, 2] += 0.4
        image[:, 1:, :, 0] = torch.tensor([300.0, 280.0])[:, None, None]
        return Turns(image / 127.5 - 1, torch.full((len(seeds),), 2), None)

    drawer(fine)
    report = evaluate(generator, [["red cube", "blue cube"]], draws=2, judge=oracle, progress=False)
    assert report.preservation == 0


def test_diversity_is_the_mean_distance_of_draws_of_a_list(
    generator: IterativeGenerator, oracle: _Oracle, drawer: Callable[[DrawTurns], None]
) -> None:
    drawer(_one_light)
    report = evaluate(generator, LISTS, draws=3, judge=oracle, progress=False)
    assert report.diversity == 0
    drawer(_honest)
    report = evaluate(generator, LISTS, draws=3, judge=oracle, progress=False, seed=9)
    expected = []
    for i, names in enumerate(LISTS):
        final = [_scene(names, 9 + draw * len(LISTS) + i)[-1] for draw in range(3)]
        expected += [(a - b).square().mean().sqrt().item() for a, b in itertools.combinations(final, 2)]
    assert report.diversity == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert report.diversity_real is None
    assert report.diversity_ratio is None
    assert evaluate(generator, LISTS, draws=1, judge=oracle, progress=False).diversity is None


def test_real_pictures_are_judged_by_the_same_judge(
    generator: IterativeGenerator, oracle: _Oracle, drawer: Callable[[DrawTurns], None], packed: Path
) -> None:
    drawer(_forgetful)
    report = evaluate(generator, LISTS, draws=2, judge=oracle, verifier=oracle, data=packed, progress=False)
    assert report.accuracy < 1
    assert (report.real_accuracy, report.real_exact, report.real_pictures) == (1, 1, 36)
    assert report.preservation_real == pytest.approx(DRIFT, abs=0.05)
    assert report.changed_area_real is not None
    assert 0.03 < report.changed_area_real < 18 * 18 / SIZE**2 + 1e-6
    by_file = evaluate(
        generator, LISTS, draws=2, judge=oracle, verifier=oracle, data=packed / f"condgan-{SIZE}.npy", progress=False
    )
    assert dataclasses.replace(by_file, seconds=report.seconds) == report


def test_real_diversity_compares_sets_of_equal_size(
    generator: IterativeGenerator, oracle: _Oracle, drawer: Callable[[DrawTurns], None], packed: Path
) -> None:
    """Real pairs of equal sets exist among first turns only, so lists of one object alone enter the ratio."""
    drawer(_honest)
    report = evaluate(generator, LISTS, draws=4, judge=oracle, verifier=oracle, data=packed, progress=False)
    scenes = json.loads((packed / f"condgan-{SIZE}.json").read_text())["scenes"]
    firsts: dict[str, list[Tensor]] = {}
    for scene, pixels in zip(scenes, np.load(packed / f"condgan-{SIZE}.npy"), strict=True):
        if scene_split(scene["name"]) == "test":
            firsts.setdefault(scene["objects"][0], []).append(torch.from_numpy(pixels[0]).float())
    pairs = [
        (a - b).square().mean().sqrt().item() for group in firsts.values() for a, b in itertools.combinations(group, 2)
    ]
    assert report.diversity_real == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    singles = evaluate(
        generator, [LISTS[0], LISTS[3]], draws=2, judge=oracle, verifier=oracle, data=packed, progress=False
    )
    assert singles.diversity is not None
    assert singles.diversity_real is not None
    assert singles.diversity_ratio == pytest.approx(singles.diversity / singles.diversity_real)
    threes = evaluate(generator, [LISTS[2]], draws=2, judge=oracle, verifier=oracle, data=packed, progress=False)
    assert threes.diversity_real is None
    assert threes.diversity_ratio is None
    drawer(_one_light)
    same = evaluate(generator, LISTS, draws=4, judge=oracle, verifier=oracle, data=packed, progress=False)
    assert same.diversity_ratio == 0


def test_frechet_distances_are_what_the_features_say(
    generator: IterativeGenerator, oracle: _Oracle, drawer: Callable[[DrawTurns], None], packed: Path
) -> None:
    index = json.loads((packed / f"condgan-{SIZE}.json").read_text())
    real = torch.from_numpy(np.load(packed / f"condgan-{SIZE}.npy"))
    splits = [scene_split(scene["name"]) for scene in index["scenes"]]
    test, validation = (
        torch.cat([pixels for pixels, s in zip(real, splits, strict=True) if s == split])
        for split in ("test", "validation")
    )
    test_lists = [tuple(scene["objects"]) for scene, s in zip(index["scenes"], splits, strict=True) if s == "test"]
    known = dict(zip(test_lists, real[[s == "test" for s in splits]], strict=True))

    def copies(g: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int], lighter: int = 0) -> Turns:
        """Real pictures where the list is one of the test split, an honest drawing elsewhere."""
        turns = _honest(g, conditions, seeds)
        for i, names in enumerate(conditions):
            if tuple(names) in known:
                turns.images[i, 1:] = known[tuple(names)].float().add(lighter) / 127.5 - 1
        return turns

    drawer(copies)
    report = evaluate(generator, LISTS, draws=9, judge=oracle, verifier=oracle, data=packed, progress=False)
    assert report.frechet_pictures == 24  # 8 validation scenes of 3 pictures are the smallest set
    assert report.frechet_matched == pytest.approx(0, abs=1e-6)

    def features(pixels: Tensor) -> Tensor:
        return oracle.features(pixels.float() / 127.5 - 1)

    floor = metrics.frechet_distance(features(validation), features(test[:24]))
    assert report.frechet_floor == pytest.approx(floor, rel=1e-6)
    final = [_scene(names, draw * len(LISTS) + i)[-1] for draw in range(6) for i, names in enumerate(LISTS)]
    distance = metrics.frechet_distance(features(torch.stack(final)), features(test[:24]))
    assert report.frechet_distance == pytest.approx(distance, rel=1e-6)

    drawer(lambda g, conditions, seeds: copies(g, conditions, seeds, lighter=5))
    lighter = evaluate(generator, LISTS, draws=9, judge=oracle, verifier=oracle, data=packed, progress=False)
    assert lighter.frechet_matched == pytest.approx(2 * 5**2, abs=2.0)  # both features shift by 5; bright squares less
    few = evaluate(generator, LISTS[:1], draws=1, judge=oracle, verifier=oracle, data=packed, progress=False)
    assert few.frechet_distance is None
    assert few.frechet_floor is not None


def test_real_generator_and_classifier_are_left_as_they_were(generator: IterativeGenerator) -> None:
    judge = SceneClassifier(SceneClassifierConfig(widths=(4, 4), blocks=(1, 1), stem="small"))
    generator.train()
    judge.train()
    before = {name: value.clone() for name, value in [*generator.state_dict().items(), *judge.state_dict().items()]}
    random_state = torch.get_rng_state()
    reports = [evaluate(generator, LISTS, draws=2, judge=judge, batch_size=n, progress=False) for n in (3, 8)]
    first, second = (dataclasses.replace(report, seconds=0.0) for report in reports)
    assert first == second
    assert 0 <= first.accuracy <= 1
    assert torch.equal(random_state, torch.get_rng_state())
    assert generator.training and judge.training
    after = dict([*generator.state_dict().items(), *judge.state_dict().items()])
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_judge_runs_in_eval_mode(
    generator: IterativeGenerator, oracle: _Oracle, drawer: Callable[[DrawTurns], None]
) -> None:
    drawer(_honest)
    oracle.train()
    evaluate(generator, LISTS, draws=1, judge=oracle, progress=False)
    assert oracle.modes and not any(oracle.modes)
    assert oracle.training


def test_names_load_the_shipped_classifiers_and_the_verifier_only_with_data(
    generator: IterativeGenerator,
    oracle: _Oracle,
    drawer: Callable[[DrawTurns], None],
    monkeypatch: pytest.MonkeyPatch,
    packed: Path,
) -> None:
    loaded = []

    def load(name: str) -> SceneClassifier:
        loaded.append(name)
        return oracle

    monkeypatch.setattr(SceneClassifier, "from_pretrained", load)
    drawer(_honest)
    report = evaluate(generator, LISTS, draws=1, progress=False, model_name="small")
    assert loaded == ["judge"]
    assert (report.judge, report.model) == ("judge", "small")
    evaluate(generator, LISTS, draws=1, data=packed, progress=False)
    assert loaded == ["judge", "judge", "verifier"]


def test_report_is_json_and_a_table(
    generator: IterativeGenerator,
    oracle: _Oracle,
    drawer: Callable[[DrawTurns], None],
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawer(_honest)
    file = tmp_path / "test.json"
    file.write_text(json.dumps(LISTS))
    report = evaluate(generator, file, draws=2, judge=oracle, verifier=oracle, data=packed)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "drawing" in captured.err
    fields = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert fields.keys() == {field.name for field in dataclasses.fields(EvaluationReport)}
    assert fields.keys() >= {
        *("model", "conditions", "draws", "judge", "accuracy", "accuracy_ci95", "exact", "exact_ci95", "object_f1"),
        *("real_accuracy", "real_exact", "frechet_distance", "preservation", "diversity", "seconds"),
    }
    assert fields["conditions"] == "test.json"
    assert fields["accuracy_ci95"] == [1, 1]
    assert all(value is not None for value in fields.values())
    lines = str(report).splitlines()
    assert all(len(line) <= 100 for line in lines)
    (accuracy,) = [line.split() for line in lines if line.startswith("accuracy")]
    assert accuracy == ["accuracy", "1.000", "1.000", "..", "1.000", "1.000"]
    assert f"{report.preservation:.2f}" in str(report)
    silent = evaluate(generator, file, draws=1, judge=oracle, progress=False)
    assert capsys.readouterr().err == ""
    assert " -" in str(silent)


def test_what_does_not_fit_is_refused_before_anything_is_drawn(
    generator: IterativeGenerator, oracle: _Oracle, drawer: Callable[[DrawTurns], None], packed: Path, tmp_path: Path
) -> None:
    def never(g: object, conditions: Sequence[Sequence[str]], seeds: Sequence[int]) -> Turns:
        raise AssertionError("nothing should be drawn")

    drawer(never)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        evaluate(generator, LISTS, draws=0, judge=oracle)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        evaluate(generator, LISTS, batch_size=-1, judge=oracle)
    with pytest.raises(ValueError, match="conditions is empty"):
        evaluate(generator, [], judge=oracle)
    with pytest.raises(ValueError, match="did you mean 'red cube'"):
        evaluate(generator, [["red cub"]], judge=oracle)
    with pytest.raises(ValueError, match="seed must be between"):
        evaluate(generator, LISTS, seed=-1, judge=oracle)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npy.*condgan prepare"):
        evaluate(generator, LISTS, judge=oracle, verifier=oracle, data=tmp_path / "nowhere.npy")
    index = json.loads((packed / f"condgan-{SIZE}.json").read_text())
    small = np.load(packed / f"condgan-{SIZE}.npy")[..., :32, :32]
    np.save(tmp_path / "small.npy", small)
    (tmp_path / "small.json").write_text(json.dumps(index | {"image_size": 32}))
    with pytest.raises(ValueError, match=r"small\.npy.* pictures of 32 pixels, but the generator draws 64"):
        evaluate(generator, LISTS, judge=oracle, verifier=oracle, data=tmp_path / "small.npy")
    train = [i for i, scene in enumerate(index["scenes"]) if scene_split(scene["name"]) == "train"]
    np.save(tmp_path / "train.npy", np.load(packed / f"condgan-{SIZE}.npy")[train])
    (tmp_path / "train.json").write_text(json.dumps(index | {"scenes": [index["scenes"][i] for i in train]}))
    with pytest.raises(ValueError, match="no scene of the test split"):
        evaluate(generator, LISTS, judge=oracle, verifier=oracle, data=tmp_path / "train.npy")
