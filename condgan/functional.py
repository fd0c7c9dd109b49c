"""Functions over any networks of the right signature; the classes call them. What they draw is differentiable.

All are pure but :func:`evaluating`, which switches a network to eval mode for a while.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgan.derived import is_eager
from condgan.images import LEVEL, from_uint8, round_turn
from condgan.vocab import Vocabulary

CHANGE_THRESHOLD = 50 / 255
"""A pixel changed when a channel moved by more than this, in units of [-1, 1]: 25 grey levels."""
RANGE_TOLERANCE = 1e-3
"""How far a picture may leave [-1, 1]: rounding, less than a grey level."""
SCENES_AT_ONCE = 256
"""Of a data set, whose uint8 pictures become floating point: for small memories."""


class ConditionEncoder(Protocol):
    """Reads one turn: objects (N, K) and hidden (N, H) or None to condition (N, D) and the next hidden (N, H)."""

    def __call__(self, objects: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


TurnGenerator = Callable[..., Tensor]
"""Draws one turn: z (N, Z), condition (N, D), prev_image (N, 3, H, W), and place (N, 2) if any, to (N, 3, H, W)."""


def encode_objects(
    names: Sequence[str] | Sequence[Sequence[str]],
    vocabulary: Vocabulary | Sequence[str] | Mapping[str, int] | None = None,
) -> Tensor:
    """One-hot vectors of object names.

    Args:
        names: the objects of one scene, or a list of such lists; lists may differ in length.
        vocabulary: the known objects in the order of their ids, or a dict from each to its id; None is i-CLEVR's 24.

    Returns:
        (T, K) for one scene, (N, T, K) for a batch, float32 of 0 and 1. Turns after a scene's last are zero rows.

    Raises:
        TypeError: ``names`` is not a list of strings or of lists of strings.
        ValueError: a list is empty or a name is unknown.

    Example:
        >>> encode_objects([["red cube"], ["gray cube", "cyan sphere"]]).shape
        torch.Size([2, 2, 24])
    """
    if not isinstance(vocabulary, Vocabulary):
        vocabulary = Vocabulary() if vocabulary is None else Vocabulary(vocabulary)
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, Sequence):
        raise TypeError(f'names must be a list of objects such as ["red cube"], or a list of such lists, got {names!r}')
    nested = [isinstance(scene, Sequence) and not isinstance(scene, str) for scene in names]
    if any(nested) and not all(nested):
        raise TypeError(f"names mixes objects and lists of objects: {names!r}; make every scene a list")
    if any(nested):
        scenes = [_encode_scene(scene, vocabulary) for scene in names]
        return torch.nn.utils.rnn.pad_sequence(scenes, batch_first=True)
    return _encode_scene(names, vocabulary)  # type: ignore[arg-type]


def _encode_scene(names: Sequence[str], vocabulary: Vocabulary) -> Tensor:
    """One-hot vectors (T, K) of one scene."""
    if len(names) == 0:
        raise ValueError('names has an empty list: give at least one object a scene, such as ["red cube"]')
    return F.one_hot(torch.tensor([vocabulary.parse(name) for name in names]), len(vocabulary)).float()


def roll_conditions(
    encoder: ConditionEncoder, conditions: Tensor | Iterable[Tensor], hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Roll an RNN over condition sequences.

    Args:
        encoder: one turn of the RNN, such as ``IterativeGenerator.encoder``.
        conditions: (N, T, K) multi-hot objects of every turn, a turn of zeros only is padding; or N (T, K) tensors
            of different lengths.
        hidden: (N, H) state to go on from; None starts afresh.

    Returns:
        Outputs (N, T, D), zero where a sequence is padding, and hidden (N, H) after each sequence's own last turn.
        A sequence's numbers do not depend on how much padding follows it.

    Raises:
        TypeError: ``conditions`` or ``hidden`` is no tensor, nor ``conditions`` several.
        ValueError: one is not of the shape above, or, on a CPU, holds NaN or infinity.
    """
    conditions = _padded(conditions)
    _check_tensors(hidden=hidden)
    if conditions.ndim != 3 or conditions.shape[1] == 0:
        raise ValueError(f"conditions must be (N, T, K) with T of at least 1, got {tuple(conditions.shape)}")
    if hidden is not None and (hidden.ndim != 2 or len(hidden) != len(conditions)):
        raise ValueError(f"hidden must be ({len(conditions)}, H), got {tuple(hidden.shape)}")
    _check_finite(conditions=conditions, hidden=hidden)
    outputs = []
    for objects in conditions.unbind(1):
        output, new_hidden = encoder(objects, hidden)
        present = objects.ne(0).any(1, keepdim=True)
        outputs.append(output * present)
        hidden = torch.where(present, new_hidden, torch.zeros_like(new_hidden) if hidden is None else hidden)
    assert hidden is not None
    return torch.stack(outputs, 1), hidden


def rollout(
    generator: TurnGenerator,
    conditions: Tensor | Iterable[Tensor],
    z: Tensor,
    start: Tensor,
    places: Tensor | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    rest: Tensor | None = None,
) -> Tensor:
    """Draw scenes turn by turn, each turn on the picture of the turn before.

    Args:
        generator: one turn of a generator, such as an ``IterativeGenerator``.
        conditions: (N, T, D) outputs of :func:`roll_conditions`; or (N, T, K) multi-hot objects, if ``generator``
            has an ``encoder`` that reads ``encoder.num_objects`` objects; or N tensors of different lengths.
        z: (N, T, Z) noise, or (N, Z) for the same noise every turn, in any floating type.
        start: (N, 3, H, W) or (3, H, W) canvas before the first turn, in [-1, 1].
        places: (N, T, 2) centres in pixels (x, y), for generators that know places; padding may be NaN. None: a
            generator with a ``place_model`` puts each object where that says, by the first three numbers of its noise,
            which repeat where there are fewer.
        callback: called after every turn with its number and the pictures (N, 3, H, W), a copy.
        rest: (N, 3, H, W), what rounding to 256 levels took from ``start``: every picture is rounded too, as in
            ``generate`` (:func:`condgan.images.round_turn`). None leaves pictures, and gradients, as they are.

    Returns:
        (N, T, 3, H, W) in [-1, 1]: the picture after every turn. A turn whose condition is all zeros (padding)
        leaves the picture as it was, and has no part in the statistics of batch norms in training mode.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a tensor does not have the shape above; or, on a CPU, one holds NaN or infinity, or ``start`` is not
            in [-1, 1]. A GPU would have to be waited for.
    """
    conditions = _padded(conditions)
    _check_tensors(optional=False, z=z, start=start)
    _check_tensors(places=places, rest=rest)
    if conditions.ndim != 3 or conditions.shape[1] == 0:
        raise ValueError(f"conditions must be (N, T, D) with T of at least 1, got {tuple(conditions.shape)}")
    _check_finite(conditions=conditions, z=z, start=start, rest=rest)
    encoder: Any = getattr(generator, "encoder", None)
    may_be_objects = conditions.shape[2] == getattr(encoder, "num_objects", None)  # outputs may be as long
    if may_be_objects and ((conditions == 0) | (conditions == 1)).all():
        conditions, _ = roll_conditions(encoder, conditions)
    n, turns, _ = conditions.shape
    if conditions.is_floating_point():  # a generator without an encoder may take one-hot integers
        z = z.to(conditions.dtype)
    if z.ndim == 2:
        z = z[:, None].expand(-1, turns, -1)
    if z.ndim != 3 or z.shape[:2] != (n, turns):
        raise ValueError(f"z must be ({n}, {turns}, Z) or ({n}, Z), got {tuple(z.shape)}")
    if start.ndim not in (3, 4) or (start.ndim == 4 and len(start) not in (1, n)):
        raise ValueError(f"start must be ({n}, 3, H, W) or (3, H, W), got {tuple(start.shape)}")
    if not start.is_floating_point():
        raise ValueError(f"start must be floating point in [-1, 1], got {start.dtype}")
    if start.numel() and start.device.type == "cpu" and start.abs().amax() > 1 + RANGE_TOLERANCE:
        raise ValueError(f"start must be in [-1, 1], got values up to {start.abs().amax():.4g} in size")
    if rest is not None and rest.shape != (n, *start.shape[-3:]):
        raise ValueError(f"rest must be {(n, *start.shape[-3:])}, got {tuple(rest.shape)}")
    present = conditions.ne(0).any(2)  # (N, T)
    if places is not None:
        if places.shape != (n, turns, 2):
            raise ValueError(f"places must be ({n}, {turns}, 2), got {tuple(places.shape)}")
        places = places.masked_fill(~present[:, :, None], 0)
        _check_finite(places=places)
    image = start.expand(n, -1, -1, -1)
    # Batch norm would mix padding into the statistics of the other scenes. To know where it is a GPU is waited for.
    leave_out = getattr(generator, "training", False) and is_eager() and not bool(present.all())
    images = []
    for turn in range(turns):
        noise, condition = z[:, turn], conditions[:, turn]
        place = _likely_place(generator, noise, condition, image) if places is None else places[:, turn]
        inputs = (noise, condition, image, *(() if place is None else (place,)))
        there = present[:, turn]
        if leave_out and not there.all():
            rows = there.nonzero()[:, 0]
            drawn = image
            if len(rows):
                drawn = image.index_put((rows,), generator(*(x[rows] for x in inputs)).to(image.dtype))
        else:
            drawn = torch.where(there[:, None, None, None], generator(*inputs), image)
        if rest is None:
            image = drawn
        else:
            image, rest = round_turn(image, drawn, rest)
        images.append(image)
        if callback is not None:
            callback(turn, image.clone())
    return torch.stack(images, 1)


def _likely_place(generator: Any, noise: Tensor, condition: Tensor, image: Tensor) -> Tensor | None:
    """Where a generator's place model puts the objects of a turn, (N, 2); None where it has none."""
    place_model = getattr(generator, "place_model", None)
    if place_model is None:
        return None
    if noise.shape[1] == 0:
        raise ValueError("places must be given: the noise has no numbers (z_dim is 0) by which to choose them")
    with torch.no_grad():
        uniform = torch.special.ndtr(noise.float()).repeat(1, 3)[:, :3].clamp(max=1 - 2**-24)
        light = generator.read_light(image) if hasattr(generator, "read_light") else None
        place: Tensor = place_model(image.to(condition.dtype), condition, uniform, light)
    return place


def _padded(conditions: Tensor | Iterable[Tensor]) -> Tensor:
    """Sequences of one length, (N, T, K): those that are shorter end in zeros."""
    if isinstance(conditions, Tensor):
        return conditions
    expected = "conditions must be a tensor (N, T, K) or a list of tensors (T, K) of one K"
    if not isinstance(conditions, Iterable) or isinstance(conditions, str):
        raise TypeError(f"{expected}, got {type(conditions).__name__}")
    sequences = list(conditions)
    if not all(isinstance(sequence, Tensor) for sequence in sequences):
        raise TypeError(f"{expected}, got a list of {', '.join(sorted({type(x).__name__ for x in sequences}))}")
    shapes = [tuple(sequence.shape) for sequence in sequences]
    if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"{expected}, got shapes {shapes}")
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)


def _check_tensors(*, optional: bool = True, **arguments: object) -> None:
    """Refuse what is no tensor, such as an array or a picture."""
    for name, value in arguments.items():
        if not (isinstance(value, Tensor) or (optional and value is None)):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_finite(**tensors: Tensor | None) -> None:
    """Refuse NaN and infinity on a CPU: a GPU would have to be waited for."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type == "cpu" and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")


def pixel_distance(error: Tensor) -> Tensor:
    """Smooth L1 of differences of pictures in [-1, 1]: above one of 256 levels, b, |e| - b / 2, below it e^2 / (2 b).

    So a sum over pixels is least where means are right. Pictures have whole levels: the median of a soft shadow of less
    than half a level is no shadow.

    Shape:
        error: any.
        output: likewise, not negative.

    Source: Huber 1964, "Robust estimation of a location parameter", as in Girshick 2015, arXiv:1504.08083.
    """
    return F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=LEVEL)


def changed_region(prev_image: Tensor, image: Tensor, threshold: float = CHANGE_THRESHOLD) -> Tensor:
    """Where two pictures differ: (N, 3, H, W) twice, in [-1, 1], to (N, H, W) bool.

    Raises:
        ValueError: the pictures are not of one such shape.
    """
    if prev_image.ndim != 4 or prev_image.shape != image.shape:
        raise ValueError(
            f"prev_image and image must both be (N, 3, H, W), got {tuple(prev_image.shape)} and {tuple(image.shape)}"
        )
    return (image - prev_image).abs().amax(1) > threshold


def place_of_change(prev_image: Tensor, image: Tensor, threshold: float = CHANGE_THRESHOLD) -> Tensor:
    """Centroid of the pixels that changed from one picture to the next, in pixels (x, y).

    This is what the library calls the place of an object: how it is measured in data, and what ``at=`` asks for.

    Args:
        prev_image: (N, 3, H, W) in [-1, 1].
        image: (N, 3, H, W) in [-1, 1].
        threshold: least change of a channel that counts, in units of [-1, 1].

    Returns:
        (N, 2) float32, x to the right and y down, pixel centres at whole numbers; NaN where nothing changed.

    Raises:
        ValueError: the pictures are not of one shape (N, 3, H, W).
    """
    changed = changed_region(prev_image, image, threshold).float()  # (N, H, W)
    x = (changed.sum(1) * torch.arange(changed.shape[2], device=image.device)).sum(1)  # exact: no matrix product
    y = (changed.sum(2) * torch.arange(changed.shape[1], device=image.device)).sum(1)
    return torch.stack((x, y), 1) / changed.sum((1, 2))[:, None]


def places_of_turns(pixels: Tensor) -> Tensor:
    """Where every turn of whole scenes put its object: :func:`place_of_change`, and the middle for a hidden one.

    Args:
        pixels: (S, T + 1, 3, H, W) uint8, an empty scene first, then the picture after each turn.

    Returns:
        (S, T, 2) float32 in pixels (x, y).
    """
    middle = (pixels.shape[-1] - 1) / 2
    places = []
    for chunk in pixels.split(SCENES_AT_ONCE):
        before, after = from_uint8(chunk[:, :-1]).flatten(0, 1), from_uint8(chunk[:, 1:]).flatten(0, 1)
        places.append(place_of_change(before, after).unflatten(0, (len(chunk), -1)))
    return torch.cat(places).nan_to_num(middle)


def place_map(place: Tensor, image_size: int, sigma: float = 3.0) -> Tensor:
    """A Gaussian blob at each place: (N, 2) pixels (x, y) to (N, 1, H, W) in [0, 1], ``sigma`` in pixels.

    Raises:
        ValueError: ``place`` is not (N, 2).
    """
    _check_pairs("place", place)
    axis = torch.arange(image_size, dtype=place.dtype, device=place.device)
    blob_x, blob_y = torch.exp(-((axis - place[:, :, None]) ** 2) / (2 * sigma**2)).unbind(1)  # (N, W), (N, H)
    return (blob_y[:, :, None] * blob_x[:, None, :])[:, None]


def crop_corners(places: Tensor, image_size: int, crop_size: int) -> Tensor:
    """Upper left corners (N, 2) int64 (x, y) of square crops around places (N, 2), moved to lie inside the picture.

    Raises:
        ValueError: ``crop_size`` is larger than ``image_size``, or ``places`` is not (N, 2).
    """
    if not 1 <= crop_size <= image_size:
        raise ValueError(f"crop_size must be between 1 and image_size, which is {image_size}, got {crop_size}")
    _check_pairs("places", places)
    return (places - (crop_size - 1) / 2).round().long().clamp(0, image_size - crop_size)


def window_corners(places: Tensor, image_size: int, window: int) -> Tensor:
    """Upper left corners (N, 2) int64 (x, y) of the windows in which turns draw.

    The windows are centred on the places, moved down by 1/16 of the picture towards the shadow, inside the picture.

    Raises:
        ValueError: ``window`` is larger than ``image_size``, or ``places`` is not (N, 2).
    """
    _check_pairs("places", places)
    return crop_corners(places + places.new_tensor((0, image_size / 16)), image_size, window)


def paste(images: Tensor, patches: Tensor, corners: Tensor) -> Tensor:
    """Put squares into pictures, the reverse of :func:`crop`.

    Args:
        images: (N, C, H, W), left as they are.
        patches: (N, C, S, S), dtype and device of ``images``.
        corners: (N, 2) whole numbers (x, y), the upper left pixel of each square, which must lie inside its picture.

    Returns:
        (N, C, H, W): new pictures; gradients flow to ``images`` outside the squares and to ``patches``.

    Raises:
        ValueError: ``corners`` is not (N, 2), or, on a CPU, a square is not inside its picture.
    """
    _check_pairs("corners", corners, images.shape[0])
    if _is_one_at_hand(images):
        pasted = images.clone()
        _square(pasted, corners, patches.shape[-1]).copy_(patches)
        return pasted
    index = _pixels_of_squares(images, corners, patches.shape[-1])
    return images.permute(0, 2, 3, 1).index_put(index, patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def crop(images: Tensor, corners: Tensor, crop_size: int) -> Tensor:
    """Cut a square out of each picture: (N, C, H, W) and corners (N, 2) to (N, C, crop_size, crop_size).

    Args:
        images: any type, any range; gradients flow back to the pixels that were cut out.
        corners: whole numbers (x, y), the upper left pixel of each square, which must lie inside its picture.
        crop_size: side of the squares in pixels.

    Raises:
        ValueError: ``corners`` is not (N, 2), or, on a CPU, a square is not inside its picture.
    """
    _check_pairs("corners", corners, images.shape[0])
    if _is_one_at_hand(images):
        return _square(images, corners, crop_size).clone(memory_format=torch.channels_last)  # as those of a batch
    return images.permute(0, 2, 3, 1)[_pixels_of_squares(images, corners, crop_size)].permute(0, 3, 1, 2)


def channels_last(maps: Tensor) -> Tensor:
    """Maps (N, C, H, W) with the channels of a pixel side by side in memory, where convolutions are much faster.

    Under ``torch.func.vmap``, which knows no layouts, they are as they were.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return maps
    return maps.contiguous(memory_format=torch.channels_last)


def _is_one_at_hand(images: Tensor) -> bool:
    """Whether this is a single picture, whose square can be told by whole numbers: a third of the operations."""
    return images.shape[0] == 1 and images.device.type == "cpu" and is_eager()


def _square(image: Tensor, corners: Tensor, size: int) -> Tensor:
    """The square at corners (1, 2) of a single picture (1, C, H, W), not copied."""
    x, y = corners[0].tolist()
    if not (0 <= x <= image.shape[3] - size and 0 <= y <= image.shape[2] - size):
        raise _outside(image, corners, size)
    return image.narrow(2, y, size).narrow(3, x, size)


def _pixels_of_squares(images: Tensor, corners: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of one square a picture into (N, H, W, C): picture (N, 1, 1), row (N, S, 1) and column (N, 1, S)."""
    if corners.device.type == "cpu" and is_eager():  # a GPU would be waited for
        last = corners.new_tensor((images.shape[3] - size, images.shape[2] - size))
        if ((corners < 0) | (corners > last)).any():
            raise _outside(images, corners, size)
    columns, rows = (corners[:, :, None] + torch.arange(size, device=corners.device)).unbind(1)  # (N, S) each
    number = torch.arange(corners.shape[0], device=corners.device)[:, None, None]
    return number, rows[:, :, None], columns[:, None, :]


def _outside(images: Tensor, corners: Tensor, size: int) -> ValueError:
    height, width = images.shape[2:]
    return ValueError(
        f"corners: squares of {size}x{size} must lie inside pictures of {width}x{height}, got corners from "
        f"{corners.amin(0).tolist()} to {corners.amax(0).tolist()}; crop_corners moves them inside"
    )


def local_mean(images: Tensor, size: int) -> Tensor:
    """The mean of the square of an odd ``size`` around each pixel, edges repeated: (N, C, H, W) to the same."""
    return F.avg_pool2d(F.pad(images, [size // 2] * 4, mode="replicate"), size, 1)


def symmetric_root(covariances: Tensor) -> Tensor:
    """The symmetric square roots of covariances, (..., C, C) both; variances below zero count as zero."""
    variances, axes = torch.linalg.eigh(covariances)
    return (axes * variances.clamp(min=0).sqrt()[..., None, :]) @ axes.mT


def _check_pairs(name: str, pairs: Tensor, n: int | None = None) -> None:
    if pairs.ndim != 2 or pairs.shape[1] != 2 or (n is not None and n != pairs.shape[0]):
        raise ValueError(f"{name} must be ({'N' if n is None else n}, 2), got {tuple(pairs.shape)}")


class Switchable(Protocol):
    """What :func:`evaluating` needs; every ``nn.Module`` is one."""

    def modules(self) -> Iterator[nn.Module]: ...
    def train(self, mode: bool = True) -> object: ...


_switching = threading.Lock()
_switched: dict[nn.Module, int] = {}
"""What blocks of :func:`evaluating` have put in eval mode; in how many blocks, of all threads, each is."""


@contextmanager
def evaluating(module: Switchable) -> Iterator[None]:
    """Eval mode inside the block; after it every submodule is in the mode that it was in.

    Of several threads that have a module in such a block, the last one to leave it switches back.
    """
    with _switching:
        learning = [part for part in module.modules() if part.training or part in _switched]
        for part in learning:
            _switched[part] = _switched.get(part, 0) + 1
        if learning:
            module.train(False)
    try:
        yield
    finally:
        with _switching:
            for part in learning:
                _switched[part] -= 1
                if _switched[part] == 0:
                    del _switched[part]
                    part.training = True
