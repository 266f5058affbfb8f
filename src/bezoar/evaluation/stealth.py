"""How visible a trigger is: triggered against clean images, measured by kornia."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bezoar.attacks._poison import stamped
from bezoar.core.errors import SettingError
from bezoar.core.trigger import Trigger
from bezoar.io.extras import require
from bezoar.ops.fit import as_float

_WINDOW = 11  # of the SSIM paper (Wang et al., 2004): a Gaussian of 11 x 11 pixels with sigma 1.5


@dataclass(frozen=True)
class Stealth:
    """Visibility of a trigger on some images.

    Attributes:
        linf: Largest change of any pixel, in grey levels of 255.
        psnr: Peak signal-to-noise ratio in dB, mean over the images that the trigger changes; infinite without one.
        ssim: Structural similarity, mean over all images; 1 for no change.
        changed: Share of the images that the trigger changes.
        count: Number of images.
    """

    linf: float
    psnr: float
    ssim: float
    changed: float
    count: int


def stealth(x: Tensor, trigger: Trigger, batch: int = 250) -> Stealth:
    """Hold triggered images against the clean ones.

    Args:
        x: ``(N, C, H, W)`` clean images; uint8 ones are rounded to grey levels after the trigger, as a file would be.
        trigger: Stamps them.
        batch: Images at a time.

    Raises:
        SettingError: There are no images.
        MissingExtra: kornia is missing.
    """
    if not len(x):
        raise SettingError("there are no images to measure the trigger on")
    pairs = [(as_float(part), as_float(stamped(trigger, part))) for part in torch.split(x, batch)]
    linf = max(float((a - b).abs().max()) for a, b in pairs)
    psnr = torch.cat([_psnr(a, b) for a, b in pairs])
    seen = psnr[torch.isfinite(psnr)]
    return Stealth(
        linf=linf * 255,
        psnr=float(seen.mean()) if len(seen) else math.inf,
        ssim=float(torch.cat([_ssim(a, b) for a, b in pairs]).mean()),
        changed=len(seen) / len(x),
        count=len(x),
    )


def _psnr(one: Tensor, other: Tensor) -> Tensor:
    """``(B,)`` in dB; infinite for equal images."""
    metrics = require("kornia.metrics", "train")
    return torch.stack([metrics.psnr(a, b, 1.0) for a, b in zip(one, other, strict=True)]).double()


def _ssim(one: Tensor, other: Tensor) -> Tensor:
    """``(B,)``, mean over the pixels whose window lies inside the image; small images get a smaller window."""
    metrics = require("kornia.metrics", "train")
    least = min(_WINDOW, *one.shape[2:])
    window = least - 1 + least % 2  # odd
    similarity: Tensor = metrics.ssim(one, other, window, eps=0.0, padding="valid")
    return similarity.flatten(1).mean(1).double()
