"""Feature consistency towards transformations (FCT): the features of poisoned examples move further."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bezoar.core.examples import ExampleSource
from bezoar.core.filtering import Filter, Suspicion
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.ops.consistency import consistency
from bezoar.ops.isolation import lowest, whole_part


@dataclass(frozen=True, kw_only=True)
class FeatureConsistency(Filter):
    """Turn and shift each example, and suspect those whose features move furthest.

    A trigger gives an example its label only where and as it was placed, so that a transformation takes it away, while
    a class survives. The score is the mean square by which what goes into the last layer moves. The paper looks
    through a network that was trained for two epochs without augmentation, and then on a loss that pushes the means
    of the labels apart, since at first it is the poison that is learned; the trainer ``d-st`` does so. Here it is the
    model that is given, so give one that was trained briefly and without crops, turns and flips.

    The filter has no rule that says whether there is poison: it takes its share out of any set. Poison of the clean
    label kind, and triggers that survive turns, move no further than a class.

    Args:
        rate: Share of the examples to take out, in (0, 1) (the paper: 5 %).
        degrees: It is turned by up to this many degrees either way, in [0, 180].
        shift: Then it is shifted by up to this share of its height and width either way, in [0, 1].
        repeats: Draws that the score is the mean of, at least 1; the public code takes 1, more is less noise.

    References:
        Chen, Wu and Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS 2022,
        and its public code, whose settings these are. The score alone as a filter is ours.
    """

    rate: float = 0.05
    degrees: float = 180.0
    shift: float = 0.2
    repeats: int = 1

    def __post_init__(self) -> None:
        self.require("rate", 0 < self.rate < 1, "in (0, 1)")
        self.require("degrees", 0 <= self.degrees <= 180, "in [0, 180]")
        self.require("shift", 0 <= self.shift <= 1, "in [0, 1]")
        self.require("repeats", self.repeats >= 1, "at least 1")

    def filter(self, model: nn.Module, examples: ExampleSource, run: Run, clean: Clean | None) -> Suspicion:
        """See :class:`bezoar.core.filtering.Filter`."""
        del clean
        moved = consistency(model, examples, run, degrees=self.degrees, shift=self.shift, repeats=self.repeats)
        broken = ~moved.isfinite()
        if bool(broken.any()):
            run.warnings.append(f"{int(broken.sum())} examples have features that are not finite; their score is 0")
            moved = moved.masked_fill(broken, 0.0)
        suspect = lowest(-moved, whole_part(self.rate, len(moved)))
        means = {
            label: float(moved[examples.labels == label].mean())
            for label in range(examples.num_classes)
            if bool((examples.labels == label).any())
        }
        rule = f"the {self.rate:.3g} of all examples whose features move furthest when they are turned and shifted"
        return Suspicion(moved, suspect, rule, means)
