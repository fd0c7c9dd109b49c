"""What first turns have wrong on average in each light and pose, measured once and taken off."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgan.derived import Derived, is_eager

EDGE = 4
"""Pixels at each side of a turn's window that answer to nothing: in the shipped model they had 0.1 % of the answers'
squares."""
ANSWERS = 2
"""Pictures in which objects of one shape answer to the light: what they cover and shade, and how they shine."""
FURTHEST = 4.0
"""Numbers further from 0 count as this: no scene has them, but a photo may."""
LEAST_SPREAD = 0.01
"""Pixels."""
LEAST_CODE_SPREAD = 0.1
"""Of codes, whose numbers have a variance of 1 over all turns."""
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


def _take_known(usual: Tensor, spread: Tensor, new_usual: Tensor, new_spread: Tensor, least: float) -> Tensor:
    """Take over rows (K, D) without NaN and hand out which (K,) these are; a spread is at least ``least``."""
    known = new_usual.isfinite().all(1) & new_spread.isfinite().all(1)
    usual[known] = new_usual[known].to(usual)
    spread[known] = new_spread[known].clamp(min=least).to(spread)
    return known


def _directions(conditions: Tensor) -> Tensor:
    """Of conditions (K, D), (D, K) of length 1."""
    return F.normalize(conditions).T


class FirstTurnCorrection(nn.Module):
    """What has to be added to a first turn, so that the mean over many is that of real ones, object by object.

    In i-CLEVR a first object always stands at the same pixels. There an error that all pictures of an object share
    gives away every one of them, though it is a single grey level: whoever looks at many sees the mean. Convolutions
    share their weights among all pixels, and adversarial training leaves such an error behind. The same holds for how
    an object answers to the light, to the parts of a pixel by which its place differs from the usual one, as the
    camera moves, and to the code that says how it is turned. So all of it is measured after training
    (:func:`condgan.calibration.correct_first_turns`): an offset for each object, and in a square at the middle answers
    to each of these numbers and to each product of two of them, which objects and colours share. A first turn is known
    by its condition, which depends on the object only, and by its place; to other turns, and to objects that are put
    elsewhere, nothing is added.

    All weights are buffers: the optimizer of a larger model leaves them alone. A fresh correction adds nothing.

    Args:
        num_objects: size K of the vocabulary.
        condition_dim: length D of the condition.
        image_size: side of the pictures in pixels.
        light_inputs: numbers that say how a scene is lit.
        places: whether the place is known.
        code_inputs: length of the code. It, the light and x and y are L numbers.
        answer_size: side in pixels of the square with answers.
        num_answers: how many pictures C there are for each number and product, for objects and colours to share.

    Shape:
        condition: (N, D); no gradient flows back to it.
        light: (N, light_inputs), or None without light.
        place: (N, 2) in pixels (x, y), or None for models that do not know it.
        code: (N, code_inputs), for models with a mapping; no gradient flows back to it.
        output: (N, 3, H, W), to be added to pictures in [-1, 1]; or None, on a CPU, where no turn is a first one.

    Source: matching the means of real and drawn pictures is the feature matching of Salimans et al. 2016,
    arXiv:1606.03498, section 3.1, with the pixels as features and solved at once.
    """

    conditions: Tensor
    offsets: Tensor
    responses: Tensor | None
    shares: Tensor | None
    places: Tensor
    spread: Tensor
    codes: Tensor | None
    code_spread: Tensor | None
    reach: Tensor

    def __init__(
        self,
        num_objects: int,
        condition_dim: int,
        image_size: int,
        light_inputs: int = 0,
        places: bool = False,
        code_inputs: int = 0,
        answer_size: int = 0,
        num_answers: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("conditions", torch.zeros(num_objects, condition_dim))
        self.register_buffer("offsets", torch.zeros(num_objects, 3, image_size, image_size))
        self.num_inputs = numbers = light_inputs + 2 * places + code_inputs
        # Of rank 4, for channels_last.
        responses = torch.zeros(num_answers, numbers + numbers * (numbers + 1) // 2, answer_size, answer_size)
        self.register_buffer("responses", responses if numbers else None)
        self.register_buffer("shares", torch.zeros(num_objects, 3, num_answers) if numbers else None)
        self.register_buffer("places", torch.zeros(num_objects, 2))
        self.register_buffer("spread", torch.ones(num_objects, 2))
        self.register_buffer("codes", torch.zeros(num_objects, code_inputs) if code_inputs else None)
        self.register_buffer("code_spread", torch.ones(num_objects, code_inputs) if code_inputs else None)
        self.everywhere = 2.0 * image_size  # a reach that no place is beyond
        self.register_buffer("reach", torch.full((num_objects,), self.everywhere))  # so far from there it is added
        self._directions = Derived(_directions)

    def forward(
        self,
        condition: Tensor,
        light: Tensor | None = None,
        place: Tensor | None = None,
        code: Tensor | None = None,
    ) -> Tensor | None:
        can_look = condition.device.type == "cpu" and is_eager()  # a GPU would be waited for
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
        numbers = self.read(nearest, light, place, code).to(offset.dtype)
        if self.responses is not None and self.shares is not None and numbers.shape[1] == self.num_inputs:
            known = torch.cat((numbers, products_of(numbers)), 1)
            responses = (known @ self.responses.flatten(2)).transpose(0, 1)  # (N, C, h w)
            answer = (self.shares[nearest] @ responses).unflatten(2, self.responses.shape[2:])
            margin = (offset.shape[-1] - answer.shape[-1]) // 2
            offset = offset + F.pad(answer, (margin,) * 4)
        return share[:, None, None, None] * offset

    def read(self, objects: Tensor, light: Tensor | None, place: Tensor | None, code: Tensor | None = None) -> Tensor:
        """The numbers (N, L) that first turns answer to.

        The light; and the place and the code beside the usual ones of an object, in standard deviations.
        """
        read = [self.places.new_zeros(objects.shape[0], 0)]
        if light is not None:
            read.append(light)
        if place is not None:
            read.append((place - self.places[objects]) / self.spread[objects])
        if code is not None and self.codes is not None and self.code_spread is not None:
            read.append((code.detach() - self.codes[objects]) / self.code_spread[objects])
        return torch.cat(read, 1).clamp(-FURTHEST, FURTHEST)

    def clear_(self) -> None:
        """Add nothing any more."""
        self.offsets.zero_()
        self.reach.fill_(self.everywhere)
        if self.responses is not None:
            self.responses.zero_()

    def set_(self, offsets: Tensor, responses: Tensor, shares: Tensor) -> None:
        """From now on add this, for models that know the light, the place or the code.

        Args:
            offsets: (K, 3, H, W), for each object.
            responses: (C, L + L (L + 1) / 2, h, w), to each number (see :meth:`read`) and each product of two
                (:func:`products_of`), in the square at the middle.
            shares: (K, 3, C), how much of each there is in each colour of an object.
        """
        assert self.responses is not None and self.shares is not None
        self.offsets.copy_(offsets)
        self.responses.copy_(responses)
        self.shares.copy_(shares)

    def put_(self, places: Tensor, spread: Tensor, reach: float) -> None:
        """Add only within ``reach`` pixels of the usual places (K, 2), of standard deviation ``spread`` (K, 2).

        NaN where an object's are not known.
        """
        known = _take_known(self.places, self.spread, places, spread, LEAST_SPREAD)
        self.reach[known] = reach

    def turn_(self, codes: Tensor, spread: Tensor) -> None:
        """The usual codes of first turns (K, code_inputs), of standard deviation ``spread``; NaN where not known."""
        assert self.codes is not None and self.code_spread is not None
        _take_known(self.codes, self.code_spread, codes, spread, LEAST_CODE_SPREAD)

    def extra_repr(self) -> str:
        num_objects, condition_dim = self.conditions.shape
        return f"{num_objects}, {condition_dim}, image_size={self.offsets.shape[-1]}"
