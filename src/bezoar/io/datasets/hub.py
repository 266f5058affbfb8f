"""Data sets on the Hugging Face hub, as Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bezoar.core.errors import BezoarError, DataError
from bezoar.io.datasets._source import Arrays, Tell, digest, is_disk_full
from bezoar.io.extras import one_line, require

_OFFLINE = {"ConnectionError", "ConnectError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "TimeoutException"}


@dataclass(frozen=True)
class HubParquet:
    """A data set of the hub, fetched with ``huggingface_hub`` (extra ``hf``) and read with pyarrow (extra ``data``).

    The files are not pinned: the arrays that come out of them are, by the data set's SHA-256.

    Args:
        repo: Owner and name.
        folder: Folder inside, with Parquet files whose names start with ``train`` and ``test``.
        megabytes: Size of these files.
        blocks: SHA-256 (of images and labels) of equal parts of the training set in their official order: the hub may
            hold them in another. Empty where the order is the same.
    """

    repo: str
    folder: str
    megabytes: int
    blocks: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Kind and name."""
        return f"Hugging Face hub, {self.repo}"

    def fetch(self, folder: Path, tell: Tell) -> Arrays:
        """Fetch and convert.

        Raises:
            MissingExtra: huggingface_hub or pyarrow is missing.
            DataError: The hub cannot be reached, or its files are of another kind.
        """
        hub = require("huggingface_hub", "hf")
        require("pyarrow", "data")
        try:
            hub.snapshot_download(
                repo_id=self.repo, repo_type="dataset", allow_patterns=[f"{self.folder}/*.parquet"], local_dir=folder
            )
        except Exception as error:  # the client lets those of its own HTTP library through
            if is_disk_full(error):
                raise
            raise _unreachable(error) from None
        tell("converting")
        out: Arrays = {}
        for part in ("train", "test"):
            out[f"{part}_x"], out[f"{part}_y"] = _part(folder / self.folder, part, self.repo)
        out["train_x"], out["train_y"] = _in_order(out["train_x"], out["train_y"], self.blocks)
        return out


def _unreachable(error: Exception) -> BezoarError:
    if _OFFLINE & {kind.__name__ for kind in type(error).__mro__}:
        return DataError(f"no network: the hub cannot be reached ({one_line(error)})")
    return DataError(f"huggingface_hub failed: {type(error).__name__}: {one_line(error)}")


def _part(folder: Path, part: str, repo: str) -> tuple[NDArray[Any], NDArray[Any]]:
    from bezoar.io.data_readers._base import Picture, Wanted
    from bezoar.io.data_readers.arrow import ParquetReader

    files = sorted(folder.glob(f"{part}*.parquet"))
    if not files:
        raise DataError(f"{repo} holds no Parquet files of the part {part} in {folder.name}/")
    images, labels = [], []
    for file in files:
        source = ParquetReader().open(file, Wanted())
        rows = np.arange(len(source.labels), dtype=np.int64)
        pictures = [p.pixels for p in source.pictures(rows) if isinstance(p, Picture)]
        if len(pictures) != len(rows) or len({p.shape for p in pictures}) != 1:
            raise DataError(f"{file.name} of {repo} holds broken images, or images of several sizes")
        images.append(np.stack(pictures))
        labels.append(source.labels)
    return np.concatenate(images), np.concatenate(labels)


def _in_order(x: NDArray[Any], y: NDArray[Any], blocks: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The parts in the order of ``blocks``; as they are where one is not among them, which the final check refuses."""
    if not blocks or len(x) % len(blocks):
        return x, y
    parts = zip(np.split(x, len(blocks)), np.split(y, len(blocks)), strict=True)
    known = {digest(*part): part for part in parts}
    if set(known) != set(blocks):
        return x, y
    return np.concatenate([known[b][0] for b in blocks]), np.concatenate([known[b][1] for b in blocks])
