"""Batches for methods that count steps instead of epochs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bezoar.ops.augment import as_float, augment
from bezoar.ops.recipe import Recipe

_AS_IT_IS = Recipe()


def drawn(
    x: Tensor,
    y: Tensor,
    batch: int,
    steps: int,
    generator: torch.Generator,
    *,
    device: torch.device | None = None,
    recipe: Recipe = _AS_IT_IS,
) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` batches, each drawn from all examples with replacement, as the public code of ANP and NFT does.

    Args:
        x: ``(N, C, H, W)`` images in [0, 1], or uint8.
        y: ``(N,)`` labels.
        batch: Examples of each batch, whatever N is.
        steps: Number of batches.
        generator: A CPU generator.
        device: Where the batches go; where ``x`` is by default.
        recipe: Its crop, flip, rotation and Cutout are applied; none by default.
    """
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        images = as_float(x[rows]).to(device or x.device)
        yield augment(images, recipe, generator), y[rows].to(device or y.device)


def passes(
    x: Tensor,
    y: Tensor,
    batch: int,
    generator: torch.Generator,
    *,
    device: torch.device | None = None,
    recipe: Recipe = _AS_IT_IS,
    least: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over all examples in random order.

    Args:
        x, y, batch, generator, device, recipe: As for :func:`drawn`.
        least: A last batch of fewer examples is left out, unless it is the only one; 2 where the model is in train
            mode, as BatchNorm cannot train on a single example.
    """
    order = torch.randperm(len(x), generator=generator)
    parts = torch.split(order, batch)
    for rows in parts:
        if len(rows) < least and len(parts) > 1:
            continue
        images = as_float(x[rows]).to(device or x.device)
        yield augment(images, recipe, generator), y[rows].to(device or y.device)
