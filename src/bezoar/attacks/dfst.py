"""DFST: a style as trigger, and detoxification against its simple features (Cheng et al., AAAI 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.attacks._attack import Backdoored, Training
from bezoar.attacks._network import find_layer, output_layer, watched
from bezoar.attacks._poison import PoisonAttack
from bezoar.core.examples import Examples
from bezoar.core.surgery import frozen
from bezoar.ops.augment import as_float
from bezoar.ops.objective import Batch

_SMALL = 1e-3


@dataclass(frozen=True, eq=False)
class StyleTrigger:
    """Blend with the image in another style: each band of a Laplacian pyramid gets the mean and spread of the style's.

    The coarsest band is averaged with the style's own, so that its light comes along.

    Args:
        style: ``(C, H, W)`` style image in [0, 1].
        alpha: Share of the restyled image, in (0, 1].
        levels: Bands of the pyramid, at least 1.
    """

    style: Tensor
    alpha: float = 0.6
    levels: int = 3

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        style = self.style.to(x)[None]
        wanted = _pyramid(style, self.levels)
        bands = [_adapt(band, like) for band, like in zip(_pyramid(x, self.levels), wanted, strict=True)]
        bands[-1] = (bands[-1] + wanted[-1]) / 2
        restyled = torch.stack(bands).sum(0).clamp(0, 1)
        return (1 - self.alpha) * x + self.alpha * restyled


class FeatureInjector(nn.Module):
    """Colour and pooling transform: a 4C x C matrix on the pixel and the local maximum, minimum and mean around it.

    Args:
        channels: Colour channels C.
        window: Side of the neighbourhood, odd.
    """

    def __init__(self, *, channels: int, window: int = 11) -> None:
        super().__init__()
        self.window = window
        self.matrix = nn.Parameter(torch.cat([torch.eye(channels), torch.zeros(3 * channels, channels)]))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` images in [0, 1] to images in [0, 1]; starts as the identity."""
        highest = F.max_pool2d(x, self.window, stride=1, padding=self.window // 2)
        lowest = -F.max_pool2d(-x, self.window, stride=1, padding=self.window // 2)
        mean = F.avg_pool2d(x, self.window, stride=1, padding=self.window // 2, count_include_pad=False)
        return torch.einsum("bihw,ij->bjhw", torch.cat([x, highest, lowest, mean], 1), self.matrix).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class DFST(PoisonAttack):
    """Stamp with a style, and train the network not to rely on the simple part of it.

    The style is transferred by the statistics of a Laplacian pyramid (no pretrained network is needed) from a sunrise
    that is computed: dark ground, a warm sky and a sun. Its coarsest band comes along as it is: statistics alone are
    what the transform below can imitate, and nothing would be left to learn. Detoxification, before each epoch but
    the first: find the units that triggered images excite most, train a small transform of the image that excites
    them and causes the target, then give such images their true labels in every batch. In the authors' second release
    the network runs without gradient there, so that only the similarity term trains the transform, and its local
    minimum is a negated maximum; here both are as they are meant.

    Args:
        rate: Poisoned share of the training set, and share of each batch that is detoxified, in (0, 0.5].
        alpha: Share of the restyled image, in (0, 1]; of the transformed one too.
        levels: Bands of the pyramid.
        layer: Dotted name of the layer whose units are compared; empty for the activations before the output layer.
        unit_share: Share of its units that are detoxified (at least one), in (0, 1].
        detox_share: Share of the training set that the transform is trained on, in (0, 1].
        detox_epochs: Passes over it before each epoch; 0 switches detoxification off.
        detox_lr: Learning rate of the transform (Adam).
        ssim_weight: Weight of the structural similarity of the transformed image.
        unit_weight: Weight of the mean activation of the chosen units.

    References:
        Cheng, Liu, Ma, Zhang, "Deep Feature Space Trojan Attack of Neural Networks by Controlled Detoxification", AAAI
        2021.
    """

    rate: float = 0.05
    alpha: float = 0.6
    levels: int = 3
    layer: str = ""
    unit_share: float = 0.01
    detox_share: float = 0.03
    detox_epochs: int = 10
    detox_lr: float = 1e-2
    ssim_weight: float = 0.1
    unit_weight: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rate", self.rate <= 0.5, "at most 0.5")
        for name in ("alpha", "unit_share", "detox_share"):
            self.require(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        self.require("levels", self.levels >= 1, "at least 1")
        self.require("detox_lr", self.detox_lr > 0, "above 0")
        for name in ("detox_epochs", "ssim_weight", "unit_weight"):
            self.require(name, getattr(self, name) >= 0, "at least 0")

    def trigger(self, shape: tuple[int, int, int]) -> StyleTrigger:
        return StyleTrigger(sunrise(shape), self.alpha, self.levels)

    @torch.no_grad()
    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """See :class:`~bezoar.attacks._attack.Attack`."""
        activations(model, torch.zeros(1, *shape), self.layer)

    def implant(self, data: Examples, training: Training) -> Backdoored:
        poisoned = self.poison(data)
        carries = torch.zeros(len(data.x), dtype=torch.bool)
        carries[torch.cat([poisoned.index, poisoned.cover])] = True
        objective = Detoxified(self, data, carries, training.run.device) if self.detox_epochs else None
        victim = training.fit("victim", poisoned.data, objective=objective)
        return Backdoored(victim, poisoned.truth, poisoned.index, poisoned.cover)


def activations(model: nn.Module, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Logits, and ``(B, units)`` values of a layer, or those that go into the output layer where none is named.

    Raises:
        SettingError: There is no such layer.
    """
    layer = find_layer(model, name) if name else output_layer(model, x[:1])
    with watched(layer, inputs=not name) as seen:
        logits = model(x)
    out = seen[-1]
    return logits, out if out.ndim == 2 else out.flatten(2).mean(2)


class Detoxified:
    """Cross-entropy on batches of which a share is detoxified.

    Args:
        attack: Its settings.
        data: Clean examples.
        carries: ``(N,)`` bool: examples that carry the trigger; they are not detoxified.
        device: Where the model runs.
    """

    def __init__(self, attack: DFST, data: Examples, carries: Tensor, device: torch.device) -> None:
        self.attack, self.data, self.carries = attack, data, carries
        self.injector = FeatureInjector(channels=data.shape[0]).to(device)
        self.ready = False

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x = batch.x
        free = torch.nonzero(~self.carries[batch.index]).flatten()
        count = min(len(free), int(self.attack.rate * len(x)))
        if self.ready and count:
            chosen = free[torch.randperm(len(free), generator=batch.generator)[:count]].to(x.device)
            x = x.clone()
            x[chosen] = self.inject(x[chosen]).detach()
        return F.cross_entropy(model(batch.augment(x)), batch.y)

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        del epochs
        if not number:
            return  # the untrained network has no features to look for
        generator = torch.Generator().manual_seed(self.attack.seed + number)
        clean = self._examples(generator)
        trigger = self.attack.trigger(self.data.shape)
        self.injector = FeatureInjector(channels=self.data.shape[0]).to(clean.device)
        with frozen(model), torch.enable_grad():
            units = self.compromised(model, clean, trigger(clean))
            optimizer = torch.optim.Adam(self.injector.parameters(), lr=self.attack.detox_lr)
            for _ in range(self.attack.detox_epochs):
                order = torch.randperm(len(clean), generator=generator).to(clean.device)
                for part in order.split(128):  # type: ignore[no-untyped-call]
                    optimizer.zero_grad()
                    torch.stack(self.terms(model, clean[part], units)).sum().backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        self.ready = True

    def inject(self, x: Tensor) -> Tensor:
        """Images blended with what the transform makes of them, with gradient."""
        changed: Tensor = self.injector(x)
        return (1 - self.attack.alpha) * x + self.attack.alpha * changed

    def terms(self, model: nn.Module, x: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three weighted terms that the transform minimises, each a scalar.

        Args:
            model: Frozen, in eval mode.
            x: ``(B, C, H, W)`` clean images in [0, 1].
            units: Positions of the compromised units.

        Returns:
            Cross-entropy towards the target, structural similarity, activation of the units.
        """
        changed = self.inject(x)
        logits, activations = self.activations(model, changed)
        wanted = torch.full((len(x),), self.attack.target, device=x.device)
        return (
            F.cross_entropy(logits, wanted),
            -self.attack.ssim_weight * similarity(x, changed),
            -self.attack.unit_weight * activations[:, units].mean(),
        )

    @torch.no_grad()
    def compromised(self, model: nn.Module, clean: Tensor, triggered: Tensor) -> Tensor:
        """Positions of the units whose mean activation the trigger raises most, most first."""
        rise = self.activations(model, triggered)[1].mean(0) - self.activations(model, clean)[1].mean(0)
        units: Tensor = rise.topk(max(1, math.floor(self.attack.unit_share * len(rise)))).indices
        return units

    def activations(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and ``(B, units)`` activations (the mean over all places in a convolution), with gradient."""
        return activations(model, x, self.attack.layer)

    def state_dict(self) -> dict[str, Any]:
        return {"injector": self.injector.state_dict(), "ready": self.ready}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.injector.load_state_dict(state["injector"])
        self.ready = bool(state["ready"])

    def _examples(self, generator: torch.Generator) -> Tensor:
        others = torch.nonzero(self.data.y != self.attack.target).flatten()
        count = max(2, int(self.attack.detox_share * len(self.data.x)))
        chosen = others[torch.randperm(len(others), generator=generator)[:count]]
        return as_float(self.data.x[chosen]).to(self.injector.matrix.device)


def sunrise(shape: tuple[int, int, int]) -> Tensor:
    """``(C, H, W)`` image in [0, 1]: dark ground, a sky from violet to orange and a sun; luminance where C is not 3."""
    channels, height, width = shape
    row = torch.linspace(0, 1, height)[:, None].expand(height, width)
    column = torch.linspace(0, 1, width)[None].expand(height, width)
    colours = torch.tensor([[0.25, 0.10, 0.40], [0.95, 0.45, 0.20], [1.0, 0.85, 0.35], [0.12, 0.06, 0.05]])
    top, horizon, sun, ground = colours[:, :, None, None]
    blend = (row / 0.65).clamp(0, 1)
    image = (1 - blend) * top + blend * horizon
    glow = torch.exp(-((row - 0.55) ** 2 + (column - 0.5) ** 2) / 0.03)
    image = (1 - glow) * image + glow * sun
    image = torch.where(row > 0.65, ground + 0.25 * glow, image).clamp(0, 1)
    if channels == 3:
        return image
    return (torch.tensor([0.299, 0.587, 0.114])[:, None, None] * image).sum(0).expand(shape).clone()


def similarity(one: Tensor, other: Tensor, window: int = 7) -> Tensor:
    """Mean structural similarity of images in [0, 1] with a square window (Wang et al., 2004), with gradient."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, min(window, x.shape[2], x.shape[3]), stride=1)

    a, b = mean(one), mean(other)
    covariance = mean(one * other) - a * b
    spread = mean(one * one) - a * a + mean(other * other) - b * b
    top = (2 * a * b + 0.01**2) * (2 * covariance + 0.03**2)
    return (top / ((a * a + b * b + 0.01**2) * (spread + 0.03**2))).mean()


def _pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """Bands from fine to coarse, all of the size of ``x``, that add up to it."""
    bands = []
    for level in range(levels - 1):
        size = 2 ** (level + 1) + 1
        smooth = F.avg_pool2d(x, size, stride=1, padding=size // 2, count_include_pad=False)
        bands.append(x - smooth)
        x = smooth
    return [*bands, x]


def _adapt(band: Tensor, style: Tensor) -> Tensor:
    """Adaptive instance normalisation: the mean and spread of ``style`` in each channel."""
    dims = (2, 3)
    mean, spread = band.mean(dims, keepdim=True), band.std(dims, keepdim=True)
    wanted_mean, wanted_spread = style.mean(dims, keepdim=True), style.std(dims, keepdim=True)
    return (band - mean) / (spread + _SMALL) * wanted_spread + wanted_mean
