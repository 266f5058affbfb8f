"""What training minimises, where it is not plain cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """What an objective gets.

    Attributes:
        x: ``(B, C, H, W)`` images in [0, 1], on the device, before augmentation.
        y: ``(B,)`` labels, on the device.
        index: ``(B,)`` positions of the examples in the training set, on the CPU.
        augment: The recipe's augmentation (all but MixUp) for any ``(B, C, H, W)`` floats; each call draws anew.
        generator: The run's CPU generator.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    augment: Callable[[Tensor], Tensor]
    generator: torch.Generator


class Objective(Protocol):
    """What training minimises, where it is not plain cross-entropy; may train networks of its own beside the model.

    Random numbers come from the batch's generator or torch's global one: both are kept in checkpoints. The attributes
    that it comes with (numbers, texts, tensors, networks, frozen dataclasses) count as settings: a checkpoint of an
    objective with other ones is refused, so a clock does not belong there.
    """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar loss of one step; the caller does the backward pass and the step of the model."""

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        """Told before each epoch; ``number`` counts from 0. Not told again where a run goes on inside an epoch."""

    def state_dict(self) -> dict[str, Any]:
        """All tensors and numbers that a killed run needs to go on, and that are wanted after the training."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; its tensors are on the CPU."""


class Stateless:
    """The part of an objective that one without state of its own leaves out."""

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        """Nothing changes between epochs."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
