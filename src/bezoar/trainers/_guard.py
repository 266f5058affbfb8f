"""Does the ascent on isolated examples harm the others? Told without knowing which examples are poisoned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource
from bezoar.core.run import Run
from bezoar.trainers._training import correct


def slow(losses: Tensor, labels: Tensor, share: float) -> Tensor:
    """``(N,)`` bool: of each label, the share of examples with the largest losses ``(N,)``.

    Poison is learned quickly, so these are genuine even where much of a label is poisoned.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        rows = (labels == label).nonzero().flatten()
        order = losses[rows].argsort(descending=True, stable=True)
        chosen[rows[order[: max(1, round(share * len(rows)))]]] = True
    return chosen


class Guard:
    """Examples that the ascent must leave alone.

    Args:
        examples: Examples held out of the training, most of them genuine.
        run: Device.
        drop: How far the accuracy over all of them may fall, in [0, 1], beyond what is chance.
        label_drop: How far that of a single label may fall, in [0, 1], beyond what is chance.
    """

    def __init__(self, examples: ExampleSource, run: Run, drop: float, label_drop: float) -> None:
        self.examples, self.run, self.drop, self.label_drop = examples, run, drop, label_drop
        self.before: Tensor | None = None
        self.best: list[float] = []

    def start(self, model: nn.Module) -> None:
        """What comes later is compared with this model."""
        self.before = correct(model, self.examples, self.run)

    def harm(self, model: nn.Module) -> float | None:
        """How far the accuracy is below that at the start; None where that is too far, over all or for a label."""
        assert self.before is not None
        after, labels = correct(model, self.examples, self.run), self.examples.labels
        change = self.before.long() - after.long()  # 1 for lost, -1 for gained
        by_label = [change[labels == label] for label in torch.unique(labels).tolist()]
        harmed = _beyond(change, self.drop) or any(_beyond(mine, self.label_drop) for mine in by_label)
        return None if harmed else float(change.float().mean())

    def lost(self, model: nn.Module) -> bool:
        """Whether a label's accuracy is less than half of the best that this was ever asked for."""
        hits, labels = correct(model, self.examples, self.run), self.examples.labels
        present = torch.unique(labels).tolist()
        now = [float(hits[labels == label].float().mean()) for label in present]
        self.best = [max(pair) for pair in zip(now, self.best or now, strict=True)]
        return any(2 * value < best for value, best in zip(now, self.best, strict=True))

    def accuracy(self, model: nn.Module, examples: ExampleSource) -> float:
        """Share of other examples that a model gives their label."""
        return float(correct(model, examples, self.run).float().mean())


def _beyond(change: Tensor, allowed: float) -> bool:
    """Whether more was lost than allowed, by more than a standard deviation of the number of changes."""
    excess = float(change.sum()) - allowed * len(change)
    return excess > math.sqrt(float(change.abs().sum()))
