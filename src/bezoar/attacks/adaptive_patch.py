"""Adaptive Patch: one of several faint patches at a time, and cover examples (Qi et al., ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bezoar.attacks._cover import CoverAllClasses
from bezoar.attacks._draws import draws
from bezoar.attacks._patch import CORNERS, draw, in_corner, place
from bezoar.core.trigger import MaskedTrigger


@dataclass(frozen=True, eq=False)
class OneOfPatches:
    """Blends in one of several patches; which one depends on the image.

    Args:
        masks: ``(P, 1, H, W)`` in [0, 1], opacity of each patch.
        patterns: ``(P, C, H, W)`` in [0, 1].
        seed: Of the choice.
    """

    masks: Tensor
    patterns: Tensor
    seed: int

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        chosen = draws(x, 1, self.seed)[:, 0] % len(self.masks)
        mask, pattern = self.masks.to(x)[chosen], self.patterns.to(x)[chosen]
        return (1 - mask) * x + mask * pattern


@dataclass(frozen=True, kw_only=True)
class AdaptivePatch(CoverAllClasses):
    """Blend in one of several faint patches while training, and all of them, opaque, at test time.

    Cover examples of all classes carry one such patch under their true labels. Rates, the number of patches and their
    opacities are those of backdoor-toolbox for CIFAR-10. Its patches are pictures that do not come with this package:
    here they are squares of random colours, one in each corner. At test time the toolbox stamps two of its patches,
    opaque; here all are stamped unless ``test_patches`` says otherwise. It draws poisoned examples from all classes,
    here the target class is left out.

    Args:
        alphas: Opacity of each patch in training examples, each in (0, 1]; 1 to 4 patches, from the bottom right corner
            on: bottom right, bottom left, top right, top left.
        test_alpha: Opacity of every patch at test time, in (0, 1].
        test_patches: Numbers of the patches that are stamped at test time, from 0; empty for all.
        size: Side of a patch, in pixels, at least 1.
        margin: Distance from the border, in pixels.

    References:
        Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses",
        ICLR 2023.
    """

    rate: float = 0.003
    cover_rate: float = 0.006
    alphas: tuple[float, ...] = (0.5, 0.2, 0.5, 0.3)
    test_alpha: float = 1.0
    test_patches: tuple[int, ...] = ()
    size: int = 6
    margin: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.alphas)
        self.require("alphas", 1 <= count <= 4 and all(0 < a <= 1 for a in self.alphas), "1 to 4 values in (0, 1]")
        self.require("test_alpha", 0 < self.test_alpha <= 1, "in (0, 1]")
        self.require("test_patches", all(0 <= p < count for p in self.test_patches), f"in [0, {count - 1}]")
        self.require("size", self.size >= 1, "at least 1")
        self.require("margin", self.margin >= 0, "at least 0")

    def trigger(self, shape: tuple[int, int, int]) -> MaskedTrigger:
        """See :class:`PoisonAttack`.

        Raises:
            SettingError: A patch leaves the image.
        """
        patches = self._patches(shape)
        chosen = [patches[p] for p in self.test_patches or range(len(patches))]
        mask = torch.stack([one.mask for one in chosen]).amax(0)
        pattern = torch.stack([one.pattern for one in chosen]).amax(0)
        return MaskedTrigger(self.test_alpha * mask, pattern)

    def train_trigger(self, shape: tuple[int, int, int]) -> OneOfPatches:
        """See :class:`PoisonAttack`.

        Raises:
            SettingError: A patch leaves the image.
        """
        patches = self._patches(shape)
        masks = torch.stack([a * one.mask for a, one in zip(self.alphas, patches, strict=True)])
        return OneOfPatches(masks, torch.stack([one.pattern for one in patches]), self.seed)

    def _patches(self, shape: tuple[int, int, int]) -> list[MaskedTrigger]:
        """Each patch on its own, opaque."""
        size = (self.size, self.size)
        return [
            place(
                draw("noise", shape[0], *size, 101 * self.seed + number),
                shape,
                [in_corner(corner, self.margin, size, shape)],
            )
            for number, corner in enumerate(CORNERS[: len(self.alphas)])
        ]
