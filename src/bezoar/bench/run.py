"""Runs a grid: what is done is not done again, what fails is noted, and several processes share the work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bezoar.bench.grid import Cell, Grid
from bezoar.bench.measure import Bench, failed
from bezoar.bench.store import Store
from bezoar.bench.victims import Ready, prepare, splits_of
from bezoar.core.cell import CellResult
from bezoar.core.errors import SettingError
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
    work.run({only: cells[only]} if only else cells, repeat=bool(only), again=again)
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

    def run(self, cells: dict[str, Cell], *, repeat: bool, again: bool) -> None:
        scans = self.store.folder / "scans"
        bench = Bench(self.grid, self.splits, scans, self.device, self.threads, self.versions)
        ready: tuple[str, Ready | Exception] = ("", KeyError())
        for number, (key, cell) in enumerate(cells.items()):
            if self.report is not None:
                note = f"{cell.purifier.name} on {cell.victim.name}, {cell.images} images"
                self.report("bench", number, len(cells), note)
            if self._done(key, repeat, again):
                continue
            with self.store.claim(key) as mine:
                if not mine or self._done(key, repeat, again):
                    continue  # another process is at it, or was quicker
                if ready[0] != cell.victim.name:
                    ready = (cell.victim.name, self._victim(bench, cell))
                found = ready[1]
                if isinstance(found, Exception):
                    self.store.write(failed(bench, cell, key, found))
                else:
                    self.store.write(bench.run(cell, key, found))
            if time.monotonic() - self.last > _EVERY:
                self.outcome()
        if self.report is not None:
            self.report("bench", len(cells), len(cells), "done")

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
