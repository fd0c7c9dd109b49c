"""Checkpoints: a readable ``config.json`` beside ``model.safetensors``, in a folder, this package or on the hub.

A model class gets everything here by deriving from :class:`PretrainedModel`; this file knows none of them. Nothing that
is read can run code: configs are JSON with checked types, weights are safetensors, and every tensor has to match.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import reprlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from condgan import __version__
from condgan.building import Building
from condgan.fields import config_from_json, some
from condgan.files import check_utf8, replace_files
from condgan.remote import CONFIG_NAME, WEIGHTS_NAME, CheckpointError, download, hub_errors
from condgan.vocab import did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT_VERSION = 1
CARD_NAME = "README.md"

SHIPPED = Path(__file__).with_name("pretrained")
"""The checkpoints inside the package, one folder a name."""
PUBLISHED: tuple[tuple[str, str], ...] = ()
"""The checkpoints of ours on the hub: (hub id, model type)."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class PretrainedModel(nn.Module):
    """Base of the models that can be saved, loaded and shared.

    A subclass takes its config as the only argument, keeps it as ``self.config``, and names its dataclass in
    ``config_class``. The fields of the dataclass are annotated as int, float, str, bool, ``Literal``, a tuple of these
    or an optional one.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class ScaleConfig:
        ...     size: int = 3
        >>> class Scale(PretrainedModel):
        ...     config_class = ScaleConfig
        ...     def __init__(self, config=None):
        ...         super().__init__()
        ...         self.config = self.given_or_default(config)
        ...         self.scale = nn.Parameter(torch.ones(self.config.size))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Scale.from_pretrained(Scale(ScaleConfig(size=5)).save_pretrained(folder)).config
        ScaleConfig(size=5)
    """

    config_class: ClassVar[type[Any]]
    """Frozen dataclass that describes the architecture."""
    default_pretrained: ClassVar[str | None] = None
    """Shipped name that :meth:`from_pretrained` loads without arguments; None: a name has to be given."""
    config: Any
    """The ``config_class`` that this model was built from."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        map_location: str | torch.device = "cpu",
    ) -> Self:
        """A trained model, in eval mode, in float32 whatever precision it was stored in.

        The global random state is left as it is.

        Args:
            name: a shipped name of :func:`list_pretrained`, a folder or a hub id ``"org/repo"``, looked up in this
                order; None for the default of the class. ``"./judge"`` or a ``Path`` is always a folder.
            revision: branch, tag or commit on the hub; None for its main branch.
            cache_dir: where downloads are kept; None for the cache of ``huggingface_hub``.
            token: access token for private repositories; None for the one stored by ``hf auth login``, if any.
            local_files_only: use what is in the cache and make no network call.
            map_location: device of the model that is returned.

        Raises:
            CheckpointError: there is no such checkpoint, it cannot be downloaded, or it does not fit this class.
            TypeError: ``name`` is neither a string nor a path.
            ValueError: ``revision`` is given for a folder.
        """
        if name is None and cls.default_pretrained is None:
            raise CheckpointError(
                f"{cls.__name__} has no default checkpoint: give from_pretrained() a folder, a hub id 'org/repo' or "
                f"a name of condgan.list_pretrained({cls.__name__!r}), which are {list_pretrained(cls.__name__)}."
            )
        name = cls.default_pretrained if name is None else name
        if not isinstance(name, (str, Path)):
            raise TypeError(f"name must be a string or a path, got {name!r}")
        folder = find_checkpoint(name, revision, cache_dir, token, local_files_only)
        path = _existing(folder, CONFIG_NAME)
        relatives = [
            base.__name__
            for base in cls.__mro__
            if issubclass(base, PretrainedModel) and getattr(base, "config_class", None) is cls.config_class
        ]
        config = _parse_config(path.read_bytes(), str(path), relatives, cls.config_class)
        weights = _existing(folder, WEIGHTS_NAME)
        stored = _read_weights(weights)
        try:
            with Building(sum(tensor.numel() for tensor in stored.values())):
                model = cls(config).float()
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # such as a width of 10**20
            raise CheckpointError(f"{path} does not describe a model: {error}") from error
        _load_weights(model, stored, weights)
        return model.to(map_location).eval()

    @classmethod
    def given_or_default(cls, config: Any) -> Any:
        """The config that a constructor was given, or the default one for None.

        Raises:
            TypeError: it is of another class.
        """
        if config is None:
            return cls.config_class()
        if not isinstance(config, cls.config_class):
            raise TypeError(
                f"config must be a {cls.config_class.__name__} or None, got {reprlib.repr(config)}; a checkpoint is "
                f"loaded with {cls.__name__}.from_pretrained"
            )
        return config

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write ``config.json``, ``model.safetensors`` and ``README.md`` into a folder; returns the folder.

        All files are complete before the first of them replaces an older one. A ``README.md`` that is there already
        stays, for somebody may have written into it; removed, it is written anew.

        Args:
            folder: made if it is not there.
            dtype: floating type of the stored weights, such as ``torch.float16`` for half the size; None keeps
                theirs. Integer buffers keep their type.

        Raises:
            CheckpointError: ``folder`` is empty or cannot be written, or a weight is too large for ``dtype``.
        """
        if folder == "":  # a path would take it for the folder here
            raise CheckpointError("cannot save to '': give the name of a folder, or '.' for the one you are in.")
        try:
            folder = Path(folder).expanduser()
        except RuntimeError as error:  # of a user who is not there
            raise CheckpointError(f"cannot save to {folder}: {error} Give a folder that you may write to.") from None
        contents = {
            CONFIG_NAME: self.config_json(),
            WEIGHTS_NAME: safetensors.torch.save(_stored_tensors(self, dtype), {"format": "pt"}),
        }
        try:
            if not (folder / CARD_NAME).exists():
                contents[CARD_NAME] = self.model_card().encode()
            replace_files(folder, contents)
        except OSError as error:
            raise CheckpointError(f"cannot save to {folder}: {error}. Give a folder that you may write to.") from error
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a condgan model",
        dtype: torch.dtype | None = None,
    ) -> str:
        """Upload the files of :meth:`save_pretrained` to the Hugging Face hub as one commit.

        A ``README.md`` that is there already stays, as in a folder.

        Args:
            repo_id: ``"org/repo"``, made if it is not there; ``"repo"`` is one of your own.
            private: whether a repository that is made here is private.
            token: access token that may write; None for the one stored by ``hf auth login``.
            revision: an existing branch; None for the main one.
            commit_message: first line of the commit.
            dtype: as in :meth:`save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: the hub refuses or cannot be reached.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(temporary, dtype=dtype)
            api = HfApi(token=token, library_name="condgan", library_version=__version__)
            with hub_errors("upload to", repo_id, revision):
                if revision is not None:  # no repository is made for a branch that is not there
                    full_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
                    api.repo_info(full_id, revision=revision)
                full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if api.file_exists(full_id, CARD_NAME, revision=revision):
                    (folder / CARD_NAME).unlink()
                else:
                    (folder / CARD_NAME).write_text(self.model_card(full_id), encoding="utf-8")
                files = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
                # create_commit and not upload_folder, which may split the files over several commits
                commit = api.create_commit(full_id, files, commit_message=commit_message, revision=revision)
        return commit.commit_url

    def model_card(self, repo_id: str = "org/repo") -> str:
        """Text of the ``README.md`` that is saved beside the weights: Markdown with the hub's YAML header.

        Args:
            repo_id: where the model can be loaded from.
        """
        name, module = type(self).__name__, type(self).__module__
        package = "condgan" if module.startswith("condgan.") else module
        rows = "\n".join(
            f"| {key} | {', '.join(map(str, value)) if isinstance(value, tuple) else value} |"
            for key, value in dataclasses.asdict(self.config).items()
        )
        return f"""---
library_name: condgan
tags:
- condgan
- {name}
---

# {name}

{((type(self).__doc__ or "").strip() or "A model of condgan.").splitlines()[0]}
{sum(parameter.numel() for parameter in self.parameters()):,} parameters, saved by condgan {__version__}.

## Use

```python
from {package} import {name}

model = {name}.from_pretrained("{repo_id}")  # this repository, or the folder with these files
```

## Configuration

| field | value |
|---|---|
{rows}
"""

    def config_json(self) -> bytes:
        """Content of ``config.json``, checked to be readable again."""
        header = {"format_version": FORMAT_VERSION, "model_type": type(self).__name__, "condgan_version": __version__}
        text = f"{json.dumps(header | dataclasses.asdict(self.config), indent=2)}\n".encode()
        _parse_config(text, "self.config", [type(self).__name__], self.config_class)
        return text


def list_pretrained(model_type: str | None = "IterativeGenerator") -> list[str]:
    """Names that ``from_pretrained`` takes: first those inside the package, which need no network, then hub ids.

    Args:
        model_type: only the checkpoints of the class of this name; None for all.

    Raises:
        TypeError: ``model_type`` is no name.
    """
    if model_type is not None and not isinstance(model_type, str):
        raise TypeError(f"model_type must be the name of a class, such as 'SceneClassifier', got {model_type!r}")
    shipped = [
        (path.parent.name, json.loads(path.read_text(encoding="utf-8"))["model_type"])
        for path in sorted(SHIPPED.glob(f"*/{CONFIG_NAME}"))
    ]
    return [name for name, kind in (*shipped, *PUBLISHED) if model_type in (None, kind)]


def find_checkpoint(
    name: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint by its shipped name, path or hub id, downloaded if need be.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be downloaded.
        ValueError: ``revision`` is given for a folder.
    """
    try:
        folder = _local_folder(name)
    except (OSError, RuntimeError) as error:  # a name that is too long, or of a user who is not there
        raise CheckpointError(f"{str(name)[:80]!r} cannot be looked for ({error}): check the name.") from None
    if folder is None:
        return download(str(name), revision, cache_dir, token, local_files_only)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for hub ids only, and {str(name)!r} is a folder: leave it out.")
    return folder


def _local_folder(name: str | Path) -> Path | None:
    """The folder that a name means, None for a hub id."""
    text = str(name)
    path = Path(text).expanduser()
    spelled_as_path = text.startswith((".", "~")) or text.endswith("/") or text.count("/") > 1 or "\\" in text
    is_path = isinstance(name, Path) or spelled_as_path
    if not is_path and (SHIPPED / text / CONFIG_NAME).is_file():
        return SHIPPED / text
    if path.is_dir() and text:
        return path
    if is_path or path.is_absolute() or path.is_file():
        what = "is a file: give the folder that it is in" if path.is_file() else "does not exist: check the path"
        raise CheckpointError(f"{path} {what}. A checkpoint is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}.")
    if _HUB_ID.fullmatch(text):
        return None
    raise CheckpointError(
        f"unknown checkpoint {text!r}: {did_you_mean(text, list_pretrained(None))} Give a name of "
        "condgan.list_pretrained(None), an existing folder, or a hub id 'org/repo'."
    )


def _parse_config(text: bytes, source: str, model_types: Sequence[str], config_class: type[Any]) -> Any:
    """The config that the text of a ``config.json`` describes; ``source`` is what errors call it.

    It may be of any of the types: a class and those that it derives from, whose weights are its own.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not JSON: {error}. Download or save the checkpoint again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{source} must hold a JSON object, got {reprlib.repr(values)}.")
    maker = values.pop("condgan_version", "unknown")
    version, found = values.pop("format_version", None), values.pop("model_type", None)
    if type(version) is not int or version < 1 or not isinstance(found, str):
        raise CheckpointError(
            f'{source} is not of condgan: "format_version" must be a positive int and "model_type" a string, '
            f"got {version!r} and {found!r}."
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{source} has format_version {version}, written by condgan {maker}; this condgan reads up to "
            f"{FORMAT_VERSION}: upgrade condgan."
        )
    if found not in model_types:
        raise CheckpointError(
            f"{source} holds the model type {found}, wanted is {model_types[0]}: load it with {found}.from_pretrained."
        )
    try:
        return config_from_json(values, config_class)
    except ValueError as error:
        raise CheckpointError(f"{source}: {str(error).rstrip('.')}; it was written by condgan {maker}.") from error


def _stored_tensors(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The model's tensors as they are written: on the CPU, contiguous, sharing no memory, floats as ``dtype``."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype such as torch.float16, got {dtype!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating type such as torch.float16, got {dtype}")
    tensors = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.to("cpu", dtype if tensor.is_floating_point() else None, copy=True).contiguous()
        if dtype is not None and not torch.equal(stored.double().isfinite(), tensor.cpu().isfinite()):
            raise CheckpointError(f"{name} has values that {dtype} cannot hold: use torch.bfloat16 or leave dtype out.")
        tensors[name] = stored
    return tensors


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file."""
    check_utf8(path)
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.resolve()} is cut short or damaged ({error}): delete this file, then download or save it again."
        ) from error


def _load_weights(model: nn.Module, stored: dict[str, Tensor], path: Path) -> None:
    """Copy the tensors of the file ``path`` into the model; every one has to be there, and no other."""
    misfits = {
        name: f"{name} is {_kind(stored[name])}, wanted {_kind(tensor)}"
        for name, tensor in model.state_dict().items()
        if name in stored and _kind(stored[name]) != _kind(tensor)
    }
    fitting = {name: tensor for name, tensor in stored.items() if name not in misfits}
    missing, unexpected = model.load_state_dict(fitting, strict=False)
    problems = (
        ("missing", set(missing) - misfits.keys()),
        ("unexpected", unexpected),
        ("of another shape or kind", misfits.values()),
    )
    report = "; ".join(f"{problem}: {some(names)}" for problem, names in problems if names)
    if report:
        raise CheckpointError(f"the tensors of {path} do not fit its {CONFIG_NAME}: {report}. Save the model again.")


def _existing(folder: Path, filename: str) -> Path:
    """The path of a file of a checkpoint, which has to be there, and readable."""
    path = folder / filename
    if path.is_file():
        if not os.access(path, os.R_OK):
            raise CheckpointError(f"{path} is there, but you may not read it: change its permissions.")
        return path
    pickled = sorted(other.name for other in folder.iterdir() if other.suffix in _PICKLED)
    hint = (
        f" {some(pickled)} is not opened, as pickled weights can run code: load it with torch.load(..., "
        "weights_only=True) and load_state_dict yourself, then call save_pretrained."
        if pickled
        else ""
    )
    raise CheckpointError(f"{folder} has no {filename}: a checkpoint needs {CONFIG_NAME} and {WEIGHTS_NAME}.{hint}")


def _kind(tensor: Tensor) -> str:
    """What has to agree for a tensor to be loaded; floating types convert into each other."""
    return f"{'float' if tensor.is_floating_point() else str(tensor.dtype)}{tuple(tensor.shape)}"
