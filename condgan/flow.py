"""Numbers that depend on each other in a smooth, unknown way, made from independent ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_LOG_SCALE = 3.0
"""Each coupling stretches a number by at most exp(3)."""
DROPOUT = 0.1
"""Share of hidden units that rest in a step of :meth:`CouplingFlow.fit`."""
MAX_GRADIENT_NORM = 50.0
"""Longer gradients of the mean log-density are shortened in a step of :meth:`CouplingFlow.fit`."""
FRESH_BOUND = 100.0
"""A fresh flow changes no number within this distance of 0."""


class CouplingFlow(nn.Module):
    """A distribution of vectors: standard normal numbers through a stack of affine couplings.

    Each coupling keeps some of the numbers and gives the others a mean and a scale, which a small network reads off
    the kept ones. So it is inverted in one step, and its density is known. Drawn numbers stay within what was met in
    fitting, before and after each coupling: beyond it nothing is known, and one stray number would lead the next
    astray. A fresh flow changes nothing.

    All weights are buffers: :meth:`fit` finds them once, and the optimizer of a larger model leaves them alone.

    Args:
        dim: length K of the vectors; those numbers come first that tell most about the others.

    Shape:
        noise: (N, K), standard normal.
        output: (N, K), each number of mean 0 and standard deviation 1, as what was fitted.

    Source: Dinh, Sohl-Dickstein and Bengio 2017, "Density estimation using Real NVP", arXiv:1605.08803. Unlike the
    paper, a log-scale is bounded by 3 tanh(x / 3) without a learned factor, and there is no batch norm.
    """

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    weight3: Tensor
    bias3: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        layers, hidden = len(_kept(dim)), 2 * dim
        self.register_buffer("weight1", torch.zeros(layers, hidden, dim))
        self.register_buffer("bias1", torch.zeros(layers, hidden))
        self.register_buffer("weight2", torch.zeros(layers, hidden, hidden))
        self.register_buffer("bias2", torch.zeros(layers, hidden))
        self.register_buffer("weight3", torch.zeros(layers, 2 * dim, hidden))
        self.register_buffer("bias3", torch.zeros(layers, 2 * dim))
        self.register_buffer("low", torch.full((layers + 1, dim), -FRESH_BOUND))
        self.register_buffer("high", torch.full((layers + 1, dim), FRESH_BOUND))

    def forward(self, noise: Tensor) -> Tensor:
        x = noise.clamp(self.low[-1], self.high[-1])
        for (kept, weights), low, high in reversed([*zip(self._couplings(), self.low, self.high, strict=False)]):
            mean, log_scale = _affine(weights, x * kept)
            x = _couple(x, kept, mean, log_scale).clamp(low, high)
        return x

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (N,) in nats of vectors (N, K), as if there were no bounds."""
        return self._encode(x)[1]

    @torch.no_grad()
    def fit(self, x: Tensor, epochs: int = 40, batch_size: int = 128) -> None:
        """Learn a distribution from vectors of it, by maximum likelihood with AdamW and dropout.

        Every tenth vector is not learned from, and the weights of the epoch that makes these most likely are kept: too
        few vectors leave the flow as it was fresh instead of being learned by heart. Equal vectors give equal weights;
        the global random state is left alone.

        Args:
            x: (S, K), at least one, each number of mean 0 and standard deviation 1.
            epochs: how often each vector is seen.
            batch_size: vectors a step.
        """
        held_out = torch.arange(len(x), device=x.device) % 10 == 9
        known, unknown = x[~held_out], x[held_out]
        weights = [self.weight1, self.bias1, self.weight2, self.bias2, self.weight3, self.bias3]
        for weight in weights:
            weight.zero_()
        best, kept = self.log_prob(unknown).mean(), [weight.clone() for weight in weights]
        optimizer = torch.optim.AdamW(weights, weight_decay=1e-2)
        steps = epochs * math.ceil(len(known) / batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for weight in (self.weight1, self.weight2):
                weight.copy_(torch.randn(weight.shape) / math.sqrt(3 * weight.shape[-1]))
            for _ in range(epochs):
                for batch in known[torch.randperm(len(known)).to(x.device)].split(batch_size):
                    self._step(weights, batch, optimizer)
                    schedule.step()
                score = self.log_prob(unknown).mean()
                if score > best:  # never without unknown vectors: the mean of none is NaN
                    best, kept = score, [weight.clone() for weight in weights]
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
        states = torch.stack(self._encode(x)[0])  # (L + 1, S, K)
        self.low.copy_(states.amin(1))
        self.high.copy_(states.amax(1))

    def _step(self, weights: list[Tensor], batch: Tensor, optimizer: torch.optim.Optimizer) -> None:
        with torch.enable_grad():
            for weight in weights:
                weight.requires_grad_()
            loss = -self._encode(batch, DROPOUT)[1].mean()
            gradients = torch.autograd.grad(loss, weights)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.requires_grad_(False).grad = gradient
        nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()

    def _encode(self, x: Tensor, dropout: float = 0.0) -> tuple[list[Tensor], Tensor]:
        """The vectors before the first coupling and after each one, (N, K), and their log-density (N,)."""
        states = [x]
        volume = x.new_zeros(len(x))
        for kept, weights in self._couplings():
            x, change = _uncouple(x, kept, *_affine(weights, x * kept, dropout))
            volume = volume + change
            states.append(x)
        return states, volume + _normal_log_prob(x)

    def _couplings(self) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Of each coupling the numbers that it keeps, (K,) bool, and its weights and biases."""
        weights = zip(self.weight1, self.bias1, self.weight2, self.bias2, self.weight3, self.bias3, strict=True)
        return zip(_kept(self.dim).to(self.low.device), weights, strict=True)


class ConditionalFlow(nn.Module):
    """A distribution of vectors that depends on a context: standard normal numbers through affine couplings.

    As :class:`CouplingFlow`, but each coupling reads the context too, and the weights are parameters, to be learned
    along with a larger model by minimising ``-log_prob``. A fresh flow changes nothing.

    Args:
        dim: length K of the vectors, at least 2.
        context_dim: length C of the context.
        hidden_dim: hidden units of each coupling.
        couplings: how many.

    Shape:
        noise: (N, K), standard normal.
        context: (N, C).
        output: (N, K).

    Source: Real NVP as in :class:`CouplingFlow`; conditional couplings after Winkler et al. 2019, "Learning likelihoods
    with conditional normalizing flows", arXiv:1912.00042.
    """

    kept: Tensor

    def __init__(self, dim: int, context_dim: int, hidden_dim: int = 64, couplings: int = 8) -> None:
        super().__init__()
        index = torch.arange(dim)
        patterns = [index % 2 == 0, index % 2 == 1, index < dim // 2, index >= dim // 2]
        self.register_buffer("kept", torch.stack([patterns[i % 4] for i in range(couplings)]), persistent=False)
        self.couplings = nn.ModuleList()
        for _ in range(couplings):
            last = nn.Linear(hidden_dim, 2 * dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            layers = [nn.Linear(dim + context_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU()]
            self.couplings.append(nn.Sequential(*layers, last))

    def forward(self, noise: Tensor, context: Tensor) -> Tensor:
        x = noise
        for kept, coupling in zip(reversed(self.kept.unbind()), reversed([*self.couplings]), strict=True):
            x = _couple(x, kept, *self._affine(coupling, x.where(kept, 0), context))
        return x

    def log_prob(self, x: Tensor, context: Tensor) -> Tensor:
        """Log-density (N,) in nats of vectors (N, K)."""
        volume = x.new_zeros(len(x))
        for kept, coupling in zip(self.kept, self.couplings, strict=True):
            x, change = _uncouple(x, kept, *self._affine(coupling, x.where(kept, 0), context))
            volume = volume + change
        return volume + _normal_log_prob(x)

    @staticmethod
    def _affine(coupling: Any, kept_numbers: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        first, _, second, _, last = coupling  # as functions: so small, calls of modules take longer than the products
        weights = first.weight, first.bias, second.weight, second.bias, last.weight, last.bias
        return _affine(weights, torch.cat((kept_numbers, context), 1))


def _affine(weights: tuple[Tensor, ...], known: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and log-scale, (N, K) each, read off what a coupling knows; those of kept numbers mean nothing."""
    weight1, bias1, weight2, bias2, weight3, bias3 = weights
    h = F.silu(F.linear(known, weight1, bias1))
    h = F.silu(F.linear(F.dropout(h, dropout), weight2, bias2))
    mean, log_scale = F.linear(F.dropout(h, dropout), weight3, bias3).chunk(2, 1)
    return mean, _bounded(log_scale)


def _couple(x: Tensor, kept: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """One affine coupling of vectors (N, K): all but the kept numbers (K,) get a scale and a mean."""
    return torch.where(kept, x, x * log_scale.exp() + mean)


def _uncouple(x: Tensor, kept: Tensor, mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`_couple` made ``x`` of, and the logarithm (N,) of how much a small volume grows on the way back."""
    return torch.where(kept, x, (x - mean) * (-log_scale).exp()), -log_scale.masked_fill(kept, 0).sum(1)


def _normal_log_prob(x: Tensor) -> Tensor:
    """Log-density (N,) in nats of vectors (N, K) of standard normal numbers."""
    return -0.5 * (x.square() + math.log(2 * math.pi)).sum(1)


def _bounded(log_scale: Tensor) -> Tensor:
    return MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)


def _kept(dim: int) -> Tensor:
    """(L, K) bool: the numbers that each coupling keeps.

    First the leading ones give away what follows from them; then all are mixed.
    """
    index = torch.arange(dim)
    leading = [index < max(1, dim * share // 12) for share in (2, 4, 8, 2, 4, 8, 1)]
    trailing = [index >= max(1, dim * share // 12) for share in (1, 2, 4)]
    return torch.stack([*leading, *trailing, *(index % 2 == i % 2 for i in range(4))])
