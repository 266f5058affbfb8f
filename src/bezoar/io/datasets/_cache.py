"""The cache: one ``.npz`` a data set, with a record of its SHA-256 beside it; whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import numpy as np

from bezoar.core.errors import DataError
from bezoar.core.results import write_atomic
from bezoar.io.containers import sha256 as file_sha256
from bezoar.io.datasets._source import KEYS, Arrays, DiskFull, Source, canonical, digest, is_disk_full
from bezoar.io.datasets.registry import DataSet

State = Literal["absent", "whole", "damaged"]

_STALE = 24 * 3600.0


def cache_folder() -> Path:
    """Where bezoar keeps things: ``BEZOAR_CACHE``, or ``bezoar`` in the user's cache folder."""
    if "BEZOAR_CACHE" in os.environ:
        return Path(os.environ["BEZOAR_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bezoar"


def path_of(data_set: DataSet) -> Path:
    """The file of a data set, whether it is there or not."""
    return cache_folder() / "data" / f"{data_set.name}.npz"


def state(data_set: DataSet) -> State:
    """Whether the cached file is there and is what it should be.

    The record is only a short cut: where it is missing or does not fit, the arrays themselves are held to the data
    set's SHA-256, and the record is written anew.

    Raises:
        DataError: It may not be read.
    """
    path = path_of(data_set)
    if not path.is_file():
        return "absent"
    try:
        found = file_sha256(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "Check its permissions, or remove it") from None
    record = _record(path)
    if record.get("sha256") == found and record.get("arrays_sha256") == data_set.sha256:
        return "whole"
    try:
        arrays = canonical(read(path, KEYS))
    except Exception:  # zipfile and numpy raise anything on damaged bytes
        return "damaged"
    if digest(*arrays.values()) != data_set.sha256:
        return "damaged"
    _write_record(path, found, data_set, "found in the cache")
    return "whole"


def read(path: Path, keys: tuple[str, ...]) -> Arrays:
    """Some arrays of a cached file, as they were stored."""
    # Opened here: numpy leaves a file that is no zip archive open.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return {key: stored[key] for key in keys}


def store(data_set: DataSet, arrays: Arrays, source: Source, folder: Path) -> Path:
    """Write checked arrays into the cache; a reader sees the old file or the new one, never a part.

    Args:
        data_set: What they are.
        arrays: As :func:`canonical` gives them.
        source: Where they came from, for the record.
        folder: For the unfinished file, on the same disk as the cache.
    """
    path, unfinished = path_of(data_set), folder / "unfinished.npz"
    with unfinished.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    found = file_sha256(unfinished)
    os.replace(unfinished, path)
    _write_record(path, found, data_set, source.title)
    return path


@contextmanager
def work_folder(data_set: DataSet, megabytes: int) -> Iterator[Path]:
    """An empty folder beside the cached files, gone afterwards whatever happens.

    Args:
        data_set: Whose it is.
        megabytes: Room that is needed.

    Raises:
        DiskFull: There is less room, now or while it is used.
        DataError: The cache cannot be written to.
    """
    parent = path_of(data_set).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(parent)
        free = shutil.disk_usage(parent).free // 1_000_000
        if free < megabytes:
            raise _full(parent, f"{megabytes} MB are needed, {free} MB are free")
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{data_set.name}.", suffix=".part") as folder:
            yield Path(folder)
    except OSError as error:
        if is_disk_full(error):
            raise _full(parent, "the disk ran full") from None
        reason = error.strerror or str(error)
        raise DataError(f"cannot write to {parent}: {reason}", "Set BEZOAR_CACHE to a folder of your own") from None


def _full(folder: Path, why: str) -> DiskFull:
    return DiskFull(f"there is no room in {folder}: {why}", "Free some, or set BEZOAR_CACHE to a folder elsewhere")


def _remove_stale(parent: Path) -> None:
    """Remove what a killed process could not: work folders that nobody has touched for a day."""
    for left in parent.glob(".*.part"):
        with suppress(FileNotFoundError):  # its owner has just removed it
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left, ignore_errors=True)


def _record(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_record(path: Path, sha256: str, data_set: DataSet, source: str) -> None:
    facts = {"sha256": sha256, "arrays_sha256": data_set.sha256, "source": source, "credit": data_set.credit}
    with suppress(OSError):  # a cache that may only be read is checked the long way each time
        write_atomic(path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
