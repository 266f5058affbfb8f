"""Evidence of a scan: what was measured, before any rule judges it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from bezoar.core.trigger import InvertedTrigger

Status = Literal["complete", "eliminated", "failed"]
#: What sizes are counted in: pixels of a mask, or the root mean square of a change of all values.
Unit = Literal["px", "rms"]


@dataclass(frozen=True)
class LabelScan:
    """One label under one seed.

    Attributes:
        size: That of the smallest trigger that worked, or of the last one if none worked: L1 norm of the mask in
            pixels, or root mean square of the change in [0, 1].
        asr: Success of the inverted trigger on held-out clean images of other labels, in [0, 1].
        status: ``complete``; ``eliminated`` (stopped early, ``size`` is an upper bound); ``failed`` (never worked).
        reference: Whether the label belongs to the sample that median and MAD are taken from.
        trigger: The inverted trigger.
    """

    size: float
    asr: float
    status: Status
    reference: bool
    trigger: InvertedTrigger


@dataclass(frozen=True)
class SeedScan:
    """All labels that were looked at under one seed.

    Attributes:
        seed: The seed.
        labels: Evidence by label.
        finished: False where the budget ended the search early.
        progress: Share of the steps that an unfinished search took, in [0, 1].
    """

    seed: int
    labels: dict[int, LabelScan]
    finished: bool
    progress: float = 0.0

    def usual_size(self, label: int) -> float | None:
        """Median size of the other reference labels; None where there is none."""
        others = [found.size for other, found in self.labels.items() if found.reference and other != label]
        return float(np.median(others)) if others else None


@dataclass(frozen=True)
class Scan:
    """Evidence over seeds.

    Attributes:
        seeds: Evidence of each seed.
        num_classes: Number of labels K of the model.
        pixels: H x W of the images.
        unit: What sizes are counted in.
        refined: Smaller triggers from a longer search, by label; shown, but no part of a verdict.
        wanted: Labels that the user asked for, which alone can be the target; empty for all.
        calibrated: Whether the bounds of the verdict rule were set on searches of this kind.
    """

    seeds: tuple[SeedScan, ...]
    num_classes: int
    pixels: int
    unit: Unit = "px"
    refined: dict[int, LabelScan] = field(default_factory=dict)
    wanted: tuple[int, ...] = ()
    calibrated: bool = True

    @property
    def whole(self) -> float:
        """Size of a trigger that takes the whole image."""
        return float(self.pixels) if self.unit == "px" else 1.0

    def median(self, label: int, what: Literal["size", "asr"]) -> float:
        """Median over the seeds that looked at a label."""
        values = [getattr(s.labels[label], what) for s in self.seeds if label in s.labels]
        return float(torch.tensor(values).quantile(0.5))

    def smallest(self, label: int) -> tuple[int, LabelScan]:
        """The smallest working trigger of a label, which lies nearest to the attacker's, and the seed that found it.

        A refined one counts where it works nearly as well on held-out images.
        """
        seen = [(s.seed, s.labels[label]) for s in self.seeds if label in s.labels]
        best = min(seen, key=lambda found: (found[1].status != "complete", found[1].size))
        refined = self.refined.get(label)
        if refined is not None and refined.size < best[1].size and refined.asr >= 0.9 * best[1].asr:
            return self.seeds[0].seed, refined
        return best

    def looked_at(self) -> list[int]:
        """Labels that any seed looked at, ascending."""
        return sorted({label for s in self.seeds for label in s.labels})


@dataclass(frozen=True)
class Scores:
    """Evidence of a method that has no trigger size: how suspicious each label is, and the model.

    Attributes:
        labels: Score of each label that was looked at, higher for more suspicious.
        model: Score of the model as a whole, higher for more suspicious: what a calibrated verdict rests on.
        meaning: What the scores are, in words, with their unit.
        suspect: What the paper's own rule says of the model, or None where it has none.
        bound: Score of the model above which that rule says so, or None where it is another one.
        pvalue: The paper's own p-value of the most suspicious label, or None.
        triggers: Inverted triggers by label, where the method finds some.
        pairs: Score of each pair of source and target label that was looked at, for methods that tell them apart.
    """

    labels: dict[int, float]
    model: float
    meaning: str
    suspect: bool | None = None
    bound: float | None = None
    pvalue: float | None = None
    triggers: dict[int, InvertedTrigger] = field(default_factory=dict)
    pairs: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def leader(self) -> int:
        """The most suspicious label; of equal ones the first."""
        return max(self.labels, key=lambda label: (self.labels[label], -label))
