"""NGF: natural gradient fine-tuning of the last layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.augment import as_float, augment
from bezoar.ops.head import features_of, find_head
from bezoar.ops.natural import conjugate_gradient, fisher_product
from bezoar.ops.precision import full_precision
from bezoar.ops.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class NGF(Purifier):
    """Fine-tune the last layer alone, along the natural gradient.

    Each step moves the layer's weights by ``-lr (F + damping)^-1`` times the gradient of the cross-entropy on clean
    images, plus half of ``anchor`` times the squared way from the first weights weighed by their Fisher information.
    For one linear layer the Fisher information F is known in closed form, so its inverse is applied exactly, by
    conjugate gradients, where a script in the authors' style approximates it for all layers with old statistics. The
    rest of the network is frozen and runs once for each copy of the images, which makes the method the cheapest of all;
    a backdoor that sits in the frozen layers, and moves them far along what the head reads, it can only weaken.

    Args:
        steps: Updates, at least 1.
        batch: Images per step, drawn with replacement, at least 1.
        lr: Peak learning rate, at least 0; it falls to a tenth after 35 % and again after 75 % of the steps. 1 is
            Newton's step.
        momentum: Momentum of the steps, in [0, 1).
        damping: What is added to the Fisher information's diagonal, above 0; with few images a small one explodes.
        kl_clip: Steps ``d`` are shortened so that ``lr^2 d^T g``, about twice the divergence of the answers that one
            step brings, is at most this; above 0.
        anchor: Weight of the way from the first weights, at least 0. It also adds to the matrix that is inverted, as
            its own curvature; else a large one would overshoot. The paper's value is not known to us.
        weight_decay: L2 penalty, at least 0.
        copies: Times that each image runs through the network with another crop, at least 1.
        pad: Random crop after padding by this many pixels, at least 0.
        flip: Random horizontal flip; off by default, since signs, digits and text must not be mirrored.

    References:
        Karim et al., "Efficient Backdoor Removal Through Natural Gradient Fine-tuning", 2023,
        https://arxiv.org/abs/2306.17441.
    """

    steps: int = 500
    batch: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    damping: float = 1e-3
    kl_clip: float = 0.01
    anchor: float = 0.01
    weight_decay: float = 1e-4
    copies: int = 4
    pad: int = 2
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "copies"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "anchor", "weight_decay", "pad"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("damping", "kl_clip"):
            self.require(name, getattr(self, name) > 0, "above 0")
        self.require("momentum", 0 <= self.momentum < 1, "in [0, 1)")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        model.eval()
        with full_precision(model), torch.no_grad():
            device = next(model.parameters()).device
            head = find_head(model, as_float(clean.x[:1]).to(device))
            if not isinstance(head, nn.Linear):
                raise UnsupportedModel(
                    f"the last layer of {type(model).__name__} is no linear layer but {type(head).__name__}",
                    "Use a method that tunes all weights, such as finetune or fip",
                )
            features, y = self._seen(model, head, clean, run)
            weight = self._train(_joined(head), features, y, run)
            head.weight.copy_(weight[:, : head.in_features])
            if head.bias is not None:
                head.bias.copy_(weight[:, -1])
        return model

    def _seen(self, model: nn.Module, head: nn.Linear, clean: Clean, run: Run) -> tuple[Tensor, Tensor]:
        """``(N copies, D)`` features and their labels; with a bias, the last feature is 1."""
        source, recipe = run.generator("ngf", "copies"), Recipe(pad=self.pad, flip=self.flip)
        first = as_float(clean.x)
        # The first copy is the image itself.
        views = [first, *(augment(first, recipe, source) for _ in range(self.copies - 1))]
        features = torch.cat([features_of(model, head, view) for view in views]).to(head.weight)
        if head.bias is not None:
            features = torch.cat([features, features.new_ones(len(features), 1)], 1)
        return features, clean.y.to(features.device).repeat(self.copies)

    def _train(self, weight: Tensor, features: Tensor, y: Tensor, run: Run) -> Tensor:
        start, speed = weight.clone(), torch.zeros_like(weight)
        stiffness = _diagonal(features, torch.softmax(features @ weight.T, 1))
        source = run.generator("ngf", "batches")
        for number in range(self.steps):
            rows = torch.randint(len(y), (self.batch,), generator=source).to(y.device)
            a, labels = features[rows], y[rows]
            loss, slope, chances = _slope(a, labels, weight)
            slope = slope + self.anchor * stiffness * (weight - start) + self.weight_decay * weight
            rate = self.lr * 0.1 ** ((number / self.steps >= 0.35) + (number / self.steps >= 0.75))
            step = natural_step(a, chances, slope, damping=self.damping + self.anchor * stiffness, tolerance=1e-3)
            divergence = rate**2 * float((step * slope).sum())
            speed = self.momentum * speed + step * min(1.0, math.sqrt(self.kl_clip / max(divergence, 1e-30)))
            weight = weight - rate * speed
            run.progress.training(number + 1, self.steps, loss)
        run.notes["head_moved"] = float(f"{float((weight - start).norm() / start.norm().clamp(min=1e-12)):.3g}")
        return weight


def natural_step(
    features: Tensor, chances: Tensor, slope: Tensor, *, damping: float | Tensor, tolerance: float = 1e-6
) -> Tensor:
    """``(F + damping)^-1 slope`` for a linear layer under softmax.

    Args:
        features: ``(N, D)`` what goes into the layer.
        chances: ``(N, K)`` the model's probabilities.
        slope: ``(K, D)`` gradient of the layer's weight.
        damping: Added to the diagonal, at least 0; one number, or ``(K, D)``.
        tolerance: Rest that may be left, as a share of the slope.
    """
    return conjugate_gradient(lambda v: fisher_product(features, chances, v) + damping * v, slope, tolerance=tolerance)


def _joined(head: nn.Linear) -> Tensor:
    parts = [head.weight] if head.bias is None else [head.weight, head.bias.unsqueeze(1)]
    return torch.cat(parts, 1).detach().clone()


def _slope(features: Tensor, y: Tensor, weight: Tensor) -> tuple[float, Tensor, Tensor]:
    answers = features @ weight.T
    chances = torch.softmax(answers, 1)
    wrong = chances - F.one_hot(y, chances.shape[1]).to(chances)
    return float(F.cross_entropy(answers, y)), wrong.T @ features / len(y), chances


def _diagonal(features: Tensor, chances: Tensor) -> Tensor:
    """``(K, D)`` diagonal of the Fisher information."""
    return (chances * (1 - chances)).T @ features.square() / len(features)
