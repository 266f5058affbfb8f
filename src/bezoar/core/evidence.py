"""Evidence of a scan: what was measured, before any rule judges it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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
    """

    seeds: tuple[SeedScan, ...]
    num_classes: int
    pixels: int
    unit: Unit = "px"
    refined: dict[int, LabelScan] = field(default_factory=dict)
    wanted: tuple[int, ...] = ()

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
