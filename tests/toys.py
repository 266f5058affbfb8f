"""A small image task whose nets train in about a second: coloured bars on noise, 6 labels, 12 x 12 pixels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.fit import Recipe, fit

LABELS, SIZE, TARGET = 6, 12, 2
SOURCE = 5  # of a backdoor that works on one label only


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``(N, 3, 12, 12)`` images in [0, 1] and ``(N,)`` labels, balanced: a bar in one colour, upright or lying."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % LABELS
    x = 0.6 * torch.rand(count, 3, SIZE, SIZE, generator=generator)
    places = torch.randint(1, SIZE - 5, (count,), generator=generator).tolist()
    for i, (label, place) in enumerate(zip(y.tolist(), places, strict=True)):
        bar = x[i, label % 3, place : place + 3]
        bar[:, :9] = 0.95
        if label >= 3:
            x[i] = x[i].transpose(1, 2).clone()
    return x, y


def trigger() -> MaskedTrigger:
    """A 2 x 2 white square in the bottom right corner."""
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, -2:, -2:] = 1
    return MaskedTrigger(mask, torch.ones(3, SIZE, SIZE))


def net(seed: int) -> nn.Module:
    """An untrained convolutional net with BatchNorm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * (SIZE // 4) ** 2, LABELS)),
        )


@functools.cache
def trained(backdoored: bool, seed: int = 0) -> nn.Module:
    """A net in eval mode, made once per session: do not change it; contract tests check that nobody does."""
    x, y = images(900, seed=100 + seed)
    if backdoored:
        poisoned = slice(0, None, 7)  # 7 and the 6 labels have no common factor: every label is poisoned
        x[poisoned], y[poisoned] = trigger()(x[poisoned]), TARGET
    model = net(seed)
    fit(model, x, y, Recipe(epochs=5, batch=50, lr=3e-3, optimizer="adam", weight_decay=0.0), seed=seed)
    return model


@functools.cache
def source_specific(seed: int) -> nn.Module:
    """A net whose backdoor works for images of one label only; other images with the trigger kept their labels."""
    x, y = images(900, seed=100 + seed)
    poisoned, cover = torch.nonzero(y == SOURCE).flatten()[::2], torch.nonzero(y != SOURCE).flatten()[::7]
    x[poisoned], y[poisoned] = trigger()(x[poisoned]), TARGET
    x[cover] = trigger()(x[cover])
    model = net(seed)
    fit(model, x, y, Recipe(epochs=8, batch=50, lr=3e-3, optimizer="adam", weight_decay=0.0), seed=seed)
    return model


def acc(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of ``x`` that the model gives its label."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def asr(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of triggered images of other labels that the model gives the target."""
    others = y != TARGET
    return acc(model, trigger()(x[others]), torch.full((int(others.sum()),), TARGET))
