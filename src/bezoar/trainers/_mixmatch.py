"""MixMatch: learn from the labels of some examples, and from guesses for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.ops.normalisation import statistics_kept
from bezoar.ops.objective import Batch


class MixMatch:
    """Mixes augmented examples that have their label with others that have a guess.

    Each batch is divided into those whose label counts and the others. The guess for one of these is the mean of what
    the model says of two augmented versions, sharpened. Then all are mixed with each other, labels and guesses as well:
    cross-entropy for the first, square error for the others.

    Args:
        divide: Gives ``(N,)`` bool, whose label counts, for the model as it is.
        classes: Number of labels.
        every: Whether they are divided anew before each epoch, or once.
        temperature: Of the sharpening, above 0.
        mix: Alpha of the Beta distribution that the shares of a mixture are drawn from, above 0.
        weight: Of the square error at the end of the training; it rises linearly.
    """

    def __init__(
        self,
        divide: Callable[[nn.Module], Tensor],
        classes: int,
        *,
        every: bool,
        temperature: float,
        mix: float,
        weight: float,
    ) -> None:
        self._divide, self.classes, self.every = divide, classes, every
        self.temperature, self.mix, self.weight = temperature, mix, weight
        self.labelled, self.risen = torch.zeros(0, dtype=torch.bool), 0.0

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        """Divide the examples."""
        self.risen = number / epochs
        if self.every or not len(self.labelled):
            self.labelled = self._divide(model)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`."""
        counts = self.labelled[batch.index].to(batch.y.device)
        known, other = batch.x[counts], batch.x[~counts]
        views = [batch.augment(one) for one in (known, other, other) if len(one)]
        targets = [F.one_hot(batch.y[counts], self.classes).to(batch.x)]
        if len(other):
            with torch.no_grad(), statistics_kept(model):
                first, second = model(torch.cat(views[-2:])).softmax(1).chunk(2)
            targets += [sharpened((first + second) / 2, self.temperature)] * 2
        x, target = torch.cat(views), torch.cat(targets)
        pairs = torch.randperm(len(x), generator=batch.generator).to(x.device)
        share = self._share(batch.generator)
        logits = model(share * x + (1 - share) * x[pairs])
        return self._mixed(logits, share * target + (1 - share) * target[pairs], len(known))

    def _mixed(self, logits: Tensor, target: Tensor, known: int) -> Tensor:
        loss = logits.sum() * 0
        if known:
            loss = loss - (logits[:known].log_softmax(1) * target[:known]).sum(1).mean()
        if known < len(logits):
            error = ((logits[known:].softmax(1) - target[known:]) ** 2).mean()
            loss = loss + self.weight * self.risen * error
        return loss

    def _share(self, generator: torch.Generator) -> float:
        # torch draws from a Beta distribution with its global generator only.
        seed = int(torch.randint(2**62, (), generator=generator))
        share = float(np.random.default_rng(seed).beta(self.mix, self.mix))
        return max(share, 1 - share)

    def state_dict(self) -> dict[str, Any]:
        """Whose label counts, and how far the weight has risen."""
        return {"labelled": self.labelled, "risen": self.risen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self.labelled, self.risen = state["labelled"], state["risen"]


def sharpened(probabilities: Tensor, temperature: float) -> Tensor:
    """``(B, K)`` probabilities to the power of 1 / temperature, so that each row sums to 1 again."""
    powers = probabilities ** (1 / temperature)
    return powers / powers.sum(1, keepdim=True)
