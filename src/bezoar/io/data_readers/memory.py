"""Data given in Python: a pair of arrays, a ``Dataset``, a ``DataLoader``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from bezoar.core.errors import BezoarError, DataError
from bezoar.io.data_readers._base import COUNT_CAP, MEMORY_CAP, Broken, Index, Picture, Source, Wanted
from bezoar.io.data_readers._pixels import channels_last, from_pil, numeric

_Pictures = Callable[[Index], Iterator[Picture | Broken]]


class PairReader:
    """``(x, y)``: arrays or tensors."""

    def claims(self, source: object) -> bool:
        """Whether it is a pair."""
        return isinstance(source, tuple | list) and len(source) == 2

    def open(self, source: tuple[Any, Any], wanted: Wanted) -> Source:
        """Look at both; nothing is copied yet."""
        x, y = as_array(source[0], "x"), as_array(source[1], "y")
        if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
            found = f"{len(x) if x.ndim else 'a single number'} and {len(y) if y.ndim else 'a single number'}"
            raise DataError(f"x and y have different lengths: {found}", "Give one label per image")
        pixels = channels_last(numeric(x), wanted, torch_order=isinstance(source[0], torch.Tensor))
        return Source(path="(x, y)", format="arrays", labels=as_labels(y), names=(), pictures=array_pictures(pixels))


class LoaderReader:
    """A ``DataLoader`` or an ``IterableDataset``: read once, from its start to its end."""

    def claims(self, source: object) -> bool:
        """Whether it gives batches or items, but not by number."""
        return isinstance(source, DataLoader | IterableDataset)

    def open(self, source: Any, wanted: Wanted) -> Source:
        """Read it all: without numbers, images cannot be chosen before they are read."""
        batched = isinstance(source, DataLoader)
        items = _items(source, wanted) if batched else source
        return _read_all(items, type(source).__name__, wanted)


class DatasetReader:
    """A ``Dataset`` with numbered items, or anything with a length and ``[i]`` that gives ``(image, label)``."""

    def claims(self, source: object) -> bool:
        """Whether it has numbered items."""
        if isinstance(source, np.ndarray | torch.Tensor | dict | str | bytes | tuple | list):
            return False
        return isinstance(source, Dataset) or all(hasattr(source, name) for name in ("__len__", "__getitem__"))

    def open(self, source: Any, wanted: Wanted) -> Source:
        """Take the labels from ``targets`` or ``labels`` where there are such, else read all items once."""
        name = type(source).__name__
        labels = _known_labels(source)
        if labels is None:
            return _read_all((source[i] for i in range(len(source))), name, wanted)

        def pictures(index: Index) -> Iterator[Picture | Broken]:
            for i in index:
                yield _picture(_split(source[int(i)], f"item {i}")[0], f"item {i}", wanted)

        classes = getattr(source, "classes", None)
        names = tuple(map(str, classes)) if isinstance(classes, list | tuple) else ()
        return Source(path=name, format="Dataset", labels=labels, names=names, pictures=_guarded(pictures, name))


def as_array(values: Any, what: str) -> NDArray[Any]:
    """Arrays, tensors and lists of numbers as one array.

    Raises:
        DataError: Ragged, or not numbers.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        array: NDArray[Any] = (values.float() if values.dtype == torch.bfloat16 else values).resolve_conj().numpy()
        return array
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise DataError(f"{what} cannot be made into one array: {error}", "All images need the same size") from None
    if array.dtype.kind not in "buif":
        raise DataError(f"{what} has the type {array.dtype}, not numbers", "Give an array of numbers")
    return array


def as_labels(y: NDArray[Any]) -> Index:
    """Labels as ``(N,)`` int64; whole floats and a last axis of length 1 are accepted.

    Raises:
        DataError: Another shape, or labels that are not whole numbers.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        hint = "It looks one-hot: give y.argmax(1)" if y.ndim == 2 else "Give one whole number per image"
        raise DataError(f"y has the shape {tuple(y.shape)}, not (N,)", hint)
    if y.dtype.kind == "f" and not (np.isfinite(y).all() and (y == np.round(y)).all()):
        raise DataError("y holds labels that are not whole numbers", "Give labels 0, 1, 2, ...")
    if y.dtype.kind not in "buif" or (y.size and abs(float(y.max())) + abs(float(y.min())) > 2**62):
        raise DataError(f"y of type {y.dtype} does not hold labels", "Give labels 0, 1, 2, ...")
    return y.astype(np.int64)


def array_pictures(pixels: NDArray[Any]) -> _Pictures:
    """Pictures out of one array ``(N, H, W, C)``."""

    def pictures(index: Index) -> Iterator[Picture | Broken]:
        for i in index:
            yield Picture(pixels[i], f"image {i}")

    return pictures


def _known_labels(source: Any) -> Index | None:
    """Labels without decoding; None where there are none, or where the first item does not agree with them."""
    candidates = [getattr(source, name, None) for name in ("targets", "labels")]
    if isinstance(source, TensorDataset) and len(source.tensors) == 2:
        candidates = [source.tensors[1]]
    for values in candidates:
        if not isinstance(values, list | tuple | np.ndarray | torch.Tensor) or len(values) != len(source):
            continue
        try:
            labels = as_labels(as_array(values, "targets"))
            if (
                len(labels)
                and int(_split(source[0], "item 0")[1]) == labels[0]
                and not getattr(source, "target_transform", None)
            ):
                return labels
        except (BezoarError, TypeError, ValueError):
            continue
    return None


def _read_all(items: Iterable[Any], name: str, wanted: Wanted) -> Source:
    kept: list[Picture] = []
    labels: list[Any] = []
    taken = 0
    try:
        for i, item in enumerate(items):
            image, label = _split(item, f"item {i}")
            picture = _picture(image, f"item {i}", wanted)
            kept.append(picture)
            labels.append(label.item() if isinstance(label, torch.Tensor | np.generic | np.ndarray) else label)
            taken += picture.pixels.nbytes
            if taken > MEMORY_CAP or i >= COUNT_CAP:
                hint = (
                    "Give a Dataset with numbered items and .targets, so that images can be chosen before they are read"
                )
                raise DataError(f"{name} holds more than {MEMORY_CAP / 2**30:g} GiB of images", hint)
    except BezoarError:
        raise
    except Exception as error:  # the user's own code
        raise _failed(name, len(kept), error) from error

    def pictures(index: Index) -> Iterator[Picture | Broken]:
        return (kept[i] for i in index)

    found = as_labels(as_array(labels, "labels")) if labels else np.zeros(0, dtype=np.int64)
    return Source(
        path=name, format="DataLoader" if "Loader" in name else "Dataset", labels=found, names=(), pictures=pictures
    )


def _guarded(pictures: _Pictures, name: str) -> _Pictures:
    def guarded(index: Index) -> Iterator[Picture | Broken]:
        done = 0
        try:
            for picture in pictures(index):
                yield picture
                done += 1
        except BezoarError:
            raise
        except Exception as error:  # the user's own code
            raise _failed(name, int(index[done]), error) from error

    return guarded


def _failed(name: str, item: int, error: Exception) -> DataError:
    return DataError(f"item {item} of {name} raised {type(error).__name__}: {error}", "Items must be (image, label)")


def _items(loader: DataLoader[Any], wanted: Wanted) -> Iterator[tuple[Any, Any]]:
    for batch in loader:
        images, labels = _split(batch, "a batch")
        x = as_array(images, "a batch")
        pixels = channels_last(numeric(x), wanted, torch_order=True)
        if len(pixels) != len(labels):
            raise DataError(f"a batch has {len(pixels)} images and {len(labels)} labels", "Give one label per image")
        for image, label in zip(pixels, labels, strict=True):
            yield Picture(image, "an image of a batch"), label


def _split(item: Any, where: str) -> tuple[Any, Any]:
    if isinstance(item, dict):
        image = next((item[k] for k in ("image", "img", "pixel_values", "x") if k in item), None)
        label = next((item[k] for k in ("label", "labels", "fine_label", "y") if k in item), None)
        if image is not None and label is not None:
            return image, label
    elif isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    raise DataError(f"{where} is not (image, label) but {type(item).__name__}", "Give a Dataset of (image, label)")


def _picture(image: Any, where: str, wanted: Wanted) -> Picture:
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        return Picture(from_pil(image), where)
    array = as_array(image, where)
    if array.ndim not in (2, 3):
        raise DataError(
            f"{where} has the shape {tuple(array.shape)}, not that of one image", "Items must be (image, label)"
        )
    return Picture(channels_last(numeric(array[None]), wanted, torch_order=isinstance(image, torch.Tensor))[0], where)
