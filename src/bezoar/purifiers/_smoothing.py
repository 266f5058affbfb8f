"""What FIP and Fast FIP share: fine-tuning towards a smooth minimum, held near the start where the data say so."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.augment import as_float
from bezoar.ops.batches import drawn
from bezoar.ops.finite import require_finite
from bezoar.ops.fisher import Forward, diagonal, sampled_labels, trace_estimate, twice_differentiable
from bezoar.ops.precision import full_precision
from bezoar.ops.recipe import Recipe

#: Images whose gradients one by one give the anchor's Fisher information.
_ANCHOR_IMAGES = 500
#: An estimate of the trace costs this many times the forward and backward pass of its images.
_TRACE_COST = 3


class Trained(ABC):
    """What is trained, the model as a function of it, and how it gets into the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Leaf tensors by name, which need a gradient."""

    @abstractmethod
    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's parameters by name, made of the trained tensors."""

    def forward(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Logits of the model with these tensors."""
        out: Tensor = torch.func.functional_call(self.model, self.weights(tensors), (x,))
        return out

    @torch.no_grad()
    def keep(self) -> None:
        """Write the trained tensors into the model."""
        named = dict(self.model.named_parameters())
        for name, value in self.weights(self.tensors).items():
            named[name].copy_(value)


@dataclass(frozen=True, kw_only=True)
class Smoothing(Purifier):
    """Settings of the objective ``CE + smooth Tr(F) + anchor / 2 sum_i F0_ii (w_i - w0_i)^2`` and of its SGD."""

    steps: int = 1000
    batch: int = 128
    lr: float = 0.005
    momentum: float = 0.95
    smooth: float = 0.01
    anchor: float = 2.0
    every: int = 5
    labels: Literal["sampled", "given"] = "sampled"
    pad: int = 2
    flip: bool = False
    clip: float = 5.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "every"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "smooth", "anchor", "pad", "clip"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self.require("labels", self.labels in ("sampled", "given"), "sampled or given")

    @abstractmethod
    def trained(self, model: nn.Module) -> Trained:
        """What is trained."""

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        model.eval()
        with full_precision(model), twice_differentiable():
            trained = self.trained(model)
            source = run.generator("smoothing", "fisher")
            stiffness = self._diagonal(trained, clean, source, run)
            run.notes["fisher_trace_before"] = _rounded(stiffness)
            self._train(trained, clean, stiffness, run)
            run.notes["fisher_trace_after"] = _rounded(self._diagonal(trained, clean, source, run))
            trained.keep()
        return model

    def _diagonal(self, trained: Trained, clean: Clean, source: torch.Generator, run: Run) -> dict[str, Tensor]:
        device = next(iter(trained.tensors.values())).device
        rows = torch.randperm(len(clean.x), generator=source)[:_ANCHOR_IMAGES]
        x, y = as_float(clean.x[rows]).to(device), clean.y[rows].to(device)
        run.image_gradients += len(x)
        return diagonal(trained.forward, trained.tensors, x, self._labels(trained.forward, trained, x, y, source))

    def _labels(self, forward: Forward, trained: Trained, x: Tensor, y: Tensor, source: torch.Generator) -> Tensor:
        if self.labels == "given":
            return y
        with torch.no_grad():
            answers = torch.cat([forward(trained.tensors, part) for part in torch.split(x, 256)])
        return sampled_labels(answers, source)

    def _train(self, trained: Trained, clean: Clean, stiffness: dict[str, Tensor], run: Run) -> None:
        tensors = trained.tensors
        start = {name: value.detach().clone() for name, value in tensors.items()}
        optimizer = torch.optim.SGD(tensors.values(), lr=self.lr, momentum=self.momentum)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        draws, source = run.generator("smoothing", "batches"), run.generator("smoothing", "labels")
        device, recipe = next(iter(tensors.values())).device, Recipe(pad=self.pad, flip=self.flip)
        batches = drawn(clean.x, clean.y, self.batch, self.steps, draws, device=device, recipe=recipe)
        for number, (x, y) in enumerate(batches):
            loss = F.cross_entropy(trained.forward(tensors, x), y)
            require_finite(float(loss.detach()), number + 1)
            run.image_gradients += len(x)
            if self.anchor:
                pull = sum((f * (tensors[n] - start[n]).square()).sum() for n, f in stiffness.items())
                loss = loss + self.anchor / 2 * pull
            if self.smooth and number % self.every == 0:
                labels = self._labels(trained.forward, trained, x, y, source)
                # Taken at one step of so many, it counts for all of them.
                trace = trace_estimate(trained.forward, tensors, x, labels, source)
                loss = loss + self.smooth * self.every * trace
                run.image_gradients += _TRACE_COST * len(x)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if self.clip:
                nn.utils.clip_grad_norm_(tensors.values(), self.clip)
            optimizer.step()
            schedule.step()
            run.progress.training(number + 1, self.steps, float(loss.detach()))


def _rounded(found: dict[str, Tensor]) -> float:
    value = float(sum(float(d.sum()) for d in found.values()))
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0
