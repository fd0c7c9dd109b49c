"""What the first turns of a generator have wrong on average, measured once and taken off."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_LIKENESS = 0.9
"""Cosine between a condition and that of a first turn below which nothing is added. In the shipped model those of later
turns stay below 0.85."""


class FirstTurnCorrection(nn.Module):
    """What has to be added to a first turn, so that the mean over many is that of real ones, object by object.

    In i-CLEVR a first object always stands at the same pixels. There an error that all pictures of an object share
    gives away every one of them, though it is a single grey level: whoever looks at many sees the mean. Convolutions
    share their weights among all pixels, and adversarial training leaves such an error behind. So it is measured after
    training (:func:`condgan.calibration.correct_first_turns`). A first turn is known by its condition, which depends
    on the object only; to other turns nothing is added.

    All weights are buffers: the optimizer of a larger model leaves them alone. A fresh correction adds nothing.

    Args:
        num_objects: size K of the vocabulary.
        condition_dim: length D of the condition.
        image_size: side of the pictures in pixels.

    Shape:
        condition: (N, D); no gradient flows back to it.
        output: (N, 3, H, W), to be added to pictures in [-1, 1].

    Source: matching the means of real and drawn pictures is the feature matching of Salimans et al. 2016,
    arXiv:1606.03498, section 3.1, with the pixels as features and solved at once.
    """

    conditions: Tensor
    offsets: Tensor

    def __init__(self, num_objects: int, condition_dim: int, image_size: int) -> None:
        super().__init__()
        self.register_buffer("conditions", torch.zeros(num_objects, condition_dim))
        self.register_buffer("offsets", torch.zeros(num_objects, 3, image_size, image_size))

    def forward(self, condition: Tensor) -> Tensor:
        likeness = F.normalize(condition.detach()) @ F.normalize(self.conditions).T  # (N, K)
        share = F.relu((likeness - LEAST_LIKENESS) / (1 - LEAST_LIKENESS))
        return (share @ self.offsets.flatten(1)).unflatten(1, self.offsets.shape[1:])

    def extra_repr(self) -> str:
        num_objects, condition_dim = self.conditions.shape
        return f"{num_objects}, {condition_dim}, image_size={self.offsets.shape[-1]}"
