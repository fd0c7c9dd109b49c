"""images.py: one way between tensors, pictures and files, whatever the mode, and nothing damaged gets through."""

from __future__ import annotations

import os
import subprocess
import threading
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from condgan.images import (
    GRAIN,
    LEVEL,
    check_range,
    estimate_rest,
    from_uint8,
    grid,
    load_image,
    read_pixels,
    render_anew,
    resize,
    round_levels,
    round_turn,
    to_pil,
    to_rgb,
    to_tensor,
    to_uint8,
)

GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([GRAY, GRAY[::-1], GRAY.T], 2)  # (16, 16, 3)


def as_tensor(pixels: np.ndarray[Any, Any]) -> Tensor:
    """(H, W) or (H, W, 3) uint8 as a picture (3, H, W) in [-1, 1], by the plain formula."""
    pixels = pixels[..., None].repeat(3, 2) if pixels.ndim == 2 else pixels
    return torch.tensor(pixels.transpose(2, 0, 1) / 127.5 - 1, dtype=torch.float32)


class Pathlike:
    """A path of another library."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_arrays_and_batches_of_one_are_the_pictures_that_they_hold(tmp_path: Path) -> None:
    expected, first = as_tensor(COLOUR), COLOUR.transpose(2, 0, 1)
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    alike: list[Any] = [first, first[None], expected.numpy(), expected.double().numpy()[None], expected[None]]
    for image in (*alike, Pathlike(tmp_path / "a.png"), COLOUR[::-1].copy()[::-1]):
        torch.testing.assert_close(load_image(image, 16), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(load_image(GRAY[:, :, None], 16), as_tensor(GRAY), atol=1e-6, rtol=0)


def test_arrays_that_may_not_be_written_or_have_bytes_in_another_order_are_read_in_silence() -> None:
    array = as_tensor(COLOUR).numpy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in (array, array.astype(">f4"), np.broadcast_to(array[None], (1, *array.shape))):
            assert torch.equal(load_image(image, 16), as_tensor(COLOUR))


# Tensors and pictures


def test_every_grey_level_survives_both_ways() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    values = from_uint8(levels)
    assert values.dtype == torch.float32
    assert (values[0], values[-1]) == (-1, 1)
    assert torch.equal(to_uint8(values), levels)


def test_to_uint8_rounds_and_clips() -> None:
    step = 2 / 255
    values = torch.tensor([-7.0, -1 + 0.4 * step, -1 + 0.6 * step, 1 - 0.4 * step, 1 - 0.6 * step, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 1, 255, 254, 255]
    assert to_uint8(values.double()).tolist() == [0, 0, 1, 255, 254, 255]


def test_to_uint8_leaves_its_input_alone() -> None:
    values = torch.tensor([0.3, 2.0])
    to_uint8(values)
    assert torch.equal(values, torch.tensor([0.3, 2.0]))


def floors(colour: list[float], n: int = 4, size: int = 64) -> Tensor:
    """Pictures of one colour but for their brightness, which varies from pixel to pixel; not at whole levels."""
    brightness = 100 + torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(0))
    return (brightness + torch.tensor(colour).view(1, 3, 1, 1)) * LEVEL - 1


def test_what_rounding_took_is_found_where_colour_is_smooth() -> None:
    truth = floors([0.3, -0.1, -0.2])
    truth[:, 0, :, 32:] += 40.4 * LEVEL  # something red
    rounded = from_uint8(to_uint8(truth))
    rest = estimate_rest(rounded, torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert rest.abs().max() <= LEVEL / 2 + 1e-6
    assert torch.equal(from_uint8(to_uint8(rounded + 0.999 * rest)), rounded)

    def colour_error(images: Tensor) -> float:
        error = (images - truth) / LEVEL
        return (error - error.mean(1, keepdim=True)).square().mean().sqrt().item()

    assert colour_error(rounded) > 0.2
    assert colour_error(rounded + rest) < 0.1
    assert ((rounded + rest - truth) / LEVEL).mean().abs() < 0.01, "levels"


def test_another_rendering_keeps_the_mean_of_what_is_less_than_a_level() -> None:
    truth, rng = floors([0.3, -0.1, -0.2], n=16), torch.Generator().manual_seed(1)
    image, rest = round_levels(truth)
    for share in (0.1, 0.5, 0.8):
        anew = render_anew(image + share * LEVEL, rest, torch.rand(16, 1, 64, 64, generator=rng))
        assert ((anew - truth) / LEVEL).mean().item() == pytest.approx(share, abs=0.01)
        shifts = ((anew - image) / LEVEL).round().unique()
        assert shifts.tolist() == [0, 1]


def test_another_rendering_moves_a_few_whole_levels_in_all_colours_alike() -> None:
    image, rest = round_levels(floors([0.01, 0, -0.01], n=16))
    anew = render_anew(image, rest, torch.rand(16, 1, 64, 64, generator=torch.Generator().manual_seed(1)))
    moved = ((anew - image) / LEVEL).round()
    assert moved.unique().tolist() == [-1, 0, 1]
    assert moved.ne(0).float().mean().item() == pytest.approx(GRAIN / 2, rel=0.1)
    assert moved.sum().abs() < 0.1 * moved.abs().sum()
    alike = (moved == moved[:, :1]).all(1)[moved.ne(0).any(1)]
    assert alike.float().mean() > 0.2, "by chance it would be less than 0.01"


def test_other_renderings_are_whole_levels_in_range() -> None:
    rng = torch.Generator().manual_seed(1)
    images = torch.linspace(-1.5, 1.5, 12_288).view(1, 3, 64, 64)
    anew = render_anew(images, torch.zeros_like(images), torch.rand(1, 1, 64, 64, generator=rng))
    assert torch.equal(anew, from_uint8(to_uint8(anew)))
    assert (anew.min(), anew.max()) == (-1, 1)


def test_what_rounding_takes_is_carried_to_the_next_turn() -> None:
    canvas = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    image, rest = round_levels(canvas)
    assert torch.equal(image, from_uint8(to_uint8(canvas)))
    for turn in range(1, 6):  # each a third of a level darker
        image, rest = round_turn(image, image - LEVEL / 3, rest)
        assert torch.equal(image, from_uint8(to_uint8(image)))
        assert rest.abs().max() <= LEVEL / 2
        torch.testing.assert_close(image + rest, canvas - turn * LEVEL / 3, rtol=0, atol=1e-5)


def test_rounding_leaves_alone_what_a_turn_left_alone() -> None:
    before = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # not of whole levels
    rest, after = torch.full_like(before, 0.4 * LEVEL), before.clone()
    after[:, :, 8:16, 4:9] += 0.01
    image, left = round_turn(before, after, rest)
    assert torch.equal(image, from_uint8(to_uint8(after + rest)).where(after != before, before))
    assert torch.equal(left[:, :, 16:], rest[:, :, 16:])
    image, left = round_turn(before, after + 9, rest)
    assert (image.max(), left.max()) == (1, LEVEL / 2), "what is beyond white is not carried on"


def test_pil_and_tensor_are_inverse() -> None:
    picture = to_pil(as_tensor(COLOUR))
    assert (picture.mode, picture.size) == ("RGB", (16, 16))
    assert np.array_equal(np.asarray(picture), COLOUR)
    torch.testing.assert_close(to_tensor(picture), as_tensor(COLOUR), rtol=0, atol=1e-6)


def test_a_picture_is_as_wide_and_high_as_its_tensor() -> None:
    assert to_pil(torch.zeros(3, 5, 7)).size == (7, 5)
    assert to_tensor(Image.new("RGB", (7, 5))).shape == (3, 5, 7)


# Modes


@pytest.mark.parametrize(
    "mode", ["L", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "I;16L", "I;16B", "P"]
)
def test_gray_looks_the_same_in_every_mode(mode: str) -> None:
    pixels = np.asarray(to_rgb(Image.fromarray(GRAY).convert(mode)))
    assert np.array_equal(pixels, GRAY[..., None].repeat(3, 2))


@pytest.mark.parametrize(("mode", "tolerance"), [("RGBA", 0), ("RGBX", 0), ("CMYK", 0), ("YCbCr", 2), ("LAB", 3)])
def test_colours_look_the_same_in_every_mode(mode: str, tolerance: int) -> None:
    colours = np.array([[[173, 35, 35], [42, 75, 215], [29, 105, 20], [129, 74, 25], [41, 208, 208]]], np.uint8)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        picture = ImageCms.profileToProfile(Image.fromarray(colours), *profiles, outputMode="LAB")
        assert picture is not None
    else:
        picture = Image.fromarray(colours).convert(mode)
    assert np.abs(np.asarray(to_rgb(picture)).astype(int) - colours).max() <= tolerance


def test_one_bit_is_black_and_white() -> None:
    bits = Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((2, 2))).astype(np.uint8)).convert("1")
    assert np.asarray(to_rgb(bits))[:, :, 0].tolist() == [[0, 0, 255, 255]] * 2 + [[255, 255, 0, 0]] * 2


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "int32", "float32"])
def test_16_bits_are_scaled_and_not_clipped(dtype: str) -> None:
    wide = Image.fromarray((GRAY.astype(np.uint16) * 257).astype(dtype))
    assert np.array_equal(np.asarray(to_rgb(wide))[:, :, 0], GRAY)


def test_16_bits_are_rounded() -> None:
    wide = Image.fromarray(np.array([[300, 385, 386, 65535]], np.uint16))
    assert np.asarray(to_rgb(wide))[0, :, 0].tolist() == [1, 1, 2, 255]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0, 70000]], r"mode I must be in 0 to 255 or 0 to 65535, got 0 to 70000"),
        ([[-1, 5]], r"mode I .* got -1 to 5"),
        ([[0.0, float("nan")]], r"mode F .* got nan to nan"),
        ([[0.0, float("inf")]], r"mode F .* got 0 to inf"),
        ([[0.0, 0.5, 1.0]], r"mode F .* got 0 to 1; scale it first"),
    ],
)
def test_gray_of_unknown_range_is_refused(values: Any, message: str) -> None:
    dtype = np.int32 if isinstance(values[0][0], int) else np.float32
    with pytest.raises(ValueError, match=message):
        to_rgb(Image.fromarray(np.array(values, dtype)))


def test_transparency_is_dropped(tmp_path: Path) -> None:
    clear = Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 128]]], np.uint8))
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "bytes.png", transparency=b"\xff\x80")
    palette.save(tmp_path / "index.png", transparency=1)
    for picture in (clear, Image.open(tmp_path / "bytes.png"), Image.open(tmp_path / "index.png")):
        assert np.asarray(to_rgb(picture)).tolist() == [[[10, 20, 30]] * 2]
    premultiplied = Image.fromarray(np.array([[[200, 100, 50, 255]]], np.uint8)).convert("RGBa")
    assert np.asarray(to_rgb(premultiplied)).tolist() == [[[200, 100, 50]]]
    assert np.asarray(to_rgb(Image.new("LA", (1, 1), (70, 255)).convert("La"))).tolist() == [[[70] * 3]]


# Files


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp", "gif", "ppm"])
def test_files_are_read_as_their_pictures(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"señal.{ending}"
    Image.fromarray(GRAY).convert("RGB").save(path, lossless=True)
    for name in (path, str(path)):
        pixels = read_pixels(name)
        assert pixels.dtype == torch.uint8
        assert torch.equal(pixels, torch.from_numpy(GRAY).expand(3, -1, -1))


def test_a_file_of_16_bits_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "a.png")
    assert torch.equal(read_pixels(tmp_path / "a.png")[1], torch.from_numpy(GRAY))


def test_a_photo_is_read_as_its_camera_was_held(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(read_pixels(tmp_path / "a.png"), torch.from_numpy(upright.copy()).permute(2, 0, 1))
    opened = Image.open(tmp_path / "a.png")
    assert torch.equal(load_image(opened, 64), load_image(tmp_path / "a.png", 64))
    assert opened.size == image.size, "the picture of the user stays as it is"


def test_a_picture_is_read_whatever_its_camera_says(tmp_path: Path) -> None:
    Image.fromarray(GRAY).save(tmp_path / "a.png", exif=b"nonsense")
    assert torch.equal(read_pixels(tmp_path / "a.png")[1], torch.from_numpy(GRAY))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_picture_may_come_through_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[encoded("PNG")])
    writer.start()
    assert torch.equal(read_pixels(tmp_path / "pipe"), torch.from_numpy(COLOUR).permute(2, 0, 1))
    writer.join()


def test_a_path_without_a_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(FileNotFoundError, match=f"image: there is no file '{path}'"):
            load_image(str(path), 64)


def encoded(picture_format: str, pixels: np.ndarray[Any, Any] = COLOUR) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, picture_format)
    return buffer.getvalue()


DAMAGED = {
    "empty": b"",
    "text": b"this is no picture",
    "truncated PNG": encoded("PNG")[:-40],
    "PNG header only": encoded("PNG")[:20],
    "PNG of a wrong checksum": encoded("PNG").replace(b"IDAT", b"IDAU"),
    "truncated GIF": encoded("GIF", GRAY)[:-200],
    "truncated WebP": encoded("WEBP")[:60],
    "broken BMP": encoded("BMP")[:18] + b"\xff\xff\xff\x7f" * 2 + encoded("BMP")[26:],  # 2**31 pixels a side
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"image: '{path}' is not a readable picture"):
        load_image(path, 64)


@pytest.mark.parametrize("name", ["drawing.eps", "photo.png"])
def test_a_program_that_draws_is_not_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **kwargs: pytest.fail("another program was started"))
    Image.new("RGB", (8, 8)).save(tmp_path / name, "EPS")
    with pytest.raises(ValueError, match=r"is not a readable picture \(EPS is a program that draws: save it as PNG\)"):
        read_pixels(tmp_path / name)


@pytest.mark.parametrize(
    "kind", [OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError]
)
def test_whatever_pillow_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fail(path: object) -> None:
        raise kind("the reason")

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match=r"a\.png' is not a readable picture \(the reason\)"):
        read_pixels(tmp_path / "a.png")


# load_image


def test_equal_pictures_load_bit_for_bit_alike(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    pixels = torch.from_numpy(COLOUR).permute(2, 0, 1)
    alpha = np.concatenate([COLOUR, np.full((16, 16, 1), 9, np.uint8)], 2)
    same = {
        "PIL": Image.fromarray(COLOUR),
        "RGBA": Image.fromarray(alpha),
        "path": tmp_path / "a.png",
        "string": str(tmp_path / "a.png"),
        "array": COLOUR,
        "array with alpha": alpha,
        "array of strides": np.asfortranarray(COLOUR),
        "uint8": pixels,
        "float": from_uint8(pixels).contiguous(),
        "with gradient": from_uint8(pixels).requires_grad_(),
    }
    for size in (16, 8, 64):
        results = {name: load_image(image, size) for name, image in same.items()}
        for name, result in results.items():
            assert torch.equal(result, results["PIL"]), name
            assert result.shape == (3, size, size), name
            assert result.dtype == torch.float32, name
            assert result.is_contiguous(), name  # else networks may round in another way
            assert not result.requires_grad, name


def test_a_picture_of_the_right_size_is_untouched() -> None:
    torch.testing.assert_close(load_image(COLOUR, 16), as_tensor(COLOUR), rtol=0, atol=1e-6)
    values = torch.rand(3, 8, 8, dtype=torch.float64) * 2 - 1
    assert torch.equal(load_image(values, 8), values.float())
    gray = load_image(GRAY, 16)
    torch.testing.assert_close(gray, as_tensor(GRAY), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (5, 90), (240, 320)])
def test_any_size_becomes_a_square(shape: tuple[int, int]) -> None:
    loaded = load_image(np.full(shape, 51, np.uint8), 32)
    torch.testing.assert_close(loaded, torch.full((3, 32, 32), -0.6), rtol=0, atol=1e-6)


def test_resizing_samples_and_does_not_average() -> None:
    stripes = torch.zeros(1, 1, 40, 40)
    stripes[..., 2::5] = 1  # where the centres of 8 pixels lie
    assert torch.equal(resize(stripes, 8), torch.ones(1, 1, 8, 8))
    torch.testing.assert_close(
        resize(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]), 4)[0, 0, 0],
        torch.tensor([0.0, 0.25, 0.75, 1.0]),
        rtol=0,
        atol=1e-6,
    )


def test_rounding_errors_are_clipped() -> None:
    assert load_image(torch.full((3, 4, 4), 1 + 1e-6), 8).max() == 1
    assert load_image(torch.full((3, 4, 4), -1 - 1e-6), 4).min() == -1
    assert load_image(torch.nn.functional.interpolate(torch.ones(1, 3, 9, 9), 7, mode="bicubic")[0], 33).max() <= 1


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, TypeError, "must be a PIL picture, a path, an array or a tensor, got NoneType"),
        (7, TypeError, "got int"),
        ([[0, 0]], TypeError, "got list"),
        (np.zeros((4, 4, 3)), ValueError, r"an array must be uint8 \(H, W\), .* got float64 \(4, 4, 3\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), ValueError, r"must be \(3, H, W\) .* got \(2, 3, 8, 8\)"),
        (np.zeros((3, 8, 8), bool), ValueError, r"an array must .* got bool \(3, 8, 8\)"),
        (np.full((3, 8, 8), 3.0), ValueError, r"must be finite and in \[-1, 1\], got 3 to 3"),
        (np.zeros((1, 4, 4, 3), np.uint8), ValueError, r"got uint8 \(1, 4, 4, 3\)"),
        (np.zeros(4, np.uint8), ValueError, r"got uint8 \(4,\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"not empty, got \(3, 0, 4\)"),
        (Image.new("RGB", (0, 5)), ValueError, r"not empty, got \(3, 5, 0\)"),
        (Image.new("I", (0, 5)), ValueError, r"not empty, got \(3, 5, 0\)"),
        (torch.zeros(2, 3, 4, 4), ValueError, r"must be \(3, H, W\) .* got \(2, 3, 4, 4\)"),
        (torch.zeros(4, 4, 3), ValueError, r"got \(4, 4, 3\)"),
        (torch.zeros(3, 0, 4), ValueError, r"got \(3, 0, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), ValueError, r"floating point in \[-1, 1\] or uint8, got torch.int64"),
        (torch.full((3, 4, 4), float("nan")), ValueError, "must be finite .* got nan to nan"),
        (torch.full((3, 4, 4), float("inf")), ValueError, "must be finite .* got inf to inf"),
        (torch.full((3, 4, 4), 255.0), ValueError, r"in \[-1, 1\], got 255 to 255; scale it first"),
        (torch.full((3, 4, 4), -1.01), ValueError, "got -1.01 to -1.01"),
    ],
)
def test_wrong_input_is_named(image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^image.*{message}"):
        load_image(image, 64)


@pytest.mark.parametrize("image", [torch.zeros(1, 3, 8, 8, device="meta"), torch.zeros(1, 3, 8, 8).to_sparse()])
def test_tensors_without_values_are_no_pictures(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^images must be a dense tensor with values, got torch"):
        check_range("images", image)


# Grids


def test_a_grid_puts_pictures_side_by_side() -> None:
    shades = [Image.new("RGB", (4, 3), (value, 0, 0)) for value in (10, 20, 30, 40, 50)]
    sheet = np.asarray(grid(shades, columns=3, margin=1))
    assert sheet.shape == (3 + 1 + 3, 4 + 1 + 4 + 1 + 4, 3)
    for i, value in enumerate((10, 20, 30, 40, 50)):
        row, column = i // 3 * 4, i % 3 * 5
        assert (sheet[row : row + 3, column : column + 4] == (value, 0, 0)).all()
    assert (sheet[3] == 255).all()
    assert (sheet[:, 4] == 255).all()
    assert (sheet[4:, 10:] == 255).all()


def test_a_grid_is_no_wider_than_its_pictures() -> None:
    assert grid([Image.new("RGB", (4, 3))], columns=10).size == (4, 3)


def test_a_grid_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        grid([], columns=3)
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        grid([Image.new("RGB", (4, 3))], columns=0)
