"""Measures that need ground truth. Only this package may see triggered test data; no defence imports it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.trigger import Trigger
from bezoar.ops.fit import as_float


@dataclass(frozen=True)
class Measures:
    """Rates in [0, 1].

    Attributes:
        acc: Clean accuracy over all classes.
        asr: Share of triggered images whose true class is not the target that are given the target label.
        ra: Share of the same images that are given their true label.
    """

    acc: float
    asr: float
    ra: float


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, trigger: Trigger | None = None, batch: int = 500) -> Tensor:
    """``(N,)`` predicted labels of ``(N, C, H, W)`` images, stamped first where a trigger is given."""
    device = next(model.parameters()).device
    out = []
    for images in torch.split(x, batch):
        images = as_float(images)
        if trigger is not None:
            images = trigger(images)
        out.append(model(images.to(device)).argmax(1).cpu())
    return torch.cat(out)


def measure(model: nn.Module, x: Tensor, y: Tensor, trigger: Trigger, target: int) -> Measures:
    """ACC, ASR and RA of a model in eval mode on a clean test set and a known trigger."""
    clean, triggered = predict(model, x), predict(model, x, trigger)
    others = y != target
    return Measures(
        acc=float((clean == y).float().mean()),
        asr=float((triggered[others] == target).float().mean()),
        ra=float((triggered[others] == y[others]).float().mean()),
    )
