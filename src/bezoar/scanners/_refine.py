"""A second look at one label: several searches that start in different places of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bezoar.core.errors import BudgetSpent
from bezoar.core.evidence import LabelScan
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.space import MaskedSpace, Parameters
from bezoar.ops.cost import CostController
from bezoar.ops.invert import Inversion, InversionSettings

_WINDOWS = 4  # a side: 4 x 4 starts cover the image with a coarse net
_INSIDE, _OUTSIDE = 0.3, 0.02


@dataclass(frozen=True)
class WindowSpace(MaskedSpace):
    """Masks that start in one window of a grid each, row by row, in the order of the rows."""

    windows: int = _WINDOWS

    def start(self, labels: Sequence[int], seed: int) -> Parameters:
        """See :class:`bezoar.core.space.TriggerSpace`; row i starts in window i."""
        _, height, width = self.shape
        rows = [super(WindowSpace, self).start([label], seed + 7919 * i) for i, label in enumerate(labels)]
        masks = torch.full((len(labels), 1, height, width), _OUTSIDE)
        for i in range(len(labels)):
            row, column = divmod(i % self.windows**2, self.windows)
            top, bottom = (round(k * height / self.windows) for k in (row, row + 1))
            left, right = (round(k * width / self.windows) for k in (column, column + 1))
            masks[i, :, top : max(bottom, top + 1), left : max(right, left + 1)] = _INSIDE
        return {"mask": self._inverse(masks), "pattern": torch.cat([row["pattern"] for row in rows])}


def refine(
    model: nn.Module,
    clean: Clean,
    label: int,
    *,
    controller: CostController,
    settings: InversionSettings,
    steps: int,
    seed: int,
    run: Run,
) -> LabelScan | None:
    """The smallest of the triggers of one label that searches from all parts of the image end in.

    One search often ends in a larger trigger elsewhere than the attacker's. The worse half of the searches is dropped
    after 40, 60 and 80 % of the steps. What comes out is shown, and never used for the verdict: the other labels were
    not searched as hard.

    Returns:
        Evidence without a held-out rate, or None where no trigger worked or the budget ended it.
    """
    search = Inversion(
        model,
        clean.x,
        clean.y,
        [label] * _WINDOWS**2,
        space=WindowSpace(clean.shape),
        controller=controller,
        settings=settings,
        seed=seed,
        run=run,
    )
    cuts = {max(1, int(share * steps)) for share in (0.4, 0.6, 0.8)}
    try:
        while search.steps < steps:
            run.check()
            search.step()
            if search.steps in cuts and len(search.labels) > 1:
                ranked = search.current.minimum(search.sizes).argsort().tolist()
                search.keep(sorted(ranked[: len(ranked) // 2]))
            size = float(search.current.min())
            run.progress.refining(search.steps, steps, f"label {label}, {size:.0f} px")
    except BudgetSpent:
        return None
    row = int(search.sizes.argmin())
    if not torch.isfinite(search.sizes[row]):
        return None
    return LabelScan(float(search.sizes[row]), float("nan"), "complete", False, search.trigger(row))
