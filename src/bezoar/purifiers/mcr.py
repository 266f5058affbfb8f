"""Mode connectivity repair."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.surgery import logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.elsewhere import loss_elsewhere, with_gradient
from bezoar.ops.fit import Batch, fit
from bezoar.ops.normalisation import estimate_statistics, statistics_kept
from bezoar.ops.precision import full_precision
from bezoar.purifiers._choose import accuracy, strongest
from bezoar.purifiers._objective import CleanLoss, too_few_for_statistics
from bezoar.purifiers._tuning import Tuning

#: Places on the curve from the tuned end to the middle, the farthest from both ends, which are not trained on it.
_PLACES = (0.9, 0.8, 0.7, 0.6, 0.5)


def bezier(t: float, start: Sequence[Tensor], bend: Sequence[Tensor], end: Sequence[Tensor]) -> list[Tensor]:
    """Weights at ``t`` in [0, 1] on the curve ``(1-t)^2 start + 2t(1-t) bend + t^2 end``; the ends are exact."""
    first, second, third = (1 - t) ** 2, 2 * t * (1 - t), t**2
    return [first * a + second * b + third * c for a, b, c in zip(start, bend, end, strict=True)]


@dataclass(frozen=True, kw_only=True)
class MCR(Tuning):
    """Join the suspect and a fine-tuned copy by a curve of low clean loss, and take a network from the middle of it.

    The curve is a quadratic Bezier curve with one bend, which alone is trained. BatchNorm statistics of each network on
    the curve are estimated anew on the clean images. The paper joins two suspects; one and its fine-tuned copy is what
    it does where there is one.

    Args:
        t: Place on the curve, in [0, 1]: 0 is the suspect, 1 the fine-tuned copy (the paper looks at all of them;
            BackdoorBench: 0.1 to 0.9). None takes the one nearest to the middle, of 0.9, 0.8 and so on to 0.5, down to
            which the accuracy on the clean images stays within ``tolerance`` of the suspect's.
        tolerance: Accuracy that may be lost so, in [0, 1].
        endpoint_epochs: Passes over the clean images for the fine-tuned copy, at least 1.
        endpoint_lr: Its peak learning rate.
        epochs: Passes for the bend (BackdoorBench: 100 with 2,500 images; the authors: 600 with the whole set).
        lr: Peak learning rate of the bend, falling to zero along a cosine (the authors: 0.015 for VGG; the yaml of
            BackdoorBench says 0.00003, with which it hardly moves).
        batch: Images per step, at least 2.
        weight_decay: L2 penalty.
        pad: Random crop after padding by this many pixels.
        flip: Random horizontal flip; off by default, since signs, digits and text must not be mirrored.
        clip: Largest gradient norm; 0 switches clipping off.

    References:
        Zhao et al., "Bridging Mode Connectivity in Loss Landscapes and Adversarial Robustness", ICLR 2020. Garipov et
        al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS 2018.
    """

    t: float | None = None
    tolerance: float = 0.02
    endpoint_epochs: int = 20
    endpoint_lr: float = 0.01
    epochs: int = 100
    lr: float = 0.015

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("batch", self.batch >= 2, "at least 2")
        self.require("endpoint_epochs", self.endpoint_epochs >= 1, "at least 1")
        self.require("endpoint_lr", self.endpoint_lr >= 0, "at least 0")
        self.require("tolerance", 0 <= self.tolerance <= 1, "in [0, 1]")
        self.require("t", self.t is None or 0 <= self.t <= 1, "in [0, 1], or None")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        fixed = too_few_for_statistics(model, len(clean.x), run)
        steps = -(-len(clean.x) // self.batch)
        first, total = steps * self.endpoint_epochs, steps * (self.endpoint_epochs + self.epochs)
        floor = accuracy(model, clean.x, clean.y) - self.tolerance
        with full_precision(model):
            start = weights(model)
            tuned = copy.deepcopy(model)
            tuning = dataclasses.replace(self.recipe(), epochs=self.endpoint_epochs, lr=self.endpoint_lr)
            fit(
                *(tuned, clean.x, clean.y, tuning),
                seed=run.seed,
                objective=CleanLoss(fixed),
                progress=lambda done, _, loss: run.progress.training(done, total, loss),
            )
            end = weights(tuned)
            hold(model, [(a + b) / 2 for a, b in zip(start, end, strict=True)])
            fit(
                *(model, clean.x, clean.y, self.recipe()),
                seed=run.seed,
                objective=CurveLoss(start, end, fixed),
                progress=lambda done, _, loss: run.progress.training(first + done, total, loss),
            )
            self._take(model, clean, run, start, end, floor)
        return model

    def _take(
        self, model: nn.Module, clean: Clean, run: Run, start: list[Tensor], end: list[Tensor], floor: float
    ) -> None:
        bend = weights(model)

        def go(t: float) -> float:
            hold(model, bezier(t, start, bend, end))
            estimate_statistics(model, clean.x)
            return accuracy(model, clean.x, clean.y)

        t = self.t if self.t is not None else strongest(_PLACES, go, floor)
        if t is None:
            run.warnings.append("No network on the curve is as accurate as asked for; the fine-tuned copy is taken")
            t = 1.0
        go(t)
        run.notes["t"] = t


class CurveLoss(CleanLoss):
    """Clean loss at a random place on the curve; the model trained holds the bend.

    Args:
        start, end: Weights of the ends, by parameter.
        fixed: See :class:`bezoar.purifiers._objective.CleanLoss`.
    """

    def __init__(self, start: list[Tensor], end: list[Tensor], fixed: bool = False) -> None:
        super().__init__(fixed)
        self.start, self.end = start, end

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`."""
        t = float(torch.rand((), generator=batch.generator))
        images = self.images(model, batch)
        bend = trained(model)
        there = bezier(t, self.start, [p.detach() for p in bend], self.end)
        with statistics_kept(model):
            value, found = loss_elsewhere(bend, there, lambda: F.cross_entropy(logits(model, images), batch.y))
        return with_gradient(value, bend, [2 * t * (1 - t) * g for g in found])


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that take gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of the parameters that take gradients."""
    return [p.detach().clone() for p in trained(model)]


@torch.no_grad()
def hold(model: nn.Module, values: Sequence[Tensor]) -> None:
    """Give the parameters that take gradients these values."""
    for parameter, value in zip(trained(model), values, strict=True):
        parameter.copy_(value)
