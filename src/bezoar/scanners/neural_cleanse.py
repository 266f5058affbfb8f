"""Neural Cleanse: the smallest trigger of each label (Wang et al., IEEE S&P 2019)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bezoar.core.errors import BudgetSpent, SettingError
from bezoar.core.evidence import LabelScan, Scan, SeedScan, Status
from bezoar.core.method import Clean, Scanner
from bezoar.core.run import Run
from bezoar.core.space import MaskedSpace
from bezoar.core.surgery import logits, require_gradient, require_independent_rows
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.cost import CostController
from bezoar.ops.invert import Inversion, InversionSettings, Loss
from bezoar.ops.reference import invert_label

# Under a budget: steps that the pace is measured on, smallest batch, and share kept for held-out images and the report.
_PACE = 3
_LEAST_BATCH = 6
_RESERVE = 0.15


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(Scanner):
    """Search, for each label, the smallest trigger that turns any image into that label.

    A label that a far smaller trigger reaches than the others is suspect (section III). ``fast`` inverts all labels in
    one batch and drops those that cannot become the smallest; ``reference`` is the authors' procedure, label by label.

    Args:
        mode: ``fast`` or ``reference``.
        seeds: Seeds to scan with; they must agree for a verdict.
        labels: Labels to look at; empty for all. Others are still sampled for the median.
        steps: Steps of ``fast``, one batch each.
        batch: Images per step of ``fast``, the same ones for all labels.
        lr: Step size of Adam in ``fast``.
        reach: Success rate that counts as a success, in (0, 1].
        loss: ``ce`` (the paper) or ``linear`` (what the authors' code computes).
        start_mask: Mean of the first mask in ``fast``, in (0, 1).
        pressure: First weight of the mask's share of the image in ``fast``.
        candidates: Smallest labels that ``fast`` follows to the end.
        reference_labels: Random labels that ``fast`` follows to the end for median and MAD.
        chunk: Most images in one forward pass, for memory; 0 chooses by image size.
        reference_steps: Most steps of ``reference``, 31 batches of 32 each.
        precision: ``auto`` uses bf16 or fp16 on CUDA; ``fp32`` never does.

    References:
        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
        Neural Networks", IEEE S&P 2019, sections III and IV.
    """

    mode: Literal["fast", "reference"] = "fast"
    seeds: int = 3
    labels: tuple[int, ...] = ()
    steps: int = 120
    batch: int = 16
    lr: float = 0.2
    reach: float = 0.99
    loss: Loss = "ce"
    start_mask: float = 0.12
    pressure: float = 10.0
    candidates: int = 4
    reference_labels: int = 12
    chunk: int = 0
    reference_steps: int = 1000
    precision: Literal["auto", "fp32"] = "auto"

    def __post_init__(self) -> None:
        self.require("mode", self.mode in ("fast", "reference"), "'fast' or 'reference'")
        self.require("loss", self.loss in ("ce", "linear"), "'ce' or 'linear'")
        for name in ("seeds", "steps", "batch", "candidates", "reference_steps"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("reference_labels", self.reference_labels >= 4, "at least 4")
        self.require("reach", 0 < self.reach <= 1, "in (0, 1]")
        self.require("start_mask", 0 < self.start_mask < 0.6, "in (0, 0.6)")
        self.require("lr", self.lr > 0, "above 0")
        self.require("pressure", self.pressure > 0, "above 0")
        self.require("chunk", self.chunk >= 0, "at least 0")

    def scan(self, model: nn.Module, clean: Clean, run: Run) -> Scan:
        """See :class:`Scanner`. A budget that runs out ends the scan early with what was found."""
        for label in self.labels:
            if not 0 <= label < clean.num_classes:
                raise SettingError(f"label {label} is not in 0..{clean.num_classes - 1}")
        require_gradient(model, clean.x[:2].to(run.device))
        if self.mode == "fast":
            require_independent_rows(model, clean.x[:4].to(run.device))
        found: list[SeedScan] = []
        look = self._reference if self.mode == "reference" else self._fast
        for number in range(self.seeds):
            seed = run.seed + number
            if number and run.left <= 0:
                break
            found.append(look(model, clean, run, seed, self._wanted(clean, run.seed, found)))
            run.progress.seed_done()
        _, height, width = clean.shape
        return Scan(tuple(found), clean.num_classes, height * width)

    def _wanted(self, clean: Clean, root: int, found: list[SeedScan]) -> tuple[list[int], list[int]]:
        """Labels to look at and, of these, those that median and MAD are taken from.

        Later seeds repeat the smallest labels of the first one and the reference labels.
        """
        everything = range(clean.num_classes)
        if clean.num_classes <= self.reference_labels + self.candidates:
            reference = list(everything)
        else:
            order = torch.randperm(clean.num_classes, generator=Run(seed=root).generator("reference labels"))
            reference = sorted(order[: self.reference_labels].tolist())
        chosen: Iterable[int] = self.labels or everything
        if found:
            first = found[0].labels
            seen = [(first[label].status == "failed", first[label].size, label) for label in chosen if label in first]
            chosen = [label for _, _, label in sorted(seen)[: self.candidates]]
        return sorted({*chosen, *reference}), reference

    def _fast(
        self, model: nn.Module, clean: Clean, run: Run, seed: int, wanted: tuple[list[int], list[int]]
    ) -> SeedScan:
        labels, reference = wanted
        channels, height, width = clean.shape
        area = height * width
        search = Inversion(
            model,
            clean.x,
            clean.y,
            labels,
            space=MaskedSpace((channels, height, width), start_mask=self.start_mask),
            controller=CostController(
                init_cost=self.pressure / area, patience=5, multiplier=1.5, reach=self.reach, from_zero=False
            ),
            settings=InversionSettings(
                batch=self.batch,
                lr=self.lr,
                loss=self.loss,
                precision=self.precision,
                pixels_per_pass=self.chunk * area or InversionSettings.pixels_per_pass,
            ),
            seed=seed,
            run=run,
        )
        dropped: dict[int, LabelScan] = {}
        saved = run.progress.load(seed)
        if saved is not None:
            search.restore(saved["search"])
            dropped = _unpack(saved["dropped"])
        finished = True
        first, began = search.steps, time.monotonic()
        try:
            while search.steps < self.steps:
                run.check(_RESERVE)
                search.step()
                if run.budget is not None and search.steps == first + _PACE:
                    self._fit_budget(search, run, (time.monotonic() - began) / _PACE)
                if search.steps in self._rounds():
                    dropped.update(self._eliminate(search, reference))
                run.progress.step(seed, search.steps, self.steps, _leader(search))
                last = search.steps == self.steps
                run.progress.save(seed, lambda: {"search": search.state(), "dropped": _pack(dropped)}, now=last)
        except BudgetSpent:
            finished = False
        for row, label in enumerate(search.labels):
            dropped[label] = self._label(search, row, "complete", label in reference)
        return SeedScan(seed, self._held_out(model, clean, run, dropped), finished, search.steps / self.steps)

    def _fit_budget(self, search: Inversion, run: Run, per_step: float) -> None:
        """Take fewer images a step where the steps that are left would outlast the budget."""
        needed = per_step * (self.steps - search.steps)
        share = (run.left - _RESERVE * (run.budget or 0.0)) / max(needed, 1e-9)
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

    def _reference(
        self, model: nn.Module, clean: Clean, run: Run, seed: int, wanted: tuple[list[int], list[int]]
    ) -> SeedScan:
        labels = list(self.labels) or list(range(clean.num_classes))
        del wanted  # the paper looks at every label and takes the median over all of them
        saved = run.progress.load(seed)
        found = _unpack(saved["dropped"]) if saved is not None else {}
        finished = True
        for label in labels:
            if label in found:
                continue
            try:
                trigger, size, works = invert_label(
                    model,
                    clean.x,
                    label,
                    controller=CostController(reach=self.reach),
                    steps=self.reference_steps,
                    batches=31,
                    batch=32,
                    lr=0.1,
                    loss=self.loss,
                    seed=seed,
                    run=run,
                    progress=_label_progress(run, seed, labels, label, self.reference_steps),
                )
            except BudgetSpent:
                finished = False
                break
            found[label] = LabelScan(size, float("nan"), "complete" if works else "failed", True, trigger)
            run.progress.save(seed, lambda: {"dropped": _pack(found)}, now=True)
        return SeedScan(seed, self._held_out(model, clean, run, found), finished)

    @torch.no_grad()
    def _held_out(self, model: nn.Module, clean: Clean, run: Run, found: dict[int, LabelScan]) -> dict[int, LabelScan]:
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


def _leader(search: Inversion) -> str:
    """The label with the smallest trigger now, for the progress bar."""
    row = int(search.current.argmin())
    return f"label {search.labels[row]}, {float(search.current[row]):.0f} px"


def _label_progress(run: Run, seed: int, labels: list[int], label: int, steps: int) -> Any:
    place = labels.index(label)

    def told(step: int, best: float) -> None:
        run.progress.step(seed, place * steps + step, len(labels) * steps, f"label {label}, best {best:.0f} px")

    return told


def _pack(found: dict[int, LabelScan]) -> dict[int, dict[str, Any]]:
    return {
        label: {
            "size": s.size,
            "status": s.status,
            "reference": s.reference,
            "mask": s.trigger.mask,
            "pattern": s.trigger.pattern,
        }
        for label, s in found.items()
    }


def _unpack(saved: dict[int, dict[str, Any]]) -> dict[int, LabelScan]:
    return {
        label: LabelScan(s["size"], float("nan"), s["status"], s["reference"], MaskedTrigger(s["mask"], s["pattern"]))
        for label, s in saved.items()
    }
