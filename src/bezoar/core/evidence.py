"""Evidence of a scan: what was measured, before any rule judges it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bezoar.core.trigger import MaskedTrigger

Status = Literal["complete", "eliminated", "failed"]


@dataclass(frozen=True)
class LabelScan:
    """One label under one seed.

    Attributes:
        size: L1 norm of the smallest mask that worked, in pixels; that of the last mask if none worked.
        asr: Success of the inverted trigger on held-out clean images of other labels, in [0, 1].
        status: ``complete``; ``eliminated`` (stopped early, ``size`` is an upper bound); ``failed`` (never worked).
        reference: Whether the label belongs to the sample that median and MAD are taken from.
        trigger: The inverted trigger.
    """

    size: float
    asr: float
    status: Status
    reference: bool
    trigger: MaskedTrigger


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
    """Evidence over seeds, for images of ``pixels`` = H x W."""

    seeds: tuple[SeedScan, ...]
    num_classes: int
    pixels: int

    def median(self, label: int, what: Literal["size", "asr"]) -> float:
        """Median over the seeds that looked at a label."""
        values = [getattr(s.labels[label], what) for s in self.seeds if label in s.labels]
        return float(torch.tensor(values).quantile(0.5))

    def looked_at(self) -> list[int]:
        """Labels that any seed looked at, ascending."""
        return sorted({label for s in self.seeds for label in s.labels})
