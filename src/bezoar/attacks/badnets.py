"""BadNets: a small patch (Gu et al., "BadNets", 2017; patterns of Neural Cleanse and of the public code)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bezoar.attacks._patch import CORNERS, Corner, draw, in_corner, place
from bezoar.attacks._poison import PoisonAttack
from bezoar.core.errors import SettingError
from bezoar.core.trigger import MaskedTrigger


@dataclass(frozen=True, kw_only=True)
class BadNets(PoisonAttack):
    """Replace, or blend in, a patch of the image.

    The paper's single pixel is ``size=1``; its all-to-all attack is ``label_map="all-to-all"``. The public loaders of
    NAD, ABL and RNP also poison images of the target class; here, as in the I-BAU and FTrojan code, they are left out.

    Args:
        pattern: ``square`` (white), ``noise`` (random colours), ``grid`` (the 3x3 pattern of the NAD, ABL, RNP, ANP and
            NFT code, which is no true checkerboard), ``checkerboard`` (a true one), ``triangle`` and
            ``l-shape`` (white), ``random-pixels`` (``size`` x ``width`` single pixels of random colours, anywhere) or
            ``random-image`` (a random colour in every pixel, blended in).
        size: Rows of the patch, at least 1; None is 4, and 3 for ``grid``.
        width: Columns of the patch; 0 takes as many as rows.
        margin: Distance from the border, in pixels; None is 1, and 0 for ``grid``, as in the public code.
        corner: Where the patch sits; ``all`` puts it in all four corners.
        row: Top row of the patch, instead of a corner; -1 takes the corner.
        column: Left column of the patch, instead of a corner; -1 takes the corner.
        alpha: Opacity of the pattern, in (0, 1]; None is 1, and 0.2 for ``random-image``.

    References:
        Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017.
    """

    pattern: Literal[
        "square", "noise", "grid", "checkerboard", "triangle", "l-shape", "random-pixels", "random-image"
    ] = "square"
    size: int | None = None
    width: int = 0
    margin: int | None = None
    corner: Literal["bottom-right", "bottom-left", "top-right", "top-left", "all"] = "bottom-right"
    row: int = -1
    column: int = -1
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("size", self.size is None or self.size >= 1, "at least 1")
        self.require("width", self.width >= 0, "at least 0")
        self.require("margin", self.margin is None or self.margin >= 0, "at least 0")
        self.require("row", self.row >= -1, "at least -1")
        self.require("column", self.column >= -1, "at least -1")
        self.require("alpha", self.alpha is None or 0 < self.alpha <= 1, "in (0, 1]")
        if self.pattern == "random-image":
            self.require("alpha", self.alpha != 1, "below 1 for random-image, which covers the whole image")

    def trigger(self, shape: tuple[int, int, int]) -> MaskedTrigger:
        """See :class:`PoisonAttack`.

        Raises:
            SettingError: The patch leaves the image, or the pattern does not come in this size.
        """
        if self.pattern == "random-image":
            return place(draw("noise", *shape, self.seed), shape, [(0, 0)], 0.2 if self.alpha is None else self.alpha)
        alpha = 1.0 if self.alpha is None else self.alpha
        if self.pattern == "random-pixels":
            return self._pixels(shape, alpha)
        rows, columns = self._size()
        patch = draw(self.pattern, shape[0], rows, columns, self.seed)
        return place(patch, shape, self._places(shape), alpha)

    def _size(self) -> tuple[int, int]:
        usual = 3 if self.pattern == "grid" else 4
        rows = usual if self.size is None else self.size
        return rows, self.width or rows

    def _places(self, shape: tuple[int, int, int]) -> list[tuple[int, int]]:
        """Top row and left column of each copy of the patch."""
        corners: tuple[Corner, ...] = CORNERS if self.corner == "all" else (self.corner,)
        usual = 0 if self.pattern == "grid" else 1
        margin = usual if self.margin is None else self.margin
        at = [in_corner(corner, margin, self._size(), shape) for corner in corners]
        return [(top if self.row < 0 else self.row, left if self.column < 0 else self.column) for top, left in at]

    def _pixels(self, shape: tuple[int, int, int], alpha: float) -> MaskedTrigger:
        channels, height, width = shape
        generator = torch.Generator().manual_seed(self.seed)
        rows, columns = self._size()
        count = rows * columns
        if count > height * width:
            raise SettingError(f"{count} random pixels do not fit in a {height}x{width} image", "Choose a smaller size")
        chosen = torch.randperm(height * width, generator=generator)[:count]
        mask, pattern = torch.zeros(1, height * width), torch.zeros(channels, height * width)
        mask[:, chosen] = alpha
        pattern[:, chosen] = torch.rand(channels, count, generator=generator)
        return MaskedTrigger(mask.view(1, height, width), pattern.view(shape))
