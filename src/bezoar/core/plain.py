"""Dataclasses to plain JSON values and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal


def plain(value: Any) -> Any:
    """Dataclasses, dicts and tuples as what JSON holds; floats that it cannot hold become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def built(kind: Any, raw: Any) -> Any:
    """Rebuild a value of an annotated type from what :func:`plain` gave.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: It is no value of that type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_dataclass(kind, raw)
    if origin in (types.UnionType, typing.Union):
        if raw is None and type(None) in arguments:
            return None
        return built(next(a for a in arguments if a is not type(None)), raw)
    if origin is tuple:
        return tuple(built(arguments[0], v) for v in _expect(list, raw))
    if origin is dict:
        return {k: built(arguments[1], v) for k, v in _expect(dict, raw).items()}
    return _build_plain(kind, raw)


def _build_dataclass(kind: type[Any], raw: Any) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = set(_expect(dict, raw)) - set(hints)
    if unknown:
        raise KeyError(f"{kind.__name__}: unknown {', '.join(sorted(unknown))}")
    return kind(**{k: built(hints[k], v) for k, v in raw.items()})


def _build_plain(kind: Any, raw: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        if raw not in typing.get_args(kind):
            raise ValueError(f"expected one of {typing.get_args(kind)}, got {raw!r}")
        return raw
    if kind is float:
        return float("nan") if raw is None else float(raw)
    return _expect(kind, raw) if kind in (int, str, bool) else raw


def _expect(kind: type[Any], raw: Any) -> Any:
    # To Python a bool is an int; to a reader of the report it is not.
    if not isinstance(raw, kind) or (kind is int and isinstance(raw, bool)):
        raise TypeError(f"expected {kind.__name__}, got {raw!r:.80}")
    return raw
