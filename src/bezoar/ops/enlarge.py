"""A handful of images made into more: changed copies that a model should answer alike."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def changed(x: Tensor, generator: torch.Generator, strength: float = 0.5) -> Tensor:
    """Copies of ``(B, C, H, W)`` images in [0, 1], each slightly turned, moved, scaled, sheared and lit otherwise.

    Args:
        x: Floats, on any device.
        generator: A CPU generator.
        strength: 1 is up to 10 degrees, a tenth of the side, 15 % of scale, 8 degrees of shear and 20 % of brightness.
    """

    def draw(most: float) -> Tensor:
        return (2 * torch.rand(len(x), generator=generator, dtype=torch.float64) - 1) * most * strength

    angle, shear, scale = draw(math.radians(10)), draw(math.tan(math.radians(8))), 1 + draw(0.15)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    # Translations are in half sides, as affine_grid has them.
    rows = torch.stack([cos, shear - sin, draw(0.2), sin, cos, draw(0.2)], 1).view(-1, 2, 3)
    grid = F.affine_grid(rows.to(x), list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, align_corners=False)
    light = (1 + draw(0.2)).to(x).view(-1, 1, 1, 1)
    return (moved * light).clamp(0, 1)


def enlarged(x: Tensor, y: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The images and changed copies of them, at least ``count`` in all, each image copied equally often.

    Args:
        x: ``(N, C, H, W)`` images in [0, 1], at least one.
        y: ``(N,)`` labels.
        count: How many there should be; where there are as many already, nothing is added.
        generator: A CPU generator.
    """
    copies = -(-(count - len(x)) // len(x)) if count > len(x) else 0
    parts = [x, *(changed(x, generator) for _ in range(copies))]
    return torch.cat(parts), y.repeat(copies + 1)
