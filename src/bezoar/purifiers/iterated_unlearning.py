"""Rounds of detection and unlearning, for several triggers on one label (Neural Cleanse, section VII-D)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

import torch
from torch import nn

from bezoar.core.evidence import Scan
from bezoar.core.method import Clean
from bezoar.core.run import Progress, Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.fit import fit
from bezoar.ops.verdict import RatioRule, judge, size_ratio
from bezoar.purifiers.unlearn import Unlearn
from bezoar.scanners.neural_cleanse import NeuralCleanse

#: A trigger of a round, and the label that it causes.
Found = list[tuple[int, InvertedTrigger]]


@dataclass(frozen=True, kw_only=True)
class IteratedUnlearning(Unlearn):
    """Detect, unlearn what was found, and detect again until nothing is found.

    A label that several triggers cause shows one of them at a time: the search ends in whichever is the smallest. So
    the model is searched anew after each unlearning. Every suspect label is unlearned, with the triggers of all seeds,
    and those of earlier rounds are shown again, so that they do not come back. A label is suspect as in a scan: its
    trigger is far smaller than the usual one, and works on clean images that the search did not see, which are half of
    those to work with. A first scan is spared where its triggers are given.

    Where most labels are infected none stands out; ``patch="all"`` unlearns the triggers of all of them in one round,
    whatever their sizes.

    Args:
        epochs: Passes over the clean images in each round.
        lr: Peak learning rate of SGD, falling to zero along a cosine in each round.
        batch: Images per step.
        weight_decay: L2 penalty.
        share: Share of each batch that carries a trigger, in (0, 1].
        jitter: Each stamped image carries the trigger at a random strength between this and 1, in (0, 1].
        rounds: Most rounds, at least 1.
        patch: ``found`` for labels that are suspect, ``all`` for all of them, once.
        seeds: Seeds of each search, at least 1.
        search_steps: Steps of each search, at least 1.
        pad: Random crop after padding by this many pixels, before the trigger is stamped.
        flip: Random horizontal flip, before the trigger is stamped.
        clip: Largest gradient norm; 0 switches clipping off.

    References:
        Wang et al., "Neural Cleanse", IEEE S&P 2019, sections VI-C and VII (several infected labels, one label with
        several triggers).
    """

    needs_triggers = False

    rounds: int = 5
    patch: Literal["found", "all"] = "found"
    seeds: int = 2
    search_steps: int = 120

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "seeds", "search_steps"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("patch", self.patch in ("found", "all"), "'found' or 'all'")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers, where given, are those of the first round."""
        shown: Found = []
        story: list[dict[str, Any]] = []
        found = list(triggers.items()) if self.patch == "found" else []
        for number in range(1 if self.patch == "all" else self.rounds):
            found = found or self.found(model, clean, run, number)
            if not found or run.spendable <= 0:
                break
            shown += found
            story.append(
                {
                    "labels": sorted({label for label, _ in found}),
                    "triggers": len(found),
                    "mean_size": round(mean(trigger.size for _, trigger in found), 3),
                }
            )
            seed = run.seed + number
            stamp = self.stamp([trigger for _, trigger in shown])
            fit(model, clean.x, clean.y, self.recipe(), seed=seed, stamp=stamp, progress=run.progress.training)
            found = []
        run.notes["rounds"] = story
        if len(story) == self.rounds and self.patch == "found":
            run.warnings.append(f"after {self.rounds} rounds it was not asked again whether anything is left: scan it")
        return model

    def found(self, model: nn.Module, clean: Clean, run: Run, number: int) -> Found:
        """Labels and triggers to unlearn in a round; none where nothing is found."""
        told = run.progress
        search = NeuralCleanse(seeds=self.seeds, steps=self.search_steps, refine=0)
        # Other starts in each round. Time counts on, but checkpoints of a scan are not those of this model.
        own = dataclasses.replace(
            run,
            seed=run.seed + 101 * number,
            notes={},
            progress=Progress(report=told.report, seeds=self.seeds, name=f"search {number + 1}"),
        )
        scan = search(model, _divided(clean, run), own)
        run.image_gradients, run.budget_spent = own.image_gradients, own.budget_spent
        labels = scan.looked_at() if self.patch == "all" else suspects(scan)
        return [
            (label, seed.labels[label].trigger)
            for label in labels
            for seed in scan.seeds
            if label in seed.labels and seed.labels[label].status == "complete"
        ]


def suspects(scan: Scan, rule: RatioRule | None = None) -> list[int]:
    """Labels that the rule of a scan suspects: the target, and others whose triggers are as small and work."""
    rule = rule or RatioRule()
    judged = judge(scan, (), rule)
    if judged.verdict != "backdoored" or judged.target is None:
        return []
    rule = rule.for_unit(scan.unit).for_labels(scan.num_classes)
    also = [
        label
        for label in scan.looked_at()
        if scan.median(label, "asr") >= rule.asr
        and mean(size_ratio(seed, label) for seed in scan.seeds if label in seed.labels) <= rule.backdoored_ratio
    ]
    return sorted({judged.target, *also})


def _divided(clean: Clean, run: Run) -> Clean:
    """Half of the images of each class to search with, half to try the triggers on."""
    order = torch.randperm(len(clean.y), generator=run.generator("halves"))
    order = order[clean.y[order].argsort(stable=True)]
    searched, tried = (order[0::2], order[1::2]) if len(order) > 1 else (order, order)
    return dataclasses.replace(
        clean, x=clean.x[searched], y=clean.y[searched], held_x=clean.x[tried], held_y=clean.y[tried], suspects=None
    )
