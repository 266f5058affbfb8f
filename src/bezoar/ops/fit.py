"""One training loop for everything that trains: victims, fine-tuning, unlearning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Changes a batch of images before the step; the generator is the run's own.
Stamp = Callable[[Tensor, torch.Generator], Tensor]
#: Told after each step: steps done, steps in all, loss of the step.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Args:
        epochs: Passes over the data, at least 1.
        batch: Examples per step.
        lr: Peak learning rate.
        optimizer: ``sgd`` (momentum 0.9, Nesterov) or ``adam``.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty.
        schedule: ``constant``, ``cosine`` to zero, or ``onecycle`` (linear up over the first fifth, cosine to zero).
        pad: Random crop after padding by this many pixels; 0 switches it off.
        flip: Random horizontal flip.
        clip: Largest gradient norm; 0 switches clipping off.
    """

    epochs: int = 10
    batch: int = 128
    lr: float = 0.1
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine", "onecycle"] = "onecycle"
    pad: int = 0
    flip: bool = False
    clip: float = 0.0

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("lr", self.lr >= 0, "at least 0"),
            ("pad", self.pad >= 0, "at least 0"),
        ):
            if not valid:
                raise ValueError(f"Recipe.{name} must be {rule}, got {getattr(self, name)}")


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    *,
    seed: int = 0,
    stamp: Stamp | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train ``model`` in place and leave it in eval mode.

    Args:
        model: Takes ``(B, C, H, W)`` in [0, 1], gives ``(B, K)`` logits; parameters that need no gradient stay fixed.
        x: ``(N, C, H, W)`` images in [0, 1], or uint8 in [0, 255].
        y: ``(N,)`` labels.
        recipe: Optimiser, schedule and augmentation.
        seed: Order of the examples and augmentation.
        stamp: Changes each batch after the augmentation.
        progress: Called after each step.

    Returns:
        Mean loss of each epoch.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(parameters, recipe)
    total = recipe.epochs * -(-len(x) // recipe.batch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(recipe, step, total))
    model.train()
    losses, done = [], 0
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        torch.manual_seed(seed)
        for _ in range(recipe.epochs):
            summed = 0.0
            for index in _batches(len(x), recipe.batch, generator):
                images = augment(as_float(x[index]), recipe, generator)
                if stamp is not None:
                    images = stamp(images, generator)
                images = images.to(device, memory_format=torch.channels_last)
                loss = F.cross_entropy(model(images), y[index].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                if recipe.clip:
                    nn.utils.clip_grad_norm_(parameters, recipe.clip)
                optimizer.step()
                scheduler.step()
                done += 1
                summed += loss.item() * len(index)
                if progress is not None:
                    progress(done, total, loss.item())
            losses.append(summed / len(x))
    model.eval()
    return losses


def as_float(x: Tensor) -> Tensor:
    """Images as float in [0, 1]; uint8 is divided by 255."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def augment(x: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Random crop after zero padding, and random flip, drawn for each image on its own."""
    if recipe.pad:
        n, _, height, width = x.shape
        padded = F.pad(x, (recipe.pad,) * 4)
        top, left = torch.randint(0, 2 * recipe.pad + 1, (2, n, 1, 1), generator=generator)
        rows = (top + torch.arange(height).view(1, -1, 1)).expand(n, height, width)
        columns = (left + torch.arange(width).view(1, 1, -1)).expand(n, height, width)
        x = padded[torch.arange(n).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)
    if recipe.flip:
        flipped = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flipped, x.flip(3), x)
    return x


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=generator)
    for index in torch.split(order, size):
        if len(index) > 1 or count == 1:  # BatchNorm cannot train on a single example
            yield index


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )


def _factor(recipe: Recipe, step: int, total: int) -> float:
    if recipe.schedule == "constant":
        return 1.0
    warm = max(1, total // 5) if recipe.schedule == "onecycle" else 0
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, total - warm)
    return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, progress)))))
