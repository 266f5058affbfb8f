"""Unlearning with the inverted trigger (Neural Cleanse, section VI-C)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.fit import Stamp, fit
from bezoar.purifiers._tuning import Tuning


@dataclass(frozen=True, kw_only=True)
class Unlearn(Tuning):
    """Fine-tune while part of the images carry the inverted trigger with their true labels.

    The paper trains one epoch on a tenth of the training set; from a few hundred clean images the same number of
    updates takes several passes, hence ``epochs``.

    Args:
        share: Share of each batch that carries a trigger, in (0, 1] (the paper: 0.2).
        epochs: Passes over the clean images.
        lr: Peak learning rate of SGD, falling to zero along a cosine.
        batch: Images per step.
        weight_decay: L2 penalty.
        jitter: Each stamped image carries the trigger at a random strength between this and 1, in (0, 1]: what is
            unlearned is then the direction, not one exact picture. 1 is the paper's.
        pad: Random crop after padding by this many pixels, before the trigger is stamped.
        flip: Random horizontal flip, before the trigger is stamped.
        clip: Largest gradient norm; 0 switches clipping off.

    References:
        Wang et al., "Neural Cleanse", IEEE S&P 2019, section VI-C.
    """

    needs_triggers = True

    epochs: int = 10
    lr: float = 0.02
    share: float = 0.2
    jitter: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("share", 0 < self.share <= 1, "in (0, 1]")
        self.require("jitter", 0 < self.jitter <= 1, "in (0, 1]")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`."""
        stamp = self.stamp(list(triggers.values()))
        fit(model, clean.x, clean.y, self.recipe(), seed=run.seed, stamp=stamp, progress=run.progress.training)
        return model

    def stamp(self, chosen: list[InvertedTrigger]) -> Stamp:
        """What stamps a share of the images, each with one of the triggers."""

        def stamped(x: Tensor, generator: torch.Generator) -> Tensor:
            which = torch.randint(len(chosen), (len(x),), generator=generator)
            carries = torch.rand(len(x), generator=generator) < self.share
            strength = self.jitter + (1 - self.jitter) * torch.rand(len(x), generator=generator)
            out = x.clone()
            for number, trigger in enumerate(chosen):
                rows = carries & (which == number)
                weight = strength[rows].view(-1, 1, 1, 1).to(x.device)
                rows = rows.to(x.device)
                out[rows] = (1 - weight) * x[rows] + weight * trigger(x[rows])
            return out

        return stamped
