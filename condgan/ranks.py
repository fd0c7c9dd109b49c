"""Several processes that train one model (``torchrun``): who they are, sums over all of them, batch norm over all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for another, which may be writing a checkpoint or fitting the canvas on a slower machine."""
LARGE = 2**16
"""Tensors with so many numbers are sent on their own: to put them together would take longer than a message."""
MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
"""What ``torchrun`` sets beside ``RANK`` and ``WORLD_SIZE``, for processes that have to meet."""


class RankLost(RuntimeError):
    """Another process of the same run has gone, or has not answered for :data:`PATIENCE`."""


@dataclass(frozen=True)
class Ranks:
    """The processes that work together, and which of them this is."""

    rank: int = 0
    """Number of this process."""
    count: int = 1
    """How many there are."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """What this process computes on."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Replace tensors of one dtype by their sums over all ranks, which are the same to the last bit on each.

        They are dense: contiguous, or so but for the order of their dimensions. Large ones are sent as they are, all
        small ones together.

        Raises:
            RankLost: another rank has gone.
        """
        if self.count == 1:
            return
        small = [tensor for tensor in tensors if tensor.numel() < LARGE]
        with _losing_ranks():
            sums = [dist.all_reduce(tensor, async_op=True) for tensor in tensors if tensor.numel() >= LARGE]
            if small:
                together = torch.cat([tensor.flatten() for tensor in small])
                dist.all_reduce(together)
                for tensor, total in zip(small, together.split([tensor.numel() for tensor in small]), strict=True):
                    tensor.copy_(total.view_as(tensor))
            for large in sums:
                large.wait()

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank; no rank goes on before all have come here.

        Raises:
            RankLost: another rank has gone.
        """
        if self.count == 1:
            return flag
        total = torch.tensor(float(flag), device=self.device)
        self.sum_(total)
        return bool(total)

    def check_same(self, number: int, message: str) -> None:
        """Raise a ValueError with this message on every rank unless the number is the same on all.

        Raises:
            RankLost: another rank has gone.
            ValueError: it is not.
        """
        numbers = torch.zeros(self.count, dtype=torch.int64, device=self.device)
        numbers[self.rank] = number
        self.sum_(numbers)
        if (numbers != number).any():
            raise ValueError(f"{message}; rank 0 to {self.count - 1}: {numbers.tolist()}")

    @torch.no_grad()
    def copy_from_first(self, module: nn.Module) -> None:
        """Give the module the weights and buffers that it has on rank 0.

        Raises:
            RankLost: another rank has gone.
        """
        if self.count == 1:
            return
        for value in module.state_dict().values():
            sent = value.contiguous() if self.leads else torch.zeros_like(value, memory_format=torch.contiguous_format)
            _all_reduce(sent)  # zeros but for one: a broadcast
            value.copy_(sent)


ALONE = Ranks()


def launched() -> tuple[int, int]:
    """Number of this process among those that ``torchrun`` has started, and how many these are; 0 and 1 if alone.

    Raises:
        ValueError: the variables ``RANK`` and ``WORLD_SIZE`` say something else.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    rank, count = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise ValueError(
            "the variables RANK and WORLD_SIZE must be whole numbers, RANK from 0 to WORLD_SIZE - 1, "
            f"got {rank!r} and {count!r}: set both, or unset both to work alone"
        )
    return int(rank), int(count)


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[Ranks]:
    """Meet the other processes that ``torchrun`` has started, or those of a process group that is there already.

    Args:
        device: such as ``cuda``, which is another GPU for every process of a machine; None takes a GPU if there is one.

    Yields:
        :class:`Ranks`; a process that was started alone is the only one.

    Raises:
        ValueError: more processes were started on this machine than it has GPUs, ``device`` cannot be used, or the
            variables say of several processes but not where they meet.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), own_device(device))
        return
    _, count = launched()
    missing = [name for name in MEETING_POINT if name not in os.environ]
    if count > 1 and missing:
        raise ValueError(
            f"{count} processes were started (WORLD_SIZE), but {' and '.join(missing)} is not set, where they meet: "
            "start them with torchrun, or unset RANK and WORLD_SIZE to train alone"
        )
    if count == 1 or not dist.is_available():
        yield Ranks(device=own_device(device))
        return
    own = own_device(device)
    from torch.distributed.distributed_c10d import PrefixStore  # PyTorch may be built without
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(count):
        # After a restart on one machine they meet in the same store, which has the addresses of those that died.
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    agreed = False
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), own)
        agreed = True
    except KeyboardInterrupt:
        agreed = True
        raise
    finally:
        if agreed:  # after an error the others may never come: do not wait for them
            dist.destroy_process_group()


def own_device(device: str | None = None) -> torch.device:
    """Of the GPUs of a machine the one with the number that ``torchrun`` gives this process there.

    Args:
        device: such as ``cpu``, which is taken as it is; None takes a GPU if there is one.

    Raises:
        ValueError: the machine has fewer GPUs than processes, or no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} was asked for, but PyTorch finds no GPU here: give cpu, or leave it out")
    if device != "cuda" or "LOCAL_RANK" not in os.environ:
        return torch.device(device)
    number = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count()
    if number >= gpus:
        raise ValueError(
            f"device: process {number} of this machine has none of its {gpus} GPUs: start {gpus} processes or fewer"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _all_reduce(tensor: Tensor) -> None:
    with _losing_ranks():
        dist.all_reduce(tensor)


@contextlib.contextmanager
def _losing_ranks() -> Iterator[None]:
    """What a process group raises when a process has gone, as RankLost; that memory is short stays what it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLost(
            f"rank {dist.get_rank()} of {dist.get_world_size()} has lost another rank, so that all stop "
            f"({_reason(error)})"
        ) from error


def _reason(error: RuntimeError) -> str:
    """The first line of a message, or that of the error of NCCL's own which it quotes further down."""
    message = str(error).strip()
    quoted = message.rpartition("Last error:")[2].strip()
    return (quoted or message or type(error).__name__).splitlines()[0]


class _Normalize(torch.autograd.Function):
    """Batch norm with the statistics of all ranks, whose gradient knows that each rank's pictures are in them.

    Both directions are what PyTorch has for batch norm with given statistics; backwards, what the statistics add is the
    same map with another scale and shift.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, (True, True, True)
        )
        sums = torch.stack((grad_weight, grad_bias))
        _all_reduce(sums)
        scale, shift = sums / count * weight * torch.rsqrt(var + ctx.eps)
        grad_x -= F.batch_norm(x, mean, var, scale, shift, eps=ctx.eps)
        return grad_x, grad_weight, grad_bias, None, None, None, None


class GlobalBatchNorm(_BatchNorm):
    """Batch norm that in training mode takes mean and variance over the batches of all ranks.

    The same up to rounding as plain batch norm on their concatenation, in its gradients too; ranks may have batches of
    different sizes. It needs a process group, and every rank must call it equally often. It can be differentiated once,
    which gradient penalties need no more often: no picture that they ask about passes through a batch norm.

    Args:
        norm: the plain layer, whose weights and buffers it shares.

    Shape:
        x: (N, C, ...).
        output: as ``x``.

    Source: Peng et al. 2018 (MegDet), arXiv:1711.07240, section 3.3. Unlike ``torch.nn.SyncBatchNorm`` it works on the
    CPU.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:  # what the base class asks for
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        mean, var, count = self._statistics(input)
        self._update_running(mean, var * (count / (count - 1)))
        weight = torch.ones_like(mean) if self.weight is None else self.weight
        bias = torch.zeros_like(mean) if self.bias is None else self.bias
        normalized: Tensor = _Normalize.apply(input, weight, bias, mean, var, count, self.eps)
        return normalized

    @torch.no_grad()
    def _statistics(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance (C,) over all ranks, and of how many numbers each is."""
        assert self.running_mean is not None and self.running_var is not None
        # Given statistics of higher precision, the new ones have it too. A copy: one number alone would make them NaN.
        mean, var = torch.batch_norm_update_stats(input, self.running_mean.clone(), self.running_var.clone(), 0.0)
        off = mean - self.running_mean  # from what all ranks know: their squares then lose no digits
        count = input.numel() / self.num_features
        sums = count * torch.cat((off, var + off.square(), torch.ones_like(off[:1])))
        _all_reduce(sums)
        off, square = (sums[:-1] / sums[-1]).chunk(2)
        return self.running_mean + off, (square - off.square()).clamp(min=0), sums[-1]

    def _update_running(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)


def share_statistics(module: nn.Module) -> None:
    """Turn every batch norm inside a module, in place, into a :class:`GlobalBatchNorm`."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, GlobalBatchNorm(child))
