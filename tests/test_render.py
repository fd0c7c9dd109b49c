"""render.py: scenes are what was asked for, where it was asked for, and data sets can be continued."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from condgan import SceneClassifier, images
from condgan.datasets import SceneDataset
from condgan.functional import place_of_change
from condgan.layout import CAMERA_HEIGHT, cube_rotation
from condgan.prepare import prepare
from condgan.render import (
    CAMERA,
    MIN_DISTANCE,
    REACH,
    PlacedObject,
    RenderedScene,
    render_dataset,
    render_scene,
)
from condgan.vocab import ICLEVR_OBJECTS, Vocabulary

SMALL = 48


def stacked(scene: RenderedScene) -> Tensor:
    """(T + 1, 3, H, W) in [-1, 1]: the empty scene, then the picture after each turn."""
    return torch.stack([images.to_tensor(picture) for picture in (scene.empty, *scene.turns)])


@pytest.fixture(scope="module")
def scene() -> RenderedScene:
    return render_scene(["Red  cube", "blue sphere", "grey cylinder"], 7, height=96)


def test_a_turn_adds_an_object_at_its_place_and_leaves_the_rest(scene: RenderedScene) -> None:
    pictures = stacked(scene)
    assert pictures.shape == (4, 3, 96, 128)
    assert [item.name for item in scene.objects] == ["red cube", "blue sphere", "gray cylinder"]
    places = place_of_change(pictures[:-1], pictures[1:])
    assert (places - torch.tensor(scene.places)).norm(dim=1).max() < 4, "shadows move the centre of what changed"
    for before, after, (x, y) in zip(pictures[:-1], pictures[1:], scene.places, strict=True):
        change = (after - before).abs().mean(0)
        near = torch.zeros_like(change, dtype=torch.bool)
        near[int(y) - 16 : int(y) + 17, int(x) - 16 : int(x) + 17] = True
        assert change[near].mean() > 20 * change[~near].mean()
    red, blue, gray = (pictures[-1][:, round(y), round(x)] for x, y in scene.places)
    assert red.argmax() == 0
    assert blue.argmax() == 2
    assert gray.max() - gray.min() < 0.1 < red.max() - red.min()


def test_the_seed_decides_all_and_pictures_do_not_depend_on_later_turns(scene: RenderedScene) -> None:
    again = render_scene([item.name for item in scene.objects], 7, height=96)
    assert again.objects == scene.objects
    assert torch.equal(stacked(again), stacked(scene))
    other = render_scene([item.name for item in scene.objects], 8, height=96)
    assert other.objects[1] != scene.objects[1]
    assert (stacked(other)[0] - stacked(scene)[0]).abs().mean() > 0.01, "another light"


def test_names_are_placed_as_in_iclevr() -> None:
    scenes = [render_scene(["red cube"] * 4, seed, height=8) for seed in range(10)]
    for scene in scenes:
        points = torch.tensor([(item.x, item.y) for item in scene.objects], dtype=torch.float64)
        assert points[0].tolist() == [0, 0]
        assert points.abs().max() <= REACH
        assert torch.pdist(points).min() >= MIN_DISTANCE
    assert len({round(item.rotation) for scene in scenes for item in scene.objects}) > 20
    with pytest.raises(ValueError, match=r"objects: no place is left for one of 12, 2\.4 units from all others"):
        render_scene(["red cube"] * 12, 0)


@pytest.mark.parametrize("turned", [10, 30, 60, 80])
def test_placed_objects_stay_and_cubes_are_turned_as_told(turned: int) -> None:
    """Against the fit that measures the rotation of cubes, which looks from a camera a little lower."""
    towards = torch.atan2(torch.tensor(CAMERA[1]), torch.tensor(CAMERA[0])).rad2deg().item()
    cube = PlacedObject("cyan cube", 0.5, -0.5, towards + turned)
    pictures = stacked(render_scene([cube, "red sphere"], 3, height=240))
    found = render_scene([cube], 3, height=8).objects
    assert found == [cube]
    small = images.resize(pictures, 64)
    assert pytest.approx(CAMERA[2], abs=0.5) == CAMERA_HEIGHT
    assert cube_rotation(small[:1], small[1:2]).item() == pytest.approx(turned, abs=12)


@pytest.mark.slow
def test_the_verifier_sees_what_was_rendered() -> None:
    names = [[ICLEVR_OBJECTS[(5 * i + 7 * t) % 24] for t in range(3)] for i in range(8)]
    last = torch.stack([images.to_tensor(render_scene(scene, i).turns[-1]) for i, scene in enumerate(names)])
    found = SceneClassifier.from_pretrained().probabilities(last).topk(3).indices
    vocabulary = Vocabulary()
    right = [vocabulary.parse(name) in found[i].tolist() for i, scene in enumerate(names) for name in scene]
    assert sum(right) >= 0.8 * len(right), "by chance one in eight"


def test_mitsubas_variant_is_left_as_it_was() -> None:
    import mitsuba

    mitsuba.set_variant("scalar_spectral")
    render_scene(["red cube"], 0, height=8)
    assert mitsuba.variant() == "scalar_spectral"


@pytest.mark.parametrize(
    ("objects", "options", "error", "message"),
    [
        (["red cub"], {}, ValueError, "unknown object 'red cub': did you mean 'red cube'"),
        ([], {}, ValueError, "objects must be a list such as .* got \\[\\]"),
        ([("red cube", 0, 0, 0)], {}, TypeError, "red cube"),
        ([PlacedObject("red cube", float("nan"), 0, 0)], {}, ValueError, "x, y and rotation must be finite numbers"),
        ("red cube", {}, ValueError, "objects must be a list such as .* got 'red cube'"),
        (["red cube"], {"seed": -1}, ValueError, "seed must be between 0"),
        (["red cube"], {"seed": None}, TypeError, "seed must be a whole number, got None"),
        (["red cube"], {"height": 7}, ValueError, "height must be between 8 and"),
    ],
)
def test_what_cannot_be_rendered(
    objects: list[str], options: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        render_scene(objects, **{"seed": 0, **options})  # type: ignore[arg-type]


def test_without_mitsuba_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    with pytest.raises(ModuleNotFoundError, match="pip install mitsuba"):
        render_scene(["red cube"], 0)
    with pytest.raises(ModuleNotFoundError, match="pip install mitsuba"):
        render_dataset(tmp_path / "scenes", 1, progress=False)
    assert not (tmp_path / "scenes").exists()


# --- data sets ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scenes; the tests leave it alone."""
    folder = tmp_path_factory.mktemp("rendered") / "scenes"
    report = render_dataset(folder, 4, seed=5, height=SMALL, progress=False)
    assert (report.out, report.scenes, report.pictures, report.rendered) == (str(folder), 4, 12, 4)
    assert report.summary().splitlines()[0].startswith(f"{folder}: 4 scenes, 12 pictures; took ")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prepare_reads_the_pictures_and_the_names(dataset: Path, tmp_path: Path) -> None:
    report = prepare(dataset, out=tmp_path / "packed.npy", progress=False)
    assert (report.scenes, report.missing, report.unlabelled, report.skipped_scenes) == (4, (), (), ())
    labels = json.loads((dataset / "train.json").read_text())
    for item in SceneDataset(report.path, split=None):
        names = labels[f"{item.name}_2.png"]
        assert len({*names}) == 3
        assert Vocabulary().decode(item.objects.any(0).float()) == sorted(names, key=ICLEVR_OBJECTS.index)
        edges = item.images.diff(dim=-1).abs().amax(1)  # (3, 64, 63)
        middle = torch.zeros_like(edges, dtype=torch.bool)
        middle[:, 14:42, 20:44] = True
        assert edges[0][middle[0]].amax() > 0.2 > edges[0][~middle[0]].amax(), "the first object is in the middle"
        assert (edges[1:].masked_fill(middle[1:], 0).amax((1, 2)) > 0.2).all(), "later ones are not"


def test_the_lists_are_as_many_and_as_long_as_those_of_iclevr(dataset: Path) -> None:
    lengths = {}
    for file in ("test.json", "new_test.json"):
        lists = json.loads((dataset / file).read_text())
        assert all(len({*names}) == len(names) and {*names} <= {*ICLEVR_OBJECTS} for names in lists)
        lengths[file] = Counter(map(len, lists))
    assert lengths == {"test.json": {1: 6, 2: 12, 3: 14}, "new_test.json": {2: 12, 3: 20}}


def test_a_set_goes_on_after_an_interruption_and_can_be_lengthened(dataset: Path, tmp_path: Path) -> None:
    whole = content(dataset)
    folder = tmp_path / "scenes"
    assert render_dataset(folder, 2, seed=5, height=SMALL, progress=False).rendered == 2
    (folder / "images" / "CLEVR_train_000001_2.png").unlink()
    (folder / "train.json").unlink()
    report = render_dataset(folder, 4, seed=5, height=SMALL, progress=False)
    assert report.rendered == 3
    assert "4 scenes, 1 of them from before, 12 pictures" in report.summary()
    assert content(folder) == whole
    assert render_dataset(folder, 4, seed=5, height=SMALL, progress=False).rendered == 0


def test_a_folder_of_something_else_is_refused(dataset: Path, tmp_path: Path) -> None:
    before = content(dataset)
    with pytest.raises(ValueError, match="holds another set: seed was 5 and is 6; choose another folder"):
        render_dataset(dataset, 4, seed=6, height=SMALL, progress=False)
    with pytest.raises(ValueError, match="holds more than 3 scenes: ask for at least as many"):
        render_dataset(dataset, 3, seed=5, height=SMALL, progress=False)
    assert content(dataset) == before
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds train\.json, but no render\.json that says what it is"):
        render_dataset(tmp_path, 1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
