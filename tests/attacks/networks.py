"""Small networks and trainings for the tests of attacks that use one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bezoar.attacks._attack import Training
from bezoar.core.examples import Examples
from bezoar.ops.recipe import Recipe


def small_net(channels: int = 1, classes: int = 3, seed: int = 0) -> nn.Module:
    """A convolution with BatchNorm, a hidden Linear layer and an output layer, for 12 x 12 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, classes)),
        )


def bars(count: int = 120, channels: int = 1, classes: int = 3, seed: int = 0) -> Examples:
    """``(N, C, 12, 12)`` uint8 images with a bright bar whose height is the label."""
    generator = torch.Generator().manual_seed(seed)
    x, y = 0.4 * torch.rand(count, channels, 12, 12, generator=generator), torch.arange(count) % classes
    for i, label in enumerate(y.tolist()):
        x[i, :, 3 * label + 1 : 3 * label + 3, 1:8] += 0.5
    return Examples((x * 255).round().to(torch.uint8), y, classes)


def training(epochs: int = 2, channels: int = 1, classes: int = 3) -> Training:
    """Trains :func:`small_net` for a moment."""
    recipe = Recipe(epochs=epochs, batch=20, lr=1e-2, optimizer="adam", weight_decay=0.0)
    return Training(lambda: small_net(channels, classes), recipe)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}
