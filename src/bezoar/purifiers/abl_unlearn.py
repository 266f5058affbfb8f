"""ABL's unlearning: raise the loss on training examples that a filter isolated, and hold it on clean ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.surgery import logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.answers import answers
from bezoar.ops.batches import passes
from bezoar.ops.normalisation import fix_statistics
from bezoar.ops.precision import full_precision
from bezoar.purifiers._choose import accuracy


@dataclass(frozen=True, kw_only=True)
class ABLUnlearn(Purifier):
    """Gradient ascent on suspects, with the labels that they came with, and descent on clean examples.

    It ends when no more suspects than by chance get their label, and goes back to the weights of the epoch before when
    the accuracy on the clean examples falls by more than ``tolerance``: the ascent has no bound of its own. Clean
    examples among the suspects are unlearned too, so a few sure suspects do better than many. Suspects that the model
    does not give their label are left alone.

    Args:
        order: ``joint`` minimises the loss on clean examples minus that on suspects, in one batch, as in the paper;
            ``ascent`` raises that on suspects alone, as the public code does in its last stage.
        epochs: Most passes over the suspects, at least 1 (the code: 4).
        lr: Learning rate of SGD (momentum 0.9, Nesterov), at least 0.
        batch: Suspects, and clean examples, of each step, at least 2.
        weight_decay: L2 penalty, at least 0.
        clip: Largest gradient norm; 0, as in the code, switches clipping off.
        tolerance: Fall of the accuracy on the clean examples that is allowed, in [0, 1].
        most: Most suspects to use, at least 1: the first ones (the paper: 1 % of 50,000).
        statistics: ``batch`` normalises by the batch and lets the running statistics move, as the code does; ``fixed``
            keeps them.

    References:
        Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021, section 3.3.
    """

    needs_suspects = True

    order: Literal["joint", "ascent"] = "joint"
    epochs: int = 20
    lr: float = 5e-4
    batch: int = 64
    weight_decay: float = 1e-4
    clip: float = 5.0
    tolerance: float = 0.02
    most: int = 500
    statistics: Literal["fixed", "batch"] = "batch"

    def __post_init__(self) -> None:
        self.require("order", self.order in ("joint", "ascent"), "joint or ascent")
        for name in ("epochs", "most"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("batch", self.batch >= 2, "at least 2")
        for name in ("lr", "weight_decay", "clip"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("tolerance", 0 <= self.tolerance <= 1, "in [0, 1]")
        self.require("statistics", self.statistics in ("fixed", "batch"), "fixed or batch")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        assert clean.suspects is not None
        x, y = (part[: self.most] for part in clean.suspects)
        given = answers(model, x) == y
        run.notes |= {"suspects": len(y), "suspects_before": round(float(given.double().mean()), 4)}
        if float(given.double().mean()) <= 1 / clean.num_classes:
            run.warnings.append("The model gives the suspects their labels no more often than chance: it is unchanged")
            return model
        with full_precision(model):
            self._unlearn(model, clean, x[given], y[given], run)
        run.notes["suspects_after"] = round(float((answers(model, x) == y).double().mean()), 4)
        return model

    def _unlearn(self, model: nn.Module, clean: Clean, x: Tensor, y: Tensor, run: Run) -> None:
        wanted = [p for p in model.parameters() if p.requires_grad]
        nesterov = {"momentum": 0.9, "nesterov": True, "weight_decay": self.weight_decay}
        optimizer = torch.optim.SGD(wanted, lr=self.lr, **nesterov)  # type: ignore[arg-type]
        lowest = accuracy(model, clean.x, clean.y) - self.tolerance
        others = self._clean(model, clean, run)
        good = copy.deepcopy(model.state_dict())
        done = 0
        for epoch in range(self.epochs):
            finite = all(
                self._step(model, optimizer, batch, next(others)) for batch in self._suspects(model, x, y, run, epoch)
            )
            if not finite or accuracy(model, clean.x, clean.y) < lowest:
                model.load_state_dict(good)
                run.warnings.append(
                    f"Unlearning stopped after {done} epochs, before the accuracy on the clean examples fell by more "
                    f"than {self.tolerance:.0%}"
                )
                break
            good, done = copy.deepcopy(model.state_dict()), epoch + 1
            if float((answers(model, x) == y).double().mean()) <= 1 / clean.num_classes:
                break
        run.notes["unlearn_epochs"] = done

    def _step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        suspects: tuple[Tensor, Tensor],
        clean: tuple[Tensor, Tensor],
    ) -> bool:
        """One step; whether the loss was finite."""
        model.train()
        if self.statistics == "fixed" or min(len(suspects[1]), len(clean[1])) < 2:
            fix_statistics(model)
        # Together, so that BatchNorm sees them together, as in training.
        x = torch.cat([suspects[0], clean[0]]) if self.order == "joint" else suspects[0]
        out = logits(model, x)
        loss = -F.cross_entropy(out[: len(suspects[1])], suspects[1])
        if self.order == "joint":
            loss = loss + F.cross_entropy(out[len(suspects[1]) :], clean[1])
        if not math.isfinite(float(loss.detach())):
            return False
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.clip:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        optimizer.step()
        return True

    def _suspects(
        self, model: nn.Module, x: Tensor, y: Tensor, run: Run, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        steps = -(-len(y) // self.batch)
        generator, device = run.generator("abl-unlearn", "suspects", epoch), _device(model)
        for step, batch in enumerate(passes(x, y, self.batch, generator, device=device, least=2)):
            run.check()
            run.progress.training(epoch * steps + step + 1, self.epochs * steps, 0.0)
            yield batch

    def _clean(self, model: nn.Module, clean: Clean, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
        generator = run.generator("abl-unlearn", "clean")
        while True:
            yield from passes(clean.x, clean.y, self.batch, generator, device=_device(model), least=2)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
