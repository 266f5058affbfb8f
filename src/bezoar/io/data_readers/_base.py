"""What every reader of data gives: labels first, pictures only for the images that were chosen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bezoar.core.errors import BezoarError, DataError

#: Most bytes that the images of one data set may take in memory.
MEMORY_CAP = 4 << 30
#: Most images or rows that are looked at.
COUNT_CAP = 50_000_000

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Wanted:
    """What the model takes, where it is known: input size (height, width) and colour channels."""

    size: tuple[int, int] | None = None
    channels: int | None = None


@dataclass(frozen=True)
class Picture:
    """One image.

    Attributes:
        pixels: ``(H, W, C)``; uint8 in [0, 255], uint16 in [0, 65535], or float32 as it was found.
        where: How to name it in an error.
    """

    pixels: NDArray[Any]
    where: str


@dataclass(frozen=True)
class Broken:
    """An image that could not be read, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Source:
    """Data that has been opened but not decoded.

    Attributes:
        path: For the report.
        format: ``folder``, ``npz``, ``parquet``, ...
        labels: ``(N,)``, as found; not yet checked against a range.
        names: Class names, or empty if there are none.
        pictures: Images of the given indices (ascending), in that order.
        notes: What the user should know, such as files that were left out.
        named: Whether ``names`` has exactly one entry for each class of the data.
    """

    path: str
    format: str
    labels: Index
    names: tuple[str, ...]
    pictures: Callable[[Index], Iterator[Picture | Broken]]
    notes: tuple[str, ...] = ()
    named: bool = False


class Reader(Protocol):
    """One kind of data."""

    def claims(self, source: object) -> bool:
        """Whether ``source`` is of this kind; cheap, and never raises."""
        ...

    def open(self, source: Any, wanted: Wanted) -> Source:
        """Open it.

        Raises:
            DataError: It is of this kind, but cannot be used.
        """
        ...


def shown(text: str | os.PathLike[str]) -> str:
    """A file's name that is safe to print: odd bytes and control characters are escaped."""
    plain = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)


def listed(items: list[str], most: int = 3) -> str:
    """The first few items, and how many more there are."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")


def starts_with(source: object, *magic: bytes) -> bool:
    """Whether ``source`` is the path of a regular file that begins with one of these bytes."""
    if not isinstance(source, Path):
        return False
    try:
        if not source.is_file():
            return False
        with source.open("rb") as file:
            return file.read(max(map(len, magic))).startswith(magic)
    except OSError:
        return False


@contextmanager
def reading(path: object, kind: str) -> Iterator[None]:
    """Turn whatever a parser raises on a broken or hostile file into one DataError."""
    try:
        yield
    except BezoarError:
        raise
    except Exception as error:  # parsers raise anything from struct.error to MemoryError
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        message = f"cannot read {shown(str(path))} as {kind}: {type(error).__name__}{': ' + reason if reason else ''}"
        raise DataError(message, "The file is damaged or not what its name says: fetch or write it again") from None


def inside(folder: Path, relative: str) -> Path | None:
    """The real path of ``relative`` if it is a regular file that lies in ``folder``, links followed; else None."""
    root = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(root / relative))
    return target if target.is_relative_to(root) and target.is_file() else None
