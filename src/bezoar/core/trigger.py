"""Concrete triggers: values that stamp raw inputs, go to disk and to workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Trigger(Protocol):
    """A change of raw inputs: ``(B, C, H, W)`` in [0, 1] to the same shape and range."""

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        ...


@dataclass(frozen=True, eq=False)
class MaskedTrigger:
    """Masked replacement ``(1 - m) x + m p``, equation (1) of Neural Cleanse.

    Args:
        mask: ``(1, H, W)`` in [0, 1], shared by the colour channels.
        pattern: ``(C, H, W)`` in [0, 1].
    """

    mask: Tensor
    pattern: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        mask, pattern = self.mask.to(x), self.pattern.to(x)
        return (1 - mask) * x + mask * pattern

    @property
    def size(self) -> float:
        """L1 norm of the mask in pixels: each pixel counts once, not once per colour channel."""
        return float(self.mask.sum())


@dataclass(frozen=True, eq=False)
class AdditiveTrigger:
    """Addition ``clip(x + d, 0, 1)``.

    Args:
        delta: ``(C, H, W)`` in [-1, 1].
    """

    delta: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        return torch.clamp(x + self.delta.to(x), 0, 1)

    @property
    def size(self) -> float:
        """Root mean square of the change, in [0, 1]."""
        return float(self.delta.square().mean().sqrt())


#: What an inversion finds.
InvertedTrigger = MaskedTrigger | AdditiveTrigger


def trigger_tensors(trigger: InvertedTrigger) -> dict[str, Tensor]:
    """The tensors of a trigger by field name, to go to disk; :func:`trigger_of` is the reverse."""
    return {f.name: getattr(trigger, f.name).contiguous() for f in dataclasses.fields(trigger)}


def trigger_of(tensors: Mapping[str, Tensor]) -> InvertedTrigger:
    """The trigger that has these tensors.

    Raises:
        KeyError: They are those of no trigger.
    """
    return (
        AdditiveTrigger(tensors["delta"]) if "delta" in tensors else MaskedTrigger(tensors["mask"], tensors["pattern"])
    )
