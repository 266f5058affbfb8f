"""Smooth: a perturbation of low frequencies only (Zeng et al., ICCV 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bezoar.attacks._dct import inverse_dct
from bezoar.attacks._poison import PoisonAttack
from bezoar.core.trigger import AdditiveTrigger


@dataclass(frozen=True, kw_only=True)
class Smooth(PoisonAttack):
    """Add one fixed smooth perturbation, whose energy lies in low frequencies of the cosine transform alone.

    It leaves no trace in high frequencies, by which most patches and blended pictures can be told from clean images.
    The paper learns its smooth trigger with a bilevel optimisation through a low-pass filter; here it is random, which
    needs no network. The mean of each channel does not change, so that it is no mere change of brightness.

    Args:
        epsilon: Largest change of a pixel, in (0, 1].
        cutoff: Share of the frequencies of each axis that is used, from the lowest, in (0, 1].

    References:
        Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021.
    """

    epsilon: float = 16 / 255
    cutoff: float = 1 / 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("epsilon", 0 < self.epsilon <= 1, "in (0, 1]")
        self.require("cutoff", 0 < self.cutoff <= 1, "in (0, 1]")

    def trigger(self, shape: tuple[int, int, int]) -> AdditiveTrigger:
        channels, height, width = shape
        rows, columns = max(2, round(self.cutoff * height)), max(2, round(self.cutoff * width))
        generator = torch.Generator().manual_seed(self.seed)
        coefficients = torch.zeros(shape, dtype=torch.float64)
        coefficients[:, :rows, :columns] = torch.randn(
            channels, rows, columns, generator=generator, dtype=torch.float64
        )
        coefficients[:, 0, 0] = 0
        wave = inverse_dct(coefficients)
        return AdditiveTrigger((self.epsilon * wave / wave.abs().max()).float())
