"""A second look at one label: several searches that start in different places of the image."""

from __future__ import annotations

from torch import nn

from bezoar.core.errors import BudgetSpent
from bezoar.core.evidence import LabelScan
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.ops.cost import CostController
from bezoar.ops.invert import InversionSettings
from bezoar.ops.windows import search_windows


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

    One search often ends in a larger trigger elsewhere than the attacker's. What comes out is shown, and never used for
    the verdict: the other labels were not searched as hard.

    Returns:
        Evidence without a held-out rate, or None where no trigger worked or the budget ended it.
    """
    try:
        found = search_windows(
            model,
            clean,
            label,
            controller=controller,
            settings=settings,
            steps=steps,
            seed=seed,
            run=run,
            told=lambda done, size: run.progress.refining(done, steps, f"label {label}, {size:.0f} px"),
        )
    except BudgetSpent:
        return None
    return None if found is None else LabelScan(found[0], float("nan"), "complete", False, found[1])
