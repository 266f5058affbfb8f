"""Runs a grid: what is done is not done again, what fails is noted, and several processes share the work."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bezoar.bench.grid import Cell, Grid
from bezoar.bench.measure import Bench, failed
from bezoar.bench.store import Store
from bezoar.bench.victims import Ready, prepare, splits_of
from bezoar.core.cell import CellResult
from bezoar.core.errors import SettingError
from bezoar.core.exec import Executor, executor
from bezoar.core.results import write_atomic
from bezoar.core.run import Progress, Report, Run
from bezoar.evaluation.splits import Splits
from bezoar.report.board import render_board
from bezoar.session import device_named

_EVERY = 60.0  # seconds between two leaderboards


@dataclass(frozen=True)
class Outcome:
    """What a run of a grid left behind: all cells that are there, and the leaderboard."""

    results: tuple[CellResult, ...]
    missing: int
    page: Path

    def count(self, status: str) -> int:
        """Cells of a status."""
        return sum(one.status == status for one in self.results)


def run_grid(
    grid: Grid,
    folder: Path,
    versions: Mapping[str, str],
    *,
    only: str = "",
    again: bool = False,
    device: str = "auto",
    threads: int = 0,
    ray: str = "",
    report: Report | None = None,
) -> Outcome:
    """Measure all cells that are missing and write the leaderboard.

    Args:
        grid: What to measure.
        folder: Where results are kept; several processes may work in the same one.
        versions: Of the software; they are part of each cell's key.
        only: Key of one cell, which is then measured again whatever is there.
        again: Also repeat cells that failed.
        device, threads: As for a scan.
        ray: Spread the cells over a Ray cluster, see :func:`bezoar.core.exec.executor`; all its nodes must share the
            folder.
        report: Told of progress.

    Raises:
        SettingError: There is no cell of this key.
        BezoarError: The data cannot be read.
    """
    splits = splits_of(grid)
    hashes = (splits.train_facts.sha256, splits.test_facts.sha256)
    cells = {grid.key(cell, versions, hashes): cell for cell in grid.cells()}
    if only and only not in cells:
        raise SettingError(f"no cell {only!r} in this grid", "Keys stand in the leaderboard and in cells/")
    work = _Work(grid, splits, cells, Store(folder), dict(versions), device, threads, report)
    wanted = {only: cells[only]} if only else cells
    with executor(ray, cpus=threads or 1, gpus=float(device_named(device).type == "cuda")) as pool:
        if pool.away:
            work.spread(wanted, pool, repeat=bool(only), again=again)
        else:
            work.run(wanted, repeat=bool(only), again=again)
    return work.outcome()


@dataclass
class _Work:
    grid: Grid
    splits: Splits
    cells: dict[str, Cell]
    store: Store
    versions: dict[str, str]
    device: str
    threads: int
    report: Report | None
    last: float = 0.0
    ready: tuple[str, Ready | Exception] = ("", KeyError())

    @cached_property
    def bench(self) -> Bench:
        """What all cells share."""
        return Bench(self.grid, self.splits, self.store.folder / "scans", self.device, self.threads, self.versions)

    def spread(self, cells: dict[str, Cell], pool: Executor, *, repeat: bool, again: bool) -> None:
        """Cells as pieces; each writes its result itself, as side by side processes do."""
        left = list(self._left(cells, repeat, again))
        device = device_named(self.device).type
        silent = dataclasses.replace(self, report=None, last=math.inf, device=device, threads=self.threads or 1)
        with closing(pool.map(_measure, (silent, repeat, again), left)) as results:
            for done, _ in enumerate(results, len(cells) - len(left) + 1):
                if self.report is not None:
                    self.report("bench", done, len(cells), "")
                if time.monotonic() - self.last > _EVERY:
                    self.outcome()

    def run(self, cells: dict[str, Cell], *, repeat: bool, again: bool) -> None:
        left = self._left(cells, repeat, again)  # those that are there already do not count in the ETA
        for number, (key, cell) in enumerate(left.items(), len(cells) - len(left)):
            if self.report is not None:
                note = f"{cell.purifier.name} on {cell.victim.name}, {cell.images} images"
                self.report("bench", number, len(cells), note)
            with self.store.claim(key) as mine:
                if not mine or self._done(key, repeat, again):
                    continue  # another process is at it, or was quicker
                if self.ready[0] != cell.victim.name:
                    self.ready = (cell.victim.name, self._victim(self.bench, cell))
                found = self.ready[1]
                if isinstance(found, Exception):
                    self.store.write(failed(self.bench, cell, key, found))
                else:
                    self.store.write(self.bench.run(cell, key, found))
            if time.monotonic() - self.last > _EVERY:
                self.outcome()
        if self.report is not None:
            self.report("bench", len(cells), len(cells), "done")

    def _left(self, cells: dict[str, Cell], repeat: bool, again: bool) -> dict[str, Cell]:
        return {key: cell for key, cell in cells.items() if not self._done(key, repeat, again)}

    def _done(self, key: str, repeat: bool, again: bool) -> bool:
        found = self.store.read(key)
        return found is not None and not repeat and not (again and found.status == "failed")

    def _victim(self, bench: Bench, cell: Cell) -> Ready | Exception:
        progress = Progress() if self.report is None else Progress(report=self.report)
        run = Run(seed=cell.victim.seed, device=device_named(self.device), progress=progress)
        try:
            with self.store.claim(f"victim-{cell.victim.name}", wait=True):
                return prepare(cell.victim, bench.splits, self.store.folder / "victims", run, self.versions)
        except Exception as error:  # its cells are noted as failed, the others go on
            return error

    def outcome(self) -> Outcome:
        """Write index and leaderboard of what is there."""
        self.last = time.monotonic()
        found = [self.store.read(key) for key in self.cells]
        results = tuple(one for one in found if one is not None)
        self.store.index(list(results))
        page = self.store.folder / "leaderboard.html"
        write_atomic(page, render_board(results, missing=len(self.cells) - len(results)))
        return Outcome(results, len(self.cells) - len(results), page)


def _measure(shared: tuple[_Work, bool, bool], key: str) -> None:
    """One cell, in a worker; what all cells of a victim share stays with the worker."""
    work, repeat, again = shared
    work.run({key: work.cells[key]}, repeat=repeat, again=again)
