"""Ground truth on disk: ``truth.json`` says what there is, ``truth.safetensors`` holds the numbers. Nothing is pickled.

Any dataclass and module of this package can be stored: a dataclass by its fields, a module by its ``config`` (the plain
keyword values that built it) and its state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from bezoar.attacks._attack import GroundTruth
from bezoar.core.errors import DataError
from bezoar.core.results import write_atomic

SCHEMA = "bezoar.truth/1"
TEXT, NUMBERS = "truth.json", "truth.safetensors"
_PACKAGE = "bezoar."


def save_truth(truth: GroundTruth, folder: Path) -> None:
    """Write a ground truth into a folder.

    Raises:
        DataError: A trigger holds something that cannot be stored, such as a function.
    """
    writer = _Writer()
    plain = writer.node(truth, "truth")
    numbers = safetensors.torch.save(writer.tensors)
    text = {"schema": SCHEMA, "sha256": hashlib.sha256(numbers).hexdigest(), "truth": plain}
    # The text names the hash of the numbers: a write that was cut off between the two is found when they are read.
    write_atomic(folder / NUMBERS, numbers)
    write_atomic(folder / TEXT, json.dumps(text, indent=1, allow_nan=False) + "\n")


def load_truth(folder: str | Path) -> GroundTruth:
    """Read a ground truth back; tensors and modules on the CPU, modules in eval mode and without gradients.

    Raises:
        DataError: The files are missing, damaged, or do not belong together.
    """
    folder = Path(folder)
    try:
        text, numbers = (folder / TEXT).read_bytes(), (folder / NUMBERS).read_bytes()
    except OSError as error:
        raise DataError(f"no ground truth in {folder}: {error.strerror}", _HINT) from None
    try:
        raw = json.loads(text)
        if raw["schema"] != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA!r}, got {raw['schema']!r:.80}")
        if raw["sha256"] != hashlib.sha256(numbers).hexdigest():
            raise ValueError(f"{NUMBERS} is not the one that {TEXT} was written with")
        truth = _Reader(safetensors.torch.load(numbers)).node(raw["truth"])
        if not isinstance(truth, GroundTruth) or not truth.plants:
            raise ValueError("it holds no planted trigger")
        return truth
    except DataError:
        raise
    except Exception as error:  # damaged text can break any constructor
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise DataError(f"the ground truth in {folder} is damaged: {reason}", _HINT) from None


_HINT = f"Give a folder with the {TEXT} and {NUMBERS} that bezoar attack wrote"


@dataclass
class _Writer:
    """Values to JSON; tensors are put aside under the path that leads to them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def node(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        for kind, write in self._kinds():
            if isinstance(value, kind):
                return write(value, path)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._dataclass(value, path)
        raise DataError(f"{path} is a {type(value).__name__}, which cannot be stored", "Hold tensors and plain values")

    def _kinds(self) -> tuple[tuple[type, Callable[[Any, str], Any]], ...]:
        return (
            (float, self._float),
            (Tensor, self._tensor),
            (nn.Module, self._module),
            (tuple, self._tuple),
            (list, self._list),
            (dict, self._dict),
        )

    def _float(self, value: float, _path: str) -> Any:
        return value if math.isfinite(value) else {"float": str(value)}

    def _tensor(self, value: Tensor, path: str) -> Any:
        self.tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}

    def _module(self, value: nn.Module, path: str) -> Any:
        config = getattr(value, "config", None)
        if not isinstance(config, dict):
            raise DataError(f"{path}: {type(value).__name__} has no config", "Keep its keyword arguments in .config")
        state = {key: self._tensor(entry, f"{path}/{key}")["tensor"] for key, entry in value.state_dict().items()}
        return {"module": _name(type(value), path), "config": self.node(config, f"{path}.config"), "state": state}

    def _tuple(self, value: tuple[Any, ...], path: str) -> Any:
        return {"tuple": self._list(value, path)["list"]}

    def _list(self, value: list[Any] | tuple[Any, ...], path: str) -> Any:
        return {"list": [self.node(entry, f"{path}.{i}") for i, entry in enumerate(value)]}

    def _dict(self, value: dict[str, Any], path: str) -> Any:
        if not all(isinstance(key, str) for key in value):
            raise DataError(f"{path} has keys that are no text, which cannot be stored")
        return {"dict": {key: self.node(entry, f"{path}.{key}") for key, entry in value.items()}}

    def _dataclass(self, value: Any, path: str) -> Any:
        fields = {
            f.name: self.node(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value) if f.init
        }
        return {"class": _name(type(value), path), "fields": fields}


@dataclass
class _Reader:
    """JSON to values, the reverse of :class:`_Writer`."""

    tensors: dict[str, Tensor]

    def node(self, raw: Any) -> Any:
        if not isinstance(raw, dict):
            if isinstance(raw, list):
                raise ValueError("a bare list")
            return raw
        kinds = {k: getattr(self, f"_{k}") for k in ("float", "tensor", "module", "tuple", "list", "dict", "class")}
        kind = next((k for k in kinds if k in raw), None)
        if kind is None:
            raise ValueError(f"no kind of value has the keys {', '.join(raw)[:80]}")
        return kinds[kind](raw)

    def _float(self, raw: dict[str, Any]) -> float:
        return float(raw["float"])

    def _tensor(self, raw: dict[str, Any]) -> Tensor:
        return self.tensors[raw["tensor"]]

    def _tuple(self, raw: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(self.node(entry) for entry in raw["tuple"])

    def _list(self, raw: dict[str, Any]) -> list[Any]:
        return [self.node(entry) for entry in raw["list"]]

    def _dict(self, raw: dict[str, Any]) -> dict[str, Any]:
        return {key: self.node(entry) for key, entry in raw["dict"].items()}

    def _module(self, raw: dict[str, Any]) -> nn.Module:
        kind = _class(raw["module"])
        if not issubclass(kind, nn.Module):
            raise ValueError(f"{raw['module']} is no module")
        with torch.random.fork_rng(devices=[]):  # its first weights are drawn and thrown away
            made = kind(**self.node(raw["config"]))
        made.load_state_dict({key: self.tensors[name] for key, name in raw["state"].items()})
        return made.eval().requires_grad_(False)

    def _class(self, raw: dict[str, Any]) -> Any:
        kind = _class(raw["class"])
        if not dataclasses.is_dataclass(kind):
            raise ValueError(f"{raw['class']} is no dataclass")
        return kind(**{name: self.node(entry) for name, entry in raw["fields"].items()})


def _name(kind: type[Any], path: str) -> str:
    name = f"{kind.__module__}:{kind.__qualname__}"
    if not kind.__module__.startswith(_PACKAGE) or "<" in name:
        raise DataError(f"{path}: {kind.__qualname__} is not a class of this package, so it cannot be stored")
    return name


def _class(name: str) -> type[Any]:
    """A class of this package by ``module:name``; no other can be named by a file."""
    module, _, qualified = name.partition(":")
    if not module.startswith(_PACKAGE):
        raise ValueError(f"{name:.80} is not a class of this package")
    found: Any = vars(importlib.import_module(module)).get(qualified)
    if not isinstance(found, type) or found.__module__ != module:
        raise ValueError(f"there is no class {name:.80}")
    return found
