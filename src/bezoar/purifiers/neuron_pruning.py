"""Neuron pruning with the inverted trigger (Neural Cleanse, section VI-B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.augment import as_float
from bezoar.ops.units import Units, last_channels, last_features
from bezoar.purifiers._choose import accuracy

_LAYERS = {"penultimate": last_features, "conv": last_channels}


@dataclass(frozen=True, kw_only=True)
class NeuronPruning(Purifier):
    """Prune the neurons that the inverted trigger excites most, until the model no longer responds to it.

    The neurons of the second-to-last layer are ranked once by how much higher their mean activation is on stamped
    images than on clean ones, and shut in this order, a hundredth at a time. This ends when the inverted trigger rarely
    works any more, or before the clean images lose too much accuracy. Several triggers are treated one after the other.

    Args:
        layer: ``penultimate`` (what the last layer reads) or ``conv`` (the channels of the last convolution, which the
            paper prunes where the second-to-last layer is small and costs too much accuracy).
        success: Pruning ends when at most this share of the stamped images of other labels gets the label, in [0, 1].
        tolerance: Share of the accuracy on the clean images that pruning may cost, in [0, 1].
        share: Largest share of the neurons to prune for one trigger, in (0, 1].

    References:
        Wang et al., "Neural Cleanse", IEEE S&P 2019, section VI-B. It prunes until the trigger stops working, at a cost
        of up to 5 points of accuracy; the bound on that cost is ours.
    """

    needs_triggers = True

    layer: Literal["penultimate", "conv"] = "penultimate"
    success: float = 0.05
    tolerance: float = 0.05
    share: float = 0.5

    def __post_init__(self) -> None:
        self.require("layer", self.layer in _LAYERS, "penultimate or conv")
        self.require("success", 0 <= self.success <= 1, "in [0, 1]")
        self.require("tolerance", 0 <= self.tolerance <= 1, "in [0, 1]")
        self.require("share", 0 < self.share <= 1, "in (0, 1]")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`."""
        x, y = as_float(clean.x), clean.y
        units = _LAYERS[self.layer](model, x[:1].to(next(model.parameters()).device))
        closed = torch.zeros(0, dtype=torch.long)
        floor = (1 - self.tolerance) * accuracy(model, x, y)
        for label, trigger in triggers.items():
            closed = self._prune(model, units, closed, (x, y), label, trigger, floor, run)
        units.fold(closed)
        run.notes["pruned"], run.notes["neurons"] = len(closed), units.count
        return model

    def _prune(
        self,
        model: nn.Module,
        units: Units,
        closed: Tensor,
        clean: tuple[Tensor, Tensor],
        label: int,
        trigger: InvertedTrigger,
        floor: float,
        run: Run,
    ) -> Tensor:
        """Numbers of the units to shut for this trigger too."""
        x, y = clean
        others = y.to(x.device) != label
        if not bool(others.any()):
            run.warnings.append(f"Label {label}: there are no clean images of other labels, so nothing is pruned")
            return closed
        stamped = trigger(x[others])
        target = torch.full((len(stamped),), label)
        ranked = most_excited(model, units, x[others], stamped)
        ranked = ranked[~torch.isin(ranked, closed)]
        step, most = -(-units.count // 100), int(self.share * units.count)
        kept, works = closed, 1.0
        for count in range(0, most + step, step):
            tried = torch.cat([closed, ranked[: min(count, most)]])
            with units.shut(tried):
                if count and accuracy(model, x, y) < floor:
                    break
                kept, works = tried, accuracy(model, stamped, target)
            run.progress.training(min(count, most), most, works)
            if works <= self.success:
                break
        run.notes[f"success_{label}"] = round(works, 4)
        if works > self.success:
            run.warnings.append(
                f"Label {label}: its trigger still works on {works:.0%} of the images; more pruning costs too much "
                f"accuracy or share. Try layer={'conv' if self.layer == 'penultimate' else 'penultimate'}, or unlearn"
            )
        return kept


def most_excited(model: nn.Module, units: Units, x: Tensor, stamped: Tensor) -> Tensor:
    """Numbers of the units, the one first whose mean activation the trigger raises most."""
    rise = units.activations(model, stamped) - units.activations(model, x)
    return rise.argsort(descending=True, stable=True)
