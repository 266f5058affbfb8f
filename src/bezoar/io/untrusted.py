"""Labelled images that nobody vouches for: read once from front to end, then by position from a file on disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bezoar.core.errors import DataError, SettingError
from bezoar.core.results import DataFacts
from bezoar.core.run import Report
from bezoar.io.data import choose, open_source, train_and_test
from bezoar.io.data_readers._base import Broken, Index, Picture, Source, Wanted, listed
from bezoar.io.data_readers._pixels import shaped

#: Share of a disk that the unpacked images may take of what is free.
_DISK_SHARE = 0.9
_SLACK = 1e-4  # of a pixel that should lie in [0, 1]


@dataclass(frozen=True)
class UntrustedData:
    """Training images whose labels may lie, an :class:`bezoar.core.examples.ExampleSource`.

    The images lie unpacked in a file without a name, which is gone when the program ends.

    Attributes:
        labels: ``(N,)`` int64 labels as they came.
        num_classes: Number of labels K.
        shape: ``(C, H, W)`` of one image.
        facts: Where they come from, how many there are of each label, and their hash.
        origin: ``(N,)`` int64, ascending: position of each example in the data as it came, unreadable ones counted.
        first: ``(N,)`` int64: the first example with exactly the same pixels, mostly the example itself.
        unreadable: Images that were left out, and why.
        notes: What the user should know, such as files that were left out.
        where: Name of each example: a file, or its place in the data.
        pixels: ``(N, C, H, W)`` uint8 or float32, mapped from disk.
    """

    labels: Tensor
    num_classes: int
    shape: tuple[int, int, int]
    facts: DataFacts
    origin: Tensor
    first: Tensor
    unreadable: tuple[Broken, ...]
    notes: tuple[str, ...]
    where: tuple[str, ...]
    pixels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; their numbers where they have none."""
        return self.facts.names

    @property
    def sha256(self) -> str:
        """Hash of all pixels and labels, which a checkpoint is held against."""
        return self.facts.sha256

    def name(self, row: int) -> str:
        """The file of an example, or its place in the data as it came."""
        return self.where[row]

    def take(self, rows: Tensor) -> Tensor:
        """``(B, C, H, W)`` images at these positions: uint8 in [0, 255], or float32 in [0, 1]."""
        return torch.from_numpy(np.ascontiguousarray(self.pixels[rows.cpu().numpy()]))

    @property
    def duplicates(self) -> Tensor:
        """``(D,)`` positions of the examples whose pixels came before."""
        return (self.first != torch.arange(len(self))).nonzero().flatten()

    @property
    def conflicts(self) -> Tensor:
        """``(G,)`` positions of all examples whose pixels also stand under another label."""
        differ = self.labels != self.labels[self.first]
        groups = torch.zeros(len(self), dtype=torch.bool)
        groups[self.first[differ]] = True
        return groups[self.first].nonzero().flatten()

    @property
    def empty(self) -> tuple[int, ...]:
        """Labels without any example."""
        return tuple(label for label, count in enumerate(self.facts.per_class) if not count)


def open_untrusted(
    source: Any,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    *,
    num_classes: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_unreadable: float = 0.01,
    folder: Path | None = None,
    report: Report | None = None,
) -> UntrustedData:
    """Open training images that nobody vouches for; all are looked at once, and never more than one is in memory.

    Args:
        source: As for :func:`bezoar.io.data.load_data`; a data set by name stands for its training images.
        size: Height and width that all images are brought to.
        channels: 1 or 3: images are converted where they differ.
        num_classes: Number of labels; by default what the data says.
        limit: Use at most this many images, as many of each label as there are.
        seed: Of that draw.
        max_unreadable: Share of the images that may be unreadable, in [0, 1); they are listed and left out.
        folder: Where the unpacked images lie while the program runs; the system's temporary folder by default.
        report: Told of progress.

    Raises:
        DataError: The data cannot be used, too much of it is unreadable, or the disk is too small for it.
        SettingError: A setting is out of range.
    """
    if not 0 <= max_unreadable < 1:
        raise SettingError(f"max_unreadable must be in [0, 1), got {max_unreadable}")
    wanted = Wanted(size, channels)
    opened = open_source(train_and_test(source)[0], wanted)
    classes = _classes(opened, num_classes)
    index = choose(opened.labels, limit, seed)
    unpacked = _Unpacking(len(index), wanted, max_unreadable, folder)
    for done, (position, picture) in enumerate(zip(index, opened.pictures(index), strict=True), start=1):
        unpacked.add(int(position), picture)
        if report is not None and (done % 100 == 0 or done == len(index)):
            report("read", done, len(index), "")
    pixels = unpacked.finished()
    origin = np.array(unpacked.origin, dtype=np.int64)
    labels = opened.labels[origin]
    counts = np.bincount(labels, minlength=classes)
    if (counts > 0).sum() < 2:
        raise DataError("the data has one class only", "Give images of at least two classes")
    names = opened.names if len(opened.names) == classes else tuple(map(str, range(classes)))
    sha = hashlib.sha256(repr((pixels.dtype.str, pixels.shape)).encode() + b"".join(unpacked.hashes))
    sha.update(labels.astype("<i8").tobytes())
    channels, height, width = pixels.shape[1:]
    return UntrustedData(
        labels=torch.from_numpy(labels),
        num_classes=classes,
        shape=(channels, height, width),
        facts=DataFacts(
            path=opened.path,
            format=opened.format,
            sha256=sha.hexdigest(),
            count=len(labels),
            per_class=tuple(counts.tolist()),
            names=names,
        ),
        origin=torch.from_numpy(origin),
        first=torch.from_numpy(_first(unpacked.hashes)),
        unreadable=tuple(unpacked.broken),
        notes=opened.notes + unpacked.notes(),
        where=tuple(unpacked.where),
        pixels=pixels,
    )


def _classes(source: Source, given: int | None) -> int:
    labels = source.labels
    if not len(labels):
        raise DataError(f"{source.path} holds no images", "Give images with labels")
    low, high = int(labels.min()), int(labels.max())
    classes = given or (len(source.names) if source.named else high + 1)
    if low < 0 or high >= classes:
        hint = "Labels are 0, 1, 2, ...; remove images without a label, and check --num-classes"
        raise DataError(f"the labels lie between {low} and {high}, with {classes} classes", hint)
    if source.named and len(source.names) != classes:
        message = f"the data has {len(source.names)} classes, the model has {classes}"
        raise DataError(message, "Give the data that this model was made for")
    seen = len(np.unique(labels))
    if classes > 2 * seen + 8:
        message = f"the labels go up to {high}, but only {seen} of {classes} are there"
        raise DataError(message, "Number the labels 0, 1, 2, ..., or give --num-classes if that is right")
    return classes


def _first(hashes: list[bytes]) -> Index:
    """The first place at which each hash stands."""
    _, first, group = np.unique(np.array(hashes, dtype="V16"), return_index=True, return_inverse=True)
    return first[group].astype(np.int64)


class _Unpacking:
    """Writes one picture after the other to disk, and keeps what there is to know about it."""

    def __init__(self, count: int, wanted: Wanted, max_unreadable: float, folder: Path | None) -> None:
        self.count, self.wanted, self.allowed, self.folder = count, wanted, max_unreadable * count, folder
        self.origin: list[int] = []
        self.where: list[str] = []
        self.hashes: list[bytes] = []
        self.broken: list[Broken] = []
        self.rounded = 0
        self.brightest = 0.0
        self.out: NDArray[Any] | None = None

    def add(self, position: int, picture: Picture | Broken) -> None:
        found = picture if isinstance(picture, Broken) else self._pixels(picture)
        if isinstance(found, Broken):
            self.broken.append(found)
            if len(self.broken) > self.allowed:
                raise self._too_many()
            return
        if self.out is None:
            self.out = self._room(found)
        self._check_shape(found, picture.where)
        row = len(self.origin)
        self.out[row] = self._as_kept(found)
        self.brightest = max(self.brightest, float(found.max()) / (255 if found.dtype == np.uint8 else 1))
        self.hashes.append(hashlib.blake2b(self.out[row].tobytes(), digest_size=16).digest())
        self.origin.append(position)
        self.where.append(picture.where)

    def finished(self) -> NDArray[Any]:
        if self.out is None:
            raise self._too_many() if self.broken else DataError("there are no images", "Give images with labels")
        if self.brightest < 1.5 / 255:
            message = f"all images are almost black: the largest pixel is {self.brightest:.4g} on the scale from 0 to 1"
            raise DataError(message, "Were pixels in [0, 1] stored as uint8, or divided by 255 twice?")
        self.out.flags.writeable = False
        return self.out[: len(self.origin)]

    def notes(self) -> tuple[str, ...]:
        return (f"{self.rounded} images of 16 bits were rounded to 8 like the others",) if self.rounded else ()

    def _pixels(self, picture: Picture) -> NDArray[Any] | Broken:
        """``(C, H, W)`` uint8, or float32 in [0, 1]."""
        pixels = shaped(picture, self.wanted).transpose(2, 0, 1)
        if pixels.dtype == np.uint8:
            return pixels
        if pixels.dtype.kind == "u":
            return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
        low, high = float(pixels.min()), float(pixels.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            return Broken(picture.where, "holds NaN or Inf")
        if low < -_SLACK or high > 1 + _SLACK:
            return Broken(picture.where, f"pixels lie in [{low:.4g}, {high:.4g}], not in [0, 1]")
        return pixels.astype(np.float32).clip(0, 1)

    def _as_kept(self, pixels: NDArray[Any]) -> NDArray[Any]:
        assert self.out is not None
        if pixels.dtype == self.out.dtype:
            return pixels
        if self.out.dtype == np.uint8:
            self.rounded += 1
            return (pixels * 255).round().astype(np.uint8)
        return pixels.astype(np.float32) / np.float32(255)

    def _room(self, first: NDArray[Any]) -> NDArray[Any]:
        folder = Path(tempfile.gettempdir()) if self.folder is None else self.folder
        folder.mkdir(parents=True, exist_ok=True)
        need, free = self.count * first.nbytes, shutil.disk_usage(folder).free
        if need > _DISK_SHARE * free:
            sizes = f"{need / 2**30:.1f} GiB unpacked, and {folder} has {free / 2**30:.1f} GiB left"
            raise DataError(f"{self.count} images need {sizes}", "Give a smaller --size, or another disk with --out")
        with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps it alive
            os.truncate(file.fileno(), need)
            return np.memmap(file, dtype=first.dtype, mode="r+", shape=(self.count, *first.shape))

    def _check_shape(self, pixels: NDArray[Any], where: str) -> None:
        assert self.out is not None
        first, other = self.out.shape[1:], pixels.shape
        if first[0] != other[0]:
            raise DataError(
                f"the first image has {first[0]} channels, {where} has {other[0]}", "Give --channels 3 or 1"
            )
        if first != other:
            sizes = f"the first image has {first[1]} x {first[2]} pixels, {where} has {other[1]} x {other[2]}"
            raise DataError(sizes, "Give --size, which all images are brought to")

    def _too_many(self) -> DataError:
        found = listed([f"{b.where} ({b.reason})" for b in self.broken])
        message = f"too many unreadable images, {len(self.broken)} so far of {self.count}: {found}"
        return DataError(message, "Fetch them again, or allow more with --max-unreadable, such as 0.05")
