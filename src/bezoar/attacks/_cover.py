"""Attacks whose cover examples come from every class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bezoar.attacks._labels import LabelMap
from bezoar.attacks._poison import PoisonAttack


@dataclass(frozen=True, kw_only=True)
class CoverAllClasses(PoisonAttack):
    """A poison attack whose cover examples come from all classes, the target among them.

    Args:
        cover_classes: Classes whose images carry the trigger under their true label; empty for all of them.
    """

    def choose_cover(self, y: Tensor, labels: LabelMap, index: Tensor) -> Tensor:
        count = int(self.cover_rate * len(y))
        if not count:
            return torch.empty(0, dtype=torch.long)
        allowed = torch.isin(y, torch.tensor(self.cover_classes or range(labels.num_classes)))
        allowed[index] = False
        return self._pick("cover", torch.nonzero(allowed).flatten(), count, "cover_rate")
