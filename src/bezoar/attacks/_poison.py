"""What all data-poisoning attacks share: which examples change, and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bezoar.core.trigger import Trigger


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set and its ground truth.

    Attributes:
        x: ``(N, C, H, W)`` images in [0, 1].
        y: ``(N,)`` labels as the victim sees them.
        index: ``(P,)`` positions of the poisoned examples, ascending.
        trigger: What turns any image into a triggered one at test time.
        target: The attacker's label.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    trigger: Trigger
    target: int


@dataclass(frozen=True, kw_only=True)
class PoisonAttack(ABC):
    """A dirty-label or clean-label attack that only changes training examples.

    Args:
        target: Label that the trigger shall cause.
        rate: Poisoned share of the examples that may be poisoned, in (0, 1].
        seed: Chooses the examples and any random pattern.
    """

    target: int = 0
    rate: float = 0.1
    seed: int = 0

    #: A clean-label attack changes examples of the target class and keeps their labels.
    clean_label = False

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"{type(self).__name__}.rate must be in (0, 1], got {self.rate}")
        if self.target < 0:
            raise ValueError(f"{type(self).__name__}.target must be at least 0, got {self.target}")

    @abstractmethod
    def trigger(self, shape: tuple[int, int, int]) -> Trigger:
        """The test-time trigger for images of ``shape`` (C, H, W)."""

    def poison(self, x: Tensor, y: Tensor) -> Poisoned:
        """Poison a copy of ``(x, y)``; the target class is left out of dirty-label poisoning.

        Args:
            x: ``(N, C, H, W)`` images in [0, 1].
            y: ``(N,)`` labels.
        """
        generator = torch.Generator().manual_seed(self.seed)
        allowed = torch.nonzero((y == self.target) == self.clean_label).flatten()
        count = max(1, int(self.rate * (len(allowed) if self.clean_label else len(y))))
        if count > len(allowed):
            raise ValueError(
                f"rate {self.rate} asks for {count} poisoned examples, only {len(allowed)} may be poisoned"
            )
        index = allowed[torch.randperm(len(allowed), generator=generator)[:count]].sort().values
        channels, height, width = x.shape[1:]
        trigger = self.trigger((channels, height, width))
        x, y = x.clone(), y.clone()
        x[index] = trigger(x[index])
        y[index] = self.target
        return Poisoned(x=x, y=y, index=index, trigger=trigger, target=self.target)
