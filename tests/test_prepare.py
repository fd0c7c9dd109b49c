"""prepare.py: the i-CLEVR layout, resizing, packing, and going on after an interruption."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scenes import write_iclevr_layout

import condgan.prepare
from condgan.datasets import DatasetError, SceneDataset, packed_path
from condgan.files import file_sha256
from condgan.prepare import PrepareReport, prepare, read_layout, read_picture
from condgan.vocab import ICLEVR_OBJECTS

Names = dict[str, list[str]]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Ten scenes, in a folder whose name is not plain ASCII."""
    return write_iclevr_layout(tmp_path / "données 数据", 10)


@pytest.fixture
def pictures_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that are opened from now on."""
    opened: list[str] = []

    def read(path: Path, image_size: int) -> NDArray[np.uint8]:
        opened.append(path.name)
        return read_picture(path, image_size)

    monkeypatch.setattr(condgan.prepare, "read_picture", read)
    return opened


def edit_labels(data_dir: Path, edit: Callable[[Any], object]) -> None:
    labels = json.loads((data_dir / "train.json").read_text())
    edit(labels)
    (data_dir / "train.json").write_text(json.dumps(labels))


def picture(data_dir: Path, scene: int, turn: int) -> Path:
    return data_dir / "images" / f"CLEVR_train_{scene:06d}_{turn}.png"


# --- the layout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["iclevr", "."])
def test_pictures_may_lie_elsewhere(data_dir: Path, place: str) -> None:
    usual = read_layout(data_dir)
    if place == ".":
        for file in (data_dir / "images").iterdir():
            file.rename(data_dir / file.name)
    else:
        (data_dir / "images").rename(data_dir / place)
    layout = read_layout(data_dir)
    assert layout.folder == data_dir / place
    assert layout.scenes == usual.scenes
    assert layout.unlabelled == layout.missing == layout.skipped_scenes == ()


def test_objects_are_what_each_turn_added(data_dir: Path) -> None:
    labels = json.loads((data_dir / "train.json").read_text())
    layout = read_layout(data_dir)
    assert layout.vocabulary.names == ICLEVR_OBJECTS
    assert len(layout.scenes) == 10
    for scene in layout.scenes:
        assert [list(scene.objects[: turn + 1]) for turn in range(3)] == [labels[file] for file in scene.pictures]


def test_labels_may_be_spelled_freely_and_listed_in_any_order(data_dir: Path) -> None:
    usual = read_layout(data_dir)
    labels: Names = json.loads((data_dir / "train.json").read_text())
    shuffled = {file: [name.upper().replace("GRAY", "Grey ") for name in labels[file]] for file in reversed(labels)}
    (data_dir / "train.json").write_text(json.dumps(shuffled))
    assert read_layout(data_dir).scenes == usual.scenes


FIRST, SECOND = "CLEVR_train_000000_0.png", "CLEVR_train_000000_1.png"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda labels: labels.clear(), "train.json: expected a dict"),
        (lambda labels: labels.update({FIRST: "red cube"}), f"'{FIRST}': expected a list of names"),
        (lambda labels: labels.update({FIRST: []}), f"'{FIRST}': the list of objects is empty"),
        (lambda labels: labels.update({FIRST: ["gren cube"]}), f"'{FIRST}': unknown object 'gren cube': did you mean"),
        (lambda labels: labels[SECOND].reverse(), f"'{SECOND}': turn 1 must list the objects of the turn before"),
        (lambda labels: labels[SECOND].pop(), f"'{SECOND}': turn 1 must list"),
        (lambda labels: labels[SECOND].append("red cube"), f"'{SECOND}': turn 1 must list"),
        (lambda labels: labels.update({"photo.png": ["red cube"]}), "'photo.png' is not named SCENE_TURN.png"),
        (lambda labels: labels.update({FIRST[:-3] + "jpg": labels[FIRST]}), "are the same turn"),
    ],
)
def test_bad_labels_are_named(data_dir: Path, edit: Callable[[Any], object], expected: str) -> None:
    edit_labels(data_dir, edit)
    with pytest.raises(DatasetError) as caught:
        prepare(data_dir, progress=False)
    assert expected in str(caught.value)
    assert str(data_dir / "train.json") in str(caught.value)
    assert not [*data_dir.glob("*.npy")]


@pytest.mark.parametrize("file", ["train.json", "objects.json"])
def test_missing_and_malformed_files_are_named(data_dir: Path, file: str) -> None:
    (data_dir / file).write_text('{"a": ')
    with pytest.raises(DatasetError, match=rf"{file} is not valid JSON"):
        prepare(data_dir, progress=False)
    (data_dir / file).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=rf"{file} is not valid JSON"):
        prepare(data_dir, progress=False)
    (data_dir / file).unlink()
    with pytest.raises(DatasetError, match=rf"there is no {file} in {data_dir}"):
        prepare(data_dir, progress=False)


def test_missing_folders_are_named(data_dir: Path) -> None:
    with pytest.raises(DatasetError, match="there is no folder"):
        prepare(data_dir / "nowhere", progress=False)
    shutil.rmtree(data_dir / "images")
    with pytest.raises(DatasetError, match=r"no picture that .*train\.json lists, such as CLEVR_train_000000_0\.png"):
        prepare(data_dir, progress=False)


# --- resizing -----------------------------------------------------------------------------------------------------


def plain_bilinear(pixels: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    """Bilinear interpolation written out: pixel centres at halves, two neighbours an axis, edges repeated."""
    height, width, _ = pixels.shape
    result = np.zeros((3, size, size))
    for i in range(size):
        for j in range(size):
            y = max((i + 0.5) * height / size - 0.5, 0)
            x = max((j + 0.5) * width / size - 0.5, 0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = pixels[top, left] * (1 - (x - left)) + pixels[top, right] * (x - left)
            lower = pixels[bottom, left] * (1 - (x - left)) + pixels[bottom, right] * (x - left)
            result[:, i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return result


@pytest.mark.parametrize("shape", [(24, 32), (7, 5), (8, 31), (1, 1)])
def test_resizing_is_plain_bilinear(tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    resized = read_picture(tmp_path / "a.png", 8)
    assert resized.dtype == np.uint8
    assert np.abs(resized - plain_bilinear(pixels, 8)).max() <= 0.5 + 1e-3


def test_resizing_320x240_is_not_antialiased(tmp_path: Path) -> None:
    pixels = np.zeros((240, 320, 3), np.uint8)
    pixels[:, 2::5] = 255  # each fifth column, just where the centres of 64 pixels lie
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", 64) == 255).all()


def test_picture_of_the_right_size_is_untouched(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(tmp_path / "a.png", 64), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_any_8_bit_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    blocks = np.kron([[0, 255], [255, 0]], np.ones((4, 4))).astype(np.uint8)  # the same in every mode
    Image.fromarray(blocks).convert("RGB").convert(mode).save(tmp_path / f"a.{'jpg' if mode == 'CMYK' else 'png'}")
    pixels = read_picture(next(tmp_path.iterdir()), 8)
    assert np.abs(pixels.astype(int) - blocks).max() <= 10  # JPEG is a little off


def test_transparent_palette_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=b"\xff\x80")
    assert read_picture(tmp_path / "a.png", 8)[:, 0, 0].tolist() == [10, 20, 30]


def test_pictures_of_16_bits_are_scaled_rather_than_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", 8) == 100).all()


# --- packing ------------------------------------------------------------------------------------------------------


def test_packed_file_and_index_are_as_documented(data_dir: Path, tmp_path: Path) -> None:
    report = prepare(data_dir, image_size=16, progress=False)
    assert report.path == packed_path(data_dir, 16) == data_dir / "condgan-16.npy"
    assert (report.scenes, report.pictures) == (10, 30)
    assert not (report.missing or report.unreadable or report.unlabelled or report.skipped_scenes)
    pixels = np.load(report.path)
    for scene in range(10):
        for turn in range(3):
            assert np.array_equal(pixels[scene, turn], read_picture(picture(data_dir, scene, turn), 16))
    np.save(tmp_path / "plain.npy", pixels)
    assert report.path.read_bytes() == (tmp_path / "plain.npy").read_bytes()
    index = json.loads(report.path.with_suffix(".json").read_text())
    labels = json.loads((data_dir / "train.json").read_text())
    assert (index["format"], index["version"], index["image_size"]) == ("condgan-scenes", 1, 16)
    assert index["sha256"] == report.sha256 == file_sha256(report.path)
    assert index["objects"] == [*ICLEVR_OBJECTS]
    names = [f"CLEVR_train_{scene:06d}" for scene in range(10)]
    assert index["scenes"] == [{"name": name, "objects": labels[f"{name}_2.png"]} for name in names]
    assert sorted(path.name for path in data_dir.glob("condgan*")) == ["condgan-16.json", "condgan-16.npy"]
    assert len(SceneDataset(report.path, verify=True)) == 10


def test_out_is_a_file_or_a_folder(data_dir: Path, tmp_path: Path) -> None:
    assert prepare(data_dir, out=tmp_path / "new" / "folder", image_size=8, progress=False).path == (
        tmp_path / "new" / "folder" / "condgan-8.npy"
    )
    assert prepare(data_dir, out=tmp_path / "my.scenes.npy", image_size=8, progress=False).path.is_file()
    assert len(SceneDataset(tmp_path / "my.scenes.npy")) == 10


def test_every_picture_in_trouble_is_named_and_its_scene_left_out(data_dir: Path) -> None:
    picture(data_dir, 1, 0).unlink()
    picture(data_dir, 1, 2).unlink()
    truncated = picture(data_dir, 3, 1)
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    picture(data_dir, 3, 2).write_text("no picture")
    picture(data_dir, 4, 0).write_bytes(b"")
    Image.new("RGB", (4, 4)).save(data_dir / "images" / "CLEVR_train_009999_0.png")
    edit_labels(data_dir, lambda labels: labels.pop("CLEVR_train_000005_1.png"))
    edit_labels(data_dir, lambda labels: labels.pop("CLEVR_train_000006_2.png"))
    Image.new("RGB", (50, 20)).save(picture(data_dir, 7, 0))  # another size is no trouble
    (data_dir / "images" / "readme.txt").touch()
    (data_dir / "images" / "._CLEVR_train_000000_0.png").touch()  # macOS leaves these
    report = prepare(data_dir, image_size=16, progress=False)
    assert report.missing == ("CLEVR_train_000001_0.png", "CLEVR_train_000001_2.png")
    assert report.unreadable == ("CLEVR_train_000003_1.png", "CLEVR_train_000003_2.png", "CLEVR_train_000004_0.png")
    assert report.unlabelled == ("CLEVR_train_000005_1.png", "CLEVR_train_000006_2.png", "CLEVR_train_009999_0.png")
    assert report.skipped_scenes == tuple(f"CLEVR_train_{scene:06d}" for scene in (1, 3, 4, 5, 6))
    assert (report.scenes, report.pictures) == (5, 15)
    data = SceneDataset(report.path, verify=True)
    assert data.names == [f"CLEVR_train_{scene:06d}" for scene in (0, 2, 7, 8, 9)]
    assert np.array_equal(data.pixels[4, 2], read_picture(picture(data_dir, 9, 2), 16))
    summary = report.summary()
    for name in (*report.missing, *report.unreadable, *report.unlabelled, *report.skipped_scenes):
        assert name in summary
    again = prepare(data_dir, image_size=16, progress=False)
    assert again.already_prepared
    assert (again.missing, again.unreadable, again.unlabelled) == (report.missing, report.unreadable, report.unlabelled)
    assert (again.skipped_scenes, again.scenes) == (report.skipped_scenes, 5)


def test_summary_of_much_trouble_is_short(data_dir: Path) -> None:
    for scene in range(1, 10):
        for turn in range(3):
            picture(data_dir, scene, turn).unlink()
    summary = prepare(data_dir, image_size=8, progress=False).summary(max_names=2)
    assert "27 pictures listed in train.json but missing" in summary
    assert "CLEVR_train_000001_1.png, and 25 more" in summary
    assert "CLEVR_train_000001_2.png" not in summary


def test_most_scenes_decide_how_many_turns_there_are(data_dir: Path) -> None:
    def add_turn(labels: Names) -> None:
        labels["CLEVR_train_000002_3.png"] = [*labels["CLEVR_train_000002_2.png"], "red cube"]

    edit_labels(data_dir, add_turn)
    edit_labels(data_dir, lambda labels: labels.pop("CLEVR_train_000008_2.png"))
    report = prepare(data_dir, image_size=8, progress=False)
    assert report.skipped_scenes == ("CLEVR_train_000002", "CLEVR_train_000008")
    assert SceneDataset(report.path).objects.shape == (8, 3)


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """File name -> what the system says instead of opening it."""
    troubles: dict[str, Exception] = {}

    def open_picture(file: Any) -> Image.Image:
        if (trouble := troubles.get(Path(file.name).name)) is not None:
            raise trouble
        return opened(file)

    opened = Image.open
    monkeypatch.setattr(Image, "open", open_picture)
    return troubles


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "x"), "Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_picture_that_cannot_be_read_this_time_is_not_left_out(
    data_dir: Path, trouble: dict[str, Exception], error: Exception, reason: str
) -> None:
    unlucky = picture(data_dir, 4, 1)
    trouble[unlucky.name] = error
    with pytest.raises(DatasetError) as caught:
        prepare(data_dir, image_size=8, progress=False)
    assert str(caught.value) == f"cannot read {unlucky} ({reason}): mend that and run it again to go on"
    assert not packed_path(data_dir, 8).exists()
    trouble.clear()
    report = prepare(data_dir, image_size=8, progress=False)
    assert (report.unreadable, report.scenes, report.resumed_scenes) == ((), 10, 4)


def test_damage_that_sends_pillow_nowhere_is_damage(data_dir: Path, trouble: dict[str, Exception]) -> None:
    trouble[picture(data_dir, 4, 1).name] = OSError(errno.EINVAL, "Invalid argument")
    assert prepare(data_dir, image_size=8, progress=False).unreadable == (picture(data_dir, 4, 1).name,)


def test_a_picture_that_can_be_read_again_is_taken_in(data_dir: Path, trouble: dict[str, Exception]) -> None:
    trouble[picture(data_dir, 4, 1).name] = OSError("out of memory error when reading image file")  # Pillow's own
    picture(data_dir, 6, 0).write_text("no picture")
    assert prepare(data_dir, image_size=8, progress=False).scenes == 8
    assert prepare(data_dir, image_size=8, progress=False).already_prepared
    trouble.clear()
    report = prepare(data_dir, image_size=8, progress=False)
    assert (report.scenes, report.unreadable) == (9, (picture(data_dir, 6, 0).name,))
    assert prepare(data_dir, image_size=8, progress=False).already_prepared


def test_nothing_usable_is_an_error(data_dir: Path) -> None:
    for scene in range(10):
        picture(data_dir, scene, 1).write_text("no picture")
    with pytest.raises(DatasetError, match=r"can be read: CLEVR_train_000000_1\.png"):
        prepare(data_dir, progress=False)
    assert not [*data_dir.glob("condgan*")]
    for scene in range(10):
        picture(data_dir, scene, 1).unlink()
    with pytest.raises(DatasetError, match=r"complete.* 10 are missing, such as CLEVR_train_000000_1\.png"):
        prepare(data_dir, progress=False)


def test_place_that_cannot_be_written_is_named(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data_dir / "file").touch()
    with pytest.raises(DatasetError, match=r"cannot write .*file.*give another place"):
        prepare(data_dir, out=data_dir / "file", progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(DatasetError, match=r"cannot write .*MB are free"):
        prepare(data_dir, progress=False)


def test_labels_are_not_taken_for_an_index(data_dir: Path) -> None:
    before = (data_dir / "train.json").read_bytes()
    with pytest.raises(DatasetError, match=r"train\.json is in the way.*give another `out`"):
        prepare(data_dir, image_size=8, out=data_dir / "train.npy", progress=False)
    assert (data_dir / "train.json").read_bytes() == before


def test_an_array_of_somebody_elses_is_not_overwritten(data_dir: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.npy"
    np.save(mine, np.arange(3))
    before = mine.read_bytes()
    with pytest.raises(DatasetError, match=r"mine\.npy is in the way: it has no index.*give another `out`"):
        prepare(data_dir, image_size=8, out=mine, progress=False)
    assert mine.read_bytes() == before
    assert [path.name for path in tmp_path.glob("mine*")] == ["mine.npy"]


@pytest.mark.parametrize("content", ['{"a": 1}\n{"a": 2}\n', "not JSON", "[" * 100_000])
def test_a_file_of_somebody_elses_is_not_taken_for_a_damaged_index(
    content: str, data_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(DatasetError, match=r"mine\.json is in the way.*give another `out`"):
        prepare(data_dir, image_size=8, out=tmp_path / "mine.npy", progress=False)
    assert (tmp_path / "mine.json").read_text() == content


@pytest.mark.parametrize("name", ["condgan-8.partial.npy", "condgan-8.partial.json"])
def test_nothing_is_written_through_a_link_in_the_folder(name: str, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (data_dir / name).symlink_to(tmp_path / "mine")
    with pytest.raises(DatasetError, match=rf"{name} is a link, through which nothing is written: remove it"):
        prepare(data_dir, image_size=8, progress=False)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("image_size", [0, -64])
def test_bad_image_size_is_named(data_dir: Path, image_size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size must be between 1 and .*, got {image_size}"):
        prepare(data_dir, image_size=image_size, progress=False)


@pytest.mark.parametrize("image_size", ["64", True, 64.0])
def test_an_image_size_is_a_whole_number(data_dir: Path, image_size: Any) -> None:
    with pytest.raises(TypeError, match=f"image_size must be a whole number, got {image_size!r}"):
        prepare(data_dir, image_size=image_size, progress=False)


def test_progress_goes_to_stderr_only(data_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare(data_dir, image_size=8)
    out, err = capfd.readouterr()
    assert out == ""
    assert "10/10" in err
    prepare(data_dir, image_size=9, progress=False)
    assert capfd.readouterr() == ("", "")


# --- doing only what is left to do --------------------------------------------------------------------------------


def test_second_call_reads_nothing(data_dir: Path, pictures_read: list[str]) -> None:
    first = prepare(data_dir, image_size=8, progress=False)
    assert len(pictures_read) == 30
    second = prepare(data_dir, image_size=8, progress=False)
    assert len(pictures_read) == 30
    assert (second.already_prepared, first.already_prepared) == (True, False)
    assert "prepared before" in second.summary()
    assert "prepared before" not in first.summary()
    assert (second.path, second.scenes, second.pictures, second.sha256) == (
        first.path,
        first.scenes,
        first.pictures,
        first.sha256,
    )


def edit_index(data_dir: Path, source: dict[str, object] | None = None, **changes: object) -> None:
    path = packed_path(data_dir, 8).with_suffix(".json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes | {"source": content["source"] | (source or {})}))


def damage_pixels(data_dir: Path) -> None:
    path = packed_path(data_dir, 8)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


@pytest.mark.parametrize(
    "change",
    [
        damage_pixels,
        lambda data_dir: packed_path(data_dir, 8).unlink(),
        lambda data_dir: packed_path(data_dir, 8).with_suffix(".json").write_text("{"),
        lambda data_dir: edit_index(data_dir, scenes=[]),
        lambda data_dir: edit_index(data_dir, objects=["red cube"]),
        lambda data_dir: edit_index(data_dir, image_size=9),
        lambda data_dir: edit_index(data_dir, source={"unreadable": 5}),
        lambda data_dir: edit_index(data_dir, source={"unreadable": [5]}),
        lambda data_dir: Image.new("RGB", (96, 72), "white").save(picture(data_dir, 9, 2)),
        lambda data_dir: edit_labels(
            data_dir, lambda labels: labels["CLEVR_train_000009_2.png"].__setitem__(2, "red cube")
        ),
    ],
)
def test_what_changed_or_was_damaged_is_prepared_again(data_dir: Path, change: Callable[[Path], object]) -> None:
    Image.new("RGB", (96, 72), "gray").save(picture(data_dir, 9, 2))
    prepare(data_dir, image_size=8, progress=False)
    change(data_dir)
    again = prepare(data_dir, image_size=8, progress=False)
    assert not again.already_prepared
    fresh = prepare(data_dir, image_size=8, out=data_dir / "fresh", progress=False)
    assert again.path.read_bytes() == fresh.path.read_bytes()
    assert again.path.with_suffix(".json").read_bytes() == fresh.path.with_suffix(".json").read_bytes()


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_pictures: int) -> None:
    """Let ``num_pictures`` be read, and no more."""
    left = [num_pictures]

    def read(path: Path, image_size: int) -> NDArray[np.uint8]:
        if not left[0]:
            raise Interrupted
        left[0] -= 1
        return read_picture(path, image_size)

    monkeypatch.setattr(condgan.prepare, "read_picture", read)


def test_a_call_waits_for_another_that_writes_the_same_file(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, pictures_read: list[str]
) -> None:
    expected = prepare_fresh(data_dir)
    reports: list[PrepareReport] = []
    in_the_middle, go_on = threading.Event(), threading.Event()
    first = threading.Thread(target=lambda: reports.append(prepare(data_dir, image_size=8, progress=False)))
    read, warn = condgan.prepare.read_picture, warnings.warn

    def read_half(path: Path, image_size: int) -> NDArray[np.uint8]:
        if threading.current_thread() is first and path == picture(data_dir, 5, 1):
            in_the_middle.set()
            assert go_on.wait(60)
        return read(path, image_size)

    def warn_and_go_on(message: str, **options: Any) -> None:
        warn(message, **options)
        go_on.set()

    monkeypatch.setattr(condgan.prepare, "read_picture", read_half)
    monkeypatch.setattr(warnings, "warn", warn_and_go_on)
    pictures_read.clear()
    first.start()
    try:
        assert in_the_middle.wait(60)
        with pytest.warns(UserWarning, match=r"waiting for another process, which prepares .*condgan-8\.npy"):
            reports.append(prepare(data_dir, image_size=8, progress=False))
    finally:
        go_on.set()
        first.join(60)
    assert len(pictures_read) == 30, "the second call read nothing"
    assert sorted(report.already_prepared for report in reports) == [False, True]
    assert packed_path(data_dir, 8).read_bytes() == expected
    assert sorted(path.name for path in data_dir.glob(".*")) == [".condgan-8.npy.lock", ".fresh.npy.lock"]


def test_what_is_prepared_may_lie_in_a_folder_that_cannot_be_written(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(data_dir, image_size=8, progress=False)
    monkeypatch.setattr(condgan.prepare, "locked", None)  # it is not called
    assert prepare(data_dir, image_size=8, progress=False).already_prepared


@pytest.fixture
def damaged_data_dir(data_dir: Path) -> Path:
    """Ten scenes; a picture of the second and a picture of the last cannot be read."""
    picture(data_dir, 1, 0).write_text("no picture")
    picture(data_dir, 9, 1).write_text("no picture")
    return data_dir


def prepare_fresh(data_dir: Path) -> bytes:
    return prepare(data_dir, image_size=8, out=data_dir / "fresh.npy", progress=False).path.read_bytes()


@pytest.mark.parametrize("num_pictures", [0, 2, 3, 5, 14, 29])
def test_interrupted_call_goes_on_where_it_was(
    damaged_data_dir: Path, monkeypatch: pytest.MonkeyPatch, pictures_read: list[str], num_pictures: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, num_pictures)
        with pytest.raises(Interrupted):
            prepare(damaged_data_dir, image_size=8, progress=False)
    assert not packed_path(damaged_data_dir, 8).exists()
    report = prepare(damaged_data_dir, image_size=8, progress=False)
    assert len(pictures_read) == 30 - num_pictures // 3 * 3
    assert report.resumed_scenes == num_pictures // 3
    assert (f"after {num_pictures // 3} scenes" in report.summary()) == (num_pictures >= 3)
    assert report.unreadable == ("CLEVR_train_000001_0.png", "CLEVR_train_000009_1.png")
    assert report.path.read_bytes() == prepare_fresh(damaged_data_dir)
    assert not [*damaged_data_dir.glob("*partial*")]


def test_killed_call_goes_on_at_the_last_note_of_its_journal(
    damaged_data_dir: Path, monkeypatch: pytest.MonkeyPatch, pictures_read: list[str]
) -> None:
    notes = []

    def note_four_scenes_then_none(*args: Any) -> None:
        notes.append(args)
        if len(notes) <= 2:
            write_journal(*args)

    write_journal = condgan.prepare._write_journal
    monkeypatch.setattr(condgan.prepare, "JOURNAL_SCENES", 2)
    with monkeypatch.context() as patch:
        patch.setattr(condgan.prepare, "_write_journal", note_four_scenes_then_none)
        interrupt_after(patch, 23)
        with pytest.raises(Interrupted):
            prepare(damaged_data_dir, image_size=8, progress=False)
    with open(damaged_data_dir / "condgan-8.partial.npy", "ab") as file:
        file.write(bytes(100_000))  # more than will be written over
    report = prepare(damaged_data_dir, image_size=8, progress=False)
    assert report.resumed_scenes == 4
    assert len(pictures_read) == 30 - 4 * 3
    assert report.path.read_bytes() == prepare_fresh(damaged_data_dir)


def test_call_killed_before_the_last_rename_reads_nothing_again(
    damaged_data_dir: Path, monkeypatch: pytest.MonkeyPatch, pictures_read: list[str]
) -> None:
    def die_at_the_packed_file(source: Path, target: Path) -> None:
        if target.suffix == ".npy":
            raise Interrupted
        replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die_at_the_packed_file)
        with pytest.raises(Interrupted):
            prepare(damaged_data_dir, image_size=8, progress=False)
    assert len(pictures_read) == 30
    report = prepare(damaged_data_dir, image_size=8, progress=False)
    assert len(pictures_read) == 30
    assert report.path.read_bytes() == prepare_fresh(damaged_data_dir)


@pytest.mark.parametrize(
    "change",
    [
        lambda data_dir: Image.new("RGB", (96, 72)).save(picture(data_dir, 0, 0)),
        lambda data_dir: (data_dir / "condgan-8.partial.json").write_text('{"finger'),
        lambda data_dir: (data_dir / "condgan-8.partial.json").unlink(),
        lambda data_dir: (data_dir / "condgan-8.partial.npy").unlink(),
        lambda data_dir: (data_dir / "condgan-8.partial.npy").write_bytes(b"short"),
    ],
)
def test_interrupted_call_starts_over_when_its_files_no_longer_fit(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, pictures_read: list[str], change: Callable[[Path], object]
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 15)
        with pytest.raises(Interrupted):
            prepare(data_dir, image_size=8, progress=False)
    change(data_dir)
    report = prepare(data_dir, image_size=8, progress=False)
    assert report.resumed_scenes == 0
    assert len(pictures_read) == 30
    assert report.path.read_bytes() == prepare_fresh(data_dir)
