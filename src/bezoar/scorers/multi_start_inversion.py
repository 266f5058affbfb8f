"""Masks from many starting places: Neural Cleanse's search, as hard for every label as a second look is for one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.evidence import Scores
from bezoar.core.method import Clean, Scorer
from bezoar.core.run import Run
from bezoar.core.surgery import require_gradient, require_independent_rows
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.cost import CostController
from bezoar.ops.invert import InversionSettings
from bezoar.ops.stats import log_ratios
from bezoar.ops.windows import search_windows

#: First weight of the mask norm, for a mask of the whole image; the scan's own search starts with it too.
_PRESSURE = 10.0


@dataclass(frozen=True, kw_only=True)
class MultiStartInversion(Scorer):
    """How much smaller the smallest mask of a label is than that of the others, of searches from all over the image.

    A single search for a small trigger often ends in a larger one elsewhere than the attacker's, most of all in nets
    with BatchNorm, and natural features of other labels are then as small. So the image is divided into windows, a
    search of each label starts in each of them, and the worse half is dropped after 40, 60 and 80 % of the steps. All
    labels are searched equally hard, so that their smallest masks can be compared.

    Args:
        steps: Updates of a search, at least 5.
        reach: Success rate that counts as a success, in (0, 1].
        batch: Images of an update, at least 1.
        lr: Step size of Adam, above 0.

    References:
        The search is that of Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
        Networks", IEEE S&P 2019; the starts and the halving are ours.
    """

    steps: int = 60
    reach: float = 0.99
    batch: int = 16
    lr: float = 0.2

    def __post_init__(self) -> None:
        self.require("steps", self.steps >= 5, "at least 5")
        self.require("reach", 0 < self.reach <= 1, "in (0, 1]")
        self.require("batch", self.batch >= 1, "at least 1")
        self.require("lr", self.lr > 0, "above 0")

    def scores(self, model: nn.Module, clean: Clean, run: Run) -> Scores:
        """See :class:`bezoar.core.method.Scorer`."""
        if clean.num_classes < 2:
            raise UnsupportedModel("one label has no other to be compared with", "Use a method that looks at weights")
        require_gradient(model, clean.x[:2].to(run.device))
        require_independent_rows(model, clean.x[:4].to(run.device))
        _, height, width = clean.shape
        whole = height * width
        controller = CostController.quick(_PRESSURE, whole, self.reach)
        settings = InversionSettings(batch=self.batch, lr=self.lr)
        sizes, triggers = [float(whole)] * clean.num_classes, dict[int, InvertedTrigger]()
        for label in range(clean.num_classes):
            run.progress.step(run.seed, label, clean.num_classes, f"label {label}")
            found = search_windows(
                model, clean, label, controller=controller, settings=settings, steps=self.steps, seed=run.seed, run=run
            )
            if found is not None:
                sizes[label], triggers[label] = found
        ratios = log_ratios([1 / max(size, 1e-3) for size in sizes])
        return Scores(
            labels={label: float(ratio) for label, ratio in enumerate(ratios)},
            model=float(ratios.max()),
            meaning="how many times smaller the label's smallest mask is than the usual one, as a natural logarithm",
            triggers=triggers,
        )
