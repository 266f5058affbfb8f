"""Small labelled sets for the tests of attacks."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bezoar.attacks._attack import Training
from bezoar.core.examples import Examples
from bezoar.core.run import Progress, Run
from bezoar.ops.fit import Recipe

SHAPE = (3, 32, 32)


def floats(count: int = 60, shape: tuple[int, int, int] = SHAPE, classes: int = 5, seed: int = 0) -> Examples:
    """Float images in [0.3, 0.7], labels in turn."""
    x = 0.3 + 0.4 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))
    return Examples(x, torch.arange(count) % classes, classes)


def levels(count: int = 60, shape: tuple[int, int, int] = SHAPE, classes: int = 5, seed: int = 0) -> Examples:
    """uint8 images of all grey levels, labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    return Examples(x, torch.arange(count) % classes, classes)


@st.composite
def pictures(draw: st.DrawFn, smallest: int = 12, largest: int = 36) -> Tensor:
    """``(B, C, H, W)`` of any small size, grey or RGB, with saturated pixels among them."""
    shape = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 3])),
        *draw(st.tuples(*[st.integers(smallest, largest)] * 2)),
    )
    x = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return (1.5 * x - 0.25).clamp(0, 1)


def blobs(count: int, seed: int = 0) -> Examples:
    """A bright square in one of four corners, and noise."""
    source = torch.Generator().manual_seed(seed)
    x, y = 0.4 * torch.rand(count, 1, 12, 12, generator=source), torch.arange(count) % 4
    for label in range(4):
        rows, columns = slice(6 * (label // 2), 6 * (label // 2) + 5), slice(6 * (label % 2), 6 * (label % 2) + 5)
        x[y == label, :, rows, columns] += 0.5
    return Examples(x, y, 4)


def toy_net() -> nn.Module:
    """A small net without BatchNorm for :func:`blobs`."""
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(144, 4))


def training(folder=None, epochs: int = 2, report=None) -> Training:
    """Short training of :func:`toy_net`."""
    recipe = Recipe(epochs=epochs, batch=40, lr=3e-3, optimizer="adam", weight_decay=0)
    progress = Progress() if report is None else Progress(report=report)
    return Training(toy_net, recipe, Run(progress=progress), folder)


def assert_trigger(trigger, x: Tensor) -> Tensor:
    """What every trigger promises: shape, range, no change in place, the same answer alone and in a batch."""
    before = x.clone()
    out = trigger(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert torch.equal(x, before)
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert torch.equal(trigger(x), out)
    alone = torch.cat([trigger(one) for one in x.split(1)])
    torch.testing.assert_close(alone, out, rtol=0, atol=1e-6)
    return out
