"""ABL's isolation: what a fresh network learns fastest is suspect."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bezoar.core.examples import ExampleSource
from bezoar.core.filtering import Filter, Suspicion
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.filters._classes import over_represented
from bezoar.ops.fresh import fresh
from bezoar.ops.isolation import Floor, isolate, lowest, whole_part
from bezoar.ops.losses import Curves
from bezoar.ops.normalisation import optimizer_from_scratch
from bezoar.ops.recipe import Recipe

_WORST = 1e6  # loss of an example whose loss is not finite: it was not learned at all


@dataclass(frozen=True, kw_only=True)
class ABLIsolation(Filter):
    """Train a fresh network briefly with a floor under the loss, and suspect the examples of the lowest loss.

    It is the first stage of the trainer ``abl`` alone. The weights of the model that is given do not matter: its
    architecture is trained anew, without augmentation, so nothing needs to be trained beforehand. The score of an
    example is minus its loss after the isolation, in eval mode and without augmentation; what a label's statistic says
    is how many times its share of the examples it has of the suspects.

    The filter has no rule that says whether there is poison: it takes its share out of any set, and where a class is as
    easy as the poison, or poison is learned no faster than a class, that class is what it takes out.

    Args:
        rate: Share of the examples to take out, in (0, 1); it should lie below the true share of poison.
        isolation: How the loss is kept above the floor: ``lga`` turns the gradient of each example below it (the
            paper's formula), ``lga-batch`` that of a batch whose mean is below it (the public code), ``flooding`` has
            the same gradient as ``lga-batch``.
        gamma: The floor, at least 0; with 0 it is plain training.
        epochs: Most epochs of the isolation, at least 1; the paper takes 20, its public code 10.
        until_floor: Whether it ends after the first epoch that brings half of the examples to the floor.
        batch: Examples per step, at least 1.
        lr: Learning rate, above 0; None is 0.1 with SGD for a net with BatchNorm, and 0.001 with Adam for others.

    References:
        Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021, and its public code.
        Its isolation as a filter of its own is ours.
    """

    through_model = False

    rate: float = 0.01
    isolation: Floor = "lga-batch"
    gamma: float = 0.5
    epochs: int = 10
    until_floor: bool = True
    batch: int = 128
    lr: float | None = None

    def __post_init__(self) -> None:
        self.require("rate", 0 < self.rate < 1, "in (0, 1)")
        self.require("isolation", self.isolation in ("lga", "lga-batch", "flooding"), "lga, lga-batch or flooding")
        self.require("gamma", self.gamma >= 0, "at least 0")
        for name in ("epochs", "batch"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("lr", self.lr is None or self.lr > 0, "above 0, or None")

    def filter(self, model: nn.Module, examples: ExampleSource, run: Run, clean: Clean | None) -> Suspicion:
        """See :class:`bezoar.core.filtering.Filter`."""
        del clean
        count = whole_part(self.rate, len(examples.labels))
        if not count:
            run.warnings.append(f"a share of {self.rate:g} of {len(examples.labels)} examples is none: raise rate")
        made = fresh(model)
        optimizer, usual = optimizer_from_scratch(made)
        recipe = Recipe(
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr or usual,
            optimizer=optimizer,
            weight_decay=1e-4,
            schedule="constant",
        )
        curves = Curves(self.epochs + 1, len(examples.labels), None)
        done = isolate(
            made,
            examples,
            recipe,
            curves,
            run,
            how=self.isolation,
            gamma=self.gamma,
            until_floor=self.until_floor,
        )
        losses = torch.nan_to_num(curves.table[done].double(), nan=_WORST, posinf=_WORST).clamp(max=_WORST)
        suspect = lowest(losses, count)
        return Suspicion(
            -losses,
            suspect,
            f"the {self.rate:.3g} of all examples that a fresh network learns fastest",
            over_represented(suspect, examples.labels, examples.num_classes),
        )
