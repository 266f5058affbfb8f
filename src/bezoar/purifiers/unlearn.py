"""Unlearning with the inverted trigger (Neural Cleanse, section VI-C)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.fit import Recipe, fit


@dataclass(frozen=True, kw_only=True)
class Unlearn(Purifier):
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
        clip: Largest gradient norm.

    References:
        Wang et al., "Neural Cleanse", IEEE S&P 2019, section VI-C.
    """

    needs_triggers = True

    share: float = 0.2
    epochs: int = 10
    lr: float = 0.02
    batch: int = 64
    weight_decay: float = 5e-4
    jitter: float = 1.0
    pad: int = 2
    flip: bool = False
    clip: float = 5.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("share", 0 < self.share <= 1, "in (0, 1]")
        self.require("jitter", 0 < self.jitter <= 1, "in (0, 1]")
        self.require("lr", self.lr >= 0, "at least 0")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, MaskedTrigger]) -> nn.Module:
        """See :class:`Purifier`."""
        chosen = list(triggers.values())

        def stamp(x: Tensor, generator: torch.Generator) -> Tensor:
            which = torch.randint(len(chosen), (len(x),), generator=generator)
            carries = torch.rand(len(x), generator=generator) < self.share
            strength = self.jitter + (1 - self.jitter) * torch.rand(len(x), generator=generator)
            out = x.clone()
            for number, trigger in enumerate(chosen):
                rows = carries & (which == number)
                weight = strength[rows].view(-1, 1, 1, 1)
                out[rows] = (1 - weight) * x[rows] + weight * trigger(x[rows])
            return out

        recipe = Recipe(
            epochs=self.epochs,
            lr=self.lr,
            batch=self.batch,
            weight_decay=self.weight_decay,
            schedule="cosine",
            pad=self.pad,
            flip=self.flip,
            clip=self.clip,
        )
        fit(model, clean.x, clean.y, recipe, seed=run.seed, stamp=stamp, progress=run.progress.training)
        return model
