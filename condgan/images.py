"""The only conversions between [-1, 1] float tensors, uint8 tensors, PIL pictures and picture files; picture grids."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ROUNDING = 1e-4
"""How far beyond [-1, 1] a tensor may be from rounding errors alone; it is clipped."""
LEVEL = 1 / 127.5
"""Distance of two of the 256 levels of a picture in [-1, 1]."""
GRAIN = 0.065
"""Levels, at most, by which the grain of two renderings of one floor differs, the same for all three colours: then as
many values are a level off as between two pictures of i-CLEVR far from all that was changed, about 3 %."""
SAME_COLOUR = 1.5
"""Levels between the colours of two pixels, after their brightness was taken off, beyond which they hardly count as the
same: rounding brings them one apart."""

PROGRAMS = ("EPS", "WMF")
"""Formats whose pictures another program would have to draw: files are not run."""


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] to uint8, any shape, rounded; values outside are clipped."""
    return _levels(images).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8, or whole levels of another type, to float32 in [-1, 1], any shape; the inverse of :func:`to_uint8`."""
    return pixels.float() / 127.5 - 1


def _levels(images: Tensor) -> Tensor:
    """Float in [-1, 1] to the nearest of the levels 0 to 255, float32."""
    return ((images.float() + 1) * 127.5).round_().clamp_(0, 255)


def estimate_rest(images: Tensor, uniform: Tensor) -> Tensor:
    """What rounding may have taken from pictures at 256 levels, of which nobody knows.

    Colour varies less from pixel to pixel than rounding, channel by channel, makes it. So the colour of a pixel, what
    is left when its brightness is taken off, is taken to be the mean over its neighbours of the same colour; its
    brightness is then any that all three channels would be rounded from to what they are. Where there is none, as in
    textures, it is any rest, the same for the three.

    Args:
        images: (N, 3, H, W) whole levels in [-1, 1], as :func:`from_uint8` gives them.
        uniform: (N, 1, H, W) uniform numbers in [0, 1), which choose the brightness.

    Returns:
        (N, 3, H, W), half a level at most; to be added.

    Source: the range in which all channels agree is the quantisation constraint set of Zakhor 1992, "Iterative
    procedures for reduction of blocking effects"; the mean is the bilateral filter of Tomasi and Manduchi 1998.
    """
    levels = images / LEVEL
    colour = levels - levels.mean(1, keepdim=True)
    padded = F.pad(colour, (1, 1, 1, 1), mode="replicate")
    height, width = images.shape[2:]
    total, weights = colour.clone(), torch.ones_like(colour[:, :1])
    for y, x in product(range(3), repeat=2):
        if (y, x) == (1, 1):
            continue
        neighbour = padded[:, :, y : y + height, x : x + width]
        weight = (-(neighbour - colour).square().sum(1, keepdim=True) / (2 * SAME_COLOUR**2)).exp()
        total, weights = total + weight * neighbour, weights + weight
    without_brightness = levels - total / weights  # every channel says what the brightness is, within half a level
    low, high = without_brightness.amax(1, keepdim=True) - 0.5, without_brightness.amin(1, keepdim=True) + 0.5
    found = torch.lerp(low, high, uniform) - without_brightness
    return LEVEL * torch.where(low < high, found, uniform - 0.5)


def render_anew(images: Tensor, rest: Tensor, uniform: Tensor) -> Tensor:
    """Bring pictures to 256 levels as another rendering would, whose grain differs a little (:data:`GRAIN`).

    Args:
        images: (N, 3, H, W) in [-1, 1]; values outside are clipped.
        rest: likewise, what rounding took from the pictures that they were drawn on, half a level at most.
        uniform: (N, 1, H, W) uniform numbers in [0, 1).

    Returns:
        float32, exactly what :func:`from_uint8` gives.
    """
    return from_uint8(to_uint8(images.float() + rest + LEVEL * GRAIN * (2 * uniform - 1)))


def round_levels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures in [-1, 1], any shape, at the nearest of 256 levels; and what that takes, half a level at most."""
    rounded = from_uint8(_levels(images))
    return rounded, (images - rounded).clamp(-LEVEL / 2, LEVEL / 2)  # more only beyond black and white


def round_turn(before: Tensor, after: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a turn's picture to 256 levels and carry what rounding takes to the next turn.

    A soft shadow of less than half a level then shows as in a real picture, though the generator sees, and draws on,
    whole levels: pixels that were near to the next level reach it. Turn after turn no noise is added.

    Args:
        before: (N, 3, H, W) in [-1, 1], the picture that the turn drew on.
        after: likewise, what it made of it. Where the two are equal the picture stays as it was.
        rest: (N, 3, H, W), what earlier rounding took from ``before``, at most half a level.

    Returns:
        The picture, and what rounding has taken from it.
    """
    same = after == before
    image, left = round_levels(after + rest)
    return torch.where(same, before, image), torch.where(same, rest, left)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) float in [-1, 1] to an RGB picture."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def to_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def to_tensor(image: Image.Image) -> Tensor:
    """A PIL picture of any mode to (3, H, W) float32 in [-1, 1]; the inverse of :func:`to_pil`. See :func:`to_rgb`."""
    return from_uint8(_pixels(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL picture of any mode as 8-bit RGB.

    Transparency is dropped: what shows is the colour beneath. Gray of more than 8 bits (modes ``I;16``, ``I`` and
    ``F``) may be in the range of 8 bits, as Pillow's own conversions give it, or else of 16 bits, as files have it.

    Raises:
        ValueError: such gray is NaN, in neither range, or floating point in 0 to 1.
    """
    if image.mode[0] in "IF":  # Pillow would clip at 255
        gray = np.asarray(image).astype(np.float64)
        low, high = gray.min(initial=0), gray.max(initial=0)
        if not 0 <= low <= high <= 65535 or (image.mode == "F" and 0 < high <= 1):  # NaN fails too
            raise ValueError(
                f"image: gray of mode {image.mode} must be in 0 to 255 or 0 to 65535, got {low:.5g} to {high:.5g}; "
                "scale it first"
            )
        image = Image.fromarray((gray / (1 if high <= 255 else 257)).round().astype(np.uint8))
    elif image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    elif image.mode == "P" and "transparency" in image.info:  # Pillow would warn
        image = image.convert("RGBA")
    return image.convert("RGB")


def _pixels(image: Image.Image) -> Tensor:
    """A PIL picture of any mode to (3, H, W) uint8."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """A picture as the camera that took it has noted that it be turned."""
    with suppress(Exception):  # a damaged note is no damaged picture
        return ImageOps.exif_transpose(image)
    return image


def read_pixels(path: str | os.PathLike[str]) -> Tensor:
    """The picture in a file to (3, H, W) uint8, in the size it has, upright as a camera has noted. See :func:`to_rgb`.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: the file is not a picture, is damaged or cannot be read; the message names it.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():  # a pipe will do
        raise FileNotFoundError(f"image: there is no file {str(path)!r}")
    try:
        with path.open("rb") as file, Image.open(file) as image:
            if image.format in PROGRAMS:
                raise ValueError(f"{image.format} is a program that draws: save it as PNG")
            image.load()
            return _pixels(_upright(image))
    except UnidentifiedImageError:
        raise ValueError(f"image: {str(path)!r} is not a readable picture (of no format that Pillow knows)") from None
    except Exception as error:  # by the kind of damage Pillow raises any of a dozen
        raise ValueError(f"image: {str(path)!r} is not a readable picture ({error})") from error


def resize(images: Tensor, image_size: int) -> Tensor:
    """(N, C, H, W) to (N, C, image_size, image_size), bilinear without anti-aliasing, as i-CLEVR at 64x64 is made.

    Pictures of the right size pass unchanged. Any floating-point range.
    """
    if images.shape[-2:] == (image_size, image_size):
        return images
    return F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=False)


def load_image(image: Image.Image | str | os.PathLike[str] | NDArray[Any] | Tensor, image_size: int) -> Tensor:
    """Any picture as a (3, image_size, image_size) float32 tensor in [-1, 1].

    Args:
        image: a PIL picture of any mode and size, turned as its camera has noted; the path of one; a uint8 array
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a tensor or array (3, H, W) or (1, 3, H, W), floating point
            in [-1, 1] or uint8. Equal pictures give equal results.
        image_size: side of the result; see :func:`resize`.

    Raises:
        FileNotFoundError: there is no file at the path.
        TypeError: ``image`` is none of the above.
        ValueError: the file is not a picture, a shape is wrong, or values are NaN or out of range.
    """
    if isinstance(image, (str, os.PathLike)):
        tensor = read_pixels(image)
    elif isinstance(image, np.ndarray):
        tensor = _from_array(image)
    elif isinstance(image, Image.Image):
        tensor = _pixels(_upright(image))
    elif isinstance(image, Tensor):
        tensor = image.detach().cpu()
    else:
        raise TypeError(f"image must be a PIL picture, a path, an array or a tensor, got {type(image).__name__}")
    if tensor.ndim == 4 and len(tensor) == 1:  # as that of a result of one picture
        tensor = tensor[0]
    if tensor.ndim != 3 or tensor.shape[0] != 3 or 0 in tensor.shape:
        raise ValueError(f"image: a picture must be (3, H, W) and not empty, got {tuple(tensor.shape)}")
    if tensor.dtype == torch.uint8:
        tensor = from_uint8(tensor)
    elif not tensor.is_floating_point():
        raise ValueError(f"image: a tensor must be floating point in [-1, 1] or uint8, got {tensor.dtype}")
    else:
        check_range("image: a tensor", tensor)
    # contiguous, since the last bits of a convolution depend on the memory layout
    return resize(tensor.float()[None], image_size)[0].clamp(-1, 1).contiguous()


def _from_array(image: NDArray[Any]) -> Tensor:
    """An array with its channels last, uint8, or first, as the tensor that it says."""
    shape = image.shape[-3:]
    if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and shape[2] in (1, 3, 4))):
        if image.size == 0:  # of which older versions of Pillow make no picture
            raise ValueError(f"image: a picture must be (3, H, W) and not empty, got {(3, *image.shape[:2])}")
        return _pixels(Image.fromarray(image[:, :, 0] if image.ndim == 3 and shape[2] == 1 else image))
    if len(shape) == 3 and shape[0] == 3 and image.ndim in (3, 4) and image.dtype.kind in "fu":
        return torch.from_numpy(np.array(image, image.dtype.newbyteorder("="), order="C"))  # a copy, to be written to
    raise ValueError(
        "image: an array must be uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or (3, H, W), uint8 or floating "
        f"point in [-1, 1], got {image.dtype} {image.shape}"
    )


def check_range(name: str, images: Tensor) -> None:
    """Raise unless this is a tensor of pictures, of any shape, as networks read them; ``name`` is what errors call it.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is not floating point, or not finite and in [-1, 1] up to rounding.
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{name} must be a tensor in [-1, 1], which images.load_image makes, got {type(images).__name__}"
        )
    if images.is_meta or images.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor with values, got {images.layout} on {images.device}")
    if not images.is_floating_point():
        raise ValueError(f"{name} must be floating point in [-1, 1], got {images.dtype}")
    if images.numel() and not images.abs().amax() <= 1 + ROUNDING:  # NaN fails too
        raise ValueError(
            f"{name} must be finite and in [-1, 1], got {images.min().item():.5g} to {images.max().item():.5g}; "
            "scale it first, e.g. `image / 127.5 - 1` for 0 to 255"
        )


def check_colours(images: Tensor) -> None:
    """Raise a TypeError unless ``images`` is a tensor, a ValueError unless one of colour pictures, (N, 3, H, W)."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor (N, 3, H, W) in [-1, 1], got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W), got {tuple(images.shape)}")


def grid(images: Sequence[Image.Image], columns: int, margin: int = 2) -> Image.Image:
    """Pictures of one size side by side, row by row, on white, ``margin`` pixels apart.

    Raises:
        ValueError: there are no pictures, or no columns.
    """
    if not images:
        raise ValueError("images is empty: a grid needs at least one picture")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = min(columns, len(images))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + margin) - margin, rows * (height + margin) - margin), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(image, (column * (width + margin), row * (height + margin)))
    return sheet
