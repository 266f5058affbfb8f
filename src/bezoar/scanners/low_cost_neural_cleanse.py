"""The low-cost scan of Neural Cleanse for models with many labels (Wang et al., IEEE S&P 2019, section V-D)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bezoar.core.errors import BudgetSpent, SettingError
from bezoar.core.evidence import LabelScan, Scan, SeedScan, Status
from bezoar.core.method import Clean, Scanner
from bezoar.core.run import Run
from bezoar.core.surgery import require_gradient, require_independent_rows
from bezoar.ops.cost import CostController
from bezoar.ops.lock_step import Found, Iteration, LockStep
from bezoar.scanners._together import held_out, pack, unpack

#: First weight of the mask norm in the short look at all labels, as in the authors' code.
_FIRST_COST = 1e-3


@dataclass(frozen=True, kw_only=True)
class LowCostNeuralCleanse(Scanner):
    """Look at all labels briefly, and search only the most promising ones and a random sample to the end.

    All labels are inverted together, an iteration (31 batches of 32) at a time, with a weight on the mask norm from the
    start. After each iteration the labels are ranked by their mask norm. Once the foremost 100 of an iteration share
    more than 50 with those of the one before, 10 times in a row, the look ends. Those 100 and 100 random others are
    then searched by the full procedure; median and MAD are those of the random others. A model with no more labels than
    that is searched in full, without the first look.

    The paper does not say whether the full search goes on from the short one. Here it starts anew, at weight 0 as the
    full procedure does, so that the sizes are those that a full run of all labels would give.

    Args:
        seeds: Seeds to scan with; the paper takes one.
        labels: Labels that alone can be the target; empty for all. The random others are of all labels.
        loss: ``ce`` (the paper) or ``linear`` (what the authors' code computes).
        reach: Success rate that counts as a success, in (0, 1].
        candidates: Foremost labels that are followed to the end, at least 1.
        reference_labels: Random other labels that are followed to the end for median and MAD, at least 4.
        overlap: Share of the foremost labels that must be the same in two iterations, and somewhat more, in [0, 1).
        stable: Iterations in a row with so many the same, at least 1.
        iterations: Most iterations of a search, at least 1.
        batches: Updates of an iteration, at least 1.
        batch: Images of an update, at least 1.
        lr: Step size of Adam, above 0.
        chunk: Most images in one forward pass, for memory; 0 chooses by image size.

    References:
        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
        Neural Networks", IEEE S&P 2019, section V ("low-cost detection"), and the public code (RESET_COST_TO_ZERO).
    """

    seeds: int = 1
    labels: tuple[int, ...] = ()
    loss: Literal["ce", "linear"] = "ce"
    reach: float = 0.99
    candidates: int = 100
    reference_labels: int = 100
    overlap: float = 0.5
    stable: int = 10
    iterations: int = 1000
    batches: int = 31
    batch: int = 32
    lr: float = 0.1
    chunk: int = 0

    def __post_init__(self) -> None:
        self.require("loss", self.loss in ("ce", "linear"), "'ce' or 'linear'")
        self.require("reach", 0 < self.reach <= 1, "in (0, 1]")
        self.require("reference_labels", self.reference_labels >= 4, "at least 4")
        self.require("overlap", 0 <= self.overlap < 1, "in [0, 1)")
        for name in ("seeds", "candidates", "stable", "iterations", "batches", "batch"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("lr", self.lr > 0, "above 0")
        self.require("chunk", self.chunk >= 0, "at least 0")

    def scan(self, model: nn.Module, clean: Clean, run: Run) -> Scan:
        """See :class:`Scanner`. A budget that runs out ends the scan early with what was found."""
        for label in self.labels:
            if not 0 <= label < clean.num_classes:
                raise SettingError(f"label {label} is not in 0..{clean.num_classes - 1}")
        require_gradient(model, clean.x[:2].to(run.device))
        require_independent_rows(model, clean.x[:4].to(run.device))
        found = []
        for number in range(self.seeds):
            if number and run.spendable <= 0:
                run.budget_spent = True
                break
            found.append(_Seed(self, model, clean, run, run.seed + number).look())
            run.progress.seed_done()
        _, height, width = clean.shape
        return Scan(tuple(found), clean.num_classes, height * width, "px", wanted=self.labels)

    def search(
        self, model: nn.Module, clean: Clean, run: Run, seed: int, labels: list[int], *, brief: bool
    ) -> LockStep:
        """The running search for some labels, before its first iteration; ``brief`` for the look at all of them."""
        _, height, width = clean.shape
        return LockStep(
            model,
            clean.x,
            labels,
            controller=CostController(init_cost=_FIRST_COST, reach=self.reach, from_zero=not brief),
            iteration=Iteration(
                batches=self.batches,
                batch=self.batch,
                lr=self.lr,
                loss=self.loss,
                pixels_per_pass=self.chunk * height * width or Iteration.pixels_per_pass,
            ),
            seed=seed,
            run=run,
        )


class Foremost:
    """Tells when the ranking of the labels no longer changes much.

    Args:
        count: Labels that are foremost.
        overlap: Share of them that must be the same in two iterations, and somewhat more.
        stable: Iterations in a row.
    """

    def __init__(self, count: int, overlap: float, stable: int) -> None:
        self.count, self.overlap, self.stable = count, overlap, stable
        self.labels: list[int] = []
        self.streak = 0

    def settled(self, labels: list[int], norms: Tensor) -> bool:
        """Told the ``(T,)`` mask norms of an iteration: whether the foremost are known now."""
        order = torch.argsort(norms, stable=True)[: self.count].tolist()
        now = [labels[row] for row in order]
        same = len(set(now) & set(self.labels))
        self.streak = self.streak + 1 if same > self.overlap * self.count else 0
        self.labels = now
        return self.streak >= self.stable


class _Seed:
    """One seed of a scan."""

    def __init__(self, settings: LowCostNeuralCleanse, model: nn.Module, clean: Clean, run: Run, seed: int) -> None:
        self.settings, self.model, self.clean, self.run, self.seed = settings, model, clean, run, seed
        self.foremost = Foremost(settings.candidates, settings.overlap, settings.stable)
        self.dropped: dict[int, LabelScan] = {}
        self.reference: list[int] = []

    def look(self) -> SeedScan:
        """Both phases; each goes on from its checkpoint."""
        saved = self.run.progress.load(self.seed) or {}
        finished, progress, search = True, 0.0, None
        try:
            followed = self._followed(saved)
            search = self._search(followed, brief=False)
            if "full" in saved:
                search.restore(saved["full"])
            self._full(search, followed)
        except BudgetSpent:
            finished = False
            progress = 0.0 if search is None else search.iterations / self.settings.iterations
        full = {} if search is None else search.results()
        found = self.dropped | {label: self._evidence(label, one) for label, one in full.items()}
        return SeedScan(self.seed, held_out(self.model, self.clean, self.run, found), finished, progress)

    def _followed(self, saved: dict[str, Any]) -> list[int]:
        """Labels to follow to the end, of which the reference is taken."""
        everything = list(range(self.clean.num_classes))
        if len(everything) <= self.settings.candidates + self.settings.reference_labels:
            self.reference = everything
            return everything
        if "followed" in saved:
            self.reference, self.dropped = saved["reference"], unpack(saved["dropped"])
            return list(saved["followed"])
        candidates = list(self.settings.labels) or everything
        if len(candidates) > self.settings.candidates:
            candidates = self._foremost(candidates, saved)
        others = [label for label in everything if label not in set(candidates)]
        order = torch.randperm(len(others), generator=self.run.generator("random others"))
        self.reference = sorted(others[row] for row in order[: self.settings.reference_labels].tolist())
        followed = sorted({*candidates, *self.reference})
        for label in followed:
            self.dropped.pop(label, None)
        return followed

    def _search(self, labels: list[int], *, brief: bool) -> LockStep:
        return self.settings.search(self.model, self.clean, self.run, self.seed, labels, brief=brief)

    def _foremost(self, labels: list[int], saved: dict[str, Any]) -> list[int]:
        """The foremost of the labels after a short look at them; all are put down with what they have come to."""
        search = self._search(labels, brief=True)
        if "brief" in saved:
            search.restore(saved["brief"])
            self.foremost.labels, self.foremost.streak = saved["foremost"], saved["streak"]
        settled = False
        try:
            while not settled and search.labels and search.iterations < self.settings.iterations:
                search.iterate()
                norms = {label: one.size for label, one in search.found.items()}
                norms |= dict(zip(search.labels, search.norms.tolist(), strict=True))
                settled = self.foremost.settled(labels, torch.tensor([norms[label] for label in labels]))
                self._tell("all labels", search)
                self.run.progress.save(self.seed, lambda: self._state("brief", search))
        except BudgetSpent:
            self.reference = labels
            self._drop(search)
            raise
        self._drop(search)
        self.run.notes["iterations_of_all_labels"] = search.iterations
        return self.foremost.labels

    def _drop(self, search: LockStep) -> None:
        self.dropped = {label: self._evidence(label, one, dropped=True) for label, one in search.results().items()}

    def _full(self, search: LockStep, followed: list[int]) -> None:
        while search.labels and search.iterations < self.settings.iterations:
            search.iterate()
            self._tell("foremost labels" if self.dropped else "labels", search)
            self.run.progress.save(self.seed, lambda: self._state("full", search) | {"followed": followed})

    def _state(self, phase: str, search: LockStep) -> dict[str, Any]:
        return {
            phase: search.state(),
            "foremost": self.foremost.labels,
            "streak": self.foremost.streak,
            "reference": self.reference,
            "dropped": pack(self.dropped),
        }

    def _tell(self, what: str, search: LockStep) -> None:
        note = f"{len(search.labels)} {what}"
        if search.labels:
            at = int(search.norms.argmin())
            note += f", label {search.labels[at]} has {float(search.norms[at]):.0f} px"
        self.run.progress.step(self.seed, search.iterations, self.settings.iterations, note)

    def _evidence(self, label: int, found: Found, dropped: bool = False) -> LabelScan:
        # What never worked bounds nothing.
        status: Status = "failed" if not found.works else "eliminated" if dropped else "complete"
        return LabelScan(found.size, float("nan"), status, label in self.reference, found.trigger)
