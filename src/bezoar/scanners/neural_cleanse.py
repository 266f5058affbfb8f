"""Neural Cleanse: the smallest trigger of each label (Wang et al., IEEE S&P 2019)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from bezoar.core.errors import BudgetSpent
from bezoar.core.evidence import LabelScan, Scan, SeedScan, Unit
from bezoar.core.method import Clean, Scanner
from bezoar.core.run import Run
from bezoar.core.space import MaskedSpace
from bezoar.ops.cost import CostController
from bezoar.ops.reference import invert_label
from bezoar.ops.verdict import size_ratio
from bezoar.scanners._refine import refine
from bezoar.scanners._seeds import Scene, Wanted
from bezoar.scanners._together import Together, held_out, pack, unpack
from bezoar.scanners.additive_inversion import AdditiveInversion

# At this ratio to the median of the other labels or below, the leading label gets a second look.
_WORTH_REFINING = 0.6
#: Settings that the search for faint changes takes over.
_SHARED = ("seeds", "labels", "batch", "reach", "loss", "candidates", "reference_labels", "chunk", "precision")


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(Together):
    """Search, for each label, the smallest trigger that turns any image into that label.

    A label that a far smaller trigger reaches than the others is suspect (section III). ``fast`` inverts all labels in
    one batch and drops those that cannot become the smallest; ``reference`` is the authors' procedure, label by label.

    Args:
        mode: ``fast`` or ``reference``.
        seeds: Seeds to scan with; they must agree for a verdict.
        labels: Labels to look at, which alone can be the target; empty for all. Others are sampled for the median.
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
        refine: Steps of a second look at the leading label of ``fast``, from 16 places of the image, where its trigger
            is much smaller than the usual one; 0 leaves it out. It is for the picture, not for the verdict.
        precision: ``auto`` uses bf16 or fp16 on CUDA; ``fp32`` never does.

    References:
        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
        Neural Networks", IEEE S&P 2019, sections III and IV.
    """

    unit: ClassVar[Unit] = "px"

    mode: Literal["fast", "reference"] = "fast"
    start_mask: float = 0.12
    reference_steps: int = 1000
    refine: int = 120

    def __post_init__(self) -> None:
        self.require("mode", self.mode in ("fast", "reference"), "'fast' or 'reference'")
        super().__post_init__()
        self.require("reference_steps", self.reference_steps >= 1, "at least 1")
        self.require("refine", self.refine >= 0, "at least 0")
        self.require("start_mask", 0 < self.start_mask < 0.6, "in (0, 0.6)")

    @property
    def seeds_apart(self) -> bool:
        """See :class:`Together`; the labels of the reference are pieces of their own."""
        return self.mode == "fast"

    def space(self, shape: tuple[int, int, int]) -> MaskedSpace:
        """See :class:`Together`."""
        return MaskedSpace(shape, start_mask=self.start_mask)

    def beside(self) -> tuple[Scanner, ...]:
        """See :class:`bezoar.core.method.Scanner`: a search for faint changes, in ``fast`` mode."""
        if self.mode != "fast":
            return ()
        return (AdditiveInversion(**{name: getattr(self, name) for name in _SHARED}),)

    def finish(self, model: nn.Module, clean: Clean, run: Run, found: Scan) -> Scan:
        """See :class:`Together`: look for a smaller trigger of the leading label."""
        label = _leading(found)
        if self.mode != "fast" or not self.refine or label is None or run.spendable <= 0:
            return found
        spent = run.budget_spent
        smaller = refine(
            model,
            clean,
            label,
            controller=self.controller(clean),
            settings=self.settings(clean),
            steps=self.refine,
            seed=run.seed,
            run=run,
        )
        if smaller is None:  # what the verdict rests on was finished all the same
            run.budget_spent = spent
            return found
        return dataclasses.replace(found, refined=held_out(model, clean, run, {label: smaller}))

    def check(self, model: nn.Module, clean: Clean, run: Run) -> None:
        """See :class:`Together`; label by label, rows may interact."""
        if self.mode == "fast":
            super().check(model, clean, run)

    def look(self, model: nn.Module, clean: Clean, run: Run, seed: int, wanted: Wanted) -> SeedScan:
        """See :class:`Together`; the reference goes label by label."""
        if self.mode == "fast":
            return super().look(model, clean, run, seed, wanted)
        # As in the paper, median and MAD are those of all labels.
        labels = list(self.labels) or list(range(clean.num_classes))
        saved = run.progress.load(seed)
        found = unpack(saved["dropped"]) if saved is not None else {}
        finished, away = True, run.executor.away
        shared = (self, Scene.of(model, clean, run), seed, labels, away)
        left = [label for label in labels if label not in found]
        try:
            with closing(run.executor.map(_invert, shared, left)) as results:
                for label, (scan, gradients) in results:
                    found[label] = scan
                    run.progress.save(seed, lambda: {"dropped": pack(found)}, now=True)
                    if away:
                        run.image_gradients += gradients
                        run.progress.step(seed, len(found), len(labels), f"label {label} is done")
        except BudgetSpent:
            run.budget_spent, finished = True, False
        return SeedScan(seed, held_out(model, clean, run, found), finished)


def _invert(shared: tuple[NeuralCleanse, Scene, int, list[int], bool], label: int) -> tuple[LabelScan, int]:
    """One label of the reference."""
    settings, scene, seed, labels, away = shared
    with scene.entered(away) as (model, run):
        trigger, size, works = invert_label(
            model,
            scene.clean.x,
            label,
            controller=CostController(reach=settings.reach),
            steps=settings.reference_steps,
            batches=31,
            batch=32,
            lr=0.1,
            loss=settings.loss,
            seed=seed,
            run=run,
            progress=_label_progress(run, seed, labels, label, settings.reference_steps),
        )
        found = LabelScan(size, float("nan"), "complete" if works else "failed", True, trigger)
        return found, run.image_gradients


def _leading(found: Scan) -> int | None:
    """The label that most seeds rank first, if its trigger is much smaller than the median of the others."""
    leaders = []
    for seed in found.seeds:
        working = {label: scan.size for label, scan in seed.labels.items() if scan.status == "complete"}
        if len(working) < 2:
            continue
        leader = min(working, key=lambda label: working[label])
        if size_ratio(seed, leader) <= _WORTH_REFINING:  # never of NaN
            leaders.append(leader)
    return Counter(leaders).most_common(1)[0][0] if leaders else None


def _label_progress(run: Run, seed: int, labels: list[int], label: int, steps: int) -> Callable[[int, float], None]:
    place = labels.index(label)

    def told(step: int, best: float) -> None:
        run.progress.step(seed, place * steps + step, len(labels) * steps, f"label {label}, best {best:.0f} px")

    return told
