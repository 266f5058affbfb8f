"""Boxes with a coarse pattern as vectors of numbers, for searches that take no gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bezoar.core.trigger import MaskedTrigger

#: Top, left, height and width in pixels.
Region = tuple[int, int, int, int]
Genomes = NDArray[np.float64]
# How far colours reach beyond [0, 1].
_BEYOND = 0.25


@dataclass(frozen=True)
class Boxes:
    """A genome is centre row, centre column, height, width in pixels, a colour, a contrast, and a value of each cell.

    The colour fills the box; where the contrast is above 0, each cell deviates from it by as much as its own value
    says. Half of the range of the contrast is below 0, so that plain boxes are as common as patterned ones, and colours
    reach a little beyond [0, 1] before they are cut, so that black and white are common as well.

    Args:
        shape: ``(C, H, W)`` of an image.
        cells: Cells of the pattern a side; they are stretched over the box.
    """

    shape: tuple[int, int, int]
    cells: int

    @property
    def genes(self) -> int:
        """Numbers of a genome."""
        return 5 + self.shape[0] * (1 + self.cells**2)

    @property
    def whole(self) -> Region:
        """The region of the whole image."""
        return 0, 0, self.shape[1], self.shape[2]

    def bounds(self, region: Region) -> list[tuple[float, float]]:
        """Lower and upper bound of each gene: boxes whose centre lies in a region and that are no larger."""
        top, left, height, width = region
        box = [(top, top + height), (left, left + width), (0.5, height + 0.5), (0.5, width + 0.5)]
        colour = [(-_BEYOND, 1 + _BEYOND)] * self.shape[0]
        cells = [(-1.0, 1.0)] * (1 + self.shape[0] * self.cells**2)
        return [(float(low), float(high)) for low, high in box] + colour + cells

    def spread(self, draws: Genomes) -> Genomes:
        """Genomes of draws in [0, 1]: small boxes as common as large ones, and most of them nearly square."""
        low, high = np.array(self.bounds(self.whole)).T
        genomes: Genomes = low + draws * (high - low)
        _, height, width = self.shape
        side = (min(height, width) / 2) ** draws[:, 2] * np.sqrt(2)
        longer = 2 ** (draws[:, 3] - 0.5)
        genomes[:, 2] = np.clip(side * longer, 1, height)
        genomes[:, 3] = np.clip(side / longer, 1, width)
        return genomes

    def corners(self, genomes: Genomes) -> Tensor:
        """``(S, 4)`` whole numbers of ``(S, genes)``: top, left, height and width of boxes inside the image."""
        _, height, width = self.shape
        most = np.array([height, width])
        sides = np.clip(np.rint(genomes[:, 2:4]), 1, most)
        starts = np.clip(np.rint(genomes[:, :2] - sides / 2), 0, most - sides)
        return torch.from_numpy(np.concatenate([starts, sides], 1).astype(np.int64))

    def sizes(self, genomes: Genomes) -> Tensor:
        """``(S,)`` pixels of the boxes."""
        return self.corners(genomes)[:, 2:].prod(1)

    def decode(self, genomes: Genomes) -> tuple[Tensor, Tensor]:
        """``(S, 1, H, W)`` masks of 0 and 1, and ``(S, C, H, W)`` patterns in [0, 1], which are 0 outside."""
        channels, height, width = self.shape
        box = self.corners(genomes)
        rows, row_cells = self._inside(box[:, 0], box[:, 2], height)
        columns, column_cells = self._inside(box[:, 1], box[:, 3], width)
        masks = (rows[:, :, None] & columns[:, None, :])[:, None].float()
        values = torch.from_numpy(genomes[:, 4:]).float()
        colour, contrast, cells = values[:, :channels], values[:, channels, None], values[:, channels + 1 :]
        cells = colour.clamp(0, 1)[:, :, None] + contrast.clamp(0, 1)[:, :, None] * cells.view(len(cells), channels, -1)
        cells = cells.clamp(0, 1).view(-1, channels, self.cells, self.cells)
        each = torch.arange(len(cells))[:, None, None]
        patterns = cells.permute(0, 2, 3, 1)[each, row_cells[:, :, None], column_cells[:, None, :]]
        return masks, patterns.permute(0, 3, 1, 2) * masks

    def trigger(self, genome: Genomes) -> MaskedTrigger:
        """The trigger of one genome."""
        masks, patterns = self.decode(genome[None])
        return MaskedTrigger(masks[0], patterns[0])

    def _inside(self, start: Tensor, side: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """``(S, length)`` whether a place is inside, and the cell that covers it."""
        places = torch.arange(length)[None] - start[:, None]
        cell = (places * self.cells).div(side[:, None], rounding_mode="floor")
        return (places >= 0) & (places < side[:, None]), cell.clamp(0, self.cells - 1)


def box_around(seen: Tensor, threshold: float) -> Region | None:
    """The smallest region that holds all places of ``(H, W)`` at or above a share of the largest one.

    Returns:
        None where nothing is seen at all.
    """
    if not float(seen.max()) > 0:
        return None
    rows, columns = torch.nonzero(seen >= threshold * seen.max(), as_tuple=True)
    top, left = int(rows.min()), int(columns.min())
    return top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1
