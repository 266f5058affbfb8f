"""Clean data: images in [0, 1] with labels, from a path or from Python, checked before anything is done with them."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bezoar.core.errors import DataError, SettingError
from bezoar.core.results import DataFacts
from bezoar.io.data_readers._base import Index, Reader, Source, Wanted, shown, starts_with
from bezoar.io.data_readers._pixels import Assembly
from bezoar.io.data_readers.arrow import ArrowReader, ParquetReader
from bezoar.io.data_readers.folder import FolderReader
from bezoar.io.data_readers.memory import DatasetReader, LoaderReader, PairReader
from bezoar.io.data_readers.named import NamedReader
from bezoar.io.data_readers.npz import NpzPart, NpzReader, parts
from bezoar.io.datasets.registry import NamedData, named, nearest

#: All kinds of data; the first that claims a source reads it.
READERS: tuple[Reader, ...] = (
    NamedReader(),
    ArrowReader(),
    ParquetReader(),
    NpzReader(),
    FolderReader(),
    PairReader(),
    LoaderReader(),
    DatasetReader(),
)
_KINDS = "an image folder with one folder per class, an .npz with x and y, or Parquet files"
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class CleanData:
    """Images with labels.

    Attributes:
        x: ``(N, C, H, W)`` float32 in [0, 1].
        y: ``(N,)`` int64 in [0, K).
        facts: What the report says about them.
        notes: What the user should know, such as files that were left out.
    """

    x: Tensor
    y: Tensor
    facts: DataFacts
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, channels, height, width = self.x.shape
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.facts.per_class)

    def take(self, index: Tensor) -> CleanData:
        """The images of ``index``, a tensor of numbers or a boolean mask ``(N,)``, with facts of their own."""
        x, y = self.x[index], self.y[index]
        counts = tuple(torch.bincount(y, minlength=self.num_classes).tolist())
        return replace(self, x=x, y=y, facts=replace(self.facts, sha256=_sha256(x, y), count=len(x), per_class=counts))

    def split(self, held_out: float, seed: int) -> tuple[CleanData, CleanData]:
        """Split at random, class by class.

        Args:
            held_out: Share of the second part, between 0 and 1.
            seed: The same seed gives the same split.

        Returns:
            The part to work with and the held-out part; a class of at least 2 images is in both, of 1 in the first.

        Raises:
            SettingError: ``held_out`` is not between 0 and 1.
        """
        if not 0 < held_out < 1:
            raise SettingError(f"held_out must be between 0 and 1, got {held_out}", "Give a share such as 0.2")
        generator = torch.Generator().manual_seed(seed)
        held = torch.zeros(len(self), dtype=torch.bool)
        for label in range(self.num_classes):
            members = (self.y == label).nonzero().flatten()
            if len(members) >= 2:
                count = min(max(round(len(members) * held_out), 1), len(members) - 1)
                held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
        return self.take(~held), self.take(held)


def load_data(
    source: Any,
    *,
    num_classes: int | None,
    size: tuple[int, int] | None,
    channels: int | None,
    limit: int | None = None,
    seed: int = 0,
    least: int = 2,
) -> CleanData:
    """Read clean images with labels.

    Args:
        source: One of

            - an image folder with one folder per class. Names are sorted as torchvision's ``ImageFolder`` sorts them
              and numbered from 0; but where all names are whole numbers, the number is the label (``00014`` is 14);
            - an ``.npz`` file with ``x`` and ``y`` (also ``images``/``labels``, ``x_test``/``y_test``,
              ``data``/``targets``), NHWC, NCHW or NHW, uint8 in [0, 255] or float in [0, 1]; optional ``names``;
            - a Parquet file, a folder of them, or a folder written by ``save_to_disk`` of Hugging Face datasets, with
              the columns ``image`` or ``img``, and ``label``, ``labels`` or ``fine_label``;
            - ``(x, y)`` as arrays or tensors; a ``Dataset`` of (image, label); a ``DataLoader``, read once;
            - the name of a data set that ``bezoar data get`` has fetched, such as ``cifar-10``: its test images, or its
              training images as ``cifar-10:train``. A file or folder of that name comes first.
        num_classes: Labels of the model; None takes what the data says.
        size: Height and width of the result: images are resized (bilinear, antialiased) where they differ.
        channels: 1 or 3: images are converted where they differ.
        limit: Use at most this many images, as many of each class as there are; drawn before they are decoded.
        seed: Of that draw.
        least: Fewest images for each class, on average.

    Raises:
        DataError: The data cannot be used; the hint says what to do.
        MissingExtra: pyarrow is needed and missing.
    """
    _check_settings(size, channels, limit)
    wanted = Wanted(size, channels)
    opened = open_source(source, wanted)
    classes = _check_labels(opened, num_classes)
    index = choose(opened.labels, limit, seed)
    if len(index) < least * classes:
        what = f"chosen of {len(opened.labels)}" if len(index) < len(opened.labels) else "in the data"
        message = f"{len(index)} images {what} are too few for {classes} classes"
        raise DataError(message, f"Give at least {least * classes}, better {max(500, 10 * classes)}")
    x = Assembly(len(index), wanted).tensor(opened.pictures(index))
    if bool((x == x[:1]).all()):
        raise DataError(f"all {len(x)} images are identical", "Look at how the data was made")
    y = torch.from_numpy(opened.labels[index])
    names = opened.names if len(opened.names) == classes else tuple(map(str, range(classes)))
    facts = DataFacts(
        path=opened.path,
        format=opened.format,
        sha256=_sha256(x, y),
        count=len(x),
        per_class=tuple(torch.bincount(y, minlength=classes).tolist()),
        names=names,
    )
    return CleanData(x, y, facts, opened.notes)


def open_source(source: Any, wanted: Wanted) -> Source:
    """Open data without decoding it; see :func:`load_data`.

    Raises:
        DataError: It is of no kind that can be read.
        MissingExtra: pyarrow is needed and missing.
    """
    source = _named_or_path(source) if isinstance(source, str | os.PathLike) else source
    return _reader(source).open(source, wanted)


def train_and_test(data: Any) -> tuple[Any, Any]:
    """What :func:`load_data` reads as training and as test images; None for the second where it is not known."""
    if not isinstance(data, str | Path):
        return data, None
    path = Path(data)
    if not path.exists():
        found = named(str(data))
        if found is None or ":" in str(data):
            return data, None
        return NamedData(found.data_set, "train"), NamedData(found.data_set, "test")
    held = parts(path) if path.is_file() else set()
    if "train" not in held:
        return data, None
    return NpzPart(path, "train"), NpzPart(path, "test") if "test" in held else None


def choose(labels: Index, limit: int | None, seed: int) -> Index:
    """Numbers (ascending) of at most ``limit`` images, spread evenly over the classes; the same for the same seed."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels), dtype=np.int64)
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(labels))
    shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]
    ordered = labels[shuffled]
    starts = np.searchsorted(ordered, ordered, side="left")
    turn = np.arange(len(labels)) - starts  # the how-manieth of its class
    tie = random.random(len(labels))
    return np.sort(shuffled[np.lexsort((tie, turn))[:limit]]).astype(np.int64)


def _check_settings(size: tuple[int, int] | None, channels: int | None, limit: int | None) -> None:
    if size is not None and not all(1 <= s <= 8192 for s in size):
        raise SettingError(f"size must be between 1 and 8192, got {size}", "Give the input size of the model")
    if channels is not None and channels < 1:
        raise SettingError(f"channels must be at least 1, got {channels}", "Give 1 for grey or 3 for RGB")
    if limit is not None and limit < 1:
        raise SettingError(f"limit must be at least 1, got {limit}", "Give a number of images")


def _named_or_path(source: str | os.PathLike[str]) -> object:
    found = named(source) if isinstance(source, str) and not os.path.exists(source) else None
    return found or Path(source)


def _reader(source: object) -> Reader:
    if isinstance(source, Path):
        _check_path(source)
    for reader in READERS:
        if reader.claims(source):
            return reader
    if not isinstance(source, Path):
        hint = f"Give {_KINDS}, a pair (x, y), a Dataset or a DataLoader"
        raise DataError(f"data of type {type(source).__name__} cannot be read", hint)
    if starts_with(source, *_PICKLES):
        raise DataError(
            f"{shown(source)} is a pickle, which can run code: refused", "Save it with numpy.savez(path, x=x, y=y)"
        )
    if starts_with(source, _LFS):
        raise DataError(f"{shown(source)} is a Git LFS pointer, not the data", "Fetch the real file with git lfs pull")
    raise DataError(f"{shown(source)} is of no kind that can be read", f"Give {_KINDS}")


def _check_path(path: Path) -> None:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            with os.scandir(path) as entries:
                next(entries, None)
        elif stat.S_ISREG(mode):
            path.open("rb").close()
        else:
            raise DataError(f"{shown(path)} is neither a file nor a folder", f"Give {_KINDS}")
    except FileNotFoundError:
        near = nearest(str(path))
        hint = f"Did you mean the data set {near}?" if near else f"Give {_KINDS}"
        raise DataError(f"{shown(path)} does not exist", hint) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot open {shown(path)}: {reason}", "Check the path and its permissions") from None


def _check_labels(source: Source, num_classes: int | None) -> int:
    """Number of classes, once the labels are known to fit."""
    labels = source.labels
    if not len(labels):
        raise DataError(f"{source.path} holds no images", f"Give {_KINDS}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise DataError(f"y holds the label {low}", "Labels are 0, 1, 2, ...; remove images without a label")
    if source.named and num_classes is not None and len(source.names) != num_classes:
        message = f"the data has {len(source.names)} classes, the model has {num_classes}"
        raise DataError(message, "Give the data that this model was made for" + _numbered_hint(source))
    classes = num_classes or (len(source.names) if source.named else high + 1)
    if high >= classes:
        message = f"y holds the label {high}, but with {classes} classes the largest is {classes - 1}"
        one_based = low == 1 and high == classes
        raise DataError(
            message, "Labels seem to start at 1: subtract 1" if one_based else "Is it the data of this model?"
        )
    seen = np.unique(labels)
    if classes < 2:
        raise DataError("the data has one class only", "Give images of every class of the model")
    if len(seen) < classes:
        missing = np.setdiff1d(np.arange(min(classes, len(seen) + 5)), seen)[:5]
        message = f"{classes - len(seen)} of {classes} classes have no image, such as {', '.join(map(str, missing))}"
        raise DataError(message, "Give images of every class of the model, and check --num-classes")
    return classes


def _numbered_hint(source: Source) -> str:
    return ", or name each class folder by the number of its label" if source.format == "folder" else ""


def _sha256(x: Tensor, y: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(x.shape)).encode())
    digest.update(np.ascontiguousarray(x.numpy(), dtype="<f4").data)
    digest.update(np.ascontiguousarray(y.numpy(), dtype="<i8").data)
    return digest.hexdigest()
