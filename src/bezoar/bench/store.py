"""Cells on disk: one JSON file each, which is the truth, and an SQLite index made from them for questions."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from bezoar.core.cell import CellResult
from bezoar.core.plain import built, plain
from bezoar.core.results import write_atomic


class Store:
    """The folder of a grid: ``cells/KEY.json``, ``victims/``, ``scans/``, ``results.sqlite``.

    Args:
        folder: Made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells = folder / "cells"

    def read(self, key: str) -> CellResult | None:
        """A finished cell, or None; a damaged file is as good as none."""
        try:
            row: CellResult = built(CellResult, json.loads((self.cells / f"{key}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return row

    def write(self, row: CellResult) -> None:
        """Keep a cell; a reader sees all of it or nothing."""
        write_atomic(self.cells / f"{row.key}.json", json.dumps(plain(row), indent=1) + "\n")

    @contextmanager
    def claim(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Keep other processes off a piece of work; the claim ends with the block or the process.

        Args:
            name: Of the work.
            wait: Wait until it is free instead of giving False.
        """
        folder = self.folder / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def index(self, rows: list[CellResult]) -> Path:
        """Write ``results.sqlite`` anew: one table ``cells``, settings and lists as JSON text."""
        path = self.folder / "results.sqlite"
        part = self.folder / f".results.{os.getpid()}.part"
        part.unlink(missing_ok=True)
        names = [f.name for f in fields(CellResult)]
        try:
            with closing(sqlite3.connect(part)) as base, base:
                base.execute(f"CREATE TABLE cells ({', '.join(names)}, PRIMARY KEY (key))")
                marks = ", ".join("?" * len(names))
                base.executemany(f"INSERT INTO cells VALUES ({marks})", [_flat(row, names) for row in rows])
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return path


def _flat(row: CellResult, names: list[str]) -> list[Any]:
    values = [getattr(row, name) for name in names]
    return [json.dumps(plain(v)) if isinstance(v, dict | tuple) else v for v in values]
