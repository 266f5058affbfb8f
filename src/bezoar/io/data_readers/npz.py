"""NumPy ``.npz`` archives, opened without pickle and only after their headers were held against the archive."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bezoar.core.errors import DataError
from bezoar.io.data_readers._base import MEMORY_CAP, Source, Wanted, listed, reading, shown, starts_with
from bezoar.io.data_readers._pixels import channels_last, numeric
from bezoar.io.data_readers.memory import array_pictures, as_labels

#: Names of images and labels, in order of preference; case does not matter.
KEYS = (
    ("x", "y"),
    ("images", "labels"),
    ("x_test", "y_test"),
    ("test_x", "test_y"),
    ("test_images", "test_labels"),
    ("data", "targets"),
    ("data", "labels"),
    ("x_train", "y_train"),
    ("train_x", "train_y"),
    ("train_images", "train_labels"),
)
#: The same for files that hold both parts of a data set.
PART_KEYS = {
    part: ((f"{part}_x", f"{part}_y"), (f"x_{part}", f"y_{part}"), (f"{part}_images", f"{part}_labels"))
    for part in ("train", "test")
}
_ENTRY_CAP = 1000
_HEADER_CAP = 10_000
_DEFLATE_RATIO = 1100  # deflate cannot do better than 1032 to 1


@dataclass(frozen=True)
class NpzPart:
    """One part, ``train`` or ``test``, of an ``.npz`` file that holds such parts."""

    path: Path
    part: Literal["train", "test"]


def parts(source: Path) -> set[str]:
    """Which of ``train`` and ``test`` an ``.npz`` file holds; empty for any other file."""
    if not NpzReader().claims(source):
        return set()
    with reading(source, "an npz file"), zipfile.ZipFile(source) as archive:
        members = _members(source, archive)
    return {part for part, keys in PART_KEYS.items() if any(members.keys() >= set(pair) for pair in keys)}


class NpzReader:
    """``.npz`` files with images and labels."""

    def claims(self, source: object) -> bool:
        """Whether it is a zip archive, or part of one."""
        return isinstance(source, NpzPart) or starts_with(source, b"PK\x03\x04", b"PK\x05\x06")

    def open(self, source: Path | NpzPart, wanted: Wanted) -> Source:
        """Check every header that is needed, then read x and y."""
        keys = KEYS if isinstance(source, Path) else PART_KEYS[source.part]
        source = source if isinstance(source, Path) else source.path
        with reading(source, "an npz file"), zipfile.ZipFile(source) as archive:
            members = _members(source, archive)
            x_key, y_key = _keys(source, members, keys)
            wanted_keys = [members[k] for k in (x_key, y_key, "names") if k in members]
            arrays = {a.key: a for a in (_Header.read(archive, info) for info in wanted_keys)}
            total = sum(a.size for a in arrays.values())
            if total > MEMORY_CAP:
                message = f"{shown(source)} unpacks to {total / 2**30:.1f} GiB, more than {MEMORY_CAP / 2**30:g} GiB"
                raise DataError(message, "Store fewer images, and pixels as uint8")
            x, y = arrays[x_key].load(archive, "buif"), arrays[y_key].load(archive, "buif")
            names = arrays["names"].load(archive, "US") if "names" in arrays else np.array([], dtype="U1")
        if x.shape[:1] != y.shape[:1]:
            found = f"{x_key} has {len(x) if x.ndim else 0} images, {y_key} has {len(y) if y.ndim else 0} labels"
            raise DataError(found, "Store one label per image")
        pixels = channels_last(numeric(x), wanted, torch_order=False)
        return Source(
            path=shown(source),
            format="npz",
            labels=as_labels(y),
            names=tuple(shown(str(n.decode("utf-8", "replace") if isinstance(n, bytes) else n)) for n in names.ravel()),
            pictures=array_pictures(pixels),
            named=names.size > 0,
        )


def _members(source: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    entries = [i for i in archive.infolist() if i.filename.endswith(".npy")]
    if not entries or len(entries) > _ENTRY_CAP:
        message = f"{shown(source)} is a zip archive with {len(entries)} NumPy arrays"
        raise DataError(message, "Give an .npz file with the arrays x and y; unpack other archives first")
    members = {i.filename.removesuffix(".npy").lower(): i for i in entries}
    if len(members) < len(entries):
        raise DataError(f"{shown(source)} holds two arrays of the same name", "Write the file again")
    return members


def _keys(source: Path, members: dict[str, zipfile.ZipInfo], keys: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    for x_key, y_key in keys:
        if x_key in members and y_key in members:
            return x_key, y_key
    found = listed([shown(k) for k in members], 8)
    raise DataError(f"{shown(source)} holds {found}, not x and y", "Save it with numpy.savez(path, x=images, y=labels)")


@dataclass(frozen=True)
class _Header:
    """What one ``.npy`` entry says about itself, after it was checked against the archive."""

    key: str
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def read(cls, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Header:
        key = info.filename.removesuffix(".npy").lower()
        if info.flag_bits & 1:
            raise DataError(f"the array {shown(key)} is encrypted", "Store it without a password")
        if info.file_size > _DEFLATE_RATIO * max(info.compress_size, 1) + _HEADER_CAP:
            message = (
                f"the array {shown(key)} claims {info.file_size:,} bytes from {info.compress_size:,} compressed ones"
            )
            raise DataError(message, "No honest file does: do not trust where it came from")
        with archive.open(info) as stream:
            shape, fortran, dtype = _parse(stream)
            header = cls(key, info, shape, fortran, dtype, stream.tell())
        if dtype.hasobject:
            hint = "Store numbers: numpy.savez(path, x=numpy.stack(images), y=labels)"
            raise DataError(f"the array {shown(key)} holds Python objects, which only a pickle can open: refused", hint)
        if min(shape, default=0) < 0 or header.offset + header.size != info.file_size:
            message = f"the array {shown(key)} claims the shape {shape} of {dtype} but has {info.file_size:,} bytes"
            raise DataError(message, "The file is damaged or hostile: fetch or write it again")
        return header

    def load(self, archive: zipfile.ZipFile, kinds: str) -> NDArray[Any]:
        if self.dtype.kind not in kinds or self.dtype.itemsize > 8 and kinds != "US":
            raise DataError(
                f"the array {shown(self.key)} has the type {self.dtype}", "Store x as uint8 or float32, y as int64"
            )
        with archive.open(self.info) as stream:
            stream.read(self.offset)
            content = stream.read(self.size)
            stream.read(1)  # at the end: the checksum is compared here
        flat = np.frombuffer(bytearray(content), dtype=self.dtype)
        return flat.reshape(self.shape, order="F" if self.fortran else "C").astype(
            self.dtype.newbyteorder("="), copy=False
        )


def _parse(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream, max_header_size=_HEADER_CAP)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream, max_header_size=_HEADER_CAP)
    raise ValueError(f"npy format version {version} is not supported")
