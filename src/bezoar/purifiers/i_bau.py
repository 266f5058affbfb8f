"""I-BAU: implicit backdoor adversarial unlearning."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.batches import passes
from bezoar.ops.finite import require_finite
from bezoar.ops.fisher import twice_differentiable
from bezoar.ops.hypergradient import hypergradient
from bezoar.ops.precision import full_precision

#: The fewest images that the authors tried.
_FEW = 100


@dataclass(frozen=True, kw_only=True)
class IBAU(Purifier):
    """Unlearn the worst change common to all images, with a gradient that knows how that change answers.

    Each round finds one additive change of the image that raises the loss on all clean images at once, and then takes a
    step on each batch that teaches the model to ignore it. The step's gradient also says how the worst change would
    move with the weights (the hypergradient). BatchNorm keeps its statistics.

    Args:
        rounds: Rounds of finding a change and unlearning it, at least 1. The authors' 5 rounds over 5000 images are 250
            steps of the weights; 20 rounds over 500 images are 100.
        lr: Learning rate of Adam on the weights (BackdoorBench: 1e-4), at least 0.
        batch: Images per step, at least 1; each round takes a step for each batch of the clean images.
        share: Share of each batch that carries the change while it is unlearned, in (0, 1], at least one image. The
            paper's formula has 1, the authors' code 0.01.
        terms: Iterations of the hypergradient, at least 0; 0 takes the change as a constant.
        step: Size of the gradient step that the hypergradient rests on, above 0.
        inner_lr: Learning rate of the change, at least 0; one step on each batch.
        inner_steps: Least steps of the change in each round, at least 1: with few batches, they are used again.
        penalty: Weight of the change's squared norm, at least 0.
        bound: Largest root mean square of the change over the values of the image; 0 for none, as the authors' script
            has it. 0.18 is the L2 norm of 10 on 3 x 32 x 32 values of their notebooks.

    References:
        Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022.
    """

    rounds: int = 20
    lr: float = 1e-3
    batch: int = 100
    share: float = 0.01
    terms: int = 5
    step: float = 0.1
    inner_lr: float = 10.0
    inner_steps: int = 10
    penalty: float = 1e-3
    bound: float = 0.18

    def __post_init__(self) -> None:
        for name in ("rounds", "batch", "inner_steps"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "terms", "inner_lr", "penalty", "bound"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("step", self.step > 0, "above 0")
        self.require("share", 0 < self.share <= 1, "in (0, 1]")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        if len(clean.x) < _FEW:
            run.warnings.append(f"I-BAU has {len(clean.x)} clean images; with fewer than {_FEW} it costs much accuracy")
        model.eval()
        with full_precision(model), twice_differentiable():
            self._rounds(model, clean, run)
        return model

    def _rounds(self, model: nn.Module, clean: Clean, run: Run) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        device, source = parameters[0].device, run.generator("i-bau")
        # In random order, where the authors take the images as they come: the first batch stands for all of them.
        batches = list(passes(clean.x, clean.y, self.batch, source, device=device))
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        total = self.rounds * len(batches)
        for number in range(self.rounds):
            change = self.worst_change(model, batches)
            run.image_gradients += self.batch * max(len(batches), self.inner_steps)
            if number == 0:
                _note(model, batches[0][0], change, run)
            for at, (x, y) in enumerate(batches):
                loss = self._unlearn(model, parameters, batches[0], (x, y), change, source)
                require_finite(loss, number * len(batches) + at + 1)
                optimizer.step()
                run.image_gradients += len(x) + (self.terms + 1) * len(batches[0][0])
                run.progress.training(number * len(batches) + at + 1, total, loss)

    def worst_change(self, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """``(1, C, H, W)`` the change that takes the model away from its own answers: one step on each batch."""
        change = torch.zeros_like(batches[0][0][:1])
        for x, _ in islice(cycle(batches), max(len(batches), self.inner_steps)):
            change.requires_grad_(True)
            with torch.no_grad():
                answers = model(x).argmax(1)
            loss = self.penalty * change.square().sum() - F.cross_entropy(model(x + change), answers)
            slope = torch.autograd.grad(loss, change)[0]
            change = (change - self.inner_lr * slope).detach()
        size = float(change.square().mean().sqrt())
        return change * min(1.0, self.bound / size) if self.bound and size else change

    def _unlearn(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        first: tuple[Tensor, Tensor],
        batch: tuple[Tensor, Tensor],
        change: Tensor,
        source: torch.Generator,
    ) -> float:
        (x, y), losses = batch, []
        carries = torch.zeros(len(x), 1, 1, 1)
        carries[torch.randperm(len(x), generator=source)[: max(1, round(self.share * len(x)))]] = 1
        carries = carries.to(x)

        def inner(delta: Tensor) -> Tensor:
            return self.penalty * delta.square().sum() - F.cross_entropy(model(first[0] + delta), first[1])

        def outer(delta: Tensor) -> Tensor:
            losses.append(F.cross_entropy(model(x + carries * delta), y))
            return losses[-1]

        slopes = hypergradient(inner, outer, change, parameters, step=self.step, terms=self.terms)
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.grad = slope
        return float(losses[-1].detach())


@torch.no_grad()
def _note(model: nn.Module, x: Tensor, change: Tensor, run: Run) -> None:
    """Where the first change sends most images: the backdoor's label, if it found the backdoor."""
    answers = model(x + change).argmax(1).cpu()
    label = int(answers.mode().values)
    share = float((answers == label).float().mean())
    run.notes["change_size"] = round(float(change.square().mean().sqrt()), 3)
    run.notes["change_leads_to"] = label
    run.notes["change_leads_share"] = round(share, 3)
