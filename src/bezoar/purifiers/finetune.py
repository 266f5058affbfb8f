"""Fine-tuning: the baseline of every repair method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.fit import Recipe, fit


@dataclass(frozen=True, kw_only=True)
class Finetune(Purifier):
    """Train all weights on the clean images with cross-entropy.

    Args:
        epochs: Passes over the clean images.
        lr: Peak learning rate of SGD (momentum 0.9, Nesterov), falling to zero along a cosine. It decides everything:
            0.1 forgets the backdoor and some accuracy, 0.001 changes next to nothing.
        batch: Images per step.
        weight_decay: L2 penalty.
        pad: Random crop after padding by this many pixels.
        flip: Random horizontal flip; off by default, since signs, digits and text must not be mirrored.
        clip: Largest gradient norm.

    References:
        Wu et al., "BackdoorBench", NeurIPS 2022, defence ``ft`` (SGD 0.01, cosine, weight decay 5e-4).
    """

    epochs: int = 20
    lr: float = 0.01
    batch: int = 64
    weight_decay: float = 5e-4
    pad: int = 2
    flip: bool = False
    clip: float = 5.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("lr", self.lr >= 0, "at least 0")

    def recipe(self) -> Recipe:
        """The training recipe."""
        return Recipe(
            epochs=self.epochs,
            lr=self.lr,
            batch=self.batch,
            weight_decay=self.weight_decay,
            schedule="cosine",
            pad=self.pad,
            flip=self.flip,
            clip=self.clip,
        )

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, MaskedTrigger]) -> nn.Module:
        """See :class:`Purifier`; the triggers are not used."""
        del triggers
        fit(model, clean.x, clean.y, self.recipe(), seed=run.seed, progress=run.progress.training)
        return model
