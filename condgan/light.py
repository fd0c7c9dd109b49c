"""How a scene is lit, read off a picture of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgan.derived import Derived
from condgan.precision import full_precision

SQUARES = 8
"""The picture is looked at as so many rows and columns of mean colours."""
TOLERANCE = 2 / 127.5
"""A square further than this from the light that was found has an object or a shadow in it (2 grey levels)."""
FAR = 4.0
"""The same before any light was found, in standard deviations of empty scenes."""
NOISE_VARIANCE = (1 / 127.5) ** 2
"""Of a square's colour around what the light says (1 grey level squared): soft shadows, mostly."""
ROUNDS = 3


class _Equations(NamedTuple):
    """Least squares on some of P squares, of K components; float32."""

    basis: Tensor
    """(K, 3 P): the components."""
    by_square: Tensor
    """(3 P, K): the same, transposed."""
    products: Tensor
    """(P, K * K): of every two components, in each square."""
    ridge: Tensor
    """(K * K,): what their sums over squares get added."""
    far: Tensor
    """(3, P): the most that the square of a colour of an empty scene is."""

    @classmethod
    def of(cls, components: Tensor) -> _Equations:
        """Of components (K, 3, h, w)."""
        components = components.float().flatten(2)
        products = (components[:, None] * components).sum(2).flatten(0, 1).T
        ridge = NOISE_VARIANCE * torch.eye(len(components)).to(components).flatten()
        basis = components.flatten(1)
        return cls(basis, basis.T.contiguous(), products, ridge, FAR**2 * components.square().sum(0))

    def solve(self, squares: Tensor, free: Tensor) -> Tensor:
        """How much of each component (N, K) squares (N, 3, P) have, from those that are ``free`` (N, P)."""
        weight, count = free.float(), len(self.basis)
        normal = torch.addmm(self.ridge, weight, self.products).view(-1, count, count)
        seen = (weight[:, None] * squares).flatten(1) @ self.by_square
        return torch.linalg.solve_ex(normal, seen[:, :, None]).result[:, :, 0]  # always well conditioned


class SceneLight(nn.Module):
    """A few numbers that say how a scene is lit, whatever stands in it.

    In i-CLEVR lamps and camera are moved a little from scene to scene. About twelve numbers say all of it: principal
    components of empty scenes, seen as 8x8 squares of mean colour. Those of a picture with objects are found by least
    squares on the squares that look like an empty floor; what these leave open is taken to be as usual.

    All weights are buffers: :meth:`fit` finds them once. A fresh one says 0 of every picture.

    Args:
        num_inputs: how many numbers, K.

    Shape:
        image: (N, 3, H, W) in [-1, 1]; no gradient flows back to it.
        output: (N, K) float32, over empty scenes each of mean 0, variance 1 and uncorrelated.

    Raises:
        ValueError: ``num_inputs`` is not from 1 to 192.

    Source: principal components with squares left out, Tipping and Bishop 1999, "Probabilistic principal component
    analysis", section 4.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        most = 3 * SQUARES**2
        if not 1 <= num_inputs <= most:
            raise ValueError(
                f"light_inputs must be from 1 to {most}, as many as colours are looked at, got {num_inputs}"
            )
        self.register_buffer("mean", torch.zeros(3, SQUARES, SQUARES))
        self.register_buffer("components", torch.zeros(num_inputs, 3, SQUARES, SQUARES))
        self._equations = Derived(_Equations.of)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        with full_precision(image.device):
            squares = (F.adaptive_avg_pool2d(image.float(), SQUARES) - self.mean.float()).flatten(2).contiguous()
            equations = self._equations(self.components)
            free = (squares.square() < equations.far).all(1)  # (N, P)
            light = equations.solve(squares, free)
            for _ in range(ROUNDS - 1):
                unexplained = squares - (light @ equations.basis).view_as(squares)
                light = equations.solve(squares, (unexplained.abs() < TOLERANCE).all(1))
        return light

    @torch.no_grad()
    def fit(self, empty: Tensor) -> None:
        """Learn how light varies from empty scenes (S, 3, H, W) in [-1, 1]."""
        squares = torch.cat([F.adaptive_avg_pool2d(chunk.float(), SQUARES) for chunk in empty.split(512)])
        self.mean.copy_(squares.mean(0))
        centred = (squares - self.mean).flatten(1)
        values, directions = torch.linalg.eigh(centred.T @ centred / len(centred))  # in ascending order
        count = len(self.components)
        found = directions * values.clamp(min=0).sqrt()
        self.components.copy_(found[:, -count:].flip(1).T.reshape_as(self.components))

    def extra_repr(self) -> str:
        return f"{len(self.components)}"
