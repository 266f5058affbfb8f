"""What purifiers that fine-tune share."""

from __future__ import annotations

from dataclasses import dataclass

from bezoar.core.method import Purifier
from bezoar.ops.fit import Recipe


@dataclass(frozen=True, kw_only=True)
class Tuning(Purifier):
    """Settings of SGD with momentum 0.9 and Nesterov, whose learning rate falls to zero along a cosine."""

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
        for name in ("lr", "weight_decay", "pad", "clip"):
            self.require(name, getattr(self, name) >= 0, "at least 0")

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
