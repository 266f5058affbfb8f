"""Trigger inversion for many labels in one batch.

Stamp T triggers on the same B images, run the T x B results as one batch, sum the T losses, take one Adam step over
parameters whose first axis is the label. In eval mode rows do not interact, so the gradient of the sum is that of the
T separate losses, and the cost controller is a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.run import Run
from bezoar.core.space import Parameters, TriggerSpace
from bezoar.core.surgery import logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.cost import CostController

Loss = Literal["ce", "linear"]
# ln((1 - 1e-7) / 1e-7): what the swapped arguments of the authors' Keras loss amount to, methods sheet section 1.
_LINEAR = 16.118095550958316


def target_loss(out: Tensor, target: Tensor, kind: Loss) -> Tensor:
    """``(N,)`` losses of ``(N, K)`` logits against ``(N,)`` target labels.

    ``ce`` is the paper's cross-entropy; ``linear`` is ``16.118 (1 - p_target)``, what the authors' code computes.
    """
    if kind == "ce":
        return F.cross_entropy(out, target, reduction="none")
    return _LINEAR * (1 - out.softmax(1).gather(1, target[:, None]).squeeze(1))


@dataclass(frozen=True, kw_only=True)
class InversionSettings:
    """How to invert.

    Args:
        batch: Images per step, the same ones for all labels.
        lr: Step size of Adam.
        betas: Momenta of Adam (the authors' 0.5 and 0.9).
        loss: See :func:`target_loss`.
        smoothing: Weight of the past in the running success rate, in [0, 1); 0 decides on each batch alone.
        pixels_per_pass: Bound on B x H x W of one forward pass; more labels are cut into chunks.
        precision: ``auto`` computes in bf16 or fp16 on CUDA and in fp32 elsewhere.
    """

    batch: int = 16
    lr: float = 0.2
    betas: tuple[float, float] = (0.5, 0.9)
    loss: Loss = "ce"
    smoothing: float = 0.7
    pixels_per_pass: int = 256 * 32 * 32
    precision: Literal["auto", "fp32"] = "auto"


class Inversion:
    """The running search for a trigger of each label. Resumable: all of its state is in :meth:`state`.

    Args:
        model: Eval mode, parameters without gradients.
        x: ``(N, C, H, W)`` clean images in [0, 1], on the CPU.
        y: ``(N,)`` labels.
        labels: Labels to invert.
        space: Family of triggers.
        controller: Weight of the size.
        settings: Optimiser and batches.
        seed: Start of the triggers and order of the images.
        run: Device, and where gradients are counted.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        labels: list[int],
        *,
        space: TriggerSpace,
        controller: CostController,
        settings: InversionSettings,
        seed: int,
        run: Run,
    ) -> None:
        self.model, self.x, self.y, self.space = model, x, y, space
        self.controller, self.settings, self.run = controller, settings, run
        self.labels = list(labels)
        self.seed = seed
        self.steps = 0
        self.parameters = {k: v.to(run.device).requires_grad_() for k, v in space.start(self.labels, seed).items()}
        self.best = {k: v.detach().clone() for k, v in self.parameters.items()}
        self.cost = controller.start(len(labels))
        self.success = torch.zeros(len(labels), dtype=torch.float64)
        self.done = torch.zeros(len(labels), dtype=torch.bool)
        self.optimizer = self._adam(self.parameters)

    def step(self) -> None:
        """One step of all labels on the next batch of images."""
        images, truth = self._batch()
        size = self.space.size(self.parameters)
        rates = []
        self.optimizer.zero_grad(set_to_none=True)
        weight = self.cost["cost"].to(size)
        (weight * size).sum().backward()  # type: ignore[no-untyped-call]
        for rows in self._chunks(len(images)):
            rates.append(self._chunk(rows, images, truth))
        # The decision is about the triggers that were measured, so it comes before they are changed.
        self._decide(torch.cat(rates), size.detach().cpu().double())
        self.optimizer.step()
        self.steps += 1
        self.run.image_gradients += len(self.labels) * len(images)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, dtype=torch.long)
        old = self.optimizer.state_dict()["state"]
        moved = index.to(self.run.device)
        self.labels = [self.labels[r] for r in rows]
        self.parameters = {k: v.detach()[moved].clone().requires_grad_() for k, v in self.parameters.items()}
        self.best = {k: v[moved].clone() for k, v in self.best.items()}
        self.cost = {k: v[index] for k, v in self.cost.items()}
        self.success, self.done = self.success[index], self.done[index]
        self.optimizer = self._adam(self.parameters)
        fresh = self.optimizer.state_dict()
        fresh["state"] = {
            i: {k: v[moved] if k.startswith("exp_avg") else v for k, v in entry.items()} for i, entry in old.items()
        }
        self.optimizer.load_state_dict(fresh)

    @property
    def sizes(self) -> Tensor:
        """``(T,)`` size of the smallest working trigger so far; infinite where none has worked."""
        return self.cost["best"]

    @property
    def current(self) -> Tensor:
        """``(T,)`` size of the triggers as they are now."""
        with torch.no_grad():
            return self.space.size(self.parameters).cpu().double()

    def trigger(self, row: int) -> InvertedTrigger:
        """The smallest working trigger of a row; where none has worked, the one it has now."""
        source = self.best if torch.isfinite(self.sizes[row]) else self.parameters
        return self.space.harden(source, row)

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that :meth:`restore` continues from."""
        return {
            "labels": self.labels,
            "steps": self.steps,
            "parameters": {k: v.detach().cpu() for k, v in self.parameters.items()},
            "best": {k: v.cpu() for k, v in self.best.items()},
            "cost": self.cost,
            "success": self.success,
            "done": self.done,
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same scan."""
        device = self.run.device
        self.labels, self.steps = list(state["labels"]), int(state["steps"])
        self.parameters = {k: v.to(device).requires_grad_() for k, v in state["parameters"].items()}
        self.best = {k: v.to(device) for k, v in state["best"].items()}
        self.cost, self.success, self.done = state["cost"], state["success"], state["done"]
        self.optimizer = self._adam(self.parameters)
        self.optimizer.load_state_dict(state["optimizer"])

    def _adam(self, parameters: Parameters) -> torch.optim.Adam:
        return torch.optim.Adam(list(parameters.values()), lr=self.settings.lr, betas=self.settings.betas)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Images of this step: a fresh order of the whole set for each pass, known from seed and step alone."""
        size = min(self.settings.batch, len(self.x))
        per_pass = max(1, len(self.x) // size)
        order = torch.randperm(len(self.x), generator=Run(seed=self.seed).generator("order", self.steps // per_pass))
        at = self.steps % per_pass * size
        index = order[at : at + size]
        images = self.x[index].to(self.run.device, memory_format=torch.channels_last)
        return images, self.y[index].to(self.run.device)

    def _chunks(self, images: int) -> list[slice]:
        area = self.x.shape[2] * self.x.shape[3]
        count = max(1, self.settings.pixels_per_pass // (images * area))
        return [slice(at, at + count) for at in range(0, len(self.labels), count)]

    def _chunk(self, rows: slice, images: Tensor, truth: Tensor) -> Tensor:
        """Add the gradient of some rows; give their ``(t,)`` success rates on images of other labels."""
        part = {k: v[rows] for k, v in self.parameters.items()}
        labels = torch.tensor(self.labels[rows], device=self.run.device)
        stamped = self.space.stamp(part, images).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with self._autocast():
            out = logits(self.model, stamped).float()
        targets = labels.repeat_interleave(len(images))
        others = (truth[None] != labels[:, None]).float()
        count = others.sum(1).clamp(min=1)
        losses = target_loss(out, targets, self.settings.loss).view(len(labels), -1)
        ((losses * others).sum(1) / count).sum().backward()  # type: ignore[no-untyped-call]
        hit = (out.argmax(1) == targets).view(len(labels), -1).float()
        rate = (hit * others).sum(1) / count
        # A batch that holds only images of the label says nothing: NaN leaves the running rate as it is.
        return torch.where(others.sum(1) > 0, rate, torch.nan).detach().cpu().double()

    def _decide(self, rate: Tensor, size: Tensor) -> None:
        weight = 0.0 if self.steps == 0 else self.settings.smoothing
        moved = weight * self.success + (1 - weight) * rate
        self.success = torch.where(torch.isnan(rate), self.success, moved)
        improved, done = self.controller.decide(self.cost, self.success, size)
        self.done |= done
        rows = torch.nonzero(improved).flatten().to(self.run.device)
        for name, value in self.parameters.items():
            self.best[name][rows] = value.detach()[rows]

    def _autocast(self) -> torch.autocast:
        device = self.run.device.type
        lower = self.settings.precision == "auto" and device == "cuda"
        dtype = torch.bfloat16 if not lower or torch.cuda.is_bf16_supported() else torch.float16
        return torch.autocast(device, dtype=dtype, enabled=lower)
