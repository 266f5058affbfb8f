"""Attacks as text: ``badnets:target=1,corner=top-left``."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, get_type_hints

from bezoar.attacks._poison import PoisonAttack
from bezoar.core.errors import SettingError
from bezoar.core.fields import value as value_of
from bezoar.core.registry import method_name, methods


def parse(text: str, **defaults: Any) -> PoisonAttack:
    """An attack from its name and settings, typed as its fields are.

    Args:
        text: ``name`` or ``name:key=value,...``; dashes in the name do not matter, the values of a tuple are joined by
            ``+``, such as ``sources=1+2``.
        defaults: Settings where the text gives none.

    Raises:
        SettingError: The name, a setting or a value is not known, or the attack does more than change examples.
    """
    name, _, rest = text.partition(":")
    attack = _find(name.strip())
    settings = dict(defaults)
    hints = get_type_hints(attack)
    for pair in filter(None, (p.strip() for p in rest.split(","))):
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in _fields(attack):
            raise SettingError(f"{text!r}: {name} has no setting {key!r}", f"There are: {', '.join(_fields(attack))}")
        settings[key] = value_of(f"{text!r}: {key}", value.strip(), hints[key], separator="+")
    return attack(**settings)


def written(attack: PoisonAttack) -> str:
    """The text that :func:`parse` reads as an equal attack.

    Raises:
        SettingError: A value holds ``,`` or a ``+`` within a tuple and cannot be written.
    """
    pairs = [f"{f.name}={_written(getattr(attack, f.name))}" for f in dataclasses.fields(attack)]
    text = f"{method_name(type(attack))}:{','.join(pairs)}"
    if parse(text) != attack:
        raise SettingError(f"{attack!r} cannot be written as text", "Settings must not contain commas or plus signs")
    return text


def _find(name: str) -> type[PoisonAttack]:
    known = {known.replace("-", ""): found for known, found in methods("attacks").items()}
    found = known.get(name.lower().replace("-", ""))
    if found is None:
        near = difflib.get_close_matches(name, known, 1)
        raise SettingError(
            f"no attack {name!r}", f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}"
        )
    if not issubclass(found, PoisonAttack):
        raise SettingError(f"{name} controls the training and cannot be planted together with others")
    return found


def _fields(attack: type[PoisonAttack]) -> list[str]:
    return [f.name for f in dataclasses.fields(attack)]


def _written(value: Any) -> str:
    return "+".join(map(_written, value)) if isinstance(value, tuple) else str(value)
