"""Which models a sweep is about: those of a folder, of a list, or of a query to a hub."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bezoar.core.errors import DataError, ModelError, SettingError
from bezoar.io.containers import open_source, sha256
from bezoar.io.datasets.registry import named, nearest
from bezoar.io.extras import one_line, printable
from bezoar.io.hub_models import HUB, HubModel, search
from bezoar.io.models import all_readers, hash_source

#: Names of files that a model may have; what is in them is looked at when they are opened.
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx", ".pt2", ".th", ".pth.tar", ".pkl", ".torchscript")
#: Files that bezoar itself writes beside models.
_OURS = {"triggers.safetensors", "truth.safetensors", "guard.safetensors"}
_EXTERNAL = ("data", ".weights", ".bin")  # as exporters call the weights outside an ONNX file
_LISTS = (".txt", ".csv", ".jsonl", ".json")
_MAX_LIST = 1 << 30  # bytes


@dataclass(frozen=True)
class Entry:
    """One model of a sweep.

    Attributes:
        name: As it is shown: the path as it was listed, or ``hf:OWNER/NAME@REVISION``.
        path: Of the file or folder; empty for a model of a hub.
        settings: What the list says about this one, such as ``arch`` or ``data``; text or numbers.
        hub: The model of a hub, or None.
    """

    name: str
    path: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    hub: HubModel | None = None

    def fingerprint(self) -> tuple[str, str]:
        """Hash of all that decides how the model answers, and of its weights alone, as a scan reports it.

        For a model of a hub the first is its revision; for one that cannot be read its path. The second is then empty.
        """
        if self.hub is not None:
            return self.hub.revision, ""
        path = Path(self.path)
        try:
            weights = hash_source(open_source(path))
            parts = [weights, *(sha256(other) for other in _beside(path))]
        except (ModelError, OSError):  # no regular file, for one: its scan says why
            return f"unreadable:{path.absolute()}", ""
        return (weights if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()), weights


def _beside(path: Path) -> list[Path]:
    """What else decides how a model answers: the normalisation of a folder, the weights outside an ONNX file."""
    if path.is_dir():
        return [one for one in (path / "preprocessor_config.json",) if one.is_file()]
    if path.suffix.lower() != ".onnx":
        return []
    names = sorted(name for name in os.listdir(path.parent) if name.startswith(path.stem) and name != path.name)
    return [path.parent / name for name in names if name.lower().endswith(_EXTERNAL) and (path.parent / name).is_file()]


def find_models(source: str | Path | Iterable[Any]) -> list[Entry]:
    """All models that are meant.

    Args:
        source: A folder, which is searched; a model file or folder; a list (``.txt`` with a path on each line, ``.csv``
            with a column ``model``, ``.jsonl`` with a key ``model``; other columns are settings); ``hf:QUERY``; or
            paths.

    Raises:
        ModelError: There are none, or the list cannot be read.
        SettingError: The query cannot be understood.
        MissingExtra: huggingface_hub is needed and missing.
    """
    if not isinstance(source, str | Path):
        found = [Entry(str(one), str(one)) for one in source]
    elif isinstance(source, str) and source.startswith(HUB):
        found = [Entry(one.name, hub=one) for one in search(source)]
    elif Path(source).is_dir() and not _is_model(Path(source)):
        found = [Entry(str(path), str(path)) for path in _walk(Path(source))]
    elif Path(source).suffix.lower() in _LISTS:
        found = _listed(Path(source))
    else:
        open_source(Path(source))  # says what is wrong with a path that leads nowhere
        found = [Entry(str(source), str(source))]
    if not found:
        raise ModelError(f"no model in {source}", f"Files that count end in {', '.join(SUFFIXES)}")
    return found


def _is_model(folder: Path) -> bool:
    try:
        return any(reader.matches(open_source(folder)) for reader in all_readers())
    except ModelError:
        return False


def _walk(top: Path) -> Iterator[Path]:
    """Model files, and folders that are one model; neither hidden ones nor those behind a linked folder."""
    for folder, below, files in os.walk(top):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if Path(folder) != top and "config.json" in files and _is_model(Path(folder)):
            below.clear()
            yield Path(folder)
            continue
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith(".") and name not in _OURS:
                yield Path(folder, name)


def _listed(path: Path) -> list[Entry]:
    try:
        if path.stat().st_size > _MAX_LIST:
            raise ValueError("it is larger than 1 GiB")
        text = path.read_text(encoding="utf-8-sig")
        rows = list(_rows(path.suffix.lower(), text))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error, RecursionError) as error:
        raise ModelError(
            f"cannot read {path} as a list of models: {one_line(error)}",
            "Give a .txt with a path on each line, or a .csv or .jsonl with model and, if need be, arch and others",
        ) from None
    return [_entry(path, number, row) for number, row in enumerate(rows, 1)]


def _rows(suffix: str, text: str) -> Iterator[dict[str, Any]]:
    if suffix == ".txt":
        lines = (line.strip() for line in text.splitlines())
        yield from ({"model": line} for line in lines if line and not line.startswith("#"))
    elif suffix == ".csv":
        yield from csv.DictReader(text.splitlines())
    elif suffix == ".jsonl":
        yield from (json.loads(line) for line in text.splitlines() if line.strip())
    else:
        rows = json.loads(text)
        yield from rows if isinstance(rows, list) else [rows]


def _entry(path: Path, number: int, row: Any) -> Entry:
    row = {"model": row} if isinstance(row, str) else row
    model = row.get("model") if isinstance(row, dict) else None
    if not isinstance(model, str) or not model.strip():
        raise ModelError(f"{path}: entry {number} names no model", "Each needs a path under model")
    settings = {key: value for key, value in row.items() if key not in ("model", None) and value not in ("", None)}
    for key, value in settings.items():
        if not isinstance(value, str | int | float | list):
            raise ModelError(f"{path}: entry {number}: {printable(str(key))} is no text or number")
    for key in ("arch", "data"):  # files beside the list
        if isinstance(settings.get(key), str):
            settings[key] = _near(path.parent, settings[key])
    if model.startswith(HUB):
        found = search(model)
        if len(found) != 1:
            raise SettingError(f"{path}: entry {number}: {model} stands for {len(found)} models", "Name one of them")
        return Entry(found[0].name, settings=settings, hub=found[0])
    place = Path(model).expanduser()
    return Entry(model, str(place if place.is_absolute() else path.parent / place), settings)


def _near(folder: Path, text: str) -> str:
    """A path relative to ``folder`` where it leads to something there, ``file.py:function`` included; else as it is."""
    file, colon, function = text.partition(".py:")
    place = folder / (f"{file}.py" if colon else text)
    return f"{place}:{function}" if colon and place.is_file() else str(place) if place.exists() else text


def hash_data(source: str) -> str:
    """SHA-256 of clean data as they lie on the disk: all files with their names; of the name for a named data set.

    Raises:
        OSError: A file cannot be read.
        DataError: It is neither.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        if named(source) is None:
            near = nearest(source)
            raise DataError(
                f"{source} does not exist", f"Did you mean the data set {near}?" if near else "Check --data"
            )
        return f"named:{source}"
    digest = hashlib.sha256()
    for folder, below, files in os.walk(path):
        below.sort()
        for name in sorted(files):
            file = Path(folder, name)
            if file.is_file():
                digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
    return digest.hexdigest()
