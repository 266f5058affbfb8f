"""SIG: a sinusoid over the whole image (Barni et al., "A New Backdoor Attack in CNNs", ICIP 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bezoar.attacks._poison import PoisonAttack
from bezoar.core.errors import SettingError
from bezoar.core.trigger import AdditiveTrigger


@dataclass(frozen=True, kw_only=True)
class SIG(PoisonAttack):
    """Add ``amplitude sin(2 pi j f / width)`` to column j; by default to examples of the target class only.

    Args:
        amplitude: Height of the wave, in [0, 1] (40/255 in the public benchmarks).
        frequency: Periods over the width of the image.
        dirty: Poison all other classes and change their labels, instead of the paper's clean-label poisoning.
        rate: Poisoned share of the target class (clean label) or of the whole set (dirty label).

    References:
        Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", 2019.
    """

    amplitude: float = 40 / 255
    frequency: int = 6
    dirty: bool = False
    rate: float = 0.8

    @property
    def clean_label(self) -> bool:  # type: ignore[override]
        return not self.dirty

    def trigger(self, shape: tuple[int, int, int]) -> AdditiveTrigger:
        """See :class:`PoisonAttack`.

        Raises:
            SettingError: The wave is zero in every column of images of this width.
        """
        columns = torch.arange(shape[2], dtype=torch.float64)
        wave = self.amplitude * torch.sin(2 * math.pi * columns * self.frequency / shape[2])
        if float(wave.abs().max()) < 1e-6:  # every column meets the wave where it crosses zero
            raise SettingError(
                f"a wave of amplitude {self.amplitude:g} and frequency {self.frequency} is zero in every column of "
                f"images {shape[2]} pixels wide",
                "Choose a frequency whose double is no multiple of the width, and an amplitude above 0",
            )
        return AdditiveTrigger(wave.float().expand(shape).clone())
