"""Checkpoints of a training: written whole or not at all, read without running code, never taken for another run's."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import time
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bezoar.core.errors import SettingError
from bezoar.core.examples import ExampleSource, Subset
from bezoar.core.results import write_atomic

FORMAT = "bezoar.training/1"


@dataclass
class Checkpoint:
    """The checkpoint of one training.

    Args:
        path: The file; None keeps none.
        identity: A hash of everything that decides the outcome, by name.
        writes: False for all but one of several workers.
        every: Seconds between checkpoints.
    """

    path: Path | None
    identity: dict[str, str]
    writes: bool = True
    every: float = field(default_factory=lambda: float(os.environ.get("BEZOAR_CHECKPOINT_SECONDS", "5")))
    _last: float = field(default_factory=time.monotonic)
    _checked: bool = False

    def save(self, state: Callable[[], dict[str, Any]], now: bool = False) -> None:
        """Keep the state, at most every few seconds; ``state`` is only called when it is kept.

        Raises:
            pickle.UnpicklingError: The state holds more than tensors and plain values.
        """
        if self.path is None or not self.writes or (not now and time.monotonic() - self._last < self.every):
            return
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "identity": self.identity, "state": state()}, buffer)
        if not self._checked:  # a state that cannot be read back would only show after the kill
            buffer.seek(0)
            torch.load(buffer, weights_only=True, map_location="cpu")
            self._checked = True
        write_atomic(self.path, buffer.getvalue())
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state that was kept, or None. A damaged checkpoint is as good as none.

        Raises:
            SettingError: The file is a whole checkpoint of another training.
        """
        if self.path is None or not self.path.exists():
            return None
        kept = _read(self.path)
        if kept is None:
            return None
        other = [name for name, value in self.identity.items() if kept["identity"].get(name) != value]
        if other:
            raise SettingError(
                f"the checkpoint {self.path} belongs to a training with other {', '.join(other)}",
                "Delete the file, or keep this training's checkpoints in another folder",
            )
        state: dict[str, Any] = kept["state"]
        return state


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not compare the checksums
            if archive.testzip() is not None:
                return None
        kept = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # the restricted unpickler raises anything on damaged bytes, IndexError and KeyError too
        return None
    parts = {"identity", "state"}
    whole = (
        isinstance(kept, dict) and kept.get("format") == FORMAT and all(isinstance(kept.get(p), dict) for p in parts)
    )
    return kept if whole else None


def digest(value: object) -> str:
    """SHA-256 over the settings and numbers in ``value``, the same in every process.

    It looks into tensors, networks, sources of examples, containers, frozen dataclasses and what functions close over.
    Examples that do not know their own hash are read a few at a time. Of any other object
    only the class counts: what can change may hold clocks and paths, which differ from run to run.
    """
    sha = hashlib.sha256()
    _feed(sha, value, set())
    return sha.hexdigest()


def settings(value: object) -> list[object]:
    """What an object was made with, for :func:`digest`: its class and its attributes."""
    return [_name(type(value)), getattr(value, "__dict__", {})]


def _feed(sha: Any, value: object, seen: set[int]) -> None:
    if isinstance(value, Tensor):
        _feed_tensor(sha, value)
    elif isinstance(value, ExampleSource) and not isinstance(value, Subset):
        _feed_examples(sha, value)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        sha.update(f"{value!r};".encode())
    elif id(value) not in seen:  # a function may close over itself
        name, parts = _parts(value)
        sha.update(f"{name}({len(parts)};".encode())
        for part in parts:
            _feed(sha, part, seen | {id(value)})


def _feed_tensor(sha: Any, value: Tensor) -> None:
    sha.update(f"{value.dtype}{tuple(value.shape)};".encode())
    for part in torch.split(value.detach(), 1024) if value.dim() else [value.detach()]:
        sha.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy())


def _feed_examples(sha: Any, value: ExampleSource) -> None:
    known = getattr(value, "sha256", None)
    if isinstance(known, str):
        sha.update(f"{known};".encode())
        return
    _feed_tensor(sha, value.labels)
    for rows in torch.split(torch.arange(len(value.labels)), 1024):
        _feed_tensor(sha, value.take(rows))


def _parts(value: object) -> tuple[str, list[object]]:
    name = _name(type(value))
    if isinstance(value, nn.Module):
        return name, [value.state_dict()]
    if isinstance(value, dict):
        return "dict", [part for item in value.items() for part in item]
    if isinstance(value, list | tuple):
        return name, list(value)
    if isinstance(value, types.FunctionType):
        return _name(value), [cell.cell_contents for cell in value.__closure__ or ()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and value.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return name, [getattr(value, one.name) for one in dataclasses.fields(value)]
    return name, []


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
