"""BadNets: a small patch (Gu et al., "BadNets", 2017; patterns of Neural Cleanse and of the public code)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bezoar.attacks._poison import PoisonAttack
from bezoar.core.trigger import MaskedTrigger

# The 3x3 pattern that the NAD, ABL and RNP code writes into the bottom right corner; not a true checkerboard.
_GRID = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class BadNets(PoisonAttack):
    """Replace a patch of the image.

    Args:
        pattern: ``square`` (white), ``noise`` (random colours) or ``grid`` (the 3x3 grid of the NAD code, ``size`` 3).
        size: Side of the patch, in pixels.
        margin: Distance from the border, in pixels.
        corner: Where the patch sits.

    References:
        Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017.
    """

    pattern: Literal["square", "noise", "grid"] = "square"
    size: int = 4
    margin: int = 1
    corner: Literal["bottom-right", "bottom-left", "top-right", "top-left"] = "bottom-right"

    def trigger(self, shape: tuple[int, int, int]) -> MaskedTrigger:
        channels, height, width = shape
        if self.size + self.margin > min(height, width):
            raise ValueError(f"a patch of {self.size} pixels with margin {self.margin} leaves a {height}x{width} image")
        vertical, horizontal = self.corner.split("-")
        top = self.margin if vertical == "top" else height - self.margin - self.size
        left = self.margin if horizontal == "left" else width - self.margin - self.size
        rows, columns = slice(top, top + self.size), slice(left, left + self.size)
        mask, pattern = torch.zeros(1, height, width), torch.zeros(channels, height, width)
        mask[:, rows, columns] = 1
        pattern[:, rows, columns] = self._patch(channels)
        return MaskedTrigger(mask, pattern)

    def _patch(self, channels: int) -> Tensor:
        if self.pattern == "square":
            return torch.ones(channels, self.size, self.size)
        if self.pattern == "noise":
            return torch.rand(channels, self.size, self.size, generator=torch.Generator().manual_seed(self.seed))
        if self.size != len(_GRID):
            raise ValueError(f"the grid pattern has size 3, got {self.size}")
        return torch.tensor(_GRID).expand(channels, -1, -1)
