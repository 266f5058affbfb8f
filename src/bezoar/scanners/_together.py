"""Searches that invert all labels in one batch, whatever the family of triggers."""

from __future__ import annotations

import dataclasses
import time
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bezoar.core.errors import BudgetSpent, SettingError
from bezoar.core.evidence import LabelScan, Scan, SeedScan, Status, Unit
from bezoar.core.method import Clean, Scanner
from bezoar.core.run import Run
from bezoar.core.space import TriggerSpace
from bezoar.core.surgery import logits, require_gradient, require_independent_rows
from bezoar.core.trigger import trigger_of, trigger_tensors
from bezoar.ops.cost import CostController
from bezoar.ops.invert import Inversion, InversionSettings, Loss
from bezoar.scanners._seeds import Wanted, look_for_all

# Under a budget: steps that the pace is measured on, and smallest batch.
_PACE = 3
_LEAST_BATCH = 6


@dataclass(frozen=True, kw_only=True)
class Together(Scanner):
    """Invert all labels in one batch, and drop those that cannot become the smallest.

    Args:
        seeds: Seeds to scan with; they must agree for a verdict.
        labels: Labels to look at, which alone can be the target; empty for all. Others are sampled for the median.
        steps: Steps, one batch each.
        batch: Images per step, the same ones for all labels.
        lr: Step size of Adam.
        reach: Success rate that counts as a success, in (0, 1].
        loss: ``ce`` (cross-entropy) or ``linear`` (what the code of Neural Cleanse computes).
        pressure: First weight of the size, as a share of the whole image.
        candidates: Smallest labels that are followed to the end.
        reference_labels: Random labels that are followed to the end for median and MAD.
        chunk: Most images in one forward pass, for memory; 0 chooses by image size.
        precision: ``auto`` uses bf16 or fp16 on CUDA; ``fp32`` never does.
    """

    #: What sizes are counted in.
    unit: ClassVar[Unit]
    #: Name of the phase, for the user's eye.
    phase: ClassVar[str] = "scan"

    seeds: int = 3
    labels: tuple[int, ...] = ()
    steps: int = 120
    batch: int = 16
    lr: float = 0.2
    reach: float = 0.99
    loss: Loss = "ce"
    pressure: float = 10.0
    candidates: int = 4
    reference_labels: int = 12
    chunk: int = 0
    precision: Literal["auto", "fp32"] = "auto"

    def __post_init__(self) -> None:
        self.require("loss", self.loss in ("ce", "linear"), "'ce' or 'linear'")
        for name in ("seeds", "steps", "batch", "candidates"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("reference_labels", self.reference_labels >= 4, "at least 4")
        self.require("reach", 0 < self.reach <= 1, "in (0, 1]")
        self.require("lr", self.lr > 0, "above 0")
        self.require("pressure", self.pressure > 0, "above 0")
        self.require("chunk", self.chunk >= 0, "at least 0")

    @property
    def seeds_apart(self) -> bool:
        """Whether seeds may run side by side; else :meth:`look` has pieces of its own for the run's executor."""
        return True

    @abstractmethod
    def space(self, shape: tuple[int, int, int]) -> TriggerSpace:
        """The family of triggers for images of ``shape`` (C, H, W)."""

    def scan(self, model: nn.Module, clean: Clean, run: Run) -> Scan:
        """See :class:`Scanner`. A budget that runs out ends the scan early with what was found."""
        for label in self.labels:
            if not 0 <= label < clean.num_classes:
                raise SettingError(f"label {label} is not in 0..{clean.num_classes - 1}")
        require_gradient(model, clean.x[:2].to(run.device))
        self.check(model, clean, run)
        seeds = range(run.seed, run.seed + self.seeds)
        wanted = wanted_labels(clean, run.seed, [], self.labels, self.candidates, self.reference_labels)
        # Where median and MAD are those of all labels, no seed waits for what the first one found.
        first = self.seeds if len(wanted[1]) == clean.num_classes else 1
        found = look_for_all(self, model, clean, run, seeds[:first], wanted, self.seeds_apart)
        if seeds[first:]:
            wanted = wanted_labels(clean, run.seed, found, self.labels, self.candidates, self.reference_labels)
            found += look_for_all(self, model, clean, run, seeds[first:], wanted, self.seeds_apart)
        _, height, width = clean.shape
        return self.finish(
            model, clean, run, Scan(tuple(found), clean.num_classes, height * width, self.unit, wanted=self.labels)
        )

    def finish(self, model: nn.Module, clean: Clean, run: Run, found: Scan) -> Scan:
        """A last look at what was found, after all seeds."""
        del model, clean, run
        return found

    def check(self, model: nn.Module, clean: Clean, run: Run) -> None:
        """Refuse a model that the search cannot work on."""
        require_independent_rows(model, clean.x[:4].to(run.device))

    def look(self, model: nn.Module, clean: Clean, run: Run, seed: int, wanted: Wanted) -> SeedScan:
        """One seed; ``wanted`` are the labels to look at and those of them that median and MAD are taken from."""
        labels, reference = wanted
        search = self.inversion(model, clean, run, seed, labels)
        dropped: dict[int, LabelScan] = {}
        saved = run.progress.load(seed)
        if saved is not None:
            search.restore(saved["search"])
            dropped = unpack(saved["dropped"])
        finished = True
        first, began = search.steps, time.monotonic()
        try:
            while search.steps < self.steps:
                run.check()
                search.step()
                if run.budget is not None and search.steps == first + _PACE:
                    self._fit_budget(search, run, (time.monotonic() - began) / _PACE)
                if search.steps in self._rounds():
                    dropped.update(self._eliminate(search, reference))
                run.progress.step(seed, search.steps, self.steps, _leader(search, self.unit))
                last = search.steps == self.steps
                run.progress.save(seed, lambda: {"search": search.state(), "dropped": pack(dropped)}, now=last)
        except BudgetSpent:
            finished = False
        for row, label in enumerate(search.labels):
            dropped[label] = self._label(search, row, "complete", label in reference)
        return SeedScan(seed, held_out(model, clean, run, dropped), finished, search.steps / self.steps)

    def inversion(self, model: nn.Module, clean: Clean, run: Run, seed: int, labels: list[int]) -> Inversion:
        """The running search for some labels, before its first step; ``model`` is frozen and in eval mode."""
        return Inversion(
            model,
            clean.x,
            clean.y,
            labels,
            space=self.space(clean.shape),
            controller=self.controller(clean),
            settings=self.settings(clean),
            seed=seed,
            run=run,
        )

    def controller(self, clean: Clean) -> CostController:
        """The cost controller of a search."""
        _, height, width = clean.shape
        # The weight is per pixel of a mask; a root mean square is a share of the whole already.
        whole = height * width if self.unit == "px" else 1
        return CostController.quick(self.pressure, whole, self.reach)

    def settings(self, clean: Clean) -> InversionSettings:
        """Optimiser and batches of a search."""
        _, height, width = clean.shape
        return InversionSettings(
            batch=self.batch,
            lr=self.lr,
            loss=self.loss,
            precision=self.precision,
            pixels_per_pass=self.chunk * height * width or InversionSettings.pixels_per_pass,
        )

    def _fit_budget(self, search: Inversion, run: Run, per_step: float) -> None:
        """Take fewer images a step where the steps that are left would outlast the budget."""
        needed = per_step * (self.steps - search.steps)
        share = run.spendable / max(needed, 1e-9)
        if share < 1:
            batch = max(_LEAST_BATCH, int(search.settings.batch * share))
            search.settings = dataclasses.replace(search.settings, batch=min(batch, search.settings.batch))

    def _rounds(self) -> range:
        """Steps after which labels are dropped; before, the sizes do not yet tell them apart."""
        return range(int(self.steps * 0.4), int(self.steps * 0.8), max(1, int(self.steps * 0.1)))

    def _eliminate(self, search: Inversion, reference: list[int]) -> dict[int, LabelScan]:
        """Keep the smaller half of the labels, at least the candidates, and the reference labels."""
        if len(search.labels) <= self.candidates + 1:
            return {}
        works = search.success >= min(self.reach, 0.9)
        # The best so far counts too: a small trigger that shrank too far just now is no reason to drop its label.
        ranked = torch.where(works, search.current, torch.inf).minimum(search.sizes).argsort().tolist()
        others = sum(label not in reference for label in search.labels)
        kept = set(ranked[: max(self.candidates, others // 2)])
        rows = [r for r, label in enumerate(search.labels) if r in kept or label in reference]
        out = {
            search.labels[r]: self._label(search, r, "eliminated", False)
            for r in range(len(search.labels))
            if r not in set(rows)
        }
        if out:
            search.keep(rows)
        return out

    def _label(self, search: Inversion, row: int, status: Status, reference: bool) -> LabelScan:
        best = float(search.sizes[row])
        if best == float("inf"):  # never worked: the size that it has now bounds nothing
            return LabelScan(float(search.current[row]), float("nan"), "failed", reference, search.trigger(row))
        return LabelScan(best, float("nan"), status, reference, search.trigger(row))


def wanted_labels(
    clean: Clean, root: int, found: list[SeedScan], labels: tuple[int, ...], candidates: int, reference_labels: int
) -> Wanted:
    """Labels to look at and, of these, those that median and MAD are taken from.

    Later seeds repeat the smallest labels of the first one and the reference labels.
    """
    everything = range(clean.num_classes)
    if clean.num_classes <= reference_labels + candidates:
        reference = list(everything)
    else:
        order = torch.randperm(clean.num_classes, generator=Run(seed=root).generator("reference labels"))
        reference = sorted(order[:reference_labels].tolist())
    chosen: Iterable[int] = labels or everything
    if found:
        first = found[0].labels
        seen = [(first[label].status == "failed", first[label].size, label) for label in chosen if label in first]
        chosen = [label for _, _, label in sorted(seen)[:candidates]]
    return sorted({*chosen, *reference}), reference


@torch.no_grad()
def held_out(model: nn.Module, clean: Clean, run: Run, found: dict[int, LabelScan]) -> dict[int, LabelScan]:
    """Success of each trigger on held-out images of other labels: 256 of them, 32 for a label that was dropped."""
    result = {}
    for label, scan in sorted(found.items()):
        x = clean.held_x[clean.held_y != label][: 32 if scan.status == "eliminated" else 256]
        hits: list[Tensor] = [
            logits(model, scan.trigger(part.to(run.device))).argmax(1).cpu() == label for part in torch.split(x, 64)
        ]
        asr = float(torch.cat(hits).float().mean()) if hits else float("nan")
        result[label] = LabelScan(scan.size, asr, scan.status, scan.reference, scan.trigger)
    return result


def _leader(search: Inversion, unit: Unit) -> str:
    """The label with the smallest trigger now, for the progress bar."""
    row = int(search.current.argmin())
    size = float(search.current[row])
    return f"label {search.labels[row]}, " + (f"{size:.0f} px" if unit == "px" else f"change {255 * size:.1f} of 255")


def pack(found: dict[int, LabelScan]) -> dict[int, dict[str, Any]]:
    """Evidence without held-out rates as plain values and tensors, for a checkpoint."""
    return {
        label: {
            "size": s.size,
            "status": s.status,
            "reference": s.reference,
            "trigger": trigger_tensors(s.trigger),
        }
        for label, s in found.items()
    }


def unpack(saved: dict[int, dict[str, Any]]) -> dict[int, LabelScan]:
    """The reverse of :func:`pack`."""
    return {
        label: LabelScan(s["size"], float("nan"), s["status"], s["reference"], trigger_of(s["trigger"]))
        for label, s in saved.items()
    }
