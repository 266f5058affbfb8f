"""Broken and hostile data sets, each with the error that it must give. Also printed by the benchmark of bad input."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bezoar.core.errors import BezoarError, DataError

MARKER = "marker-of-code-that-ran"


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: What is wrong.
        build: Makes the data below a folder and returns what is given to ``load_data``.
        kwargs: Further arguments of ``load_data``.
        error: Class of the error.
        fragment: Part of its text.
    """

    name: str
    build: Callable[[Path], Any]
    error: type[BezoarError]
    fragment: str
    kwargs: dict[str, Any] = field(default_factory=dict)


def pixels(count: int = 12, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def labels(count: int = 12, classes: int = 3) -> np.ndarray:
    return np.arange(count) % classes


def png(seed: int = 0, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(1, size, seed)[0]).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path, names: tuple[str, ...] = ("cat", "dog", "owl"), each: int = 4) -> Path:
    for c, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for i in range(each):
            (path / name / f"{i}.png").write_bytes(png(100 * c + i))
    return path


def npz(path: Path, **arrays: Any) -> Path:
    file = path / "data.npz"
    np.savez(file, **arrays)
    return file


class Marked:
    """Leaves a marker when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def _objects(path: Path) -> Path:
    x = np.empty(12, dtype=object)
    x[:] = [Marked(path / MARKER)] * 12
    return npz(path, x=x, y=labels())


def _pickle(path: Path) -> Path:
    import pickle

    file = path / "data.pkl"
    file.write_bytes(pickle.dumps(Marked(path / MARKER)))
    return file


def _petabytes(path: Path) -> Path:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 1000, 1000, 3), }"
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    entry = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)
    y = io.BytesIO()
    np.save(y, labels())
    file = path / "petabytes.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", entry)
        archive.writestr("y.npy", y.getvalue())
    return file


def _zip_bomb(path: Path) -> Path:
    """An honest-looking archive whose directory claims 8 GiB for an entry of a few kilobytes."""
    file = npz(path, x=pixels(), y=labels())
    content = bytearray(file.read_bytes())
    at = content.index(b"PK\x01\x02")  # the first entry of the central directory: its uncompressed size
    content[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)
    file.write_bytes(content)
    return file


def _too_much(path: Path) -> Path:
    """Zeros that compress a thousand times and unpack to more than the cap: written sparsely, 5 GiB claimed."""
    shape = (5 * 1024 * 1024, 32, 32, 1)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    file = path / "much.npz"
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = bytes(1 << 26)
    packed = compressor.compress(head.getvalue()) + compressor.compress(block) + compressor.flush()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", packed)
        y = io.BytesIO()
        np.save(y, labels())
        archive.writestr("y.npy", y.getvalue())
    content = bytearray(file.read_bytes())
    at = content.index(b"PK\x01\x02")
    size = len(head.getvalue()) + int(np.prod(shape))
    content[at + 10 : at + 12] = struct.pack("<H", 8)  # says: deflated
    content[at + 24 : at + 28] = struct.pack("<I", min(size, 0xFFFFFFF0))
    file.write_bytes(content)
    return file


def _bomb_image(path: Path) -> Path:
    """A PNG of a hundred bytes that claims 60,000 x 60,000 pixels."""
    folder(path / "images")
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    )
    (path / "images" / "cat" / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path / "images"


def _truncated_image(path: Path) -> Path:
    folder(path / "images")
    (path / "images" / "dog" / "1.png").write_bytes(png(7, 32)[:400])
    (path / "images" / "owl" / "2.png").write_bytes(b"")
    return path / "images"


def _text_as_image(path: Path) -> Path:
    folder(path / "images")
    (path / "images" / "dog" / "page.jpg").write_text("<html>404</html>")
    return path / "images"


def _postscript(path: Path) -> Path:
    """EPS would be handed to Ghostscript."""
    folder(path / "images")
    text = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({path / MARKER}) (w) file closefile\nshowpage\n"
    (path / "images" / "dog" / "x.png").write_text(text)
    return path / "images"


def _empty_class(path: Path) -> Path:
    folder(path / "images")
    (path / "images" / "emu").mkdir()
    (path / "images" / "emu" / "readme.txt").write_text("none")
    return path / "images"


def _links_out(path: Path) -> Path:
    """Every image of a class is a link to a file outside."""
    folder(path / "images")
    (path / "secret.png").write_bytes(png(5))
    for file in (path / "images" / "owl").iterdir():
        file.unlink()
        file.symlink_to(path / "secret.png")
    return path / "images"


def _splits(path: Path) -> Path:
    folder(path / "images" / "train")
    folder(path / "images" / "test")
    return path / "images"


def _no_classes(path: Path) -> Path:
    (path / "images").mkdir()
    for i in range(5):
        (path / "images" / f"{i}.png").write_bytes(png(i))
    return path / "images"


def _empty_folder(path: Path) -> Path:
    (path / "images").mkdir()
    return path / "images"


def _fifo(path: Path) -> Path:
    os.mkfifo(path / "data.npz")
    return path / "data.npz"


def _loop(path: Path) -> Path:
    (path / "loop").symlink_to(path / "loop")
    return path / "loop"


def _pointer(path: Path) -> Path:
    (path / "data.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    return path / "data.npz"


def _parquet_bytes(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / "data.parquet")
    return path / "data.parquet"


def _parquet_truncated(path: Path) -> Path:
    rows = [{"image": {"bytes": png(i), "path": None}, "label": i % 3} for i in range(12)]
    file = _parquet_bytes(path, rows)
    file.write_bytes(file.read_bytes()[:-200])
    return file


def _parquet_escape(path: Path) -> Path:
    """Rows that name a file outside of the folder."""
    (path / "secret.png").write_bytes(png(5))
    (path / "set").mkdir()
    rows = [{"image": {"bytes": None, "path": "../secret.png"}, "label": i % 3} for i in range(12)]
    return _parquet_bytes(path / "set", rows)


def _saved_escape(path: Path) -> Path:
    (path / "set").mkdir()
    (path / "secret.arrow").write_bytes(b"secret")
    (path / "set" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    return path / "set"


def _nan(_: Path) -> Any:
    x = pixels().astype(np.float32) / 255
    x[3, 2, 1, 0] = np.nan
    return x, labels()


def _damaged(path: Path) -> Path:
    file = npz(path, x=pixels(), y=labels())
    content = bytearray(file.read_bytes())
    content[600] ^= 255
    file.write_bytes(content)
    return file


def _x(**changes: Any) -> Callable[[Path], Any]:
    return lambda path: npz(path, **{"x": pixels(), "y": labels(), **changes})


CASES: list[Case] = [
    Case("missing path", lambda p: p / "nothing", DataError, "does not exist"),
    Case("link to itself", _loop, DataError, "cannot open"),
    Case("named pipe", _fifo, DataError, "neither a file nor a folder"),
    Case("Git LFS pointer", _pointer, DataError, "Git LFS pointer"),
    Case("pickle that runs code", _pickle, DataError, "can run code: refused"),
    Case("npz of pickled objects", _objects, DataError, "holds Python objects"),
    Case("npz that claims petabytes", _petabytes, DataError, "claims the shape"),
    Case("npz with a zip bomb", _zip_bomb, DataError, "compressed ones"),
    Case("npz that unpacks to more than it may", _too_much, DataError, "array x claims"),
    Case("npz with a flipped bit", _damaged, DataError, "BadZipFile"),
    Case("npz without x and y", lambda p: npz(p, a=pixels()), DataError, "holds a, not x and y"),
    Case("empty folder", _empty_folder, DataError, "is empty"),
    Case("folder without classes", _no_classes, DataError, "images but no class folders"),
    Case("folder of splits", _splits, DataError, "such as"),
    Case("class without an image", _empty_class, DataError, "without an image: emu"),
    Case("links that leave the folder", _links_out, DataError, "without an image: owl"),
    Case("truncated and empty images", _truncated_image, DataError, "2 of 12 images cannot be read"),
    Case("page of HTML named .jpg", _text_as_image, DataError, "dog/page.jpg (not an image)"),
    Case("PostScript named .png", _postscript, DataError, "dog/x.png (not an image)"),
    Case("image that claims 3.6 gigapixels", _bomb_image, DataError, "cat/bomb.png (claims"),
    Case("another number of classes", lambda p: folder(p / "i"), DataError, "the model has 10", {"num_classes": 10}),
    Case("label out of range", _x(y=labels(12, 4)), DataError, "holds the label 3", {"num_classes": 3}),
    Case("labels from 1", _x(y=labels() + 1), DataError, "subtract 1", {"num_classes": 3}),
    Case("negative label", _x(y=labels() - 1), DataError, "holds the label -1"),
    Case("fractional labels", _x(y=labels() + 0.5), DataError, "not whole numbers"),
    Case("one-hot labels", _x(y=np.eye(3)[labels()]), DataError, "one-hot"),
    Case("class that never comes", _x(y=labels() * 2), DataError, "2 of 5 classes have no image, such as 1, 3"),
    Case("x and y of different lengths", _x(y=labels(9)), DataError, "x has 12 images, y has 9 labels"),
    Case("flat images", _x(x=pixels().reshape(12, -1)), DataError, "not a batch of images"),
    Case("no colour axis", _x(x=np.zeros((12, 5, 8, 7), np.uint8)), DataError, "no axis of 1, 3 or 4"),
    Case("NHWC or NCHW", _x(x=np.zeros((12, 3, 8, 3), np.uint8)), DataError, "NHWC or NCHW"),
    Case("NaN pixels", _nan, DataError, "NaN or Inf"),
    Case("floats in [0, 255]", _x(x=pixels().astype(np.float32)), DataError, "divide by 255"),
    Case("normalised pixels", _x(x=pixels() / 128 - 1), DataError, "look normalised"),
    Case("divided by 255 twice", _x(x=pixels() / 255**2), DataError, "almost black"),
    Case("all images identical", _x(x=np.repeat(pixels(1), 12, 0)), DataError, "are identical"),
    Case("too few images", _x(x=pixels(4), y=labels(4)), DataError, "4 images in the data are too few for 3 classes"),
    Case("text", lambda p: "".join(map(str, [p / "no\x1b[2Jsuch"])), DataError, "no\\x1b[2Jsuch does not exist"),
    Case("a number", lambda p: 7, DataError, "data of type int"),
    Case("truncated Parquet", _parquet_truncated, DataError, ""),
    Case("Parquet that names files outside", _parquet_escape, DataError, "is not in the folder"),
    Case("saved data set that names files outside", _saved_escape, DataError, "not in the folder"),
]
