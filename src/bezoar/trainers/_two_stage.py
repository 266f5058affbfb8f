"""What trainers share that learn features first, without the labels or with few of them, and the last layer after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource
from bezoar.core.run import Run
from bezoar.ops.augment import as_float
from bezoar.ops.contrastive import Embedding, contrastive_loss, one_label, view
from bezoar.ops.fit import fit, tell
from bezoar.ops.head import find_head
from bezoar.ops.objective import Batch, Objective, Stateless
from bezoar.ops.recipe import Recipe


class Contrast(Stateless):
    """The contrastive loss of two views of the batch.

    Args:
        temperature: See :func:`bezoar.ops.contrastive.contrastive_loss`.
        mirrored: Whether views may be mirrored.
        trusted: ``(N,)`` bool, whose labels may be used; None uses none.
    """

    def __init__(self, temperature: float, mirrored: bool, trusted: Tensor | None = None) -> None:
        self.temperature, self.mirrored, self.trusted = temperature, mirrored, trusted

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`; ``model`` gives unit vectors."""
        views = [view(batch.x, batch.generator, mirrored=self.mirrored) for _ in range(2)]
        first, second = model(torch.cat(views)).chunk(2)
        together = None
        if self.trusted is not None:
            together = one_label(batch.y, self.trusted[batch.index].to(batch.y.device))
        return contrastive_loss(first, second, self.temperature, together)


def learn_features(
    model: nn.Module,
    examples: ExampleSource,
    recipe: Recipe,
    objective: Contrast,
    run: Run,
    checkpoint: Path | None,
) -> None:
    """Train all of a network but its last layer on views, in place.

    Raises:
        UnsupportedModel: See :class:`bezoar.ops.contrastive.Embedding`.
    """
    image = as_float(examples.take(torch.arange(1))).to(run.device)
    embedding = Embedding(model, image)
    fit(
        embedding,
        examples,
        examples.labels,
        recipe,
        seed=run.seed,
        objective=objective,
        progress=tell(run, "features"),
        checkpoint=checkpoint,
    )


class OnTheHead(Stateless):
    """A loss of the logits of augmented images, for a last layer behind features that stay as they are.

    Args:
        loss: Of ``(B, K)`` logits, ``(B,)`` labels and ``(B,)`` positions of the examples.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self._loss = loss

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        """The statistics of the features stay."""
        del number, epochs
        model.eval()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`."""
        return self._loss(model(batch.augment(batch.x)), batch.y, batch.index)


def learn_head(
    model: nn.Module,
    examples: ExampleSource,
    recipe: Recipe,
    objective: Objective,
    run: Run,
    checkpoint: Path | None,
) -> None:
    """Train the last layer of a network alone, in place; all else stays as it is."""
    head = find_head(model, as_float(examples.take(torch.arange(1))).to(run.device))
    with only(model, head):
        fit(
            model,
            examples,
            examples.labels,
            recipe,
            seed=run.seed + 1,
            objective=objective,
            progress=tell(run, "last layer"),
            checkpoint=checkpoint,
        )


@contextmanager
def only(model: nn.Module, part: nn.Module) -> Iterator[None]:
    """Inside, the weights of a part of the network alone have gradients."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    mine = {id(p) for p in part.parameters()}
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(id(parameter) in mine)
        yield
    finally:
        for parameter, value in wanted:
            parameter.requires_grad_(value)


def symmetric_cross_entropy(logits: Tensor, y: Tensor, alpha: float, beta: float) -> Tensor:
    """``(B,)`` ``alpha`` times the cross-entropy plus ``beta`` times the reverse one, where log 0 counts as log 1e-4.

    Args:
        logits: ``(B, K)``.
        y: ``(B,)`` labels.
        alpha, beta: Weights.
    """
    known = F.one_hot(y, logits.shape[1]).to(logits).clamp(min=1e-4).log()
    reverse = -(logits.softmax(1).clamp(min=1e-7) * known).sum(1)
    return alpha * F.cross_entropy(logits, y, reduction="none") + beta * reverse
