"""Parquet files, and Hugging Face data sets on disk, read with pyarrow alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bezoar.core.errors import DataError
from bezoar.io.data_readers._base import (
    COUNT_CAP,
    MEMORY_CAP,
    Broken,
    Index,
    Picture,
    Source,
    Wanted,
    inside,
    listed,
    reading,
    shown,
    starts_with,
)
from bezoar.io.data_readers._pixels import decode
from bezoar.io.extras import require

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "y", "class")
_BATCH = 64
_JSON_CAP = 64 << 20
_CLASS_CAP = 1_000_000
_SPLIT = re.compile(r"(train|test|validation|valid|val)(?=[-_.])", re.IGNORECASE)


class _Shard(Protocol):
    """One file of rows."""

    schema: Any
    rows: int

    def column(self, name: str, rows: Index | None) -> Iterator[tuple[int, Any]]:
        """Pieces of a column with the number of their first row; pieces without any of ``rows`` may be left out."""
        ...


class ParquetReader:
    """A Parquet file, or a folder of them."""

    def claims(self, source: object) -> bool:
        """Whether it is a Parquet file, or a folder that holds some at the top or in ``data/``."""
        return starts_with(source, b"PAR1") or bool(isinstance(source, Path) and _parquet_files(source))

    def open(self, source: Path, wanted: Wanted) -> Source:  # noqa: ARG002 - part of the interface
        """Read the labels; images are decoded later."""
        _pyarrow()
        folder = source if source.is_dir() else source.parent
        files = [source] if source.is_file() else _parquet_files(source)
        splits = {m.group(1).lower() for f in files if (m := _SPLIT.match(f.name))}
        if len(splits) > 1:
            hint = "Give one Parquet file, or move those of one split to a folder of their own"
            raise DataError(f"{shown(source)} holds several splits: {', '.join(sorted(splits))}", hint)
        if any(inside(folder, str(f.relative_to(folder))) is None for f in files):
            raise DataError(f"{shown(source)} holds links that lead out of the folder", "Give the real files")
        with reading(source, "Parquet"):
            return _source(source, "parquet", [_ParquetShard(f) for f in files], folder, {})


class ArrowReader:
    """A folder written by ``save_to_disk`` of Hugging Face datasets."""

    def claims(self, source: object) -> bool:
        """Whether it has the files that ``save_to_disk`` writes."""
        return isinstance(source, Path) and any((source / n).is_file() for n in ("state.json", "dataset_dict.json"))

    def open(self, source: Path, wanted: Wanted) -> Source:  # noqa: ARG002 - part of the interface
        """Read the labels; images are decoded later."""
        _pyarrow()
        if not (source / "state.json").is_file():
            splits = sorted(p.parent for p in source.glob("*/state.json"))
            best = next((s for s in splits if not s.name.startswith("train")), splits[0] if splits else None)
            hint = f"Give one of them, such as {shown(best)}" if best else "It holds none: save it again"
            raise DataError(f"{shown(source)} is a dictionary of data sets", hint)
        with reading(source, "a Hugging Face data set"):
            state = _json(source / "state.json")
            if state.get("_indices_data_files"):
                raise DataError(f"{shown(source)} has a separate index", "Save it after flatten_indices()")
            names = [str(f["filename"]) for f in state["_data_files"]]
            files = [inside(source, n) for n in names]
            missing = [shown(n) for n, f in zip(names, files, strict=True) if f is None]
            if missing:
                raise DataError(
                    f"files of {shown(source)} that are not in the folder: {listed(missing)}", "Copy all of it"
                )
            shards = [_ArrowShard(f) for f in files if f is not None]
            info = _json(source / "dataset_info.json") if (source / "dataset_info.json").is_file() else {}
            return _source(source, "huggingface-dataset", shards, source, info)


@dataclass(frozen=True)
class _ParquetShard:
    path: Path

    @property
    def file(self) -> Any:
        import pyarrow.parquet

        limits = {"thrift_string_size_limit": 64 << 20, "thrift_container_size_limit": 1 << 20}
        return pyarrow.parquet.ParquetFile(self.path, **limits)

    @property
    def schema(self) -> Any:
        return self.file.schema_arrow

    @property
    def rows(self) -> int:
        return int(self.file.metadata.num_rows)

    def column(self, name: str, rows: Index | None) -> Iterator[tuple[int, Any]]:
        file, start = self.file, 0
        for group in range(file.metadata.num_row_groups):
            facts = file.metadata.row_group(group)
            if rows is None or np.any((rows >= start) & (rows < start + facts.num_rows)):
                if facts.total_byte_size > MEMORY_CAP:
                    raise DataError(
                        f"{shown(self.path)} claims a row group of {facts.total_byte_size:,} bytes", "Rewrite it"
                    )
                at = start
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[name]):
                    yield at, batch.column(0)
                    at += batch.num_rows
            start += facts.num_rows


class _ArrowShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.schema = next(self._batches(), None)
        if self.schema is None:
            raise DataError(f"{shown(path)} has no rows", "Give a data set with images")
        self.schema = self.schema.schema
        self.rows = sum(batch.num_rows for batch in self._batches())

    def _batches(self) -> Iterator[Any]:
        import pyarrow

        with pyarrow.memory_map(str(self.path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
            yield from stream

    def column(self, name: str, rows: Index | None) -> Iterator[tuple[int, Any]]:
        start = 0
        for batch in self._batches():
            if rows is None or np.any((rows >= start) & (rows < start + batch.num_rows)):
                column = batch.column(batch.schema.get_field_index(name))
                column.validate(full=True)  # offsets of a hostile file may point anywhere
                yield start, column
            start += batch.num_rows


def _source(path: Path, kind: str, shards: list[Any], folder: Path, info: dict[str, Any]) -> Source:
    total = sum(s.rows for s in shards)
    if not 0 < total <= COUNT_CAP:
        raise DataError(f"{shown(path)} claims {total:,} rows", f"Give between 1 and {COUNT_CAP:,} images")
    schema = shards[0].schema
    image, label = _pick(schema, IMAGE_COLUMNS, "images", path), _pick(schema, LABEL_COLUMNS, "labels", path)
    names = _class_names(schema, label, info)
    labels, found = _labels([piece for s in shards for _, piece in s.column(label, None)], label, path)
    names = names or found
    return Source(
        path=shown(path),
        format=kind,
        labels=labels,
        names=names,
        pictures=partial(_pictures, shards, image, folder),
        named=bool(names),
    )


def _pick(schema: Any, usual: tuple[str, ...], what: str, path: Path) -> str:
    found = next((n for n in usual if n in schema.names), None)
    if found is None:
        have = listed([shown(n) for n in schema.names], 8)
        raise DataError(f"{shown(path)} has no column of {what}: it has {have}", f"Name it {usual[0]}")
    return found


def _labels(pieces: list[Any], column: str, path: Path) -> tuple[Index, tuple[str, ...]]:
    """Labels as numbers; text becomes the place among the sorted texts."""
    import pyarrow

    whole = pyarrow.chunked_array(pieces)
    if whole.null_count:
        raise DataError(f"{whole.null_count} rows of {shown(path)} have no label", "Remove them, or give another split")
    if pyarrow.types.is_dictionary(whole.type):
        whole = whole.cast(whole.type.value_type)
    if pyarrow.types.is_integer(whole.type) or pyarrow.types.is_boolean(whole.type):
        return whole.cast(pyarrow.int64()).to_numpy().astype(np.int64), ()
    if not (pyarrow.types.is_string(whole.type) or pyarrow.types.is_large_string(whole.type)):
        raise DataError(
            f"the column {column} of {shown(path)} has the type {whole.type}", "Labels are whole numbers or text"
        )
    names, labels = np.unique(np.array(whole.to_pylist(), dtype=object), return_inverse=True)
    return labels.astype(np.int64), tuple(shown(n) for n in names)


def _class_names(schema: Any, label: str, info: dict[str, Any]) -> tuple[str, ...]:
    """Names of a ClassLabel, from the schema's metadata or from dataset_info.json; empty where there are none."""
    raw = (schema.metadata or {}).get(b"huggingface", b"{}")
    sources = (json.loads(raw).get("info", {}), info)
    for features in (s.get("features") or {} for s in sources):
        kind = features.get(label, {})
        names = kind.get("names") if isinstance(kind, dict) else None
        if isinstance(names, list) and 0 < len(names) <= _CLASS_CAP:
            return tuple(shown(str(n)) for n in names)
    return ()


def _pictures(shards: list[Any], image: str, folder: Path, index: Index) -> Iterator[Picture | Broken]:
    first = 0
    for shard in shards:
        rows = index[(index >= first) & (index < first + shard.rows)] - first
        with reading(folder, "Parquet or Arrow"):
            for start, piece in shard.column(image, rows):
                for row in rows[(rows >= start) & (rows < start + len(piece))]:
                    yield _decoded(piece[int(row - start)].as_py(), f"row {first + row}", folder)
        first += shard.rows


def _decoded(value: Any, where: str, folder: Path) -> Picture | Broken:
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
        if content is None and isinstance(path, str):
            target = inside(folder, path)
            return (
                Broken(where, f"{shown(path)} is not in the folder") if target is None else decode(str(target), where)
            )
        value = content
    return decode(value, where) if isinstance(value, bytes) else Broken(where, "has no image bytes")


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _JSON_CAP:
        raise DataError(f"{shown(path)} has {path.stat().st_size:,} bytes", "It should be a small JSON file")
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise DataError(f"{shown(path)} does not hold a JSON object", "Save the data set again")
    return value


def _parquet_files(source: Path) -> list[Path]:
    if not source.is_dir():
        return []
    return sorted(p for g in ("*.parquet", "data/*.parquet") for p in source.glob(g) if not p.name.startswith("."))


def _pyarrow() -> None:
    for module in ("pyarrow", "pyarrow.ipc", "pyarrow.parquet"):
        require(module, "data")
