"""Random choices that depend on the image alone, so that a trigger that differs between images is still a function."""

from __future__ import annotations

import torch
from torch import Tensor

_PRIME = 2**31 - 1


def draws(x: Tensor, count: int, seed: int) -> Tensor:
    """``(B, count)`` int64 in [0, 2^31 - 1), by integer arithmetic on grey levels: exact on every device and batch.

    Args:
        x: ``(B, C, H, W)`` images in [0, 1].
        count: How many for each image, at least 1.
        seed: Other seeds give other numbers.
    """
    levels = (x.detach().clamp(0, 1) * 255).round().to(torch.int64).flatten(1)
    places = torch.arange(1, levels.shape[1] + 1, device=x.device)
    weights = places * 2654435761 % _PRIME
    # Each product is below 2^39, so that images of up to 2^24 values cannot overflow.
    prints = (levels * weights).sum(1, keepdim=True)
    streams = (torch.arange(1, count + 1, device=x.device) + 1009 * (seed % 65536)) * 2246822519 % _PRIME
    return _mixed(_mixed(prints % _PRIME) + streams)


def _mixed(values: Tensor) -> Tensor:
    """Spread out numbers below 2^32: multiplications modulo a prime with shifts between them."""
    for multiplier in (48271, 69621, 39373):
        values = values * multiplier % _PRIME
        values = (values ^ (values >> 13)) % _PRIME
    return values
