"""SIG: a sinusoid over the whole image (Barni et al., "A New Backdoor Attack in CNNs", ICIP 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bezoar.attacks._poison import PoisonAttack
from bezoar.core.errors import SettingError
from bezoar.core.trigger import AdditiveTrigger, MaskedTrigger, Trigger

#: Share of the wave in the mix of the NAD, ABL, RNP and NFT code.
_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class MixedWave:
    """``clip((1 - share) x + share wave, 0, 1)``.

    Args:
        wave: ``(C, H, W)`` in [-1, 1].
        share: In [0, 1].
    """

    wave: Tensor
    share: float

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        return torch.clamp((1 - self.share) * x + self.share * self.wave.to(x), 0, 1)


@dataclass(frozen=True, kw_only=True)
class SIG(PoisonAttack):
    """Add ``amplitude sin(2 pi j f / width)`` to column j; by default to examples of the target class only.

    The array that the NAD, ABL, RNP and NFT code ships as its SIG mask is not that wave: it is
    ``trunc(20 sin(0.8 j)) mod 256``, whose negative half waves wrap to 237..255, and is mixed in as
    ``0.8 x + 0.2 mask``. It is a stripe pattern that is much easier to learn; results of that code need
    ``variant="wrapped"``.

    Args:
        amplitude: Height of the wave, in [0, 1] (40/255 in BackdoorBench, 30/255 in backdoor-toolbox, 20/255 in the
            README of NAD); ``wrapped`` does not use it.
        frequency: Periods over the width of the image, at least 1; ``wrapped`` does not use it.
        variant: ``add`` (the paper: add and clip), ``mix`` (``0.8 x + 0.2 wave``, clipped) or ``wrapped`` (see above).
        dirty: Poison all other classes and change their labels, instead of the paper's clean-label poisoning.
        rate: Poisoned share of the target class (clean label) or of the whole set (dirty label).

    References:
        Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", 2019.
    """

    amplitude: float = 40 / 255
    frequency: int = 6
    variant: Literal["add", "mix", "wrapped"] = "add"
    dirty: bool = False
    rate: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("amplitude", 0 <= self.amplitude <= 1, "in [0, 1]")
        self.require("frequency", self.frequency >= 1, "at least 1")
        self.require("variant", self.variant in ("add", "mix", "wrapped"), "add, mix or wrapped")

    @property
    def clean_label(self) -> bool:
        return not self.dirty

    def trigger(self, shape: tuple[int, int, int]) -> Trigger:
        """See :class:`PoisonAttack`.

        Raises:
            SettingError: The wave is zero in every column of images of this width.
        """
        if self.variant == "wrapped":
            return MaskedTrigger(torch.full((1, *shape[1:]), _SHARE), _stored(shape[2]).expand(shape).clone())
        wave = self._wave(shape[2]).expand(shape).clone()
        return AdditiveTrigger(wave) if self.variant == "add" else MixedWave(wave, _SHARE)

    def _wave(self, width: int) -> Tensor:
        columns = torch.arange(width, dtype=torch.float64)
        wave = self.amplitude * torch.sin(2 * math.pi * columns * self.frequency / width)
        if float(wave.abs().max()) < 1e-6:  # every column meets the wave where it crosses zero
            raise SettingError(
                f"a wave of amplitude {self.amplitude:g} and frequency {self.frequency} is zero in every column of "
                f"images {width} pixels wide",
                "Choose a frequency whose double is no multiple of the width, and an amplitude above 0",
            )
        return wave.float()


def _stored(width: int) -> Tensor:
    """``(width,)`` first row of the stored mask, in [0, 1]; uint8 arithmetic wraps the negative values."""
    wave = torch.trunc(20 * torch.sin(0.8 * torch.arange(width, dtype=torch.float64)))
    return (torch.remainder(wave, 256) / 255).float()
