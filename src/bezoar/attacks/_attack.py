"""The kind ``Attack``: plants a known backdoor, for evaluation only. No defence can import this package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from bezoar.attacks._labels import LabelMap
from bezoar.core.examples import Examples
from bezoar.core.method import Method
from bezoar.core.run import Run
from bezoar.core.trigger import Trigger
from bezoar.ops.fit import Objective, Recipe, fit


@dataclass(frozen=True)
class Plant:
    """One planted behaviour: this trigger causes these labels. ``name`` tells several apart."""

    trigger: Trigger
    labels: LabelMap
    name: str = "trigger"


@dataclass(frozen=True)
class Control:
    """A change like the trigger's that must not work: images that carry it keep their true label."""

    trigger: Trigger
    name: str


@dataclass(frozen=True)
class GroundTruth:
    """What the attacker knows.

    Attributes:
        plants: Planted triggers; the first is the main one.
        controls: Changes that the attack taught the victim to ignore, such as WaNet's noisy warps.
        figures: What the attack measured of itself by name, such as the share of hidden bits that can be read.
    """

    plants: tuple[Plant, ...]
    controls: tuple[Control, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def main(self) -> Plant:
        """The first plant."""
        return self.plants[0]


@dataclass(frozen=True)
class Backdoored:
    """A victim and its ground truth.

    Attributes:
        model: In eval mode; takes ``(B, C, H, W)`` in [0, 1].
        truth: Test-time triggers and label maps.
        index: ``(P,)`` positions of the poisoned training examples, ascending.
        cover: ``(Q,)`` positions of examples that carry a trigger and keep their true label.
        afresh: Whether training poisoned every batch anew; the positions are then one draw of the same shares, for the
            finished trigger.
    """

    model: nn.Module
    truth: GroundTruth
    index: Tensor
    cover: Tensor
    afresh: bool = False


@dataclass(frozen=True)
class Training:
    """What the attacker trains with.

    Attributes:
        build: Makes the victim's network, freshly initialised.
        recipe: Recipe of the victim.
        run: Device, seed and progress.
        folder: Where checkpoints are kept, one file for each network; None keeps none.
        devices: How many devices share each batch; training with an objective of its own takes one.
    """

    build: Callable[[], nn.Module]
    recipe: Recipe
    run: Run = field(default_factory=Run)
    folder: Path | None = None
    devices: int = 1

    def fit(
        self,
        name: str,
        data: Examples,
        *,
        model: nn.Module | None = None,
        recipe: Recipe | None = None,
        objective: Objective | None = None,
    ) -> nn.Module:
        """Train a network and give it back in eval mode; one that was finished before a kill is read back.

        Args:
            name: Names the checkpoint; must differ between the networks of one attack.
            data: Examples as the network shall see them.
            model: Start from this one instead of a new one; it is changed.
            recipe: Other recipe than the victim's.
            objective: Other loss than the cross-entropy of the model on the augmented batch.
        """
        if model is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.run.seed)
                model = self.build()
        fit(
            model.to(self.run.device),
            data.x,
            data.y,
            recipe or self.recipe,
            seed=self.run.seed,
            objective=objective,
            progress=lambda done, total, loss: self.run.progress.report(
                f"train {name}", done, total, f"loss {loss:.3f}"
            ),
            checkpoint=None if self.folder is None else self.folder / f"{name}.pt",
            devices=self.devices if objective is None else 1,
        )
        return model


@dataclass(frozen=True, kw_only=True)
class Attack(Method, ABC):
    """Plants a backdoor in a network.

    Args:
        target: Label that the trigger shall cause.
        seed: Chooses the examples and any random part of the trigger.
    """

    target: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self.require("target", self.target >= 0, "at least 0")

    @final
    def __call__(self, data: Examples, training: Training) -> Backdoored:
        """Train a backdoored network on a copy of the data; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.implant(data, training)

    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """Refuse, before any training, what would fail after it.

        Args:
            model: A network like the victim's, in eval mode.
            shape: ``(C, H, W)`` of one image.

        Raises:
            SettingError: A setting does not suit the network or the images.
            UnsupportedModel: The attack cannot work with such a network.
        """
        del model, shape

    @abstractmethod
    def implant(self, data: Examples, training: Training) -> Backdoored:
        """The idea of the attack."""
