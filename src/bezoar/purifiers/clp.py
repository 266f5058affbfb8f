"""CLP: prune the channels that amplify most; needs no data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.augment import as_float
from bezoar.ops.lipschitz import lipschitz, pairs, stands_out, weight_of


@dataclass(frozen=True, kw_only=True)
class CLP(Purifier):
    """Channel Lipschitz pruning: shut the channels whose largest possible amplification stands out in their layer.

    A trigger is a small change with a large effect, so some channel must amplify it. The bound of a channel is the
    spectral norm of its kernel, as a matrix of input channels by positions, times the gain of the BatchNorm behind it
    over its standard deviation. Channels far above the mean of their layer are shut, gain and shift. A net without any
    BatchNorm behind a convolution is judged by the kernels of its hidden layers alone, which is ours. The clean images
    only show which layers follow each other.

    Args:
        u: Channels more than this many standard deviations above the mean of their layer are shut, above 0. With n
            channels none can be more than ``(n - 1) / sqrt(n)`` above it: with 3, layers of ten or less are left alone.

    References:
        Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022; u = 3 for CIFAR-10.
    """

    u: float = 3.0

    def __post_init__(self) -> None:
        self.require("u", self.u > 0, "above 0")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        x = as_float(clean.x[:1]).to(next(model.parameters()).device)
        layers = pairs(model, x)
        if not layers:
            raise UnsupportedModel(
                f"{type(model).__name__} has no hidden convolution or linear layer",
                "Use a method that tunes weights, such as finetune",
            )
        if all(norm is None for _, norm in layers):
            run.warnings.append("CLP was made for convolutions with BatchNorm: here the kernels alone decide")
        shut = 0
        for layer, norm in layers:
            bounds = lipschitz(layer, norm)
            high = stands_out(bounds, self.u)
            shut += int(high.sum())
            with torch.no_grad():
                for parameter in (layer if norm is None else norm).parameters(recurse=False):
                    parameter[high] = 0
        run.notes["pruned"], run.notes["channels"] = shut, sum(len(weight_of(layer)) for layer, _ in layers)
        run.progress.training(1, 1, 0.0)
        return model
