"""Small nets of many kinds, untrained, for 6 labels and 16 x 16 images: what a purifier must cope with unmodified."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from bezoar.core.method import Clean
from bezoar.nets.registry import find
from bezoar.ops.fit import Recipe, fit
from tests.toys import LABELS, SIZE, TARGET, images, trigger

CLASSES, SIDE = 6, 16


class Plain(nn.Sequential):
    """Convolutions and linear layers without any normalisation."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(12 * (SIDE // 4) ** 2, 20), nn.ReLU(), nn.Linear(20, CLASSES)),
        )


class Normed(nn.Sequential):
    """Convolutions with BatchNorm, flattened."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(12 * (SIDE // 4) ** 2, CLASSES)),
        )


class Depthwise(nn.Sequential):
    """Depthwise and pointwise convolutions, GroupNorm and BatchNorm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(2, 8), nn.ReLU6()),
            *(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES)),
        )


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm_1(x)
        x = x + self.attention(seen, seen, seen, need_weights=False)[0]
        return x + self.mlp(self.norm_2(x))


class SmallViT(nn.Module):
    """A vision transformer of two blocks."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.place = nn.Parameter(0.1 * torch.randn(1, (SIDE // 4) ** 2, width))
        self.blocks = nn.Sequential(_Block(width), _Block(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks(self.patch(x).flatten(2).transpose(1, 2) + self.place)
        return self.head(self.norm(tokens).mean(1))


_OWN = {"plain": Plain, "normed": Normed, "depthwise": Depthwise, "vit": SmallViT}
NAMES = [*_OWN, "wrn-10-1", "resnet-20"]
LARGE = ["preactresnet-18"]


def make(name: str, seed: int = 0) -> nn.Module:
    """One of the nets in eval mode, with shifts that are not 0 and running statistics of random images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = None if name in _OWN else find(name)
        model = _OWN[name]() if found is None else found[0](CLASSES, 3, SIDE)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(getattr(module, "bias", None), Tensor):
                    module.bias.copy_(0.2 * torch.randn_like(module.bias))
            for _ in range(10):
                model.train()(torch.rand(16, 3, SIDE, SIDE))
    return model.eval()


def examples(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """``(N, 3, 16, 16)`` random images in [0, 1] and ``(N,)`` labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, SIDE, SIDE, generator=generator), torch.arange(count) % CLASSES


def few(count: int) -> Clean:
    """Random examples for the nets."""
    x, y = examples(count)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=CLASSES)


def toy_clean(count: int = 180) -> Clean:
    """Clean examples of the toy task."""
    x, y = images(count, seed=7)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


@functools.cache
def deeper(width: int, epochs: int) -> nn.Module:
    """A backdoored net of five convolutions for the toy task, in eval mode: do not change it."""
    x, y = images(900, seed=100)
    poisoned = slice(0, None, 7)
    x[poisoned], y[poisoned] = trigger()(x[poisoned]), TARGET
    found = find(f"convnet-{width}-bn")
    assert found is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = found[0](LABELS, 3, SIZE)
    fit(model, x, y, Recipe(epochs=epochs, batch=50, lr=3e-3, optimizer="adam", weight_decay=0.0))
    return model


def form(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and types of everything in the state dict."""
    return {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same state to the bit."""
    weights = other.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


def hooks(model: nn.Module) -> int:
    """Number of hooks on forward passes."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
