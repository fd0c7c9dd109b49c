"""precision.py: bfloat16 where the hardware says that it has it, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from condgan import IterativeGenerator, parts, precision


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "arm64", "bf16": True}, True),
        ({"architecture": "arm64", "bf16": False}, False),
        ({}, False),
    ],
)
def test_a_processor_is_asked_for_its_instructions(
    capabilities: dict[str, object], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision.fast_bfloat16("cpu") is fast
    weight = torch.eye(2)
    with precision.autocast("cpu"):
        assert F.linear(weight, weight).dtype == (torch.bfloat16 if fast else torch.float32)
    with precision.autocast(torch.device("cpu"), enabled=False):
        assert F.linear(weight, weight).dtype == torch.float32


@pytest.mark.parametrize("native", [False, True])
def test_a_gpu_is_asked_without_its_imitation(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
    assert precision.fast_bfloat16("cuda") is native


def test_this_processor_has_the_names_that_are_asked_for() -> None:
    """A capability that PyTorch renames would read as missing: bfloat16 would be off everywhere, and nobody told."""
    known = torch.cpu.get_capabilities()
    assert any(name in known for name in precision.CPU_CAPABILITIES)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float64), ("cuda", torch.float64), ("mps", torch.float32)])
def test_the_widest_float_of_a_device(device: str, dtype: torch.dtype) -> None:
    assert precision.widest_float(device) == dtype


def test_places_are_drawn_without_float64_where_there_is_none(
    compact: IterativeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **kwargs or {})
            assert getattr(out, "dtype", None) != torch.float64, func
            return out

    expected = compact.generate(["red cube", "blue sphere"], seed=3).places
    with pytest.raises(AssertionError), NoFloat64():
        compact.generate(["red cube", "blue sphere"], seed=3)
    monkeypatch.setattr(parts, "widest_float", lambda device: torch.float32)
    with NoFloat64():
        places = compact.generate(["red cube", "blue sphere"], seed=3).places
    assert places is not None and expected is not None
    torch.testing.assert_close(torch.tensor(places), torch.tensor(expected), rtol=0, atol=0.01)
