"""What the files of a data set look like inside, whatever they come from."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bezoar.io.datasets._source import Arrays, Files


@dataclass(frozen=True)
class Idx:
    """MNIST's own format: a header of big-endian sizes, then bytes; gzipped or not.

    Args:
        name: Name of the files, with ``{part}`` (``train`` or ``t10k``) and ``{kind}``.
    """

    name: str

    def __call__(self, files: Files) -> Arrays:
        """The four arrays."""
        out: Arrays = {}
        for ours, theirs in (("train", "train"), ("test", "t10k")):
            out[f"{ours}_x"] = _idx(files(self.name.format(part=theirs, kind="images-idx3")))[..., None]
            out[f"{ours}_y"] = _idx(files(self.name.format(part=theirs, kind="labels-idx1")))
        return out


def _idx(content: bytes) -> NDArray[np.uint8]:
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    zero, kind, axes = struct.unpack_from(">HBB", content)
    if zero or kind != 8:
        raise ValueError("not an idx file of bytes")
    shape = struct.unpack_from(f">{axes}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


@dataclass(frozen=True)
class CifarSheets:
    """CIFAR-10 as one PNG a batch, one image a row, with the labels as JSON."""

    train: tuple[str, ...] = tuple(f"data_batch_{i}.png" for i in range(1, 6))

    def __call__(self, files: Files) -> Arrays:
        """The four arrays."""
        return {
            "train_x": np.concatenate([_rows(files(name)) for name in self.train]),
            "train_y": np.array(json.loads(files("train_lables.json"))),
            "test_x": _rows(files("test_batch.png")),
            "test_y": np.array(json.loads(files("test_lables.json"))),
        }


def _rows(content: bytes) -> NDArray[np.uint8]:
    return _pixels(content).reshape(-1, 32, 32, 3)


@dataclass(frozen=True)
class SignSheets:
    """GTSRB as zip archives of sheets, 100 signs of 32x32 pixels a row, with labels and boxes in an ``.npz``.

    Each sign is cropped to its box and resized back to 32x32, as the published models expect.
    """

    size: int = 32
    across: int = 100

    def __call__(self, files: Files) -> Arrays:
        """The four arrays."""
        with np.load(io.BytesIO(files("gtsrb_meta.npz")), allow_pickle=False) as raw:
            about = {key: raw[key] for key in ("ytr", "yte", "boxtr", "boxte")}
        out: Arrays = {}
        for part, short in (("train", "tr"), ("test", "te")):
            signs = self._signs(files(f"gtsrb_{part}_sheets.zip"))[: len(about[f"y{short}"])]
            boxes = np.clip(about[f"box{short}"].astype(float) * self.size, 0, self.size)
            out[f"{part}_x"] = np.stack([self._cropped(s, tuple(b)) for s, b in zip(signs, boxes, strict=True)])
            out[f"{part}_y"] = about[f"y{short}"]
        return out

    def _signs(self, content: bytes) -> NDArray[np.uint8]:
        sheets = []
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in sorted(archive.namelist()):
                sheet = _pixels(archive.read(name)).reshape(-1, self.size, self.across, self.size, 3)
                sheets.append(sheet.transpose(0, 2, 1, 3, 4).reshape(-1, self.size, self.size, 3))
        return np.concatenate(sheets)

    def _cropped(self, sign: NDArray[Any], box: tuple[float, ...]) -> NDArray[Any]:
        left, top, right, bottom = box
        whole = Image.fromarray(sign)
        resized = whole.resize((self.size,) * 2, Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        return np.asarray(resized)


def _pixels(content: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
        return np.asarray(image.convert("RGB"))
