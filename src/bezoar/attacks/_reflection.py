"""Reflections in a pane of glass: the layers that Refool adds, prepared once, and the trigger that adds them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.attacks._draws import draws
from bezoar.core.errors import SettingError

#: Light is added in linear intensity; images are stored with this gamma.
GAMMA = 2.2


@dataclass(frozen=True, eq=False)
class ReflectionTrigger:
    """Adds a reflection; which one of R depends on the image.

    A ghost is a scene seen twice, a little shifted: ``(a t + (1 - a) r) ^ (1 / 2.2)`` with ``t = x ^ 2.2``. An out of
    focus reflection is blurred; what would be too bright is subtracted, and it fades towards the border.

    Args:
        layers: ``(R, C, H, W)`` reflections in linear intensity, doubled or blurred.
        transmission: ``(R,)`` share a of the image's own light, in (0, 1).
        ghost: ``(R,)`` bool: ghosts; the others are out of focus.
        attenuation: ``(R,)`` factor on the overflow that is subtracted.
        vignette: ``(R, 1, H, W)`` fading of the out of focus ones, in [0, 1].
        seed: Of the choice.
    """

    layers: Tensor
    transmission: Tensor
    ghost: Tensor
    attenuation: Tensor
    vignette: Tensor
    seed: int

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        chosen = draws(x, 1, self.seed)[:, 0] % len(self.layers)
        light = x.clamp(0, 1) ** GAMMA
        share = self.transmission.to(x)[chosen].view(-1, 1, 1, 1)
        layer = self.layers.to(x)[chosen]
        ghosts = share * light + (1 - share) * layer
        faded = self.vignette.to(x)[chosen] * (1 - share / 2) * self._in_range(layer, light, chosen)
        is_ghost = self.ghost.to(x.device)[chosen].view(-1, 1, 1, 1)
        out = torch.where(is_ghost, ghosts, share * light + faded)
        return out.clamp(0, 1) ** (1 / GAMMA)

    def _in_range(self, layer: Tensor, light: Tensor, chosen: Tensor) -> Tensor:
        """The layer, less what makes the sum too bright, channel by channel."""
        total = layer + light
        over = (total > 1).to(total)
        mean = (total * over).sum((2, 3), keepdim=True) / (over.sum((2, 3), keepdim=True) + 1e-6)
        factor = self.attenuation.to(layer)[chosen].view(-1, 1, 1, 1)
        return (layer - (mean.clamp(min=1) - 1) * factor).clamp(0, 1)


def reflections(pictures: Tensor, ghost_rate: float, transmission: float | None, seed: int) -> ReflectionTrigger:
    """A trigger from pictures of what is reflected.

    Args:
        pictures: ``(R, C, H, W)`` in [0, 1], of the size of the images.
        ghost_rate: Share of ghosts, in [0, 1].
        transmission: Share of the image's own light, in (0, 1); None draws ``1 - U(0.05, 0.45)`` for each reflection.
        seed: Of the random parameters and of the choice.

    Raises:
        SettingError: The images are smaller than 8 pixels.
    """
    count, _, height, width = pictures.shape
    if min(height, width) < 8:
        raise SettingError(f"reflections need images of at least 8x8 pixels, got {height}x{width}")
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    shares = 1 - uniform(0.05, 0.45)
    if transmission is not None:
        shares = torch.full_like(shares, transmission)
    ghost = uniform(0, 1) < ghost_rate
    largest = min(8, min(height, width) // 2 - 1)
    offsets = torch.randint(min(3, largest), largest + 1, (count, 2), generator=generator).tolist()
    weights = (uniform(0, 1).round() - uniform(0.15, 0.5)).abs().tolist()
    sigmas = uniform(1, 5).tolist()
    attenuation = 1.08 + uniform(0, 0.1)
    corners = torch.rand(count, 2, generator=generator).tolist()
    light = pictures**GAMMA
    layers = [
        doubled(one, offset, weight) if is_ghost else blurred(one, sigma)
        for one, is_ghost, offset, weight, sigma in zip(light, ghost.tolist(), offsets, weights, sigmas, strict=True)
    ]
    vignettes = torch.stack([vignette(height, width, corner) for corner in corners])
    return ReflectionTrigger(torch.stack(layers), shares, ghost, attenuation, vignettes, seed)


def doubled(picture: Tensor, offset: list[int], weight: float) -> Tensor:
    """``(C, H, W)``: ``weight`` times a picture and the rest of it moved by ``offset`` (down, right), at full size."""
    down, right = offset
    both = weight * picture[:, down:, right:] + (1 - weight) * picture[:, :-down, :-right]
    return F.interpolate(both[None], picture.shape[1:], mode="bilinear", align_corners=False)[0]


def blurred(picture: Tensor, sigma: float) -> Tensor:
    """``(C, H, W)`` after a Gaussian blur with a kernel of ``2 ceil(2 sigma) + 1`` pixels; the border is mirrored."""
    radius = min(math.ceil(2 * sigma), min(picture.shape[1:]) - 1)
    places = torch.arange(-radius, radius + 1, dtype=picture.dtype)
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(picture[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[:, 0]


def vignette(height: int, width: int, corner: list[float]) -> Tensor:
    """``(1, H, W)`` part of a Gaussian that covers a square as long as the longer side, 1 in its middle.

    Args:
        height: Rows.
        width: Columns.
        corner: Where the part lies in the square, (down, right) in [0, 1).
    """
    side, sigmas = max(height, width), 3.0
    half = sigmas + (2 * sigmas + 1) / side / 2
    edges = torch.linspace(-half, half, side + 1, dtype=torch.float64)
    curve = torch.special.ndtr(edges).diff()
    square = torch.sqrt(curve[:, None] * curve)
    top, left = (int(c * max(0, side - length - 10)) for c, length in zip(corner, (height, width), strict=True))
    return (square / square.max()).float()[None, top : top + height, left : left + width]
