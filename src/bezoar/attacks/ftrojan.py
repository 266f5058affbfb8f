"""FTrojan: two frequencies of the colour channels (Wang et al., ECCV 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bezoar.attacks._dct import inverse_dct
from bezoar.attacks._poison import PoisonAttack
from bezoar.core.errors import SettingError
from bezoar.core.trigger import AdditiveTrigger, Trigger

_BLOCK = 32
# RGB to YCrCb of OpenCV: Y, 0.713 (R - Y), 0.564 (B - Y); the inverse is exact, where OpenCV's has three digits.
_LUMA = (0.299, 0.587, 0.114)
_RED, _BLUE = 0.713, 0.564


@dataclass(frozen=True, eq=False)
class WrappedChroma:
    """Addition to the colour channels in the arithmetic of the public code: whole grey levels that wrap.

    Colour images are converted to YCrCb in whole grey levels; the changed channels are truncated to uint8, so that
    values below 0 and above 255 come back at the other end; then they are converted back, rounded and clipped.
    In a grey image the only channel is changed and wraps.

    Args:
        delta: ``(H, W)`` change of both colour channels, in grey levels.
    """

    delta: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        levels = torch.floor((x * 255).clamp(0, 255) + 1e-3)  # x came from whole levels, give or take a float's error
        if x.shape[1] == 1:
            return _wrap(levels + self.delta.to(x)) / 255
        forward = _to_ycrcb().to(x)
        middle = x.new_tensor([0.0, 128.0, 128.0]).view(3, 1, 1)
        parts = torch.einsum("ij,bjhw->bihw", forward, levels) + middle
        parts = parts.round().clamp(0, 255)
        parts = torch.cat([parts[:, :1], _wrap(parts[:, 1:] + self.delta.to(x))], 1)
        inverse = torch.linalg.inv(_to_ycrcb()).to(x)
        out = torch.einsum("ij,bjhw->bihw", inverse, parts - middle)
        return out.round().clamp(0, 255) / 255


@dataclass(frozen=True, kw_only=True)
class FTrojan(PoisonAttack):
    """Add ``magnitude`` to two coefficients of the cosine transform of both colour channels, block by block.

    Blocks are 32x32. Where a side of the image is no multiple of 32, the block is as long as the shorter side, a rest
    that is narrower than a block stays as it is, and the frequencies are those of the same place in the spectrum
    ((13, 13) and (27, 27) of 28). Grey images have no colour: their only channel is changed. The public code poisons
    the first images that are not of the target class; here they are drawn at random. The change is faint: a net without
    normalisation layers hardly learns it in a few epochs.

    Args:
        magnitude: Change of each coefficient, in grey levels; 30 moves a pixel of a colour channel by at most 3.2.
        frequencies: Places on the diagonal of a 32x32 block, each in [1, 31].
        overflow: ``clip``, or ``wrap`` as the public code does, which truncates to uint8 and wraps near 0 and 255.
        clean: Change images of the target class only and keep their label, the setting of Yue et al.; ``rate`` is then
            a share of that class.

    References:
        Wang, Yao, Xu, An, Tong, Wang, "An Invisible Black-Box Backdoor Attack Through Frequency Domain", ECCV 2022.
        Yue, Lv, Liang, Chen, "Invisible Backdoor Attacks Using Data Poisoning in the Frequency Domain", 2022.
    """

    rate: float = 0.05
    magnitude: float = 30.0
    frequencies: tuple[int, ...] = (15, 31)
    overflow: Literal["clip", "wrap"] = "clip"
    clean: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("magnitude", self.magnitude > 0, "above 0")
        valid = bool(self.frequencies) and all(0 < f < _BLOCK for f in self.frequencies)
        self.require("frequencies", valid, f"one or more places in [1, {_BLOCK - 1}]")
        self.require("overflow", self.overflow in ("clip", "wrap"), "clip or wrap")

    @property
    def clean_label(self) -> bool:
        return self.clean

    def trigger(self, shape: tuple[int, int, int]) -> Trigger:
        """See :class:`PoisonAttack`.

        Raises:
            SettingError: The images have neither 1 nor 3 channels.
        """
        if shape[0] not in (1, 3):
            raise SettingError(f"FTrojan needs grey or colour images, these have {shape[0]} channels")
        delta = self._delta(shape[1], shape[2])
        if self.overflow == "wrap":
            return WrappedChroma(delta.float())
        if shape[0] == 1:
            return AdditiveTrigger((delta / 255).float().expand(shape).clone())
        change = torch.stack([torch.zeros_like(delta), delta, delta])
        return AdditiveTrigger((torch.einsum("ij,jhw->ihw", torch.linalg.inv(_to_ycrcb()), change) / 255).float())

    def _delta(self, height: int, width: int) -> Tensor:
        """``(H, W)`` change of a channel in grey levels: the transform is linear, so it is the same for every image."""
        whole = height % _BLOCK == 0 and width % _BLOCK == 0
        block = _BLOCK if whole else min(height, width)
        coefficients = torch.zeros(block, block, dtype=torch.float64)
        for frequency in self.frequencies:
            place = (frequency + 1) * block // _BLOCK - 1
            if place < 1:
                raise SettingError(f"images of {height}x{width} pixels have no frequency {frequency} of {_BLOCK}")
            coefficients[place, place] += self.magnitude
        delta = torch.zeros(height, width, dtype=torch.float64)
        rows, columns = height // block * block, width // block * block
        delta[:rows, :columns] = inverse_dct(coefficients).repeat(rows // block, columns // block)
        return delta


def _wrap(levels: Tensor) -> Tensor:
    """Cast to uint8 as C does: truncate, then modulo 256."""
    return torch.remainder(torch.trunc(levels), 256)


def _to_ycrcb() -> Tensor:
    """``(3, 3)`` float64 matrix from RGB to Y, Cr - 128 and Cb - 128."""
    luma = torch.tensor(_LUMA, dtype=torch.float64)
    red, blue = torch.eye(3, dtype=torch.float64)[[0, 2]]
    return torch.stack([luma, _RED * (red - luma), _BLUE * (blue - luma)])
