"""Normalisation layers, found by type: their gains and shifts, and what BatchNorm remembers of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from bezoar.ops.augment import as_float

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
NORMALISATIONS = (_BATCH_NORM, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BATCH_NORM) and m.running_mean is not None]


def optimizer_from_scratch(model: nn.Module) -> tuple[Literal["sgd", "adam"], float]:
    """Optimiser and learning rate to begin with: SGD at 0.1 for a net with BatchNorm, else Adam at 1e-3."""
    return ("sgd", 0.1) if batch_norms(model) else ("adam", 1e-3)


def gains_and_shifts(model: nn.Module) -> list[nn.Parameter]:
    """The affine parameters of all normalisations, each once."""
    layers = [m for m in model.modules() if isinstance(m, NORMALISATIONS) or type(m).__name__.endswith("RMSNorm")]
    return list(dict.fromkeys(p for layer in layers for p in layer.parameters(recurse=False)))


def fix_statistics(model: nn.Module) -> None:
    """Let BatchNorm use its running statistics, and keep them, while the rest stays in its mode."""
    for module in model.modules():
        if isinstance(module, _BATCH_NORM):
            module.eval()


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in train mode normalises by the batch without remembering it."""
    kept = [(m, m.track_running_stats) for m in model.modules() if isinstance(m, _BATCH_NORM)]
    try:
        for module, _ in kept:
            module.track_running_stats = False
        yield
    finally:
        for module, value in kept:
            module.track_running_stats = value


@torch.no_grad()
def estimate_statistics(model: nn.Module, x: Tensor, batch: int = 256) -> None:
    """Forget the running statistics of BatchNorm and take the mean over batches of ``(N, C, H, W)`` images instead.

    The batches are as equal as can be, since each counts the same; all else is left as it was. A model without
    BatchNorm, or a single image, changes nothing: one image says little about the data.
    """
    layers = batch_norms(model)
    if not layers or len(x) < 2:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    device = next(model.parameters()).device
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()  # type: ignore[operator]
            layer.momentum = None  # type: ignore[assignment]  # the plain mean over all batches
            layer.train()
        parts = torch.tensor_split(x, max(1, round(len(x) / batch)))
        for part in parts:
            model(as_float(part).to(device))
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode
