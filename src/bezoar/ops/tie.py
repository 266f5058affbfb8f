"""Are some examples of a label learned for another reason than the rest of it? Told from the gradients alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource, Subset
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.ops.augment import as_float

_CHUNK = 256


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """``(B,)`` log odds of the labels ``(B,)`` against all others, from ``(B, K)`` logits."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    return own - logits.scatter(1, y[:, None], float("-inf")).logsumexp(1)


def tie(model: nn.Module, group: ExampleSource, others: ExampleSource, run: Run) -> float:
    """How far the log odds of other examples fall for each unit by which those of a group are lowered.

    It is what an infinitely small step down the gradient of the group's mean log odds does to those of the others: near
    1 where both get their label for the same reason, near 0 where the group has a reason of its own, such as a trigger.

    Args:
        model: Left as it was; asked in eval mode.
        group, others: Examples that the model gives their label; read a few at a time.
        run: Device and time.

    Returns:
        Infinite where one of the two is empty, or nothing moves the group.
    """
    if not len(group.labels) or not len(others.labels):
        return float("inf")
    with frozen(model):
        weights = [p for p in model.parameters() if p.is_floating_point()]
        for weight in weights:
            weight.requires_grad_()
        mine, theirs = (_gradient(model, weights, one, run) for one in (group, others))
    power = sum(float((a * a).sum()) for a in mine)
    along = sum(float((a * b).sum()) for a, b in zip(mine, theirs, strict=True))
    return along / power if power > 0 else float("inf")


def _gradient(model: nn.Module, weights: list[nn.Parameter], examples: ExampleSource, run: Run) -> list[Tensor]:
    """Of the mean log odds, by weight, in double precision."""
    total = [torch.zeros_like(weight, dtype=torch.float64, requires_grad=False) for weight in weights]
    count = len(examples.labels)
    for rows in torch.split(torch.arange(count), _CHUNK):
        run.check()
        x, y = as_float(examples.take(rows)).to(run.device), examples.labels[rows].to(run.device)
        with torch.enable_grad():
            odds = log_odds(logits(model, x).float(), y).sum() / count
        for summed, part in zip(total, torch.autograd.grad(odds, weights, allow_unused=True), strict=True):
            if part is not None:
                summed += part.detach().double()
    return total


def given_their_label(model: nn.Module, examples: ExampleSource, rows: Tensor, run: Run) -> Subset:
    """Those at the positions ``rows`` that the model gives their label."""
    hits = []
    with frozen(model), torch.no_grad():
        for part in torch.split(rows, _CHUNK):
            run.check()
            found = logits(model, as_float(examples.take(part)).to(run.device)).argmax(1).cpu()
            hits.append(part[found == examples.labels[part]])
    return Subset(examples, torch.cat([rows[:0], *hits]))
