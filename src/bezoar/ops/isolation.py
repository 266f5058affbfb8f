"""The first stage of ABL: train with a floor under the loss, so that what is learned fastest shows."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import DataError
from bezoar.core.examples import ExampleSource
from bezoar.core.run import Run
from bezoar.ops.fit import fit, tell
from bezoar.ops.losses import Curves, losses_of
from bezoar.ops.objective import Batch, Stateless
from bezoar.ops.recipe import Recipe

Floor = Literal["lga", "lga-batch", "flooding"]


class Over(Exception):  # noqa: N818 - no error
    """A training has come to its end before its last epoch."""


def floored(losses: Tensor, gamma: float, how: Floor) -> Tensor:
    """A scalar whose gradient turns where the loss falls below ``gamma``.

    Args:
        losses: ``(B,)`` cross-entropies.
        gamma: The floor, at least 0.
        how: ``lga`` turns each example on its own, ``sign(l - gamma) * l``; ``lga-batch`` turns the mean of the batch;
            ``flooding`` is ``|l - gamma| + gamma`` of that mean, which has the same gradient.
    """
    if how == "lga":
        return (torch.sign(losses.detach() - gamma) * losses).mean()
    mean = losses.mean()
    if how == "flooding":
        return (mean - gamma).abs() + gamma
    return torch.sign(mean.detach() - gamma) * mean


class Watcher:
    """Calls a function with the model and the epochs done; a checkpoint is not held against what it does."""

    def __init__(self, function: Callable[[nn.Module, int], None]) -> None:
        self._function = function

    def __call__(self, model: nn.Module, done: int) -> None:
        """So many epochs are done."""
        self._function(model, done)


class Isolating(Stateless):
    """Trains with a floor under the loss, and shows the model before each epoch.

    Args:
        how: See :func:`floored`.
        gamma: The floor.
        watcher: Sees the model.
    """

    def __init__(self, how: Floor, gamma: float, watcher: Watcher) -> None:
        self.how: Floor = how
        self.gamma, self.watcher = gamma, watcher

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`; nothing is augmented."""
        return floored(F.cross_entropy(model(batch.x), batch.y, reduction="none"), self.gamma, self.how)

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        """Show the model."""
        del epochs
        self.watcher(model, number)


def isolate(
    model: nn.Module,
    examples: ExampleSource,
    recipe: Recipe,
    curves: Curves,
    run: Run,
    *,
    how: Floor,
    gamma: float,
    until_floor: bool,
    checkpoint: Path | None = None,
) -> int:
    """Train with a floor under the loss; the losses of all examples go to ``curves``.

    Args:
        model: Trained in place.
        examples: The untrusted training set.
        recipe: Optimiser and epochs; nothing should be augmented.
        curves: Takes the losses before and after each epoch.
        run: Device, time, seed and progress; the note ``isolation_epochs`` tells how many were done.
        how, gamma: See :func:`floored`.
        until_floor: Whether to end after the first epoch that brings half of the examples to the floor.
        checkpoint: Where a killed run goes on.

    Returns:
        Epochs done.
    """
    passed = [0]

    def watched(model: nn.Module, done: int) -> None:
        losses = losses_of(model, examples, run)
        curves.record(done, losses)
        passed[0] = done
        if done and until_floor and float(losses.median()) <= gamma:
            raise Over

    try:
        fit(
            model,
            examples,
            examples.labels,
            recipe,
            seed=run.seed,
            objective=Isolating(how, gamma, Watcher(watched)),
            progress=tell(run, "isolate"),
            checkpoint=checkpoint,
        )
        watched(model, recipe.epochs)
    except Over:
        pass
    run.notes["isolation_epochs"] = passed[0]
    return passed[0]


def whole_part(rate: float, count: int) -> int:
    """Exactly the whole part of ``rate * count``, with the rate as it is written."""
    return floor(Fraction(repr(rate)) * count)


def lowest(values: Tensor, count: int) -> Tensor:
    """``(N,)`` bool: the ``count`` lowest of ``(N,)`` values, of equal ones the first."""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.argsort(stable=True)[:count]] = True
    return chosen


def isolated_count(rate: float, count: int) -> int:
    """How many examples a share is, see :func:`whole_part`, where it is any.

    Raises:
        DataError: That is no example, or all.
    """
    chosen = whole_part(rate, count)
    if not chosen:
        least = ceil(1 / Fraction(repr(rate)))
        raise DataError(
            f"a share of {rate:g} of {count} examples is none", f"Give at least {least} examples, or raise --rate"
        )
    return chosen
