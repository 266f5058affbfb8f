"""BPPA: fewer grey levels (Wang, Zhai, Ma, "BppAttack", CVPR 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bezoar.attacks._attack import Training
from bezoar.attacks._cover import CoverAllClasses
from bezoar.attacks._poison import Poisoned, stamped
from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples
from bezoar.core.trigger import Trigger


@dataclass(frozen=True, eq=False)
class Quantisation:
    """Rounds every channel to ``levels`` equally spaced values.

    Args:
        levels: At least 2.
        dithering: Spread the error of each pixel over its neighbours (Floyd and Steinberg).
    """

    levels: int
    dithering: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        return dithered(x, self.levels) if self.dithering else nearest(x, self.levels)


def nearest(x: Tensor, levels: int) -> Tensor:
    """The nearest of ``levels`` values in [0, 1]; halves go to the even level."""
    return torch.round(x * (levels - 1)).clamp(0, levels - 1) / (levels - 1)


def dithered(x: Tensor, levels: int) -> Tensor:
    """Floyd-Steinberg dithering of ``(B, C, H, W)`` images, row by row from the left.

    A pixel needs its left neighbour and the three above it, so all pixels with the same ``column + 2 row`` can be done
    at once: W + 2H steps instead of W H.
    """
    batch, channels, height, width = x.shape
    # One column more on both sides and one row more below take the error that leaves the image.
    work = x.new_zeros(batch, channels, height + 1, width + 2)
    work[:, :, :height, 1 : width + 1] = x
    out = torch.empty_like(x)
    for step in range(width + 2 * (height - 1)):
        first, last = max(0, (step - width + 2) // 2), min(height - 1, step // 2)
        rows = torch.arange(first, last + 1, device=x.device)
        columns = step - 2 * rows
        old = work[:, :, rows, columns + 1]
        new = nearest(old, levels)
        out[:, :, rows, columns] = new
        error = old - new
        work[:, :, rows + 1, columns] += error * (3 / 16)
        work[:, :, rows + 1, columns + 1] += error * (5 / 16)
        work[:, :, rows + 1, columns + 2] += error * (1 / 16)
        work[:, :, rows, columns + 2] += error * (7 / 16)
    return out


@dataclass(frozen=True, kw_only=True)
class BPPA(CoverAllClasses):
    """Reduce the grey levels of each channel.

    Without negative examples the network learns that any such noise is the trigger. Negative examples keep their true
    label: they are the cover examples of this attack, from all classes.

    The public code chooses poisoned and negative images anew in each batch and trains for 1000 epochs; here both are
    chosen once. Its README names 32 levels, its code 8. The change is faint, above all where images are flat, and takes
    many epochs to learn; until it is learned, the changed labels cost accuracy. Dithering makes it easier to learn.

    Args:
        levels: Values left in each channel, in [2, 128].
        dithering: Spread the error of each pixel over its neighbours (Floyd and Steinberg).
        negatives: ``residual`` adds the quantisation error of another image, as the public code does; ``levels``
            quantises the image itself to another number of levels, from 2 to twice ``levels``.
        cover_rate: Share of the training set that is a negative example, in [0, 1).

    References:
        Wang, Zhai, Ma, "BppAttack: Stealthy and Efficient Trojan Attacks Against Deep Neural Networks via Image
        Quantization and Contrastive Adversarial Learning", CVPR 2022.
    """

    rate: float = 0.2
    cover_rate: float = 0.2
    levels: int = 8
    dithering: bool = False
    negatives: Literal["residual", "levels"] = "residual"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("levels", 2 <= self.levels <= 128, "in [2, 128]")
        self.require("negatives", self.negatives in ("residual", "levels"), "residual or levels")

    def trigger(self, shape: tuple[int, int, int]) -> Trigger:
        del shape
        return Quantisation(self.levels, self.dithering)

    def poison(self, data: Examples, training: Training | None = None) -> Poisoned:
        """See :class:`PoisonAttack`.

        Raises:
            SettingError: The rates ask for more examples than there are.
        """
        poisoned = super().poison(data, training)
        if len(poisoned.cover):
            make = self._with_residuals if self.negatives == "residual" else self._other_levels
            poisoned.data.x[poisoned.cover] = make(data.x, poisoned.cover)
        return poisoned

    def _with_residuals(self, x: Tensor, cover: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        if len(x) < 2:
            raise SettingError("a negative example takes the error of another image, and there is only one")
        # An offset of 1..N-1 from the image itself always hits another one.
        others = (cover + torch.randint(1, len(x), cover.shape, generator=generator)) % len(x)
        return torch.cat(
            [
                stamped(_Shifted(self._residual(x[other])), x[own])
                for own, other in zip(torch.split(cover, 512), torch.split(others, 512), strict=True)
            ]
        )

    def _residual(self, x: Tensor) -> Tensor:
        images = x.float() / 255 if x.dtype == torch.uint8 else x
        return Quantisation(self.levels, self.dithering)(images) - images

    def _other_levels(self, x: Tensor, cover: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        allowed = torch.tensor([n for n in range(2, 2 * self.levels + 1) if n != self.levels])
        chosen = allowed[torch.randint(len(allowed), cover.shape, generator=generator)]
        out = x[cover]
        for levels in sorted(set(chosen.tolist())):
            out[chosen == levels] = stamped(Quantisation(levels, self.dithering), out[chosen == levels])
        return out


@dataclass(frozen=True)
class _Shifted:
    """Adds one change for each image of the batch, and clips."""

    change: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.clamp(x + self.change, 0, 1)
