"""The checkpoint of a training run: everything that its next step depends on, in one file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from condgan.classifier import SceneClassifier
from condgan.datasets import SceneDataset
from condgan.files import check_utf8, settle
from condgan.presets import TrainConfig
from condgan.training import Trainer

CHECKPOINT = "checkpoint.safetensors"
COUNTERS = ("step", "images", "skipped", "skipped_in_a_row")


LEARNED_FROM = {
    "scenes": "data: the run in {!r} was trained on other scenes than these",
    "pictures": "data: the run in {!r} was trained on other pictures of these scenes",
    "verifier": "verifier: the run in {!r} listened to another verifier than what that name stands for now",
}
"""What a checkpoint names by its SHA-256, and what to say where it is another one."""


def learned_from(dataset: SceneDataset, verifier: SceneClassifier | None) -> dict[str, str]:
    """SHA-256 of all that a run learns from, by the names of :data:`LEARNED_FROM`.

    Of the scenes' names, objects and vocabulary, in order; of their pictures; of the weights of the verifier, if there
    is one.
    """
    described = json.dumps([dataset.names, dataset.objects.tolist(), dataset.vocabulary.names])
    digests = {
        "scenes": hashlib.sha256(described.encode()).hexdigest(),
        "pictures": hashlib.sha256(dataset.pixels.contiguous().numpy().data).hexdigest(),
    }
    if verifier is not None:
        weights = hashlib.sha256()
        for tensor in verifier.state_dict().values():
            weights.update(tensor.cpu().contiguous().numpy().tobytes())
        digests["verifier"] = weights.hexdigest()
    return digests


def save_checkpoint(trainer: Trainer, path: Path, digests: dict[str, str]) -> None:
    """Write all that the next step depends on, with what :func:`learned_from` says of the run; whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {
        f"{name}.{key}": value for name, net in trainer.networks().items() for key, value in net.state_dict().items()
    }
    for name, optimizer in trainer.optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}.{index}.{key}": value for key, value in state.items()}
    counters = {name: getattr(trainer, name) for name in COUNTERS}
    config = dataclasses.asdict(trainer.config)
    metadata = {"config": json.dumps(config), "counters": json.dumps(counters), **digests}
    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()
        rights = partial.stat().st_mode  # of any new file; safetensors makes one that only its owner can read
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial, metadata)
        partial.chmod(rights)
        settle(partial)
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(
            f"out: cannot write {str(path)!r} ({error}): make room and run the same again, which goes on from the "
            "checkpoint before, if there is one"
        ) from error


class StoredRun(NamedTuple):
    """What :func:`save_checkpoint` wrote."""

    counters: dict[str, int]
    tensors: dict[str, Tensor]


def restore(trainer: Trainer, stored: StoredRun) -> None:
    """Go on from a checkpoint: the steps that follow give the numbers they would have given."""
    tensors = stored.tensors
    for name, network in trainer.networks().items():
        prefix = f"{name}."
        network.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    for name, optimizer in trainer.optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        prefix = f"optimizer.{name}."
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, field_name = key[len(prefix) :].split(".")
                # A fused optimizer takes for granted that they lie in memory as the weights do. No tensor may keep
                # the file mapped, or Windows cannot replace it.
                value = torch.empty_like(weights[int(index)]).copy_(value) if value.ndim else value.clone()
                state.setdefault(int(index), {})[field_name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, count in stored.counters.items():
        setattr(trainer, name, count)


def read_checkpoint(path: Path, config: TrainConfig, digests: dict[str, str]) -> StoredRun:
    """Read a checkpoint of a run.

    Raises:
        PermissionError: the file may not be read.
        ValueError: the file is damaged, of no run, or of a run with another ``config`` or that learned from something
            else; the message names what differs.
    """
    if not os.access(path, os.R_OK):
        raise PermissionError(f"out: {str(path)!r} is there, but you may not read it: change its permissions")
    check_utf8(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): delete it to start the run again") from None
    try:
        stored, counters = (json.loads((metadata or {})[name]) for name in ("config", "counters"))
        said = stored.keys() >= {"images"} and counters.keys() == {*COUNTERS}
    except (LookupError, ValueError, AttributeError, RecursionError):
        said = False
    if not said or not all(type(count) is int for count in (stored["images"], *counters.values())):
        raise ValueError(f"{str(path)!r} does not say of which run it is: delete it to start the run again")
    for name, digest in digests.items():
        if metadata.get(name, digest) != digest:  # a checkpoint of an older condgan does not say
            other = LEARNED_FROM[name].format(str(path.parent))
            raise ValueError(f"{other}: choose another folder (--out), or give what it learned from")
    _check_same_run(stored, config, path)  # after the scenes, since few of them lower its light
    if config.images < min(stored["images"], counters["images"]):
        raise ValueError(
            f"{str(path)!r} has seen {counters['images']:,} pictures, more than images={config.images:,}: "
            "ask for as many or more, or choose another folder"
        )
    return StoredRun(counters, tensors)


def _check_same_run(stored: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """A run may be lengthened; nothing else may change between its parts."""
    before, now = _flat(stored), _flat(json.loads(json.dumps(dataclasses.asdict(config))))
    differing = [name for name in now if name != "images" and now[name] != before.get(name)]
    if differing:
        changes = ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in differing)
        raise ValueError(f"{str(path)!r} is of another run: {changes}; choose another folder or the same settings")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of configs in configs by the names that ``--set`` has for them, such as ``generator.width``."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        fields |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return fields
