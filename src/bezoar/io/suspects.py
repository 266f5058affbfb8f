"""Lists of suspect training examples: written by a filter, read back to unlearn them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bezoar.core.errors import DataError
from bezoar.io.data import open_source, train_and_test
from bezoar.io.data_readers._base import Wanted, shown
from bezoar.io.data_readers._pixels import Assembly

COLUMNS = ("position", "file", "label", "score")
RANKED = ("position", "file", "label", "rank", "loss")
_SIZE_CAP = 1 << 30  # bytes of a list


def suspects_csv(rows: Iterable[tuple[int, str, int, float]]) -> str:
    """A list as text: position in the data as it came, file, label and score; the most suspicious first."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((position, _harmless(file), label, f"{score:.6g}") for position, file, label, score in rows)
    return out.getvalue()


def ranked_csv(rows: Iterable[tuple[int, str, int, int, float]]) -> str:
    """The same of a training: position, file, label, rank from 1, and the loss by which it was ranked."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(RANKED)
    writer.writerows((at, _harmless(file), label, rank, f"{loss:.6g}") for at, file, label, rank, loss in rows)
    return out.getvalue()


def _harmless(name: str) -> str:
    # A spreadsheet takes a cell that begins like this for a formula.
    return f"'{name}" if name[:1] in ("=", "+", "-", "@") else name


def read_suspects(
    listed: str | Path, data: Any, *, size: tuple[int, int], channels: int, num_classes: int, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """``(S, C, H, W)`` images in [0, 1] and ``(S,)`` labels of the examples on a list, in its order.

    Args:
        listed: What :func:`suspects_csv` wrote; only position and label are looked at.
        data: The data that it is about, as for :func:`bezoar.io.untrusted.open_untrusted`.
        size, channels: What the images are brought to.
        num_classes: Labels of the model.
        most: Read only so many.

    Raises:
        DataError: The list cannot be read, or is of other data.
    """
    path = Path(listed)
    positions, labels = _read(path, most)
    wanted = Wanted(size, channels)
    opened = open_source(train_and_test(data)[0], wanted)
    hint = "Give the same --suspect-data that bezoar filter data was given"
    if positions.max() >= len(opened.labels):
        raise DataError(f"{shown(path)} names example {positions.max()} of {len(opened.labels)}", hint)
    if (opened.labels[positions] != labels).any() or labels.max() >= num_classes or labels.min() < 0:
        raise DataError(f"{shown(path)} and the data do not agree on the labels", hint)
    ascending, place = np.unique(positions, return_inverse=True)
    x = Assembly(len(ascending), wanted).tensor(opened.pictures(ascending))
    return x[torch.from_numpy(place)], torch.from_numpy(labels)


def _read(path: Path, most: int | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    hint = "Give the suspects.csv of bezoar filter data, or a list with the columns position and label"
    positions: list[int] = []
    labels: list[int] = []
    try:
        if path.stat().st_size > _SIZE_CAP:
            raise ValueError("it is larger than 1 GiB")
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if most is not None and len(positions) >= most:
                    break
                positions.append(int(row["position"]))
                labels.append(int(row["label"]))
        found = np.array([positions, labels], dtype=np.int64)
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        what = f"no column {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"cannot read {shown(path)} as a list of suspects: {what}", hint) from None
    if not positions:
        raise DataError(f"{shown(path)} lists no suspects", "The filter found none: there is nothing to unlearn")
    if found[0].min() < 0:
        raise DataError(f"{shown(path)} holds a negative position", hint)
    return found[0], found[1]
