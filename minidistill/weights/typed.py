"""Configs of strangers: each value of the type that its field says, and no number that only an attack would need."""

from __future__ import annotations

import math
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from minidistill.errors import shown

LARGEST = 2**24  # above any width, vocabulary, number of timesteps and id
STAGES, LAYERS = 16, 100  # above the length of any list, and above any number of layers of one kind

# What code that expects a config raises of JSON with another structure, the last of JSON that is nested too deeply.
MISSHAPEN = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def read_as(kind: Any, content: Any) -> Any:
    """kind.from_dict(content), every value of which fits its field.

    One of MISSHAPEN: it does not, or from_dict refuses it.
    """
    config = kind.from_dict(content)
    check_types(config)
    return config


def check_types(config: Any) -> None:
    """ValueError: a value of a dataclass is not of its field's type, or is a number that no model has."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        most = LAYERS if "layers" in name or "blocks" in name else LARGEST
        if not _fits(value, kind, most):
            raise ValueError(f"{name} = {shown(value)} is not of type {getattr(kind, '__name__', kind)}, or too large")
        if is_dataclass(value):
            check_types(value)


def _fits(value: Any, kind: Any, most: int) -> bool:
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one, most) for one in inside)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) <= STAGES and all(_fits(v, inside[0], most) for v in value)
    if kind is int:
        return type(value) is int and 0 <= value <= most
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, kind)
