"""datasets.py: JSON files of i-CLEVR, the packed file, augmentation."""

from __future__ import annotations

import copy
import json
import os
import pickle
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenes import draw_scene, write_iclevr_layout
from torch import Tensor

from condgan.datasets import (
    DatasetError,
    SceneDataset,
    augment_scene,
    packed_path,
    read_conditions,
    read_objects,
    scene_half,
    scene_split,
)
from condgan.prepare import prepare
from condgan.scenes import open_real
from condgan.vocab import ICLEVR_OBJECTS, Vocabulary

NUM_SCENES = 24  # the fewest with all three splits


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder; tests that write to it copy it first."""
    folder = write_iclevr_layout(tmp_path_factory.mktemp("data") / "iclevr", NUM_SCENES)
    prepare(folder, image_size=16, out=packed_path(folder), progress=False)
    return folder


@pytest.fixture
def packed(data_dir: Path, tmp_path: Path) -> Path:
    """A packed file of one's own, to damage."""
    path = tmp_path / "own.npy"
    path.write_bytes(packed_path(data_dir).read_bytes())
    path.with_suffix(".json").write_bytes(packed_path(data_dir).with_suffix(".json").read_bytes())
    return path


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# --- the drawn scenes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [(96, 72), (16, 16), (15, 15), (64, 64)])
def test_drawn_scene_changes_only_around_the_place_of_the_new_object(image_size: tuple[int, int]) -> None:
    for seed in range(30):
        scene = draw_scene(np.random.default_rng(seed), image_size, num_turns=9)
        assert scene.places[0] == (image_size[0] // 2, image_size[1] // 2)
        for turn in range(1, 9):
            changed = (np.array(scene.pictures[turn]) != np.array(scene.pictures[turn - 1])).any(-1)
            rows, columns = changed.nonzero()
            assert columns.mean() == pytest.approx(scene.places[turn][0], abs=0.5)
            assert rows.mean() == pytest.approx(scene.places[turn][1], abs=0.5)


# --- JSON files ---------------------------------------------------------------------------------------------------


def test_conditions_are_the_same_from_a_list_and_from_a_dict(tmp_path: Path) -> None:
    lists = [["red cube"], ["gray cube", "cyan sphere"]]
    (tmp_path / "list.json").write_text(json.dumps(lists))
    (tmp_path / "dict.json").write_text(json.dumps({"z_0.png": lists[0], "a_1.png": lists[1]}), encoding="utf-8-sig")
    assert read_conditions(tmp_path / "list.json") == read_conditions(tmp_path / "dict.json") == lists


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_conditions_may_come_through_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=['[["red cube"]]'])
    writer.start()
    assert read_conditions(tmp_path / "pipe") == [["red cube"]]
    writer.join()


def test_conditions_come_in_the_spelling_of_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text('[["Grey  CUBE"]]')
    assert read_conditions(tmp_path / "test.json", Vocabulary()) == [["gray cube"]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no file"),
        ("[[", "not valid JSON"),
        ('"red cube"', "list of lists"),
        ("[]", "list of lists"),
        ("{}", "list of lists"),
        ('["red cube"]', "entry 0: expected a list of names"),
        ('[["red cube"], []]', "entry 1: the list of objects is empty"),
        ('[["red cube", 3]]', "entry 0: expected a list of names"),
        ('{"a_0.png": ["red cub"]}', "entry 'a_0.png': unknown object 'red cub': did you mean 'red cube'"),
    ],
)
def test_bad_conditions_are_named(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "test.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DatasetError) as caught:
        read_conditions(path, Vocabulary())
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_objects_are_ordered_by_their_index(tmp_path: Path) -> None:
    (tmp_path / "objects.json").write_text('{"red cube": 1, "blue cone": 0}')
    assert read_objects(tmp_path / "objects.json").names == ("blue cone", "red cube")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[1", "not valid JSON"),
        ("{}", "expected a dict"),
        ('["red cube"]', "expected a dict"),
        ('{"red cube": 0, "blue cube": 2}', "0 to 1, each once"),
        ('{"red cube": 0, "blue cube": 0}', "0 to 1, each once"),
        ('{"red cube": "0"}', "0 to 0, each once"),
        ('{"red cube": false}', "0 to 0, each once"),
        ('{"Red Cube": 0}', "'Red Cube' in lower case"),
        ('{"grey cube": 0}', "'grey cube' in lower case"),
    ],
)
def test_bad_objects_are_named(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "objects.json").write_text(content)
    with pytest.raises(DatasetError) as caught:
        read_objects(tmp_path / "objects.json")
    assert expected in str(caught.value)
    assert "objects.json" in str(caught.value)


# --- the packed file ----------------------------------------------------------------------------------------------


def test_item_is_a_scene_with_the_labels_of_train_json(data_dir: Path) -> None:
    data = SceneDataset(packed_path(data_dir))
    labels = json.loads((data_dir / "train.json").read_text())
    assert len(data) == NUM_SCENES
    assert data.vocabulary.names == ICLEVR_OBJECTS
    for i in range(NUM_SCENES):
        images, objects, name = data[i]
        assert images.shape == (3, 3, 16, 16)
        assert images.dtype == objects.dtype == torch.float32
        torch.testing.assert_close((images + 1) * 127.5, data.pixels[i].float(), rtol=0, atol=1e-4)
        assert objects.sum(1).tolist() == [1, 1, 1]
        for turn in range(3):
            seen = objects[: turn + 1].sum(0)
            assert set(data.vocabulary.decode(seen)) == set(labels[f"{name}_{turn}.png"])


def test_first_and_last_grey_level_are_minus_one_and_one(packed: Path) -> None:
    data = SceneDataset(packed)
    data.pixels[0, 0] = 0
    data.pixels[0, 1] = 255
    assert (data[0].images[0] == -1).all()
    assert (data[0].images[1] == 1).all()


def test_splits_and_halves_part_the_scenes(data_dir: Path) -> None:
    parts = {
        (split, half): SceneDataset(data_dir, split, half)
        for split in ("train", "validation", "test")
        for half in (0, 1)
    }
    everything = SceneDataset(data_dir)
    assert sorted(name for part in parts.values() for name in part.names) == everything.names
    for (split, half), part in parts.items():
        assert part.objects.shape == (len(part), 3)
        assert part.objects.dtype == torch.int64
        assert part.pixels.shape == (len(part), 3, 3, 16, 16)
        for name, pixels, objects in zip(part.names, part.pixels, part.objects, strict=True):
            assert (scene_split(name), scene_half(name)) == (split, half)
            whole = everything.names.index(name)
            assert torch.equal(pixels, everything.pixels[whole])
            assert torch.equal(objects, everything.objects[whole])


def test_scenes_without_some_objects_are_all_the_others(data_dir: Path) -> None:
    everything = SceneDataset(data_dir)
    left_out = ["red cube", "Grey  sphere"]
    rest = everything.without(left_out)
    ids = {everything.vocabulary.parse(name) for name in left_out}
    kept = [i for i, scene in enumerate(everything.objects.tolist()) if not ids & set(scene)]
    assert 0 < len(kept) < NUM_SCENES
    assert len(rest) == len(kept)
    assert rest.names == [everything.names[i] for i in kept]
    assert rest.vocabulary is everything.vocabulary
    for new, old in enumerate(kept):
        assert torch.equal(rest[new].images, everything[old].images)
        assert torch.equal(rest[new].objects, everything[old].objects)
    assert len(everything) == len(everything.pixels) == len(everything.objects) == NUM_SCENES, "it is as it was"
    assert everything.without([]).names == everything.names
    assert everything.without("red cube").names == everything.without(["red cube"]).names
    with pytest.raises(ValueError, match="unknown object 'red cubes'"):
        everything.without(["red cubes"])


def test_split_of_a_name_never_changes() -> None:
    names = ["CLEVR_train_000000", "CLEVR_train_000008", "CLEVR_train_000023"]
    assert [scene_split(name) for name in names] == ["train", "test", "validation"]
    assert [scene_half(name) for name in names] == [1, 1, 0]
    shares = [scene_split(f"CLEVR_train_{number:06d}") for number in range(6003)]
    assert shares.count("train") / 6003 == pytest.approx(0.9, abs=0.01)
    assert shares.count("test") / 6003 == pytest.approx(0.05, abs=0.01)


def test_all_scenes_are_mapped_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, (4, 1, 3, 2048, 2048))  # 50 MB, sparse
    index = {
        "format": "condgan-scenes",
        "version": 1,
        "image_size": 2048,
        "objects": ["red cube"],
        "scenes": [{"name": str(i), "objects": ["red cube"]} for i in range(4)],
    }
    path.with_suffix(".json").write_text(json.dumps(index))
    tracemalloc.start()
    try:
        data = SceneDataset(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert data.pixels.shape == (4, 1, 3, 2048, 2048)
    assert peak < 1_000_000


def test_writing_to_the_pixels_leaves_the_file_alone(packed: Path) -> None:
    before = packed.read_bytes()
    data = SceneDataset(packed)
    data.pixels.fill_(7)
    del data
    assert packed.read_bytes() == before


def test_folder_stands_for_its_packed_file(data_dir: Path, tmp_path: Path) -> None:
    assert SceneDataset(data_dir).path == packed_path(data_dir)
    prepare(data_dir, out=tmp_path, image_size=8, progress=False)
    assert SceneDataset(tmp_path).path == tmp_path / "condgan-8.npy"
    prepare(data_dir, out=tmp_path, image_size=9, progress=False)
    with pytest.raises(DatasetError, match=r"condgan-8\.npy.*condgan-9\.npy"):
        SceneDataset(tmp_path)
    prepare(data_dir, out=tmp_path, progress=False)
    assert SceneDataset(tmp_path).path == tmp_path / "condgan-64.npy"


def test_of_several_packed_files_the_one_of_the_asked_size_is_opened(data_dir: Path, tmp_path: Path) -> None:
    for image_size in (8, 64):
        prepare(data_dir, out=packed_path(tmp_path, image_size), image_size=image_size, progress=False)
    for asked, found in ((8, 8), (64, 64), (None, 64), (32, 64)):
        assert SceneDataset(tmp_path, image_size=asked).path == packed_path(tmp_path, found)


def test_a_packed_file_is_found_in_its_folder_whatever_its_name(data_dir: Path, tmp_path: Path) -> None:
    prepare(data_dir, out=tmp_path / "own.npy", image_size=32, progress=False)
    (tmp_path / "later.partial.npy").touch()
    (tmp_path / "later.partial.json").touch()
    (tmp_path / "features.npy").touch()
    assert SceneDataset(tmp_path).path == tmp_path / "own.npy"
    assert open_real(tmp_path, 32).path == tmp_path / "own.npy"


def test_folder_that_is_not_prepared_says_how(tmp_path: Path) -> None:
    folder = write_iclevr_layout(tmp_path / "raw", 1)
    with pytest.raises(DatasetError, match=rf"not prepared yet: run `condgan prepare {folder}`"):
        SceneDataset(folder)
    (folder / "condgan-64.partial.npy").touch()
    with pytest.raises(DatasetError, match=rf"unfinished: run `condgan prepare {folder}`"):
        SceneDataset(folder)
    spaced = folder.rename(tmp_path / "my data")
    with pytest.raises(DatasetError, match=rf"run `condgan prepare '{spaced}'`$"):
        SceneDataset(spaced)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_index(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit_json(path.with_suffix(".json"), lambda index: index.update(changes))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (Path.unlink, "there is no file"),
        (lambda path: path.with_suffix(".json").unlink(), "there is no index"),
        (lambda path: path.with_suffix(".json").write_text("{"), "not valid JSON"),
        (change_index(format="other"), "is no index of a packed file"),
        (change_index(version=2), "format version 2"),
        (change_index(image_size=17), "does not fit its index"),
        (change_index(image_size="large"), "is damaged"),
        (change_index(image_size=float("inf")), "is damaged"),
        (change_index(objects=["red cube"]), "unknown object"),
        (change_index(objects=[]), "is damaged"),
        (change_index(scenes=[]), "does not fit its index"),
        (change_index(scenes=[{"objects": ["red cube"]}]), "is damaged"),
        (change_index(scenes=[{"name": "a", "objects": ["red cube"]}] * NUM_SCENES), "does not fit its index"),
        (truncate, "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: np.save(path, np.zeros((NUM_SCENES, 3, 3, 16, 16), np.float32)), "got float32"),
        (lambda path: np.save(path, np.array([None])), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"), }", b"", 1)), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"(", b"(-", 1)), "cannot be read"),
        (lambda path: path.write_bytes(b"PK\x03\x04 of another program"), "cannot be read"),
        (lambda path: path.with_suffix(".json").write_text("[" * 100_000), "not valid JSON"),
    ],
)
def test_damage_is_named_with_the_way_out(packed: Path, damage: Callable[[Path], object], expected: str) -> None:
    SceneDataset(packed)
    damage(packed)
    with pytest.raises(DatasetError) as caught:
        SceneDataset(packed)
    message = str(caught.value)
    assert expected in message
    assert str(packed.with_suffix("")) in message
    assert "condgan prepare" in message or "give another file" in message


@pytest.mark.parametrize("path", ["nowhere", "nowhere.npy"])
def test_missing_path_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(DatasetError, match=rf"{path}.*condgan prepare"):
        SceneDataset(tmp_path / path)


def test_checksum_finds_one_flipped_bit(packed: Path) -> None:
    SceneDataset(packed, verify=True)
    content = bytearray(packed.read_bytes())
    content[-100] ^= 1
    packed.write_bytes(content)
    with pytest.raises(DatasetError, match="damaged"):
        SceneDataset(packed, verify=True)
    data = SceneDataset(packed)
    with pytest.raises(DatasetError, match="damaged"):
        data.verify()


def test_index_without_checksum_can_be_read_but_not_verified(packed: Path) -> None:
    edit_json(packed.with_suffix(".json"), lambda index: index.pop("sha256"))
    with pytest.raises(DatasetError, match="no checksum"):
        SceneDataset(packed).verify()


@pytest.mark.parametrize("options", [{"split": "dev"}, {"half": 2}])
def test_bad_options_are_named(data_dir: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        SceneDataset(data_dir, **options)


# --- augmentation -------------------------------------------------------------------------------------------------


def coordinate_images(num_scenes: int, height: int, width: int) -> Tensor:
    """(N, 2, 3, H, W): every pixel holds its own x, y and turn, so the result shows where it came from."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    turns = [torch.stack([x, y, torch.full_like(x, turn)]) for turn in range(2)]
    return torch.stack(turns).expand(num_scenes, -1, -1, -1, -1)


def test_all_turns_move_alike_by_a_mirror_and_a_shift_with_repeated_edges() -> None:
    height, width = 12, 15
    moved = augment_scene(coordinate_images(400, height, width), torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, 0, :2], moved[:, 1, :2])
    assert torch.equal(moved[:, :, 2], torch.tensor([0, 1])[None, :, None, None].expand(400, 2, height, width))
    seen = set()
    for x, y, _ in moved[:, 0]:
        flipped = bool(x[0, 0] > x[0, -1])
        shift_x = width // 2 - int((width - 1 - x if flipped else x)[0, width // 2])
        shift_y = height // 2 - int(y[height // 2, 0])
        columns = (torch.arange(width) - shift_x).clamp(0, width - 1)
        assert torch.equal(x, (width - 1 - columns if flipped else columns).expand(height, width))
        rows = (torch.arange(height) - shift_y).clamp(0, height - 1)
        assert torch.equal(y, rows[:, None].expand(height, width))
        seen.add((flipped, shift_x, shift_y))
    assert {flipped for flipped, _, _ in seen} == {False, True}
    assert {x for _, x, _ in seen} == {y for _, _, y in seen} == {*range(-4, 5)}
    assert len(seen) > 100  # of 162: the three choices are independent


def test_places_follow_the_pictures() -> None:
    images = coordinate_images(200, 20, 24)
    places = torch.stack([torch.randint(8, 16, (200, 2)), torch.randint(8, 12, (200, 2))], -1)
    moved, moved_places = augment_scene(images, torch.Generator().manual_seed(1), places.float())
    for scene in range(200):
        for turn in range(2):
            x, y = moved_places[scene, turn].long().tolist()
            assert moved[scene, turn, :2, y, x].tolist() == places[scene, turn].tolist()


def test_augmented_pictures_do_not_depend_on_places_and_repeat_with_the_seed() -> None:
    images = torch.rand(8, 3, 3, 16, 16)
    places = torch.rand(8, 3, 2)
    plain = augment_scene(images, torch.Generator().manual_seed(2))
    again, _ = augment_scene(images, torch.Generator().manual_seed(2), places)
    other = augment_scene(images, torch.Generator().manual_seed(3))
    assert torch.equal(plain, again)
    assert not torch.equal(plain, other)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_augmentation_makes_no_new_colour_and_keeps_dtype_and_input(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (5, 3, 3, 9, 11)).to(dtype)
    before = images.clone()
    moved = augment_scene(images, torch.Generator().manual_seed(4))
    assert moved.dtype == dtype
    assert torch.equal(images, before)
    for scene, original in zip(moved, images, strict=True):
        colours = {tuple(pixel) for pixel in original.permute(0, 2, 3, 1).flatten(0, 2).tolist()}
        assert {tuple(pixel) for pixel in scene.permute(0, 2, 3, 1).flatten(0, 2).tolist()} <= colours


def test_no_shift_leaves_only_mirrors() -> None:
    images = torch.rand(20, 2, 3, 7, 9)
    moved = augment_scene(images, torch.Generator().manual_seed(5), max_shift=0)
    assert all(
        torch.equal(after, before) or torch.equal(after, before.flip(-1))
        for after, before in zip(moved, images, strict=True)
    )


@pytest.mark.parametrize(
    ("images", "places", "expected"),
    [
        (torch.zeros(2, 3, 8, 8), None, r"images must be \(N, T, 3, H, W\), got \(2, 3, 8, 8\)"),
        (torch.zeros(2, 3, 1, 8, 8), None, "images must be"),
        (torch.zeros(2, 3, 3, 8, 8), torch.zeros(2, 2), r"places must be \(2, 3, 2\).*got \(2, 2\)"),
    ],
)
def test_bad_shapes_are_named(images: Tensor, places: Tensor | None, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        augment_scene(images, torch.Generator(), places)


def test_other_processes_read_the_pictures_from_the_disk(packed: Path) -> None:
    """What is sent to a worker that is no fork is small, and holds the same scenes."""
    for dataset in (SceneDataset(packed), SceneDataset(packed, "train"), SceneDataset(packed).without("red cube")):
        sent = pickle.dumps(dataset)
        assert len(sent) < dataset.pixels.numel() / 2
        received = pickle.loads(sent)
        assert received.names == dataset.names
        assert torch.equal(received.pixels, dataset.pixels)
        assert torch.equal(received[0].images, dataset[0].images)
        assert torch.equal(copy.deepcopy(dataset).objects, dataset.objects)
    index = packed.with_suffix(".json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"sha256": "0" * 64}))
    with pytest.raises(DatasetError, match="was prepared anew since this data set was opened"):
        pickle.loads(sent)
