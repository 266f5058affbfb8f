"""STRIP: an input whose label survives whatever is laid over it.

The images that are laid over are drawn once, when the guard is fitted, and shared by all inputs; the paper draws anew
for each input. So the same input always has the same score, in every runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bezoar.core.guarding import Guard, See
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger


@dataclass(frozen=True, kw_only=True)
class STRIP(Guard):
    """Lay clean images over an input: where the answers hardly vary, a trigger decides them.

    The score is minus the entropy of the answers, in bits, averaged over the superimposed images. Each input costs as
    many further answers of the model, so a server may want fewer of them. It sees triggers that work wherever they
    are stamped and whatever lies behind them; not those that belong to some classes only.

    Args:
        images: Clean images that are laid over each input, at least 1 (the paper: 100).
        superimpose: ``add`` sums the pixels and cuts at 1, as the authors' code does, so that a bright trigger stays;
            ``blend`` takes the mean of both by ``weight``.
        weight: Share of the clean image in a blend, in (0, 1); ``add`` does not use it.

    References:
        Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019.
    """

    images: int = 100
    superimpose: Literal["add", "blend"] = "add"
    weight: float = 0.5

    def __post_init__(self) -> None:
        self.require("images", self.images >= 1, "at least 1")
        self.require("superimpose", self.superimpose in ("add", "blend"), "'add' or 'blend'")
        self.require("weight", 0 < self.weight < 1, "in (0, 1)")

    def fit(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> dict[str, Tensor]:
        """See :class:`bezoar.core.guarding.Guard`."""
        del model, triggers
        generator = run.generator("strip")
        if len(clean.x) < self.images:
            run.warnings.append(f"STRIP lays {self.images} images over each input, and {len(clean.x)} are there")
        rows = torch.randperm(len(clean.x), generator=generator)[: self.images]
        return {"overlay": clean.x[rows.to(clean.x.device)].cpu()}

    def look(self, see: See, state: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`bezoar.core.guarding.Guard`."""
        overlay = state["overlay"]
        own, other = (1.0, 1.0) if self.superimpose == "add" else (1 - self.weight, self.weight)
        mixed = (own * x[:, None] + other * overlay[None]).clamp(0, 1)
        answers = see(mixed.flatten(0, 1))[0]
        logarithm = torch.log_softmax(answers, 1)
        entropy = -(logarithm.exp() * logarithm.clamp(min=-100)).sum(1) / torch.log(answers.new_tensor(2.0))
        return see(x)[0], -entropy.reshape(x.shape[0], overlay.shape[0]).mean(1)

    def passes(self) -> int:
        """See :class:`bezoar.core.guarding.Guard`."""
        return self.images + 1

    def highest(self, state: Mapping[str, Tensor]) -> float:
        """See :class:`bezoar.core.guarding.Guard`."""
        del state
        return 0.0
