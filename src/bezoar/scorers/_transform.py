"""Smooth changes of images, one for each label: a warp and a low-frequency change of colour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.core.run import Run
from bezoar.core.space import Parameters

#: Standard deviation of the parameters at the start, in pixels and in [0, 1].
_START = 0.01


@dataclass(frozen=True)
class Smooth:
    """Warps ``x(p + f(p))`` plus a colour change ``d(p)``, both smooth: they are given on coarse grids and upsampled.

    Args:
        shape: ``(C, H, W)`` of one image.
        warp: Side of the warp's grid; values are in units of ``unit`` pixels.
        colour: Side of the colour change's grid.
        unit: Pixels that a value of 1 moves by, so that one step size fits both.
    """

    shape: tuple[int, int, int]
    warp: int
    colour: int
    unit: float = 4.0

    def start(self, labels: list[int], run: Run) -> Parameters:
        """Nearly no change; that of a label depends on the label and the seed alone."""
        flow, shift = [], []
        for label in labels:
            source = run.generator("smooth", label)
            flow.append(_START * torch.randn(2, self.warp, self.warp, generator=source))
            shift.append(_START * torch.randn(self.shape[0], self.colour, self.colour, generator=source))
        return {
            "flow": torch.stack(flow).to(run.device).requires_grad_(),
            "shift": torch.stack(shift).to(run.device).requires_grad_(),
        }

    def stamp(self, parameters: Parameters, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` images to ``(T, B, C, H, W)`` changed ones in [0, 1], differentiable in the parameters."""
        _, height, width = self.shape
        count, batch = len(parameters["flow"]), len(x)
        flow = self._up(parameters["flow"])
        # grid_sample counts from -1 to 1 over the pixels; channel 0 moves along x.
        scale = torch.tensor([max(1, width - 1), max(1, height - 1)], dtype=flow.dtype, device=flow.device)
        moved = self._identity(flow) + 2 * self.unit * flow.movedim(1, -1) / scale
        grids = moved[:, None].expand(-1, batch, -1, -1, -1).flatten(0, 1)
        images = x[None].expand(count, *x.shape).flatten(0, 1)
        warped = F.grid_sample(images, grids.to(images), padding_mode="border", align_corners=True)
        shift = self._up(parameters["shift"])[:, None].to(images)
        return torch.clamp(warped.view(count, *x.shape) + shift, 0, 1)

    def _up(self, grid: Tensor) -> Tensor:
        return F.interpolate(grid, self.shape[1:], mode="bicubic", align_corners=True)

    def _identity(self, like: Tensor) -> Tensor:
        _, height, width = self.shape
        rows, columns = (torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device) for n in (height, width))
        grid = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack([grid[1], grid[0]], dim=-1)


def distortion(changed: Tensor, x: Tensor) -> Tensor:
    """``(T,)`` root mean square of what ``(T, B, C, H, W)`` images differ by from ``(B, C, H, W)`` ones."""
    # The root of exactly zero has no gradient.
    return ((changed - x).flatten(1).square().mean(1) + 1e-12).sqrt()
