"""Methods by name, found in their folders: a new file needs no line here.

Other packages add methods through the entry-point group ``bezoar.methods``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from bezoar.core.errors import SettingError

#: Kinds of method: the folder that holds them and the base class they share.
KINDS = {
    "scanners": ("bezoar.scanners", "bezoar.core.method", "Scanner"),
    "purifiers": ("bezoar.purifiers", "bezoar.core.method", "Purifier"),
    "scorers": ("bezoar.scorers", "bezoar.core.method", "Scorer"),
    "filters": ("bezoar.filters", "bezoar.core.filtering", "Filter"),
    "guards": ("bezoar.guards", "bezoar.core.guarding", "Guard"),
    "trainers": ("bezoar.trainers", "bezoar.core.training", "Trainer"),
    "attacks": ("bezoar.attacks", "bezoar.attacks._attack", "Attack"),
}


@cache
def methods(kind: str) -> dict[str, type[Any]]:
    """All methods of a kind, by kebab-case name, sorted.

    Args:
        kind: One of :data:`KINDS`.
    """
    folder, base_module, base_name = KINDS[kind]
    base = getattr(importlib.import_module(base_module), base_name)
    package = importlib.import_module(folder)
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    found: list[type[Any]] = []
    for name in names:
        found += _classes(importlib.import_module(f"{folder}.{name}"), base)
    found += [e.load() for e in entry_points(group="bezoar.methods") if issubclass(e.load(), base)]
    return dict(sorted((method_name(c), c) for c in found))


def find(kind: str, name: str) -> type[Any]:
    """A method by name.

    Raises:
        SettingError: No method of that name; the hint names the nearest.
    """
    known = methods(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}"
        raise SettingError(f"no method {name!r} among the {kind}", hint)
    return known[name]


def method_name(method: type[Any]) -> str:
    """Kebab-case of the class name: ``NeuralCleanse`` is ``neural-cleanse``, ``SIG`` is ``sig``.

    Where the file is named as the class is, the file says where a word ends: ``BadNets`` in ``badnets.py`` is
    ``badnets``.
    """
    file = method.__module__.rpartition(".")[2]
    if file.replace("_", "") == method.__name__.lower():
        return file.replace("_", "-")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", method.__name__).lower()


def _classes(module: ModuleType, base: type[Any]) -> list[type[Any]]:
    members = vars(module).values()
    return [
        c
        for c in members
        if inspect.isclass(c) and issubclass(c, base) and c.__module__ == module.__name__ and not inspect.isabstract(c)
    ]
