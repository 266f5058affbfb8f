"""Blend: a faint picture over the whole image (Chen et al., "Targeted Backdoor Attacks", 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bezoar.attacks._poison import PoisonAttack
from bezoar.core.trigger import MaskedTrigger


@dataclass(frozen=True, kw_only=True)
class Blend(PoisonAttack):
    """``(1 - alpha) x + alpha pattern`` with a Gaussian noise pattern.

    Args:
        alpha: Share of the pattern, in (0, 1].

    References:
        Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017.
    """

    alpha: float = 0.2

    def trigger(self, shape: tuple[int, int, int]) -> MaskedTrigger:
        generator = torch.Generator().manual_seed(self.seed)
        pattern = torch.clamp(0.5 + 0.25 * torch.randn(shape, generator=generator), 0, 1)
        return MaskedTrigger(torch.full((1, *shape[1:]), self.alpha), pattern)
