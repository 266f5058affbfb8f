"""What trainers share: the settings of a training, and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from bezoar.core.examples import ExampleSource
from bezoar.core.run import Run
from bezoar.core.training import Trainer
from bezoar.ops.answers import answers
from bezoar.ops.normalisation import optimizer_from_scratch
from bezoar.ops.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Settings(Trainer):
    """Settings of the optimiser and of the augmentation."""

    batch: int = 128
    lr: float | None = None
    optimizer: Literal["sgd", "adam"] | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    pad: int = 4
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        self.require("batch", self.batch >= 1, "at least 1")
        self.require("lr", self.lr is None or self.lr > 0, "above 0, or None")
        self.require("optimizer", self.optimizer in (None, "sgd", "adam"), "sgd or adam, or None")
        self.require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        for name in ("weight_decay", "pad", "cutout"):
            self.require(name, getattr(self, name) >= 0, "at least 0")

    def recipe(self, model: nn.Module, **more: Any) -> Recipe:
        """A recipe without augmentation: SGD at 0.1 for a net with batch statistics, else Adam at 1e-3.

        Args:
            model: To be trained.
            **more: Further settings of the recipe; those given here come first.
        """
        optimizer = self.optimizer or optimizer_from_scratch(model)[0]
        usual = 1e-3 if optimizer == "adam" else 0.1
        settings: dict[str, Any] = {
            "batch": self.batch,
            "lr": self.lr or usual,
            "optimizer": optimizer,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }
        return Recipe(**settings | more)

    def augmentation(self) -> dict[str, Any]:
        """The recipe's settings of augmentation."""
        return {"pad": self.pad, "flip": self.flip, "cutout": self.cutout}


def kept(folder: Path | None, name: str) -> Path | None:
    """The checkpoint of one training."""
    return None if folder is None else folder / f"{name}.pt"


def correct(model: nn.Module, examples: ExampleSource, run: Run) -> Tensor:
    """``(N,)`` bool: which examples the model gives their label, in eval mode; the model stays as it is."""
    return answers(model, examples, run.device) == examples.labels
