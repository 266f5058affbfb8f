"""Objectives of ABL: raise the loss on some examples while others must not suffer."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource
from bezoar.ops.augment import as_float
from bezoar.ops.normalisation import fix_statistics, statistics_kept
from bezoar.ops.objective import Batch
from bezoar.ops.tie import log_odds
from bezoar.trainers._guard import Guard

Raise = Literal["log-odds", "loss"]


def raised(logits: Tensor, y: Tensor, ceiling: float, how: Raise) -> Tensor:
    """A scalar that falls as the loss of ``(B, K)`` logits rises; examples above the ceiling have no gradient.

    Args:
        logits: Of the network.
        y: ``(B,)`` labels that the network shall no longer give.
        ceiling: Of the cross-entropy; 0 is no ceiling.
        how: ``loss`` is minus the cross-entropy, whose gradient vanishes where the network is sure; ``log-odds`` is the
            log odds of the label, which has the same gradient without that factor.
    """
    losses = F.cross_entropy(logits, y, reduction="none")
    values = -losses if how == "loss" else log_odds(logits, y)
    return (values * (losses.detach() < ceiling) if ceiling else values).mean()


class Unlearning:
    """Raises the loss of the batch, and keeps the weights that forget most of those that do no harm.

    Args:
        isolated: The examples to forget.
        genuine: Of these some are drawn to lower their loss in the same step; None for none.
        batch: How many.
        fixed: Whether BatchNorm uses its running statistics, and keeps them.
        ceiling, how: See :func:`raised`.
        guard: Says what does harm.
    """

    def __init__(
        self,
        isolated: ExampleSource,
        genuine: ExampleSource | None,
        *,
        batch: int,
        fixed: bool,
        ceiling: float,
        how: Raise,
        guard: Guard,
    ) -> None:
        self.isolated, self.genuine, self.guard = isolated, genuine, guard
        self.fixed, self.ceiling, self.batch = fixed, ceiling, batch
        self.how: Raise = how
        self.best: dict[str, Any] = {}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`; nothing is augmented."""
        if self.fixed:
            fix_statistics(model)
        loss = raised(model(batch.x), batch.y, self.ceiling, self.how)
        if self.genuine is None:
            return loss
        x, y = drawn_from(self.genuine, self.batch, batch)
        return loss + F.cross_entropy(model(x), y)

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        """Look at what was done so far."""
        del epochs
        harm = self.guard.harm(model) if number else 0.0
        if harm is None:
            return
        left = self.guard.accuracy(model, self.isolated)
        if not self.best or (left, harm) < (self.best["left"], self.best["harm"]):
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            self.best = {"weights": weights, "left": left, "harm": harm, "epochs": number}

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self.best = state["best"]


class Joint:
    """Lowers the loss of the batch, and raises that of as many isolated examples in the same step.

    Args:
        isolated: The isolated examples; drawn with replacement.
        ceiling, how: See :func:`raised`.
        guard: Says where a label is lost to the ascent, which then ends.
    """

    def __init__(self, isolated: ExampleSource, *, ceiling: float, how: Raise, guard: Guard) -> None:
        self.isolated, self.ceiling, self.guard = isolated, ceiling, guard
        self.how: Raise = how
        self.rising = True

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`; only the batch is augmented."""
        loss = F.cross_entropy(model(batch.augment(batch.x)), batch.y)
        if not self.rising:
            return loss
        x, y = drawn_from(self.isolated, len(batch.y), batch)
        # The running statistics shall not become those of the isolated examples.
        with statistics_kept(model):
            return loss + raised(model(x), y, self.ceiling, self.how)

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        """Look whether a label was lost."""
        del epochs
        if number and self.rising and self.guard.lost(model):
            self.rising = False

    def state_dict(self) -> dict[str, Any]:
        """Whether the ascent goes on, and what it is held against."""
        return {"rising": self.rising, "best": self.guard.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self.rising, self.guard.best = state["rising"], state["best"]


def drawn_from(examples: ExampleSource, count: int, batch: Batch) -> tuple[Tensor, Tensor]:
    """Images and labels drawn with replacement, where the batch is."""
    rows = torch.randint(len(examples.labels), (count,), generator=batch.generator)
    return as_float(examples.take(rows)).to(batch.x.device), examples.labels[rows].to(batch.x.device)
