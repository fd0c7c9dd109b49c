"""Which precision a device has, and which is fast: bfloat16 only where the hardware multiplies it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

CPU_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16")
"""Names that :func:`torch.cpu.get_capabilities` has for products in bfloat16, on x86 and on ARM."""


def fast_bfloat16(device: torch.device | str) -> bool:
    """Whether a device multiplies bfloat16 with instructions of its own.

    A processor without them imitates it. On one core with AVX2 only, a product of two 1024x1024 matrices in bfloat16
    ran at 0.6 GFLOP/s, in float32 at 43.

    Args:
        device: a CPU is asked for its instructions, a GPU by ``torch.cuda.is_bf16_supported``; others are taken to have
            them.
    """
    device = torch.device(device)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(bool(capabilities.get(name)) for name in CPU_CAPABILITIES)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device | str, enabled: bool = True) -> AbstractContextManager[None]:
    """Operations that gain by it run in bfloat16 inside this context, where :func:`fast_bfloat16` says that they do.

    Args:
        device: on which the operations run.
        enabled: whether to do so at all.
    """
    device = torch.device(device)
    if not torch.amp.is_autocast_available(device.type):  # such as ``meta``
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and fast_bfloat16(device))


def full_precision(device: torch.device | str) -> AbstractContextManager[None]:
    """Operations run in the precision of their inputs inside this context, whatever autocast is around it."""
    kind = torch.device(device).type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()  # an exported graph then has nothing of it
    return torch.autocast(kind, enabled=False)


def widest_float(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on Apple's GPUs (``mps``), which have no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def is_coarse(x: torch.Tensor) -> bool:
    """Whether convolutions of ``x`` round to 16 bits: it has so many, or ``torch.autocast`` is enabled."""
    kind = x.device.type
    return x.element_size() == 2 or (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))
