"""Data sets by name: fetched once, checked, converted, cached, and read back offline.

from bezoar.io import datasets

datasets.get("cifar-10", tell=print)
data = datasets.load("cifar-10")
data.train_x.shape                      # (50000, 3, 32, 32), uint8
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bezoar.core.errors import BezoarError, DataError
from bezoar.io.datasets import _cache
from bezoar.io.datasets._cache import cache_folder
from bezoar.io.datasets._source import KEYS, Arrays, DiskFull, Source, Tell, canonical, digest
from bezoar.io.datasets.registry import DATA_SETS, DataSet, NamedData, find, named

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DATA_SETS",
    "DataSet",
    "DataSplit",
    "NamedData",
    "cache_folder",
    "find",
    "get",
    "is_cached",
    "load",
    "named",
    "read",
]


@dataclass(frozen=True)
class DataSplit:
    """The official parts of a data set.

    Attributes:
        train_x, test_x: ``(N, C, H, W)`` uint8.
        train_y, test_y: ``(N,)`` int64 in [0, K).
        num_classes: K.
        name: Of the data set.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    name: str


def load(name: str, *, fetch: bool = False, tell: Tell | None = None) -> DataSplit:
    """Load a data set.

    Args:
        name: Such as ``cifar-10``.
        fetch: Fetch it first if it is not cached, or if the cached file is damaged.
        tell: Told in words what is being done.

    Raises:
        DataError: There is no data set of that name, or it is not cached and cannot be fetched.
    """
    import torch

    data_set = find(name)
    if fetch:
        get(name, tell=tell)
    arrays = canonical(read(data_set, KEYS))
    images = {k: torch.from_numpy(arrays[k]).permute(0, 3, 1, 2).contiguous() for k in ("train_x", "test_x")}
    labels = {k: torch.from_numpy(arrays[k]) for k in ("train_y", "test_y")}
    return DataSplit(**images, **labels, num_classes=len(data_set.classes), name=data_set.name)


def read(data_set: DataSet, keys: tuple[str, ...]) -> Arrays:
    """Some of the cached arrays, after the whole file was held to its SHA-256.

    Args:
        data_set: See :func:`find`.
        keys: Of ``train_x``, ``train_y``, ``test_x`` and ``test_y``; images are ``(N, H, W, C)``.

    Raises:
        DataError: It is not cached, or the cached file is damaged; the hint is the command that helps.
    """
    state = _cache.state(data_set)
    if state == "absent":
        raise DataError(f"the data set {data_set.name} is not here yet", f"Run: bezoar data get {data_set.name}")
    if state == "damaged":
        message = f"{_cache.path_of(data_set)} is damaged: its SHA-256 is not the one recorded"
        raise DataError(message, f"Run: bezoar data get {data_set.name}")
    return _cache.read(_cache.path_of(data_set), keys)


def is_cached(data_set: DataSet) -> bool:
    """Whether there is a cached file; it is not checked."""
    return _cache.path_of(data_set).is_file()


def get(name: str, *, tell: Tell | None = None) -> Path:
    """Make sure that a data set is cached and whole; nothing is fetched where it is.

    Its sources are tried in turn. Whatever goes wrong, the cache holds the whole data set or nothing of it.

    Args:
        name: Such as ``cifar-10``.
        tell: Told in words what is being done.

    Returns:
        The cached ``.npz`` with ``train_x``, ``train_y``, ``test_x`` and ``test_y``; images ``(N, H, W, C)`` uint8.

    Raises:
        DataError: There is no data set of that name, no source works, the disk is full, or the cache cannot be written.
    """
    data_set = find(name)

    def told(text: str) -> None:
        if tell is not None:
            tell(f"{data_set.name}: {text}")

    state = _cache.state(data_set)
    if state == "whole":
        return _cache.path_of(data_set)
    if state == "damaged":
        told("the cached file is damaged, fetching it again")
    failures: list[tuple[Source, BezoarError]] = []
    for source in data_set.sources:
        try:
            return _from(data_set, source, told)
        except DiskFull:
            raise
        except BezoarError as error:
            failures.append((source, error))
            told(f"{source.title}: {error.message}")
    raise _no_source(data_set, failures)


def _from(data_set: DataSet, source: Source, tell: Tell) -> Path:
    # The download, the same unpacked, and the arrays.
    with _cache.work_folder(data_set, 2 * source.megabytes + data_set.megabytes) as folder:
        tell(f"from the {source.title}" + (f", {source.megabytes} MB" if source.megabytes else ""))
        (folder / "download").mkdir()
        arrays = canonical(source.fetch(folder / "download", tell))
        found = digest(*arrays.values())
        if found != data_set.sha256:
            message = f"the images and labels are not those expected: SHA-256 {found}, expected {data_set.sha256}"
            raise DataError(message, "They were not used")
        tell("SHA-256 of images and labels is right")
        path = _cache.store(data_set, arrays, source, folder)
    tell(f"stored as {path}")
    return path


def _no_source(data_set: DataSet, failures: list[tuple[Source, BezoarError]]) -> DataError:
    lines = [f"\n  {s.title}: {e.message}" + (f". {e.hint}" if e.hint else "") for s, e in failures]
    path = _cache.path_of(data_set)
    return DataError(
        f"{data_set.name} could not be fetched:{''.join(lines)}",
        f"Or copy {path.name} from a machine that has it to {path.parent}",
    )
