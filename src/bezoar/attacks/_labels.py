"""Which label the attacker wants for which image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bezoar.core.errors import SettingError

Kind = Literal["all-to-one", "all-to-all"]


@dataclass(frozen=True)
class LabelMap:
    """The attacker's map of true labels to wanted ones.

    Args:
        num_classes: Number of labels K.
        target: Wanted label of ``all-to-one``; ``all-to-all`` wants ``(y + 1) mod K`` and does not use it.
        kind: See above.
        sources: Classes whose images the trigger shall work on; empty for all of them.

    Raises:
        SettingError: A label is not in 0..K-1, or the target is a source.
    """

    num_classes: int
    target: int = 0
    kind: Kind = "all-to-one"
    sources: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for label in (self.target, *self.sources):
            if not 0 <= label < self.num_classes:
                raise SettingError(f"label {label} is not in 0..{self.num_classes - 1}")
        if self.kind == "all-to-one" and self.target in self.sources:
            raise SettingError(f"label {self.target} is both the target and a source class")

    def __call__(self, y: Tensor) -> Tensor:
        """``(N,)`` true labels to the ``(N,)`` labels that the attacker wants."""
        return (y + 1) % self.num_classes if self.kind == "all-to-all" else torch.full_like(y, self.target)

    def applies(self, y: Tensor) -> Tensor:
        """``(N,)`` bool: images that ASR is counted on.

        ``all-to-one`` leaves out the target class, ``all-to-all`` has none to leave out.
        """
        allowed = torch.ones_like(y, dtype=torch.bool) if self.kind == "all-to-all" else y != self.target
        return allowed & torch.isin(y, torch.tensor(self.sources, dtype=y.dtype)) if self.sources else allowed
