"""Numbers that depend on each other in a smooth, unknown way, made from independent ones."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from condgan.derived import Derived

MAX_LOG_SCALE = 3.0
"""Each coupling of :class:`ConditionalFlow` stretches a number by at most exp(3)."""
MAX_SCALE = math.exp(MAX_LOG_SCALE)
"""So many times."""
FRESH_BOUND = 100.0
"""A fresh flow changes no number within this distance of 0."""
STEPS = 8
"""Steps of the way from noise to a vector, each with two looks at the velocity."""
FREQUENCIES = 8
"""Of the sines and cosines that tell a network the time."""
EPOCHS = 900
"""How often :meth:`ContinuousFlow.fit` sees each vector."""
PATIENCE = 1 / 6
"""Share of the epochs after which :meth:`ContinuousFlow.fit` gives up if nothing got better."""
LEARNING_RATE = 2e-3
"""Highest of :meth:`ContinuousFlow.fit`, reached after a tenth of the steps."""
DISTRIBUTION = ("centre", "spread", "low", "high")
"""Buffers of :class:`ContinuousFlow` that are measured, not learned."""
ARRIVALS = 20_000
"""Vectors whose ends :meth:`ContinuousFlow.fit` measures."""


class ContinuousFlow(nn.Module):
    """A distribution of vectors: standard normal numbers carried along by a velocity that depends on where they are.

    At time t in [0, 1] a vector x on its way from noise to data is cos(a) noise + sin(a) data with a = t pi / 2. A
    small network learns the mean velocity dx/da of all pairs of noise and data that are at x just then; who follows it
    from noise arrives at a vector as likely as in the data. A network that has seen few vectors is too cautious, and
    what arrives varies too little: each number is stretched to the mean and the standard deviation of the data. Drawn
    numbers stay within what was met in fitting. A fresh flow changes nothing.

    All weights are buffers: :meth:`fit` finds them once, and the optimizer of a larger model leaves them alone.

    Args:
        dim: length K of the vectors.

    Shape:
        noise: (N, K), standard normal.
        output: (N, K), each number of mean 0 and standard deviation 1, as what was fitted.

    Source: Lipman et al. 2023, "Flow matching for generative modeling", arXiv:2210.02747; the path is that of Albergo
    and Vanden-Eijnden 2023, arXiv:2209.15571, along which independent normal numbers stay where they are.
    """

    centre: Tensor
    spread: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        hidden = 4 * max(dim, 16)
        shapes = {
            "weight1": (hidden, dim),
            "time1": (hidden, 2 * FREQUENCIES),
            "bias1": (hidden,),
            "weight2": (hidden, hidden),
            "bias2": (hidden,),
            "weight3": (hidden, hidden),
            "bias3": (hidden,),
            "weight4": (dim, hidden),
            "bias4": (dim,),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(dim))
        self.register_buffer("low", torch.full((dim,), -FRESH_BOUND))
        self.register_buffer("high", torch.full((dim,), FRESH_BOUND))
        self._route = Derived(_route)

    def forward(self, noise: Tensor) -> Tensor:
        return ((self._arrive(noise) - self.centre) / self.spread).clamp(self.low, self.high)

    def _arrive(self, noise: Tensor) -> Tensor:
        """Where the velocity carries the noise (N, K) to."""
        told, layers = self._route(*self._weights().values())
        step = math.pi / 2 / STEPS
        x = noise
        for start, middle in zip(told[::2], told[1::2], strict=True):
            halfway = torch.add(x, _velocity(x, start, layers), alpha=step / 2)
            x = torch.add(x, _velocity(halfway, middle, layers), alpha=step)
        return x

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    @torch.no_grad()
    def fit(self, x: Tensor, epochs: int | None = None, batch_size: int = 128, *, progress: bool = False) -> None:
        """Learn a distribution from vectors of it, with AdamW.

        Every tenth vector is not learned from, and the weights of the epoch that does best on these are kept: too few
        vectors leave the flow as it was fresh instead of being learned by heart, and end the fit early. Equal vectors
        give equal weights; the global random state is left alone.

        Args:
            x: (S, K), at least one, each number of mean 0 and standard deviation 1.
            epochs: how often each vector is seen, at most; None is :data:`EPOCHS`.
            batch_size: vectors a step.
            progress: show a progress bar on stderr.
        """
        epochs = EPOCHS if epochs is None else epochs
        held_out = torch.arange(len(x), device=x.device) % 10 == 9
        known, unknown = x[~held_out], x[held_out].repeat(4, 1)
        rng = torch.Generator().manual_seed(0)
        journeys = _journeys(unknown, rng)  # the same for every epoch
        weights = self._weights()
        for weight in weights.values():
            weight.zero_()
        best = self._errors(weights, unknown, *journeys).mean()
        kept = {name: weight.clone() for name, weight in weights.items()}
        for name in ("weight1", "time1", "weight2", "weight3"):
            weight = weights[name]
            weight.copy_(torch.randn(weight.shape, generator=rng) / math.sqrt(3 * weight.shape[1]))
        optimizer = torch.optim.AdamW(weights.values(), betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
        steps = epochs * math.ceil(len(known) / batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
        last_gain = 0
        for epoch in trange(epochs, desc="light", unit="epoch", file=sys.stderr, disable=not progress):
            for batch in known[torch.randperm(len(known), generator=rng).to(x.device)].split(batch_size):
                self._step(weights, batch, _journeys(batch, rng), optimizer)
                schedule.step()
            error = self._errors(weights, unknown, *journeys).mean()
            if error < best:  # never without unknown vectors: the mean of none is NaN
                best, kept = error, {name: weight.clone() for name, weight in weights.items()}
                last_gain = epoch
            elif epoch - last_gain > epochs * PATIENCE:
                break
        for name, value in kept.items():
            weights[name].copy_(value)
        self._measure_arrivals(rng)
        self.low.copy_(x.amin(0))
        self.high.copy_(x.amax(0))

    def _measure_arrivals(self, rng: torch.Generator) -> None:
        """Find the mean and the standard deviation of what arrives, as exactly as a fresh flow's are known."""
        noise = torch.randn(ARRIVALS, self.dim, generator=rng).to(self.centre)
        noise = (noise - noise.mean(0)) / noise.std(0, correction=0)
        arrived = self._arrive(noise)
        self.centre.copy_(arrived.mean(0))
        self.spread.copy_(arrived.std(0, correction=0))

    def _weights(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.named_buffers() if name not in DISTRIBUTION}

    def _step(
        self, weights: dict[str, Tensor], x: Tensor, journeys: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        with torch.enable_grad():
            for weight in weights.values():
                weight.requires_grad_()
            loss = self._errors(weights, x, *journeys).mean()
            gradients = torch.autograd.grad(loss, [*weights.values()])
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.requires_grad_(False).grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    @staticmethod
    def _errors(weights: dict[str, Tensor], x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        angle = time * (math.pi / 2)
        sin, cos = angle.sin(), angle.cos()
        told = _told(time, weights["time1"], weights["bias1"])
        velocity = _velocity(cos * noise + sin * x, told, _layers(*weights.values()))
        return (velocity - (cos * x - sin * noise)).square().mean(1)


def _journeys(x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where each of the vectors (N, K) comes from, noise (N, K), and how far it has got, time (N, 1)."""
    noise, time = torch.randn(x.shape, generator=rng), torch.rand(len(x), 1, generator=rng)
    return noise.to(x), time.to(x)


def _told(time: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the first layer makes of the time (N, 1): (N, hidden)."""
    phase = time * (math.pi * torch.arange(1, FREQUENCIES + 1, device=time.device, dtype=torch.float32))
    return F.linear(torch.cat((phase.sin(), phase.cos()), 1).to(time.dtype), weight, bias)


def _layers(weight1: Tensor, _time1: Tensor, _bias1: Tensor, *others: Tensor) -> list[Tensor]:
    """Weights, transposed, and biases of the network in the order of use, without what tells it the time."""
    return [x.T if x.ndim == 2 else x for x in (weight1, *others)]


def _route(*weights: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """For drawing: what the network is told of the time at each of its looks, and its layers."""
    _, time1, bias1, *_ = weights
    times = torch.arange(2 * STEPS, device=bias1.device, dtype=bias1.dtype) / (2 * STEPS)
    return _told(times[:, None], time1, bias1).unbind(), _layers(*weights)


def _velocity(x: Tensor, told: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """What the network says of vectors (N, K) and of what it was told of the time, (N, hidden) or (hidden,)."""
    weight1, weight2, bias2, weight3, bias3, weight4, bias4 = layers
    h = F.silu(torch.addmm(told, x, weight1))
    h = h + F.silu(torch.addmm(bias2, h, weight2))
    h = h + F.silu(torch.addmm(bias3, h, weight3))
    return torch.addmm(bias4, h, weight4)


class ConditionalFlow(nn.Module):
    """A distribution of vectors that depends on a context: standard normal numbers through affine couplings.

    Each coupling keeps some of the numbers and gives the others a mean and a scale, which a small network reads off
    the kept ones and the context. So it is inverted in one step, and its density is known. The weights are parameters,
    to be learned along with a larger model by minimising ``-log_prob``. A fresh flow changes nothing.

    Args:
        dim: length K of the vectors, at least 2.
        context_dim: length C of the context.
        hidden_dim: hidden units of each coupling.
        couplings: how many.

    Shape:
        noise: (N, K), standard normal.
        context: (N, C).
        output: (N, K).

    Source: Dinh, Sohl-Dickstein and Bengio 2017, "Density estimation using Real NVP", arXiv:1605.08803, with log-scales
    bounded by 3 tanh(x / 3) without a learned factor, and no batch norm; conditional couplings after Winkler et al.
    2019, "Learning likelihoods with conditional normalizing flows", arXiv:1912.00042.
    """

    kept: Tensor

    def __init__(self, dim: int, context_dim: int, hidden_dim: int = 64, couplings: int = 8) -> None:
        super().__init__()
        self.register_buffer("kept", _kept(couplings, dim), persistent=False)
        self.register_load_state_dict_post_hook(_restore_kept)  # type: ignore[no-untyped-call]
        self.couplings = nn.ModuleList()
        for _ in range(couplings):
            last = nn.Linear(hidden_dim, 2 * dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            layers = [nn.Linear(dim + context_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU()]
            self.couplings.append(nn.Sequential(*layers, last))
        self._plan = Derived(_drawing_plan)

    def forward(self, noise: Tensor, context: Tensor) -> Tensor:
        weights = [weight for coupling in self.couplings for weight in self._weights(coupling)]
        read, couplings = self._plan(self.kept, *weights)
        x = noise
        for told, (weight1, weight2, bias2, weight3, bias3) in zip(
            F.linear(context, *read).chunk(len(couplings), 1), couplings, strict=True
        ):
            h = F.silu(torch.addmm(told, x, weight1))
            h = F.silu(torch.addmm(bias2, h, weight2))
            mean, third = torch.addmm(bias3, h, weight3).chunk(2, 1)
            x = torch.addcmul(mean, x, torch.pow(MAX_SCALE, third.tanh()))
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
        return _affine(ConditionalFlow._weights(coupling), torch.cat((kept_numbers, context), 1))

    @staticmethod
    def _weights(coupling: Any) -> tuple[Tensor, ...]:
        """Used as functions: so small, calls of modules take longer than the products."""
        first, _, second, _, last = coupling
        return first.weight, first.bias, second.weight, second.bias, last.weight, last.bias


def _kept(couplings: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Which of K numbers each of L couplings keeps, (L, K) bool."""
    index = torch.arange(dim, device=device)
    patterns = [index % 2 == 0, index % 2 == 1, index < dim // 2, index >= dim // 2]
    return torch.stack([patterns[i % 4] for i in range(couplings)])


def _restore_kept(flow: ConditionalFlow, _: object) -> None:
    """After weights were loaded: a flow made on the device ``meta`` has no masks, and no checkpoint has any."""
    flow.kept = _kept(len(flow.couplings), flow.kept.shape[1], next(flow.couplings.parameters()).device)


def _affine(weights: tuple[Tensor, ...], known: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-scale, (N, K) each, read off what a coupling knows; those of kept numbers mean nothing."""
    weight1, bias1, weight2, bias2, weight3, bias3 = weights
    h = F.silu(F.linear(known, weight1, bias1))
    h = F.silu(F.linear(h, weight2, bias2))
    mean, log_scale = F.linear(h, weight3, bias3).chunk(2, 1)
    return mean, _bounded(log_scale)


class _DrawingPlan(NamedTuple):
    """The weights of a flow for drawing, where a scene is a few numbers and every operation counts."""

    read: tuple[Tensor, Tensor]
    """Linear map of the context to what it says to the first layers of all couplings."""
    couplings: list[tuple[Tensor, ...]]
    """In the order of drawing: transposed weight of the first layer, weights and biases of the others. What must not be
    read and what must not change is masked in them, and log-scales come divided by their bound."""


def _drawing_plan(kept: Tensor, *weights: Tensor) -> _DrawingPlan:
    """Of the masks (L, K) and six weights and biases of each of L couplings, in the order of ``log_prob``."""
    dim = kept.shape[1]
    read: list[Tensor] = []
    couplings: list[tuple[Tensor, ...]] = []
    for keep, number in reversed([*zip(kept, range(0, len(weights), 6), strict=True)]):
        weight1, bias1, weight2, bias2, weight3, bias3 = weights[number : number + 6]
        read.append(torch.cat((weight1[:, dim:], bias1[:, None]), 1))
        changed = (~keep).to(weight3)
        changed = torch.cat((changed, changed / MAX_LOG_SCALE))
        own = weight1[:, :dim].T * keep[:, None], weight2.T, bias2, weight3.T * changed, bias3 * changed
        couplings.append(own)
    both = torch.cat(read)
    return _DrawingPlan((both[:, :-1], both[:, -1]), couplings)


def _uncouple(x: Tensor, kept: Tensor, mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """What a coupling made ``x`` of, and the logarithm (N,) of how much a small volume grows on the way back."""
    return torch.where(kept, x, (x - mean) * (-log_scale).exp()), -log_scale.masked_fill(kept, 0).sum(1)


def _normal_log_prob(x: Tensor) -> Tensor:
    """Log-density (N,) in nats of vectors (N, K) of standard normal numbers."""
    return -0.5 * (x.square() + math.log(2 * math.pi)).sum(1)


def _bounded(log_scale: Tensor) -> Tensor:
    return MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)
