"""The smallest trigger of one label, of searches that start in different places of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.space import MaskedSpace, Parameters
from bezoar.core.trigger import InvertedTrigger
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


def search_windows(
    model: nn.Module,
    clean: Clean,
    label: int,
    *,
    controller: CostController,
    settings: InversionSettings,
    steps: int,
    seed: int,
    run: Run,
    told: Callable[[int, float], None] | None = None,
) -> tuple[float, InvertedTrigger] | None:
    """Search for a mask from every window; the worse half is dropped after 40, 60 and 80 % of the steps.

    Args:
        model, clean: Model and images to search with.
        label: Label that the trigger is to give.
        controller, settings: Of the search.
        steps: Updates of each mask that is not dropped.
        seed: Of starts and batches.
        run: The run.
        told: Told of the steps done and of the smallest size now.

    Returns:
        Size in pixels and trigger, the smallest that worked; None where none did.

    Raises:
        BudgetSpent: Time is over.
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
    while search.steps < steps:
        run.check()
        search.step()
        if search.steps in cuts and len(search.labels) > 1:
            ranked = search.current.minimum(search.sizes).argsort().tolist()
            search.keep(sorted(ranked[: len(ranked) // 2]))
        if told is not None:
            told(search.steps, float(search.current.min()))
    row = int(search.sizes.argmin())
    return (float(search.sizes[row]), search.trigger(row)) if torch.isfinite(search.sizes[row]) else None
