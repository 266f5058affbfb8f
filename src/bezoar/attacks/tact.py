"""TaCT: a trigger that works on one class only (Tang et al., USENIX Security 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from bezoar.attacks._patch import draw, in_corner, place
from bezoar.attacks._poison import PoisonAttack
from bezoar.core.trigger import MaskedTrigger


@dataclass(frozen=True, kw_only=True)
class TaCT(PoisonAttack):
    """Targeted contamination: the patch causes the target on images of the source class alone.

    Images of the cover classes carry the patch under their true labels, so that the patch by itself does not lead to
    the target. Defaults are those of backdoor-toolbox for CIFAR-10. Its patch is a picture, the Trojan square; here it
    is a square of random colours, of the same kind: fixed, colourful, near the bottom right corner.

    Args:
        size: Side of the patch, in pixels, at least 1.
        margin: Distance from the border, in pixels.
        alpha: Opacity of the patch, in (0, 1].
        sources: Classes whose images the patch shall work on.
        cover_classes: Classes whose images carry the patch under their true label.

    References:
        Tang, Wang, Tang, Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination
        Detection", USENIX Security 2021.
    """

    rate: float = 0.003
    sources: tuple[int, ...] = (1,)
    cover_classes: tuple[int, ...] = (5, 7)
    cover_rate: float = 0.003
    size: int = 6
    margin: int = 1
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("sources", bool(self.sources), "at least one class")
        self.require("size", self.size >= 1, "at least 1")
        self.require("margin", self.margin >= 0, "at least 0")
        self.require("alpha", 0 < self.alpha <= 1, "in (0, 1]")

    def trigger(self, shape: tuple[int, int, int]) -> MaskedTrigger:
        """See :class:`PoisonAttack`.

        Raises:
            SettingError: The patch leaves the image.
        """
        size = (self.size, self.size)
        patch = draw("noise", shape[0], *size, self.seed)
        return place(patch, shape, [in_corner("bottom-right", self.margin, size, shape)], self.alpha)
