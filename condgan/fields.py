"""Configs as JSON: frozen dataclasses, the types of whose fields are checked."""

from __future__ import annotations

import dataclasses
import reprlib
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ADDED_LATER = "added later"
"""Key in the metadata of a config's field that checkpoints of earlier versions do not have."""


def added_later(default: Any) -> Any:
    """A field of a config that earlier versions did not have; in their checkpoints it is ``default``."""
    return dataclasses.field(default=default, metadata={ADDED_LATER: True})


def config_from_json(values: Mapping[str, Any], config_class: type[Any]) -> Any:
    """A config of values that were read from JSON, where tuples are lists; one for each field.

    Raises:
        ValueError: a field is missing, unknown or of another type, or the config refuses its value.
    """
    hints = get_type_hints(config_class)
    later = {f.name: f.default for f in dataclasses.fields(config_class) if f.metadata.get(ADDED_LATER)}
    values = later | dict(values)
    for problem, keys in (("unknown", values.keys() - hints.keys()), ("missing", hints.keys() - values.keys())):
        if keys:
            raise ValueError(f"{problem} {some(keys)}. Make it fit {config_class.__name__}.")
    for key, hint in hints.items():
        try:
            values[key] = _from_json(values[key], hint)
        except TypeError:
            raise ValueError(f'"{key}" must be {_said(hint)}, got {reprlib.repr(values[key])}.') from None
    return config_class(**values)


def check_fields(config: Any) -> None:
    """Raise a ValueError unless every field of a frozen config is of its annotated type; a list becomes a tuple."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        try:
            fitting = _from_json([*value] if isinstance(value, tuple) else value, hint)
        except TypeError:
            raise ValueError(f"{name} must be {_said(hint)}, got {reprlib.repr(value)}") from None
        object.__setattr__(config, name, fitting)


def _said(hint: Any) -> str:
    """A type as a reader knows it."""
    return hint.__name__ if hint in (int, float, str, bool) else str(hint).replace("typing.", "")


def _from_json(value: Any, hint: Any) -> Any:
    """The value as the annotation wants it, lists as tuples; raises TypeError if it is of another type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal and any(type(value) is type(choice) and value == choice for choice in args):
        return value
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _from_json(value, option)
            except TypeError:
                continue
    if origin is tuple and isinstance(value, list):
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(items) == len(value):
            return tuple(map(_from_json, value, items))
    if hint is float and type(value) is int:
        return float(value)
    if hint in (int, float, str, bool, type(None)) and type(value) is hint:
        return value
    raise TypeError


def some(names: Any) -> str:
    """The first few of some names, in order."""
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
