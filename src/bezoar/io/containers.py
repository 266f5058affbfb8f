"""Files and the containers in them, checked before memory is taken: regular files, zip archives, safetensors."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from bezoar.core.errors import ModelError
from bezoar.io.extras import one_line

HEAD_BYTES = 4096
MAX_ENTRIES = 100_000
MAX_DIRECTORY = 64 << 20
MAX_RATIO = 100
MAX_HEADER = 32 << 20  # the format allows 100 MB; a real header takes about 100 bytes per tensor
MAX_DIMENSIONS = 64

#: Bits of each safetensors dtype that fills whole bytes.
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}

# First bytes of files that people hand over by mistake: what it is, and what to do.
_MISTAKES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer", "Fetch the real file: git lfs pull"),
    (b"<!doctype html", "an HTML page", "The download gave a web page instead of the file: download it again"),
    (b"<html", "an HTML page", "The download gave a web page instead of the file: download it again"),
    (b"<?xml", "an XML document", "The download gave an error message instead of the file: download it again"),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first"),
    (b"BZh", "a bzip2 archive", "Unpack it first"),
    (b"\xfd7zXZ", "an xz archive", "Unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "Unpack it first"),
    (b"Rar!", "a RAR archive", "Unpack it first"),
    (b"\x89HDF", "an HDF5 file, as older Keras writes", "Export the model to ONNX"),
    (b"GGUF", "a GGUF language model", "Give an image classifier"),
    (b"\x89PNG", "a PNG image", "Give the model first and the data with --data"),
    (b"\xff\xd8\xff", "a JPEG image", "Give the model first and the data with --data"),
    (b"\x93NUMPY", "a NumPy array", "Give the model first and the data with --data"),
    (b"%PDF", "a PDF document", "Give the model file"),
    (b"\x7fELF", "a program", "Give the model file"),
)


@dataclass(frozen=True)
class Source:
    """A file or folder that exists and can be read.

    Attributes:
        path: Where it is.
        size: Bytes; 0 for a folder.
        head: The first 4096 bytes; empty for a folder.
        is_folder: Whether it is a folder.
    """

    path: Path
    size: int
    head: bytes
    is_folder: bool

    @cached_property
    def zip_names(self) -> tuple[str, ...]:
        """Names in the zip archive; empty where the file is none or is damaged. Never raises."""
        if not self.head.startswith(b"PK\x03\x04"):
            return ()
        try:
            if _directory_bytes(self) > MAX_DIRECTORY:
                return ()
            with zipfile.ZipFile(self.path) as archive:
                return tuple(archive.namelist())
        except Exception:  # zipfile raises many kinds on crafted files; check_zip says what is wrong
            return ()


def open_source(path: Path) -> Source:
    """Look at a file or folder without reading more than its first bytes.

    Raises:
        ModelError: Missing, unreadable, empty, not a regular file, or plainly not a model.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise _unreachable(path, error) from None
    if stat.S_ISDIR(status.st_mode):
        return Source(path, 0, b"", True)
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path} is not a regular file (device, pipe or socket)", "Give a model file or folder")
    if status.st_size == 0:
        raise ModelError(f"{path} is empty (0 bytes)", "Download it again")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise _unreachable(path, error) from None
    _refuse_mistakes(path, head)
    return Source(path, status.st_size, head, False)


def _unreachable(path: Path, error: OSError | ValueError) -> ModelError:
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ELOOP:
        return ModelError(f"{path}: its symbolic links form a loop", "Give the real file")
    if code in (errno.EACCES, errno.EPERM):
        return ModelError(f"{path}: permission denied", "Allow reading it, such as: chmod u+r")
    if code in (errno.ENOENT, errno.ENOTDIR):
        if path.is_symlink():
            return ModelError(f"{path} is a symbolic link to nothing", "Give the real file")
        return ModelError(f"{path} does not exist", _near(path))
    return ModelError(f"{path}: {one_line(error)}", "Give a model file or folder")


def _near(path: Path) -> str:
    try:
        close = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent or "."))[:10_000], 3)
    except OSError:
        return f"The folder {path.parent} does not exist either"
    return f"Did you mean {', '.join(close)}?" if close else "Check the path"


def _refuse_mistakes(path: Path, head: bytes) -> None:
    start = head.lstrip().lower()
    for magic, what, hint in _MISTAKES:
        if head.startswith(magic) or start.startswith(magic):
            raise ModelError(f"{path} is {what}, not a model", hint)
    if head[257:262] == b"ustar":
        raise ModelError(f"{path} is a tar archive, not a model", "Unpack it first and give the file inside")


def explain_unknown(source: Source) -> ModelError:
    """The error for a file or folder that no reader took."""
    readable = "Readable: safetensors, torch.save files, ONNX, Hugging Face and timm folders"
    if source.is_folder:
        return ModelError(
            f"{source.path} is a folder without a config.json that describes a model",
            "Give the model file in it, or a Hugging Face or timm folder (config.json and model.safetensors)",
        )
    if source.head.startswith(b"PK\x03\x04"):
        check_zip(source)
        return ModelError(f"{source.path} is a zip archive, but not of a model", readable)
    if _is_text(source.head):
        return ModelError(f"{source.path} is a text file, not a model", readable)
    return ModelError(f"{source.path}: the format is unknown or the file is damaged", readable)


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < HEAD_BYTES else "ignore")
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\r\n\t\f" for c in text)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replace_when_done(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


# --- zip -----------------------------------------------------------------------------------------------------------


def _directory_bytes(source: Source) -> int:
    """Size of the archive's directory as its last record states it.

    Raises:
        ModelError: There is no such record at the very end. The writers of models leave no comment after it, and
            without one every zip library finds the same directory.
    """
    with source.path.open("rb") as file:
        file.seek(max(0, source.size - 98))
        tail = file.read(98)
    if tail[-22:-18] != b"PK\x05\x06":
        raise ModelError(f"{source.path}: the zip archive is truncated or has data after its end", "Download it again")
    size = int.from_bytes(tail[-10:-6], "little")
    if tail[-42:-38] == b"PK\x06\x07" and tail[:4] == b"PK\x06\x06":  # zip64
        size = max(size if size != 0xFFFFFFFF else 0, int.from_bytes(tail[40:48], "little"))
    return size


def check_zip(source: Source) -> dict[str, zipfile.ZipInfo]:
    """Check a zip archive by its directory alone.

    Returns:
        Entry of each name.

    Raises:
        ModelError: Damaged, encrypted, too many entries, unsafe or repeated names, overlapping entries, or a size
            out of all proportion to the file.
    """
    if _directory_bytes(source) > MAX_DIRECTORY:
        raise ModelError(
            f"{source.path}: the directory of the zip archive is damaged or too large", "Download it again"
        )
    try:
        with zipfile.ZipFile(source.path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises many kinds on crafted files
        raise ModelError(f"{source.path}: damaged zip archive ({one_line(error)})", "Download it again") from None
    if len(entries) > MAX_ENTRIES:
        raise ModelError(f"{source.path}: {len(entries)} entries in the zip archive, at most {MAX_ENTRIES} are read")
    named = {entry.filename: entry for entry in entries}
    if len(named) < len(entries):
        raise ModelError(f"{source.path}: the zip archive repeats a name", "No program writes models like this")
    for entry in entries:
        _check_entry(source, entry)
    _check_layout(source, entries)
    return named


def _check_entry(source: Source, entry: zipfile.ZipInfo) -> None:
    name = PurePosixPath(entry.filename)
    if name.is_absolute() or ".." in name.parts or "\\" in entry.filename:
        raise ModelError(f"{source.path}: unsafe path {entry.filename[:80]!r} in the zip archive")
    if entry.flag_bits & 0x1:
        raise ModelError(f"{source.path}: the zip archive is encrypted", "Unpack it first")


def _check_layout(source: Source, entries: list[zipfile.ZipInfo]) -> None:
    end = 0
    for entry in sorted(entries, key=lambda e: e.header_offset):
        if entry.header_offset < end:
            raise ModelError(f"{source.path}: entries of the zip archive overlap", "No program writes models like this")
        end = entry.header_offset + 30 + entry.compress_size
        if end > source.size:
            raise ModelError(f"{source.path}: {entry.filename[:80]!r} reaches past the end", "Download it again")
    claimed = sum(entry.file_size for entry in entries)
    if claimed > MAX_RATIO * source.size + (1 << 20):
        raise ModelError(
            f"{source.path}: {source.size} bytes claim to unpack to {claimed}: a zip bomb", "Do not open this file"
        )


def read_entry(source: Source, entry: zipfile.ZipInfo, limit: int) -> bytes:
    """Unpack one checked entry of at most ``limit`` bytes.

    Raises:
        ModelError: Too large or damaged.
    """
    if entry.file_size > limit:
        raise ModelError(
            f"{source.path}: {entry.filename[:80]!r} takes {entry.file_size} bytes, at most {limit} allowed"
        )
    try:
        with zipfile.ZipFile(source.path) as archive, archive.open(entry) as file:
            return file.read(entry.file_size + 1)
    except Exception as error:
        raise ModelError(f"{source.path}: damaged zip archive ({one_line(error)})", "Download it again") from None


# --- safetensors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorRange:
    """Where a tensor lies in a safetensors file: dtype, shape, first byte (from the start of the file), bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    count: int


def looks_like_safetensors(source: Source) -> bool:
    """Whether the first bytes are those of a safetensors header, or the name says so and nothing speaks against it."""
    if len(source.head) > 8 and source.head[8:9] == b"{":
        return int.from_bytes(source.head[:8], "little") < 1 << 56
    return source.path.suffix == ".safetensors" and not _is_text(source.head)


def safetensors_header(source: Source) -> dict[str, TensorRange]:
    """Parse and check the header of a safetensors file.

    Returns:
        Where each tensor lies.

    Raises:
        ModelError: Damaged, truncated, or with ranges that overlap, leave gaps or do not fit shape and dtype.
    """
    length = int.from_bytes(source.head[:8], "little")
    if source.size < 8 or length > source.size - 8:
        raise _damaged(source, f"its header claims {length} bytes, the file has {source.size}")
    if length > MAX_HEADER:
        raise _damaged(source, f"its header takes {length} bytes, at most {MAX_HEADER} are read")
    with source.path.open("rb") as file:
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(source, f"its header is not valid JSON ({one_line(error)})") from None
    if not isinstance(header, dict):
        raise _damaged(source, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(source, "its metadata is not text")
    ranges = {name: _range(source, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, place in sorted(ranges.items(), key=lambda item: (item[1].start, item[1].count)):
        if place.start != end:
            raise _damaged(source, f"tensor {name[:80]!r} overlaps another or leaves a gap")
        end += place.count
    if end != source.size:
        raise _damaged(source, f"its tensors end at byte {end}, the file at {source.size}")
    return ranges


def _range(source: Source, name: str, entry: Any, base: int) -> TensorRange:
    short = repr(name[:80])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(source, f"entry {short} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _damaged(source, f"tensor {short} has unknown dtype {str(dtype)[:20]!r}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS or not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(source, f"tensor {short} has a damaged shape or offsets")
    start, stop = offsets
    if stop < start or base + stop > source.size:
        raise _damaged(source, f"tensor {short} claims bytes {start} to {stop}, past the end of the file")
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if stop - start != needed:
        raise _damaged(source, f"tensor {short} has {stop - start} bytes, its shape needs {needed}")
    return TensorRange(dtype, tuple(shape), base + start, needed)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _damaged(source: Source, reason: str) -> ModelError:
    return ModelError(f"{source.path}: damaged safetensors file: {reason}", "Download it again")
