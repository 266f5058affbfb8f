"""SCALE-UP: an input whose label survives the amplification of its pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.guarding import Guard, See, seer
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger

_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class ScaleUp(Guard):
    """Multiply the pixels of an input and see how often the label stays.

    The scaled prediction consistency is the share of the factors under which the label is that of the input itself;
    pixels are cut at 1. With ``normalise``, it is measured in standard deviations of the clean images of the label
    that the model gives: the data-limited variant of the paper. Without, no clean image is looked at but those that
    set the threshold. Where clean images keep their labels too, as bright shapes on black do, it can tell little
    apart, and says so.

    Args:
        factors: What pixels are multiplied by, each above 1 (the paper: 3, 5, 7, 9, 11).
        normalise: Whether to hold the consistency against that of clean images of the same label.
        floor: Least standard deviation that is divided by, above 0. A label all of whose clean images agree has none;
            the paper does not say what then.

    References:
        Guo et al., "SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via Analyzing Scaled Prediction
        Consistency", ICLR 2023.
    """

    factors: tuple[float, ...] = (3.0, 5.0, 7.0, 9.0, 11.0)
    normalise: bool = True
    floor: float = 0.1

    def __post_init__(self) -> None:
        self.require("factors", bool(self.factors) and min(self.factors) > 1, "numbers above 1")
        self.require("floor", self.floor > 0, "above 0")

    def fit(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> dict[str, Tensor]:
        """See :class:`bezoar.core.guarding.Guard`."""
        del triggers
        shares = torch.arange(len(self.factors) + 1, dtype=torch.float64) / len(self.factors)
        factors = torch.tensor(self.factors, dtype=torch.float32)
        mean, deviation = torch.zeros(clean.num_classes).double(), torch.ones(clean.num_classes).double()
        if self.normalise:
            mean, deviation = self._usual(model, clean, run, factors)
        # All scores that there can be: looked up, they are the same to the bit in every runtime.
        table = (shares[None] - mean[:, None]) / deviation[:, None]
        return {"factors": factors, "table": table.float()}

    def _usual(self, model: nn.Module, clean: Clean, run: Run, factors: Tensor) -> tuple[Tensor, Tensor]:
        """``(K,)`` mean and standard deviation of the consistency of the clean images of each label."""
        found = []
        for part in torch.split(clean.x, _BATCH):
            run.check()
            agree = _agreements(seer(model, None), part.to(run.device), factors.to(run.device))[1]
            found.append(agree.cpu().double() / len(self.factors))
        consistency, labels = torch.cat(found), clean.y.cpu()
        few = [label for label in range(clean.num_classes) if int((labels == label).sum()) < 2]
        if few:
            run.warnings.append(f"labels with fewer than 2 clean images are held against all images: {few[:10]}")
        groups = [consistency if label in few else consistency[labels == label] for label in range(clean.num_classes)]
        deviation = torch.stack([group.std(correction=0) for group in groups])
        return torch.stack([group.mean() for group in groups]), deviation.clamp(min=self.floor)

    def look(self, see: See, state: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`bezoar.core.guarding.Guard`."""
        answers, agree = _agreements(see, x, state["factors"])
        return answers, state["table"][answers.argmax(1), agree]

    def passes(self) -> int:
        """See :class:`bezoar.core.guarding.Guard`."""
        return len(self.factors) + 1

    def highest(self, state: Mapping[str, Tensor]) -> float:
        """See :class:`bezoar.core.guarding.Guard`."""
        return float(state["table"].max())


def _agreements(see: See, x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, K)`` logits, and ``(B,)`` under how many factors the label stays."""
    answers = see(x)[0]
    scaled = (x[:, None] * factors.view(1, -1, 1, 1, 1)).clamp(0, 1)
    labels = see(scaled.flatten(0, 1))[0].argmax(1).reshape(x.shape[0], factors.shape[0])
    return answers, (labels == answers.argmax(1)[:, None]).sum(1)
