"""Adaptive Blend: parts of a blended picture, and cover examples (Qi et al., ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bezoar.attacks._cover import CoverAllClasses
from bezoar.attacks._draws import draws
from bezoar.attacks._pictures import Noise, blend_pattern
from bezoar.core.trigger import MaskedTrigger, Trigger


@dataclass(frozen=True, eq=False)
class PiecewiseBlend:
    """Blends in some pieces of a pattern; which ones depends on the image.

    Args:
        pattern: ``(C, H, W)`` in [0, 1].
        alpha: Share of the pattern, in [0, 1].
        side: Pieces along each axis.
        kept: How many of the ``side * side`` pieces are blended in.
        seed: Of the choice.
    """

    pattern: Tensor
    alpha: float
    side: int
    kept: int
    seed: int

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        mask = self.alpha * self.masks(x).to(x)
        return (1 - mask) * x + mask * self.pattern.to(x)

    def masks(self, x: Tensor) -> Tensor:
        """``(B, 1, H, W)`` bool: where the pattern is blended into each image."""
        order = draws(x, self.side**2, self.seed).argsort(1)
        chosen = torch.zeros(len(x), self.side**2, dtype=torch.bool, device=x.device)
        chosen.scatter_(1, order[:, : self.kept], True)
        _, height, width = self.pattern.shape
        rows = torch.arange(height, device=x.device) * self.side // height
        columns = torch.arange(width, device=x.device) * self.side // width
        return chosen[:, rows[:, None] * self.side + columns][:, None]


@dataclass(frozen=True, kw_only=True)
class AdaptiveBlend(CoverAllClasses):
    """Blend in half of the pieces of a pattern while training, and all of them, a little stronger, at test time.

    Cover examples of all classes carry such parts under their true labels. Both keep poisoned and clean examples close
    in feature space, where latent-space defences look. Pieces, shares, rates and opacities are those of
    backdoor-toolbox for CIFAR-10; its pattern is a cartoon that does not come with this package, so noise takes its
    place unless ``picture`` is given. It draws poisoned examples from all classes, here the target class is left out.

    Args:
        alpha: Share of the pattern in training examples, in (0, 1].
        test_alpha: Share of the pattern at test time, in (0, 1].
        side: Pieces along each axis of the image, at least 2.
        mask_rate: Share of the pieces that a training example lacks, in [0, 1).
        noise: ``gaussian`` or ``uniform``.
        picture: Image file to blend in instead of noise.

    References:
        Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses",
        ICLR 2023.
    """

    rate: float = 0.003
    cover_rate: float = 0.003
    alpha: float = 0.15
    test_alpha: float = 0.2
    side: int = 4
    mask_rate: float = 0.5
    noise: Noise = "gaussian"
    picture: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("alpha", 0 < self.alpha <= 1, "in (0, 1]")
        self.require("test_alpha", 0 < self.test_alpha <= 1, "in (0, 1]")
        self.require("side", self.side >= 2, "at least 2")
        self.require("mask_rate", 0 <= self.mask_rate < 1, "in [0, 1)")
        self.require("noise", self.noise in ("gaussian", "uniform"), "gaussian or uniform")

    def trigger(self, shape: tuple[int, int, int]) -> Trigger:
        return MaskedTrigger(torch.full((1, *shape[1:]), self.test_alpha), self._pattern(shape))

    def train_trigger(self, shape: tuple[int, int, int]) -> PiecewiseBlend:
        pieces = self.side**2
        kept = pieces - min(round(self.mask_rate * pieces), pieces - 1)
        return PiecewiseBlend(self._pattern(shape), self.alpha, self.side, kept, self.seed)

    def _pattern(self, shape: tuple[int, int, int]) -> Tensor:
        return blend_pattern(self.picture, self.noise, shape, self.seed)
