"""Plain training: what happens to a network where nothing is done against poison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from bezoar.core.examples import ExampleSource
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.training import Trained
from bezoar.ops.fit import fit, tell
from bezoar.ops.objective import Objective
from bezoar.trainers._training import Settings, kept


@dataclass(frozen=True, kw_only=True)
class Plain(Settings):
    """Plain training with no defence, the baseline that the other trainers are held against.

    Args:
        epochs: Passes over the data, at least 1.
        schedule: How the learning rate changes, see :class:`bezoar.ops.recipe.Recipe`.
        batch: Examples per step, at least 1.
        lr: Peak learning rate, above 0; None is 0.1 with SGD and 0.001 with Adam.
        optimizer: ``sgd`` or ``adam``; None is SGD for a net with BatchNorm, else Adam.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: L2 penalty, at least 0.
        pad: Random crop after padding by this many pixels; 0 switches it off.
        flip: Random horizontal flip; wrong for digits, text and traffic signs.
        cutout: Side in pixels of a square that is set to 0; 0 switches it off.

    References:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, for the usual recipe of SGD with crops and
        flips; the peak and the cosine of the learning rate are ours.
    """

    epochs: int = 30
    schedule: Literal["constant", "cosine", "onecycle", "step"] = "onecycle"
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("epochs", self.epochs >= 1, "at least 1")
        self.require("schedule", self.schedule in ("constant", "cosine", "onecycle", "step"), "a known schedule")

    def train(
        self,
        build: Callable[[], nn.Module],
        examples: ExampleSource,
        run: Run,
        folder: Path | None,
        clean: Clean | None,
    ) -> Trained:
        """See :class:`bezoar.core.training.Trainer`; no example is isolated."""
        del clean
        return Trained(self.learned(build, examples, run, folder, "train"))

    def objective(self) -> Objective | None:
        """What is minimised instead of the cross-entropy on augmented images."""
        return None

    def learned(
        self,
        build: Callable[[], nn.Module],
        examples: ExampleSource,
        run: Run,
        folder: Path | None,
        phase: str,
        augmented: bool = True,
    ) -> nn.Module:
        """A network that was trained on these examples, in eval mode.

        Args:
            build, examples, run, folder: See :class:`bezoar.core.training.Trainer`.
            phase: Name of this training, for the user's eye and for its checkpoint.
            augmented: Whether the images are augmented as the settings say.
        """
        model = build().to(run.device)
        more = self.augmentation() if augmented else {}
        fit(
            model,
            examples,
            examples.labels,
            self.recipe(model, epochs=self.epochs, schedule=self.schedule, **more),
            seed=run.seed,
            objective=self.objective(),
            progress=tell(run, phase),
            checkpoint=kept(folder, phase),
        )
        return model
