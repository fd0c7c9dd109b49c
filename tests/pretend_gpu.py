"""A GPU that is not there: tensors that say they are on another device, and are computed on the CPU.

So numbers are those of the CPU, and what would fail on a real GPU fails: operations on tensors of both devices, random
numbers of a CPU's generator, numpy. Where a program would wait for a real one is noted.

The device is called ``meta``: PyTorch asks no driver for it, and takes it for neither a CPU nor a GPU whose kernels it
would choose itself.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import condgan

GPU = torch.device("meta")
PACKAGE = str(Path(condgan.__file__).parent)

aten = torch.ops.aten
CROSSING = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
WAITING = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
"""Their results, or the shapes of these, are not known before they are computed."""


class OnGpu(Tensor):
    """Keeps its numbers in ``held``, which is on the CPU."""

    held: Tensor
    is_meta = False  # to whoever asks Python
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=GPU,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a tensor on a GPU that has gone")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = OnGpu(self.held.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    # What is done before anything is dispatched, for tensors without numbers.

    def __getitem__(self, index: Any) -> Any:
        return Tensor.__getitem__(self, _indices_on_gpu(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        Tensor.__setitem__(self, _indices_on_gpu(index), _on_gpu(value))

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or GPU)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor on the GPU to numpy: call .cpu() first")

    __array__ = numpy


def _on_gpu(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, Tensor) and not isinstance(value, OnGpu) else value


def _indices_on_gpu(index: Any) -> Any:
    """Indices may be on the CPU, and are sent."""
    parts = index if isinstance(index, tuple) else (index,)
    sent = tuple(_on_gpu(torch.tensor(part) if isinstance(part, list) else part) for part in parts)
    return sent if isinstance(index, tuple) else sent[0]


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == GPU.type


class PretendGpu(TorchDispatchMode):
    """While it is entered, there is a GPU; ``waits`` names the lines of the package that have waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        device = kwargs.get("device")
        goes_there = _is_gpu(device) if device is not None else bool(ours)
        if func is aten.copy_.default:
            goes_there = isinstance(args[0], OnGpu)
        others = [tuple(tensor.shape) for tensor in tensors if tensor.ndim and not isinstance(tensor, OnGpu)]
        if ours and others and func not in CROSSING:
            raise RuntimeError(f"{func}: tensors {others} are on the CPU, {[tuple(x.shape) for x in ours]} on the GPU")
        rng = kwargs.get("generator")
        if goes_there and rng is not None and rng.device.type == "cpu":
            raise RuntimeError(f"{func}: a random source of the CPU cannot draw on the GPU")
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if func in INDEXING else []
        if ours and (func in WAITING or masks or (func in CROSSING and not goes_there)):
            lines = [
                f"{Path(frame.filename).name}: {frame.line}"
                for frame in traceback.extract_stack()
                if frame.filename.startswith(PACKAGE)
            ]
            self.waits.append(lines[-1] if lines else "outside the package")
        if _is_gpu(device):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        known = {id(tensor.held): tensor for tensor in ours}
        held_args, held_kwargs = tree_map(lambda x: x.held if isinstance(x, OnGpu) else x, (args, kwargs))
        results = func(*held_args, **held_kwargs)
        if not goes_there:
            return results
        return tree_map(lambda x: known[id(x)] if id(x) in known else _on_gpu(x), results)


@contextlib.contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """A GPU inside the block."""
    make_tensor, autocast, is_autocast_enabled = torch.tensor, torch.autocast, torch.is_autocast_enabled

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if _is_gpu(device):
            return make_tensor(*args, **kwargs).to(GPU)
        return make_tensor(*args, device=device, **kwargs)

    def no_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu", enabled=False) if device_type == GPU.type else autocast(device_type, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, PretendGpu() as gpu:
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch, "autocast", no_autocast)
        patch.setattr(torch, "is_autocast_enabled", lambda kind: kind != GPU.type and is_autocast_enabled(kind))
        patch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None)
        kept = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a tensor cannot become one of another kind
        try:
            yield gpu
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(kept)
