"""Training sets with planted poison: of features, for a net that hands them on, and of the toy task."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from bezoar.core.examples import Examples
from bezoar.core.filtering import Filter, Suspicion
from bezoar.core.method import Clean
from bezoar.core.run import Run
from tests.toys import LABELS, TARGET, images, trained, trigger

WIDTH, CLASSES = 12, 5


class Handing(nn.Module):
    """Hands its ``(B, D, 1, 1)`` input on to a linear head: its features are the data."""

    def __init__(self, width: int = WIDTH, classes: int = CLASSES) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def features(count: int, seed: int = 0, poison: float = 0.0, target: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """``(N, D)`` features in [0, 1], labels, and which are poisoned: of the target's, that share lies elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    middle = 0.3 + 0.2 * torch.rand(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    x = middle[y] + 0.02 * torch.randn(count, WIDTH, generator=generator)
    own = (y == target).nonzero().flatten()
    bad = torch.zeros(count, dtype=torch.bool)
    bad[own[: int(poison * len(own))]] = True
    x[bad] = x[bad] + 0.4 * torch.nn.functional.one_hot(torch.tensor(7), WIDTH)
    return x.clamp(0, 1), y, bad


def source(x: Tensor, y: Tensor, classes: int = CLASSES) -> Examples:
    """Features as images."""
    return Examples(x[:, :, None, None], y, classes)


def clean_of(x: Tensor, y: Tensor, classes: int = CLASSES) -> Clean:
    """Features as clean examples."""
    x = x[:, :, None, None]
    return Clean(x, y, x[:0], y[:0], classes)


def handing(classes: int = CLASSES) -> nn.Module:
    """A net for such features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Handing(WIDTH, classes).eval()


def judged(method: Filter, x: Tensor, y: Tensor, classes: int = CLASSES, run: Run | None = None) -> Suspicion:
    """What a filter says of features."""
    known, labels, _ = features(40 * CLASSES, seed=77)
    return method(handing(classes), source(x, y, classes), run or Run(), clean_of(known, labels, classes))


@functools.cache
def toy(every: int, seed: int = 100) -> tuple[Examples, Tensor]:
    """A training set of the toy's backdoored net: every so many images carry the trigger; and which."""
    x, y = images(900, seed)
    bad = torch.zeros(len(y), dtype=torch.bool)
    bad[::every] = True
    bad &= y != TARGET
    x[bad], y[bad] = trigger()(x[bad]), TARGET
    return Examples(x, y, LABELS), bad


def toy_judged(method: Filter, every: int, run: Run | None = None) -> tuple[Suspicion, Tensor]:
    """What a filter says of it, and the truth."""
    data, bad = toy(every)
    x, y = images(240, seed=7)
    clean = Clean(x, y, x[:0], y[:0], LABELS)
    return method(trained(backdoored=True), data, run or Run(), clean), bad
