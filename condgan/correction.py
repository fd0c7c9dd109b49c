"""What the first turns of a generator have wrong on average in each light, measured once and taken off."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgan.derived import Derived

ANSWERS = 2
"""Pictures in which objects of one shape answer to the light: what they cover and shade, and how they shine."""
FURTHEST = 4.0
"""Numbers further from 0 count as this: no scene has them, but a photo may."""
LEAST_SPREAD = 0.01
"""Pixels."""
LEAST_LIKENESS = 0.9
"""Cosine between a condition and that of a first turn below which nothing is added. In the shipped model those of later
turns stay below 0.85."""


def products_of(numbers: Tensor) -> Tensor:
    """Products of every two of L numbers of mean 0 and variance 1, (N, L) to (N, L (L + 1) / 2), of mean 0 too.

    Squares come less 1: Hermite polynomials, which for normal numbers do not correlate with each other.
    """
    rows, columns = torch.triu_indices(numbers.shape[1], numbers.shape[1], device=numbers.device)
    return numbers[:, rows] * numbers[:, columns] - (rows == columns).to(numbers)


def middle_of(image_size: int, size: int) -> slice:
    """Rows, or columns, of the square of this size in the middle of a picture."""
    return slice((image_size - size) // 2, (image_size + size) // 2)


def _directions(conditions: Tensor) -> Tensor:
    """Of conditions (K, D), (D, K) of length 1."""
    return F.normalize(conditions).T


class FirstTurnCorrection(nn.Module):
    """What has to be added to a first turn, so that the mean over many is that of real ones, object by object.

    In i-CLEVR a first object always stands at the same pixels. There an error that all pictures of an object share
    gives away every one of them, though it is a single grey level: whoever looks at many sees the mean. Convolutions
    share their weights among all pixels, and adversarial training leaves such an error behind. The same holds for how
    an object answers to the light, and to the parts of a pixel by which its place differs from the usual one, as the
    camera moves. So all three are measured after training (:func:`condgan.calibration.correct_first_turns`): an offset
    for each object, and in a square at the middle answers to each of these numbers and to each product of two of them,
    which objects and colours share. A first turn is known by its condition, which depends on the object
    only, and by its place; to other turns, and to objects that are put elsewhere, nothing is added.

    All weights are buffers: the optimizer of a larger model leaves them alone. A fresh correction adds nothing.

    Args:
        num_objects: size K of the vocabulary.
        condition_dim: length D of the condition.
        image_size: side of the pictures in pixels.
        light_inputs: numbers that say how a scene is lit.
        places: whether the place is known. The light and x and y are L numbers.
        answer_size: side in pixels of the square with answers.
        num_answers: how many pictures C there are for each number and product, for objects and colours to share.

    Shape:
        condition: (N, D); no gradient flows back to it.
        light: (N, light_inputs), or None without light.
        place: (N, 2) in pixels (x, y), or None for models that do not know it.
        output: (N, 3, H, W), to be added to pictures in [-1, 1]; or None, on a CPU, where no turn is a first one.

    Source: matching the means of real and drawn pictures is the feature matching of Salimans et al. 2016,
    arXiv:1606.03498, section 3.1, with the pixels as features and solved at once.
    """

    conditions: Tensor
    offsets: Tensor
    answers: Tensor | None
    shares: Tensor | None
    places: Tensor
    spread: Tensor
    reach: Tensor

    def __init__(
        self,
        num_objects: int,
        condition_dim: int,
        image_size: int,
        light_inputs: int = 0,
        places: bool = False,
        answer_size: int = 0,
        num_answers: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("conditions", torch.zeros(num_objects, condition_dim))
        self.register_buffer("offsets", torch.zeros(num_objects, 3, image_size, image_size))
        self.num_inputs = numbers = light_inputs + 2 * places
        answers = torch.zeros(num_answers, numbers + numbers * (numbers + 1) // 2, answer_size, answer_size)
        self.register_buffer("answers", answers if numbers else None)  # of rank 4, or a module cannot be channels_last
        self.register_buffer("shares", torch.zeros(num_objects, 3, num_answers) if numbers else None)
        self.register_buffer("places", torch.zeros(num_objects, 2))
        self.register_buffer("spread", torch.ones(num_objects, 2))
        self.everywhere = 2.0 * image_size  # a reach that no place is beyond
        self.register_buffer("reach", torch.full((num_objects,), self.everywhere))  # so far from there it is added
        self._directions = Derived(_directions)

    def forward(self, condition: Tensor, light: Tensor | None = None, place: Tensor | None = None) -> Tensor | None:
        can_look = condition.device.type == "cpu" and not torch.compiler.is_compiling()  # a GPU would be waited for
        likeness = F.normalize(condition.detach()) @ self._directions(self.conditions)  # (N, K)
        likeness, nearest = likeness.max(1)
        if can_look and not (likeness > LEAST_LIKENESS).any():
            return None
        share = F.relu((likeness - LEAST_LIKENESS) / (1 - LEAST_LIKENESS))
        if place is not None:
            beyond = (place - self.places[nearest]).norm(dim=1) - self.reach[nearest]
            share = share * (1 - beyond).clamp(0, 1)  # none a pixel further away
        if can_look and not share.any():
            return None
        offset = self.offsets[nearest]
        numbers = self.read(nearest, light, place).to(offset.dtype)
        if self.answers is not None and self.shares is not None and numbers.shape[1] == self.num_inputs:
            known = torch.cat((numbers, products_of(numbers)), 1)
            answers = (known @ self.answers.flatten(2)).transpose(0, 1)  # (N, C, h w)
            answer = (self.shares[nearest] @ answers).unflatten(2, self.answers.shape[2:])
            margin = (offset.shape[-1] - answer.shape[-1]) // 2
            offset = offset + F.pad(answer, (margin,) * 4)
        return share[:, None, None, None] * offset

    def read(self, objects: Tensor, light: Tensor | None, place: Tensor | None) -> Tensor:
        """The numbers (N, L) that first turns answer to: the light, and the place beside the usual one of an object."""
        read = [self.places.new_zeros(len(objects), 0)]
        if light is not None:
            read.append(light)
        if place is not None:
            read.append((place - self.places[objects]) / self.spread[objects])
        return torch.cat(read, 1).clamp(-FURTHEST, FURTHEST)

    def clear_(self) -> None:
        """Add nothing any more."""
        self.offsets.zero_()
        self.reach.fill_(self.everywhere)
        if self.answers is not None:
            self.answers.zero_()

    def set_(self, offsets: Tensor, answers: Tensor, shares: Tensor) -> None:
        """From now on add this, for models that know the light or the place.

        Args:
            offsets: (K, 3, H, W), for each object.
            answers: (C, L + L (L + 1) / 2, h, w), to each number (see :meth:`read`) and each product of two
                (:func:`products_of`), in the square at the middle.
            shares: (K, 3, C), how much of each there is in each colour of an object.
        """
        assert self.answers is not None and self.shares is not None
        self.offsets.copy_(offsets)
        self.answers.copy_(answers)
        self.shares.copy_(shares)

    def put_(self, places: Tensor, spread: Tensor, reach: float) -> None:
        """Add only within ``reach`` pixels of the usual places (K, 2), of standard deviation ``spread`` (K, 2).

        NaN where an object's are not known.
        """
        known = places.isfinite().all(1) & spread.isfinite().all(1)
        self.places[known] = places[known]
        self.spread[known] = spread[known].clamp(min=LEAST_SPREAD)
        self.reach[known] = reach

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, fresh in (("places", 0.0), ("spread", 1.0), ("reach", self.everywhere)):
            buffer = torch.full_like(self.get_buffer(name), fresh)
            state_dict.setdefault(f"{prefix}{name}", buffer)  # checkpoints of before the places were known
        if self.answers is not None and f"{prefix}slopes" in state_dict:
            shared = self._share(state_dict.pop(f"{prefix}slopes"))
            state_dict |= {f"{prefix}{name}": value for name, value in zip(("shares", "answers"), shared, strict=True)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _share(self, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Shares and answers of a checkpoint of before objects shared them, by the first principal components.

        Args:
            slopes: (K, 3 numbers, h, w), the answers to the light of each object by itself.
        """
        assert self.answers is not None and self.shares is not None
        shares, answers = torch.zeros_like(self.shares), torch.zeros_like(self.answers)
        by_colour = slopes.unflatten(1, (-1, 3)).transpose(1, 2).float()  # (K, 3, numbers, h, w)
        left, values, right = torch.linalg.svd(by_colour.flatten(2).flatten(0, 1), full_matrices=False)
        count, numbers = min(len(answers), len(values)), by_colour.shape[2]
        shares[..., :count] = left[:, :count].unflatten(0, (-1, 3))
        answers[:count, :numbers] = (values[:count, None] * right[:count]).view(-1, *by_colour.shape[2:])
        return shares, answers

    def extra_repr(self) -> str:
        num_objects, condition_dim = self.conditions.shape
        return f"{num_objects}, {condition_dim}, image_size={self.offsets.shape[-1]}"
