"""The small image-to-image network of attacks that learn their trigger."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Generator(nn.Module):
    """Convolutional encoder and decoder: that of Input-Aware without skips, a U-Net with them.

    Args:
        in_channels: Colour channels of the image.
        out_channels: Channels of the output.
        width: Channels at full resolution; they double with each level.
        levels: Times that the resolution is halved.
        skips: Join each level of the encoder to the same level of the decoder.
    """

    def __init__(
        self, in_channels: int, out_channels: int, width: int = 16, levels: int = 2, skips: bool = False
    ) -> None:
        super().__init__()
        #: What builds the same network again.
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "width": width,
            "levels": levels,
            "skips": skips,
        }
        self.levels, self.skips = levels, skips
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(
            nn.Sequential(_block(a, b), _block(b, b)) for a, b in pairwise([in_channels, *widths])
        )
        self.middle = _block(widths[-1], widths[-1])
        # The decoder hands each level on with half its channels, which is what the next one has, the last its output.
        self.up = nn.ModuleList(
            nn.Sequential(_block(2 * a if skips else a, a), _block(a, b, relu=a != width))
            for a, b in pairwise([*reversed(widths), out_channels])
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)`` real numbers, for any H and W."""
        height, width = x.shape[2:]
        step = 2**self.levels
        x = F.pad(x, (0, -width % step, 0, -height % step), mode="replicate")
        x = x.contiguous(memory_format=torch.channels_last)  # a third less time on a CPU
        seen: list[Tensor] = []
        for encode in self.down:
            seen.append(encode(x))
            x = F.max_pool2d(seen[-1], 2)
        x = self.middle(x)
        for decode in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            skip = seen.pop()
            x = decode(torch.cat([x, skip], dim=1) if self.skips else x)
        return x[..., :height, :width]


def _block(channels: int, out: int, relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out, momentum=0.05)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def build(channels: int, out: int, width: int, levels: int, device: torch.device, skips: bool = False) -> Generator:
    """A new generator on a device; its weights come from the global CPU generator, whatever the device."""
    return Generator(channels, out, width, levels, skips).to(device)


def on(network: nn.Module, x: Tensor) -> Tensor:
    """The network's output for images on any device; it moves to them where it is elsewhere."""
    out: Tensor = network.to(x.device)(x)
    return out
