"""Small patterns and where they sit, for all attacks that stamp a patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from bezoar.core.errors import SettingError
from bezoar.core.trigger import MaskedTrigger

Corner = Literal["bottom-right", "bottom-left", "top-right", "top-left"]
CORNERS: tuple[Corner, ...] = ("bottom-right", "bottom-left", "top-right", "top-left")

# Written by the loaders of NAD, ABL and RNP and by those of ANP and NFT; not a true checkerboard.
_GRID = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0))

#: Which pixels of a patch are stamped, ``(1, h, w)``, and their values, ``(C, h, w)``.
Patch = tuple[Tensor, Tensor]


def draw(pattern: str, channels: int, height: int, width: int, seed: int) -> Patch:
    """A patch.

    Args:
        pattern: One of ``PATTERNS``.
        channels: Colour channels.
        height: Rows, at least 1.
        width: Columns, at least 1.
        seed: Of random colours.

    Raises:
        SettingError: The pattern does not come in this size.
    """
    return PATTERNS[pattern](channels, height, width, seed)


def place(patch: Patch, shape: tuple[int, int, int], at: list[tuple[int, int]], alpha: float = 1.0) -> MaskedTrigger:
    """A trigger that blends a patch in at each of the places ``(top row, left column)``.

    Raises:
        SettingError: The patch leaves the image.
    """
    _, height, width = shape
    mask, pattern = torch.zeros(1, height, width), torch.zeros(shape)
    rows, columns = patch[0].shape[1:]
    for top, left in at:
        if top < 0 or left < 0 or top + rows > height or left + columns > width:
            raise SettingError(
                f"a patch of {rows}x{columns} pixels at row {top}, column {left} leaves a {height}x{width} image",
                "Choose a smaller size or margin, or another place",
            )
        mask[:, top : top + rows, left : left + columns] = alpha * patch[0]
        pattern[:, top : top + rows, left : left + columns] = patch[0] * patch[1]
    return MaskedTrigger(mask, pattern)


def in_corner(corner: Corner, margin: int, size: tuple[int, int], shape: tuple[int, int, int]) -> tuple[int, int]:
    """Top row and left column of a patch of ``size`` (rows, columns) that keeps ``margin`` pixels from the border."""
    vertical, horizontal = corner.split("-")
    top = margin if vertical == "top" else shape[1] - margin - size[0]
    left = margin if horizontal == "left" else shape[2] - margin - size[1]
    return top, left


def _square(channels: int, height: int, width: int, _seed: int) -> Patch:
    return torch.ones(1, height, width), torch.ones(channels, height, width)


def _noise(channels: int, height: int, width: int, seed: int) -> Patch:
    values = torch.rand(channels, height, width, generator=torch.Generator().manual_seed(seed))
    return torch.ones(1, height, width), values


def _grid(channels: int, height: int, width: int, _seed: int) -> Patch:
    if (height, width) != (3, 3):
        raise SettingError(f"the grid pattern has size 3, got {height}x{width}", "Give size=3")
    return torch.ones(1, 3, 3), torch.tensor(_GRID).expand(channels, -1, -1)


def _checkerboard(channels: int, height: int, width: int, _seed: int) -> Patch:
    rows, columns = torch.arange(height).flip(0)[:, None], torch.arange(width).flip(0)
    values = ((rows + columns) % 2 == 0).float()  # white in the bottom right corner
    return torch.ones(1, height, width), values.expand(channels, -1, -1)


def _triangle(channels: int, height: int, width: int, _seed: int) -> Patch:
    rows, columns = torch.arange(1, height + 1)[:, None], torch.arange(1, width + 1)
    inside = (rows * width + columns * height > height * width).float()  # right angle in the bottom right corner
    return inside[None], torch.ones(channels, height, width)


def _l_shape(channels: int, height: int, width: int, _seed: int) -> Patch:
    mask = torch.zeros(1, height, width)
    mask[:, :, : max(1, width // 3)] = 1
    mask[:, height - max(1, height // 3) :] = 1
    return mask, torch.ones(channels, height, width)


PATTERNS: dict[str, Callable[[int, int, int, int], Patch]] = {
    "square": _square,
    "noise": _noise,
    "grid": _grid,
    "checkerboard": _checkerboard,
    "triangle": _triangle,
    "l-shape": _l_shape,
}
