"""Means of a run: time, randomness, device, progress and checkpoints."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bezoar.core.errors import BudgetSpent
from bezoar.core.exec import Executor, Serial
from bezoar.core.results import RunFacts

#: Told of progress: name of the phase, steps done, steps in all, what is in the lead.
Report = Callable[[str, int, int, str], None]


def _silent(_phase: str, _done: int, _total: int, _note: str) -> None:
    return None


@dataclass
class Progress:
    """Tells the user where a run is, and keeps what a killed run needs to go on.

    Args:
        report: Told of each step.
        folder: Where checkpoints are kept; None keeps none.
        every: Seconds between checkpoints.
        seeds: Seeds in all, for the user's eye.
        name: Name of the phase.
    """

    report: Report = _silent
    folder: Path | None = None
    every: float = field(default_factory=lambda: float(os.environ.get("BEZOAR_CHECKPOINT_SECONDS", "5")))
    seeds: int = 1
    name: str = "scan"
    _done: int = 0
    _last: float = field(default_factory=time.monotonic)

    def step(self, seed: int, done: int, total: int, note: str) -> None:
        """One step of a seed is done."""
        del seed
        name = self.name if self.seeds == 1 else f"{self.name}, seed {min(self._done + 1, self.seeds)} of {self.seeds}"
        self.report(name, self._done * total + done, self.seeds * total, note)

    def seed_done(self) -> None:
        """A seed is finished."""
        self._done += 1

    def refining(self, done: int, total: int, note: str) -> None:
        """One step of the second look at a label is done."""
        self.report("refine", done, total, note)

    def training(self, done: int, total: int, loss: float) -> None:
        """One training step is done."""
        self.report("clean", done, total, f"loss {loss:.3f}")

    def save(self, seed: int, state: Callable[[], dict[str, Any]], now: bool = False) -> None:
        """Keep the state of a seed, at most every few seconds; ``state`` is only called when it is kept."""
        if self.folder is None or (not now and time.monotonic() - self._last < self.every):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        try:
            torch.save(state(), name)
            os.replace(name, self.folder / f"seed-{seed}.pt")
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        self._last = time.monotonic()

    def load(self, seed: int) -> dict[str, Any] | None:
        """The state that was kept, or None. A damaged checkpoint is as good as none."""
        path = None if self.folder is None else self.folder / f"seed-{seed}.pt"
        if path is None or not path.exists():
            return None
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception:  # the restricted unpickler raises anything on damaged bytes, IndexError and KeyError too
            return None
        return state if isinstance(state, dict) else None


@dataclass
class Run:
    """Time, randomness and device of one run.

    Args:
        seed: Root of all randomness.
        device: Where the model runs.
        budget: Seconds allowed, or None for no limit; counted from the creation of this object.
        progress: Tells the user, keeps checkpoints.
        reserve: Share of the budget that is kept for what comes after, in [0, 1).
        notes: What a method found out on the way and the report shows: plain values by name.
        warnings: What the user should know about how it went.
        executor: Where pieces of the work run that need nothing of each other.
        deadline: Of a run that was sent to another process, by the wall clock, which all machines share.
    """

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    budget: float | None = None
    progress: Progress = field(default_factory=Progress)
    reserve: float = 0.15
    started: float = field(default_factory=time.monotonic)
    image_gradients: int = 0
    budget_spent: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    executor: Executor = field(default_factory=Serial)
    deadline: float | None = None

    def elsewhere(self) -> Run:
        """A run for pieces in other processes: same seed, kind of device and end, and nobody to tell of progress."""
        deadline = None if self.budget is None else time.time() + self.spendable
        return Run(seed=self.seed, device=torch.device(self.device.type), deadline=deadline)

    def resumed(self) -> Run:
        """What :meth:`elsewhere` gave, where it has arrived."""
        budget = None if self.deadline is None else self.deadline - time.time()
        return Run(seed=self.seed, device=self.device, budget=budget, reserve=0.0)

    @property
    def left(self) -> float:
        """Seconds left; infinite without a budget."""
        return float("inf") if self.budget is None else self.budget - (time.monotonic() - self.started)

    @property
    def spendable(self) -> float:
        """Seconds left but for those kept for what comes after."""
        return self.left - self.reserve * (self.budget or 0.0)

    def check(self) -> None:
        """Raise :class:`BudgetSpent` when the time is over, but for the share of the budget that later work needs."""
        if self.spendable <= 0:
            self.budget_spent = True
            raise BudgetSpent(f"the budget of {self.budget:g} seconds is spent")

    def facts(self, seconds: Mapping[str, float], versions: Mapping[str, str]) -> RunFacts:
        """What differs from run to run, for a report.

        Args:
            seconds: Wall time of each phase.
            versions: Of the software.
        """
        return RunFacts(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=dict(seconds),
            image_gradients=self.image_gradients,
            versions=dict(versions),
            device=str(self.device),
            threads=torch.get_num_threads(),
            budget=self.budget,
            budget_spent=self.budget_spent,
        )

    def generator(self, *key: object) -> torch.Generator:
        """A CPU generator that depends on the seed and the key alone, never on the order of calls."""
        return generator(self.seed, *key)


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by the hash of ``key``."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
