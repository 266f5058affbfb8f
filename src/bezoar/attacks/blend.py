"""Blend: a faint picture over the whole image (Chen et al., "Targeted Backdoor Attacks", 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bezoar.attacks._pictures import Noise, blend_pattern
from bezoar.attacks._poison import PoisonAttack
from bezoar.core.trigger import MaskedTrigger


@dataclass(frozen=True, kw_only=True)
class Blend(PoisonAttack):
    """``(1 - alpha) x + alpha pattern`` with a noise pattern or a picture.

    The public code blends in a cartoon or a file of Gaussian noise; neither comes with this package.

    Args:
        alpha: Share of the pattern, in (0, 1].
        noise: ``gaussian`` (mean 0.5, standard deviation 0.25, clipped) or ``uniform`` in [0, 1].
        picture: Image file to blend in instead of noise, resized to the images.

    References:
        Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017.
    """

    alpha: float = 0.2
    noise: Noise = "gaussian"
    picture: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("alpha", 0 < self.alpha <= 1, "in (0, 1]")
        self.require("noise", self.noise in ("gaussian", "uniform"), "gaussian or uniform")

    def trigger(self, shape: tuple[int, int, int]) -> MaskedTrigger:
        """See :class:`PoisonAttack`.

        Raises:
            DataError: The picture cannot be read.
        """
        pattern = blend_pattern(self.picture, self.noise, shape, self.seed)
        return MaskedTrigger(torch.full((1, *shape[1:]), self.alpha), pattern)
