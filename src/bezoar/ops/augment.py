"""Random changes of training images. All draws come from the generator that is given, on the CPU."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.core.errors import MissingExtra
from bezoar.ops.recipe import Recipe


def as_float(x: Tensor) -> Tensor:
    """Images as float in [0, 1]; uint8 is divided by 255."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def augment(x: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Crop, flip, rotation and Cutout of the recipe, in this order, drawn for each image on its own.

    Args:
        x: ``(B, C, H, W)`` floats, on any device; gradients pass.
        recipe: Says which; without any, ``x`` itself comes back.
        generator: A CPU generator.

    Raises:
        MissingExtra: Rotation or Cutout is asked for, and kornia is missing.
    """
    if recipe.pad:
        x = crop(x, recipe.pad, generator)
    if recipe.flip:
        x = flip(x, generator)
    if recipe.rotate:
        x = rotate(x, recipe.rotate, generator)
    if recipe.cutout:
        x = cutout(x, recipe.cutout, generator)
    return x


def crop(x: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Pad ``(B, C, H, W)`` images with ``pad`` zeros on each side, and cut a window of the old size at random."""
    n, _, height, width = x.shape
    padded = F.pad(x, (pad,) * 4)
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1, 1), generator=generator).to(x.device)
    rows = (top + torch.arange(height, device=x.device).view(1, -1, 1)).expand(n, height, width)
    columns = (left + torch.arange(width, device=x.device).view(1, 1, -1)).expand(n, height, width)
    return padded[torch.arange(n, device=x.device).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the ``(B, C, H, W)`` images left to right."""
    flipped = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(flipped.to(x.device), x.flip(3), x)


def rotate(x: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Rotate ``(B, C, H, W)`` images about their centre by up to ``degrees`` either way, bilinear, zeros outside."""
    angles = (2 * torch.rand(len(x), generator=generator) - 1) * degrees
    turned: Tensor = _kornia("kornia.geometry.transform").rotate(x, angles.to(x.device, x.dtype))
    return turned


def cutout(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Set a square to 0 in each of the ``(B, C, H, W)`` images.

    Its centre is any pixel, so that part of it may lie outside, as in the paper. Of an even side, the centre is the
    pixel right below the middle.
    """
    n, _, height, width = x.shape
    top = torch.randint(height, (n,), generator=generator) - side // 2
    left = torch.randint(width, (n,), generator=generator) - side // 2
    boxes = _kornia("kornia.geometry.bbox")
    size = torch.full((n,), side)
    mask = boxes.bbox_to_mask(boxes.bbox_generator(left, top, size, size).to(x.device), width, height)
    return x.masked_fill(mask.bool().unsqueeze(1), 0.0)


def mixup(x: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Mix each of the ``(B, ...)`` images with another one of the batch.

    Returns:
        The mixed images; ``(B,)`` positions of the other images, on the CPU; the share in [0, 1] that each image keeps,
        drawn from Beta(alpha, alpha) once for the batch.
    """
    share = _beta(alpha, generator)
    pairs = torch.randperm(len(x), generator=generator)
    return share * x + (1 - share) * x[pairs.to(x.device)], pairs, share


def cutmix(x: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Paste a box of another image of the batch into each of the ``(B, C, H, W)`` images, at the same place in all.

    Returns:
        The mixed images; ``(B,)`` positions of the other images, on the CPU; the share of its pixels in [0, 1] that
        each image keeps: one minus that of a box drawn from Beta(alpha, alpha), of which what lies outside is cut off.
    """
    cut = (1 - _beta(alpha, generator)) ** 0.5
    pairs = torch.randperm(len(x), generator=generator)
    box = [_window(side, round(cut * side), generator) for side in x.shape[2:]]
    mixed = x.clone()
    mixed[:, :, box[0], box[1]] = x[pairs.to(x.device)][:, :, box[0], box[1]]
    area = (box[0].stop - box[0].start) * (box[1].stop - box[1].start)
    return mixed, pairs, 1 - area / (x.shape[2] * x.shape[3])


def _window(side: int, length: int, generator: torch.Generator) -> slice:
    start = int(torch.randint(side, (), generator=generator)) - length // 2
    return slice(max(0, start), min(side, start + length))


def _beta(alpha: float, generator: torch.Generator) -> float:
    # torch draws from a Beta distribution with its global generator only.
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _kornia(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything
        raise MissingExtra(
            f"rotation and Cutout need kornia, which cannot be imported ({type(error).__name__})",
            "Run: pip install 'bezoar[train]'",
        ) from error
