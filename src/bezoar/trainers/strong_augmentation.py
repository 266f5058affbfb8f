"""Strong augmentation: images that are mixed with each other carry no whole trigger under a whole label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.ops.augment import cutmix, mixup
from bezoar.ops.objective import Batch, Stateless
from bezoar.trainers.plain import Plain


@dataclass(frozen=True, kw_only=True)
class StrongAugmentation(Plain):
    """Training on images that are mixed with each other, which weakens a backdoor and costs no accuracy.

    It isolates nothing and asks nothing of the data, so it is a baseline for what does.

    Args:
        mix: ``cutmix`` pastes a box of another image and mixes the labels by its area, ``mixup`` blends two images,
            ``both`` tosses a coin for each batch.
        alpha: Both shares are drawn from Beta(alpha, alpha), above 0.
        probability: Share of the batches that are mixed, in [0, 1].
        epochs: Passes over the data, at least 1.
        schedule: How the learning rate changes, see :class:`bezoar.ops.recipe.Recipe`.
        batch: Examples per step, at least 1.
        lr: Peak learning rate, above 0; None is 0.1 with SGD and 0.001 with Adam.
        optimizer: ``sgd`` or ``adam``; None is SGD for a net with BatchNorm, else Adam.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: L2 penalty, at least 0.
        pad: Random crop after padding by this many pixels; 0 switches it off.
        flip: Random horizontal flip; wrong for digits, text and traffic signs.
        cutout: Side in pixels of a square that is set to 0; 0 switches it off.

    References:
        Borgnia et al., "Strong Data Augmentation Sanitizes Poisoning and Backdoor Attacks Without an Accuracy
        Tradeoff", ICASSP 2021. Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with
        Localizable Features", ICCV 2019. Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """

    mix: Literal["cutmix", "mixup", "both"] = "cutmix"
    alpha: float = 1.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("mix", self.mix in ("cutmix", "mixup", "both"), "cutmix, mixup or both")
        self.require("alpha", self.alpha > 0, "above 0")
        self.require("probability", 0 <= self.probability <= 1, "in [0, 1]")

    def objective(self) -> Mixing:
        """See :class:`Plain`."""
        return Mixing(self.mix, self.alpha, self.probability)


class Mixing(Stateless):
    """Cross-entropy of mixed images, weighted by the shares of their labels.

    Args:
        mix, alpha, probability: See :class:`StrongAugmentation`.
    """

    def __init__(self, mix: str, alpha: float, probability: float) -> None:
        self.mix, self.alpha, self.probability = mix, alpha, probability

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`."""
        x = batch.augment(batch.x)
        wanted, coin = torch.rand(2, generator=batch.generator).tolist()
        if wanted >= self.probability:
            return F.cross_entropy(model(x), batch.y)
        blend = self.mix == "mixup" or (self.mix == "both" and coin < 0.5)
        mixed, pairs, share = (mixup if blend else cutmix)(x, self.alpha, batch.generator)
        logits, other = model(mixed), batch.y[pairs.to(batch.y.device)]
        return share * F.cross_entropy(logits, batch.y) + (1 - share) * F.cross_entropy(logits, other)
