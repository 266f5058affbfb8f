"""Fine-tuning with sharpness-aware minimisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.surgery import logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.elsewhere import gradients, loss_elsewhere, with_gradient
from bezoar.ops.fit import Batch, fit
from bezoar.ops.normalisation import statistics_kept
from bezoar.ops.precision import full_precision
from bezoar.purifiers._objective import CleanLoss, too_few_for_statistics
from bezoar.purifiers._tuning import Tuning

_EPSILON = 1e-12


@dataclass(frozen=True, kw_only=True)
class FTSAM(Tuning):
    """Fine-tune towards weights whose whole neighbourhood has a low loss, which shrinks neurons that a backdoor uses.

    Each step goes up the gradient first, by a distance of ``rho``, and descends with the gradient found there.
    BatchNorm remembers the images at the weights that are kept, not at the displaced ones, as in the authors' code.

    Args:
        rho: Radius of the neighbourhood, at least 0; 0 is plain fine-tuning. The paper's: 2 for CIFAR-10, 8 for GTSRB
            and Tiny ImageNet.
        adaptive: Measure the radius relative to the size of each weight (ASAM), as the paper does; else in the weights'
            own unit, where ``rho`` is usually about 0.05.
        label_smoothing: Share of the label's weight that is spread over all labels, in [0, 1); the paper's: 0.1 for
            CIFAR-10, 0 elsewhere.
        epochs: Passes over the clean images.
        lr: Peak learning rate of SGD, falling to zero along a cosine.
        batch: Images per step, at least 2 (the paper: 256, of 2,500 images; with few, smaller ones give enough steps).
        weight_decay: L2 penalty.
        pad: Random crop after padding by this many pixels.
        flip: Random horizontal flip; off by default, since signs, digits and text must not be mirrored.
        clip: Largest gradient norm; 0 switches clipping off, as in the paper.

    References:
        Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023;
        BackdoorBench, defence ``ft-sam``. Kwon et al., "ASAM", ICML 2021.
    """

    rho: float = 2.0
    adaptive: bool = True
    label_smoothing: float = 0.1
    epochs: int = 100
    clip: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("batch", self.batch >= 2, "at least 2")
        self.require("rho", self.rho >= 0, "at least 0")
        self.require("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        objective = Sharpness(self, too_few_for_statistics(model, len(clean.x), run))
        with full_precision(model):
            fit(
                *(model, clean.x, clean.y, self.recipe()),
                seed=run.seed,
                objective=objective,
                progress=run.progress.training,
            )
        return model


class Sharpness(CleanLoss):
    """The loss at the worst weights nearby.

    Args:
        method: The settings.
        fixed: See :class:`bezoar.purifiers._objective.CleanLoss`.
    """

    def __init__(self, method: FTSAM, fixed: bool) -> None:
        super().__init__(fixed)
        self.method = method

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss at the weights themselves; its gradient is that at the displaced weights."""
        images = self.images(model, batch)

        def smoothed() -> Tensor:
            return F.cross_entropy(logits(model, images), batch.y, label_smoothing=self.method.label_smoothing)

        if not self.method.rho:
            return smoothed()
        parameters = [p for p in model.parameters() if p.requires_grad]
        here = smoothed()
        ascent = displacement(parameters, gradients(here, parameters), self.method.rho, self.method.adaptive)
        displaced = [p.detach() + step for p, step in zip(parameters, ascent, strict=True)]
        with statistics_kept(model):
            _, found = loss_elsewhere(parameters, displaced, smoothed)
        return with_gradient(here.detach(), parameters, found)


@torch.no_grad()
def displacement(parameters: Sequence[Tensor], gradient: Sequence[Tensor], rho: float, adaptive: bool) -> list[Tensor]:
    """The step within the neighbourhood that raises a linear loss the most.

    With the scale T of a weight, 1 or its own size, the step is ``rho T^2 g / |T g|``: of length ``rho`` in units of T.
    """
    scale = [p.detach().abs() if adaptive else torch.ones_like(p) for p in parameters]
    squares = [(t * g).float().square().sum() for t, g in zip(scale, gradient, strict=True)]
    norm = torch.stack(squares).sum().sqrt() + _EPSILON
    return [rho * t.square() * g / norm for t, g in zip(scale, gradient, strict=True)]
