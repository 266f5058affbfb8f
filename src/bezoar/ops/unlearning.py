"""Unlearning the clean task by gradient ascent, the first stage of RNP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.surgery import logits
from bezoar.ops.answers import answers
from bezoar.ops.batches import passes
from bezoar.ops.recipe import Recipe

#: 500 images in batches of 128, as in the paper, are 4 steps; of fewer images an epoch takes several passes.
_LEAST_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """How to unlearn.

    Args:
        lr: Learning rate of SGD; a tenth of it after 10 epochs and a hundredth after 20.
        epochs: Most epochs.
        accuracy: Unlearning ends after the first epoch with at most this accuracy.
        clip: Largest gradient norm; 0 switches clipping off.
        momentum: That of SGD; the weight decay is 5e-4.
        batch: Images per step.
        recipe: Augmentation of the batches.
    """

    lr: float
    epochs: int
    accuracy: float
    clip: float
    momentum: float
    batch: int
    recipe: Recipe


@dataclass(frozen=True)
class Unlearned:
    """How far unlearning came.

    Attributes:
        accuracy: Accuracy of the last epoch, over its batches.
        epochs: Epochs that it took.
        wanted: Accuracy at which it should have ended.
    """

    accuracy: float
    epochs: int
    wanted: float

    @property
    def reached(self) -> bool:
        """Whether the clean task counts as unlearned."""
        return self.accuracy <= self.wanted


def unlearn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    settings: Unlearning,
    generator: Callable[[int], torch.Generator],
    tell: Callable[[int, int, float], None],
) -> Unlearned:
    """Ascend the cross-entropy in place until the accuracy is low, in the mode that the model is in.

    Args:
        model: Its parameters need gradients.
        x: ``(N, C, H, W)`` images in [0, 1], or uint8.
        y: ``(N,)`` labels.
        settings: Optimiser, batches and stop.
        generator: Gives the CPU generator of an epoch.
        tell: Told of epoch, step and loss.

    Raises:
        FloatingPointError: The loss is no longer finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=5e-4)
    done = Unlearned(1.0, 0, settings.accuracy)
    for epoch in range(settings.epochs):
        optimizer.param_groups[0]["lr"] = settings.lr * 0.1 ** ((epoch >= 10) + (epoch >= 20))
        right = seen = 0
        batches = epoch_of(x, y, settings.batch, settings.recipe, generator(epoch), device)
        for step, (images, truth) in enumerate(batches):
            out = logits(model, images)
            _ascend(model, optimizer, out, truth, settings.clip)
            right, seen = right + int((out.argmax(1) == truth).sum()), seen + len(truth)
            tell(epoch, step, float(F.cross_entropy(out.detach(), truth)))
        done = Unlearned(right / seen, epoch + 1, settings.accuracy)
        if done.reached:
            break
    return done


def _ascend(model: nn.Module, optimizer: torch.optim.Optimizer, out: Tensor, y: Tensor, clip: float) -> None:
    loss = -F.cross_entropy(out, y)
    if not math.isfinite(float(loss.detach())):
        raise FloatingPointError("the loss is not finite")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def epoch_of(
    x: Tensor, y: Tensor, batch: int, recipe: Recipe, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch: of few images it takes several passes."""
    for _ in range(_passes(len(x), batch)):
        yield from passes(x, y, batch, generator, device=device, recipe=recipe, least=2)


def steps_of_epoch(count: int, batch: int) -> int:
    """Steps of an epoch over ``count`` images."""
    return _passes(count, batch) * _batches(count, batch)


def stop_at(num_classes: int) -> float:
    """Accuracy at which the clean task counts as unlearned: 0.2 for the paper's 10 classes."""
    return min(max(2 / num_classes, 0.1), (1 + 1 / num_classes) / 2)


def predicted_counts(model: nn.Module, x: Tensor, num_classes: int, batch: int = 256) -> Tensor:
    """``(K,)`` how many of ``(N, C, H, W)`` images the model gives each label, in eval mode."""
    return torch.bincount(answers(model, x, batch=batch), minlength=num_classes)


def _passes(count: int, batch: int) -> int:
    return -(-_LEAST_STEPS // _batches(count, batch))


def _batches(count: int, batch: int) -> int:
    full, rest = divmod(count, batch)
    return full + (rest > 1 or full == 0)
