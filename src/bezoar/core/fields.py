"""Text as values of the fields of a dataclass, as their annotations say."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any

from bezoar.core.errors import SettingError


def fields_from(made: type[Any], name: str, flag: str, pairs: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a dataclass by name.

    Args:
        made: The dataclass.
        name: How an error names it.
        flag: How an error names the place, such as ``--set``.
        pairs: Each ``key=value``, read as the annotation of the field says.

    Raises:
        SettingError: There is no such field, or it does not take such a value.
    """
    hints = typing.get_type_hints(made)
    known = [f.name for f in dataclasses.fields(made) if f.init]
    found = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise SettingError(f"{flag} {pair!r}: expected key=value", f"Such as {flag} {known[0]}=...")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}"
            raise SettingError(f"{name} has no setting {key!r}", hint)
        found[key] = value(f"{flag} {pair!r}", text.strip(), hints[key])
    return found


def value(where: str, text: str, kind: Any, separator: str = ",") -> Any:
    """``text`` as a value of an annotated type.

    Args:
        where: How an error names the place.
        text: The value; a float may be a fraction such as ``16/255``, since grey levels are thought of so.
        kind: int, float, bool, str, a Literal, a tuple of any of the first four, or one of these or None.
        separator: Between the entries of a tuple; texts may hold commas, so it is ``;`` between texts.

    Raises:
        SettingError: It is no value of that type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return _choice(where, text, {str(a): a for a in arguments})
    if origin is tuple:
        texts = arguments[0] is str or str in typing.get_args(arguments[0])
        parts = text.split(";" if texts else separator)
        return tuple(value(where, part.strip(), str if texts else arguments[0]) for part in parts if part.strip())
    if origin in (types.UnionType, typing.Union):
        kinds = [a for a in arguments if a is not types.NoneType]
        none = text.lower() == "none" and len(kinds) < len(arguments)
        return None if none else value(where, text, kinds[0], separator)
    if kind is bool:
        return _choice(where, text.lower(), {"true": True, "false": False, "yes": True, "no": False})
    if kind not in (int, float, str):
        raise SettingError(f"{where}: this setting cannot be given on the command line", "Use the Python interface")
    try:
        return _fraction(text) if kind is float else kind(text)
    except (ValueError, ZeroDivisionError):
        raise SettingError(f"{where}: expected {'an int' if kind is int else 'a float'}, got {text!r}") from None


def _choice(where: str, text: str, choices: dict[str, Any]) -> Any:
    if text not in choices:
        near = difflib.get_close_matches(text, choices, 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(choices)}"
        raise SettingError(f"{where}: {text!r} is none of its values", hint)
    return choices[text]


def _fraction(text: str) -> float:
    over, stroke, under = text.partition("/")
    return float(over) / float(under) if stroke else float(text)
