"""Trojan: a trigger that drives a chosen unit of a clean network (Liu et al., "Trojaning Attack", NDSS 2018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bezoar.attacks._attack import Backdoored, Training
from bezoar.attacks._network import find_layer, require_training, retrain, watched, weighted_layers
from bezoar.attacks._poison import PoisonAttack, Poisoned
from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.examples import Examples
from bezoar.core.surgery import frozen
from bezoar.core.trigger import MaskedTrigger, Trigger
from bezoar.ops.augment import as_float

# Of the array in the NAD, ABL, RNP and NFT code only its place, its nine non-zero pixels and its largest value are
# known to us. The other values are our own: they differ, so that the wrap-around makes some pixels dark, some bright.
_STORED = ((250.35, 125.0, 200.0), (100.0, 225.0, 75.0), (175.0, 50.0, 150.0))
_STORED_OFFSET = 7  # rows and columns 25..27 of 32, counted from the bottom right corner


@dataclass(frozen=True, eq=False)
class AddedTrigger:
    """Addition of grey levels, with or without the wrap-around of uint8 arithmetic.

    Args:
        delta: ``(C, H, W)`` grey levels in [0, 255]; pixels where it is 0 are left as they are.
        wrap: ``floor(x + d) mod 256`` as the public code computes it, instead of clipping at 255.
    """

    delta: Tensor
    wrap: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        delta = self.delta.to(x)
        if self.wrap:
            summed = torch.remainder(torch.floor((x * 255).round() + delta), 256) / 255
        else:
            summed = torch.clamp(x + delta / 255, 0, 1)
        return torch.where(delta == 0, x, summed)


@dataclass(frozen=True, kw_only=True)
class Trojan(PoisonAttack):
    """Choose a unit of a clean network, find the pixels that excite it most, and retrain the network with them.

    The unit is the one with the largest sum of absolute incoming weights; its value in a convolution is the largest
    over all places. The pixels inside the mask minimise the squared difference of the unit's value and ``value``, over
    clean images; where no pixels in [0, 1] reach it, the unit is driven as far as they can. The paper has no training
    data and first makes some out of the network; here the attacker has the data.

    Args:
        variant: ``replace`` (the paper: the mask's pixels are replaced), ``add`` (BackdoorBench: the same pixels are
            added) or ``stored`` (a fixed 3x3 array is added, no network is used, the victim trains from scratch). The
            array of the public code is not known to us but for its place (rows and columns 25 to 27 of 32), its nine
            non-zero pixels and its largest value, 250.35: the others are our own.
        overflow: What ``add`` and ``stored`` do above 255: ``wrap`` to 0 as the public code does, or ``clip``.
        shape: Form of the mask: ``square``, ``apple`` (a disc with a bite and a stem) or ``watermark`` (thin strokes).
        area: Share of the image that the mask covers, in (0, 1].
        margin: Distance of the mask from the bottom right corner, in pixels.
        opacity: Of the replaced pixels, in (0, 1]; 1 minus the paper's transparency.
        layer: Dotted name of a Linear or convolutional layer; empty for the last hidden Linear layer, or the last
            convolution in a network that has none.
        units: How many units are driven.
        value: Wanted value of the units, above 0.
        steps: Steps of Adam, at most; they end sooner once the value is reached within 1 %.
        lr: Its learning rate, in pixel values.
        images: How many clean images the value is averaged over.
        retrain: ``all`` weights of the clean network, or only those ``above`` the unit, as the paper does.
        retrain_share: Epochs of retraining, as a share of the victim's recipe.

    References:
        Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018.
    """

    variant: Literal["replace", "add", "stored"] = "replace"
    overflow: Literal["wrap", "clip"] = "wrap"
    shape: Literal["square", "apple", "watermark"] = "square"
    area: float = 0.07
    margin: int = 1
    opacity: float = 1.0
    layer: str = ""
    units: int = 1
    value: float = 100.0
    steps: int = 1000
    lr: float = 0.05
    images: int = 32
    retrain: Literal["all", "above"] = "all"
    retrain_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("area", "opacity"):
            self.require(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        for name in ("value", "lr", "retrain_share"):
            self.require(name, getattr(self, name) > 0, "above 0")
        for name in ("units", "steps", "images"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("margin", self.margin >= 0, "at least 0")

    def trigger(self, shape: tuple[int, int, int]) -> Trigger:
        """The trigger of the variant ``stored``; the others depend on a network.

        Raises:
            SettingError: Another variant, or images too small for the array.
        """
        if self.variant != "stored":
            raise SettingError(
                f"the trigger of Trojan(variant={self.variant!r}) depends on a clean network",
                "Call poison(data, training), or choose variant='stored'",
            )
        return self._added(stored_delta(shape))

    @torch.no_grad()
    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """See :class:`~bezoar.attacks._attack.Attack`."""
        if self.variant == "stored":
            stored_delta(shape)
            return
        self.mask(*shape[1:])
        self.unit_values(model, torch.zeros(1, *shape))

    def poison(self, data: Examples, training: Training | None = None) -> Poisoned:
        if self.variant == "stored":
            return super().poison(data, training)
        return self._poison_for(require_training(self, training).fit("clean", data), data)

    def implant(self, data: Examples, training: Training) -> Backdoored:
        if self.variant == "stored":
            return super().implant(data, training)
        clean = training.fit("clean", data)
        poisoned = self._poison_for(clean, data)
        victim = self._retrain(clean, poisoned.data, training)
        return Backdoored(victim, poisoned.truth, poisoned.index, poisoned.cover)

    def mask(self, height: int, width: int) -> Tensor:
        """``(1, H, W)`` of 0 and 1: the smallest one that covers ``area``, or the largest that fits.

        Raises:
            SettingError: The margin leaves no room.
        """
        largest = min(height, width) - self.margin
        if largest < 1:
            raise SettingError(f"Trojan.margin {self.margin} leaves no room in a {height}x{width} image")
        for side in range(1, largest + 1):
            place = (torch.arange(side) + 0.5) / side
            box = _SHAPES[self.shape](place[:, None], place[None, :])
            if int(box.sum()) >= self.area * height * width:
                break
        mask = torch.zeros(1, height, width)
        top, left = height - self.margin - side, width - self.margin - side
        mask[0, top : top + side, left : left + side] = box.float()
        return mask

    def reverse(self, model: nn.Module, x: Tensor) -> Trigger:
        """Find the trigger that drives the units of ``model``.

        Args:
            model: The clean network; left as it was.
            x: ``(B, C, H, W)`` clean images in [0, 1], on its device.
        """
        generator = torch.Generator().manual_seed(self.seed)
        mask = self.mask(x.shape[2], x.shape[3]).to(x)
        with frozen(model), torch.enable_grad():
            pattern = torch.rand(x.shape[1:], generator=generator).to(x).requires_grad_()
            optimizer = torch.optim.Adam([pattern], lr=self.lr)
            for _ in range(self.steps):
                values = self.unit_values(model, self._stamp(x, mask, pattern))
                if abs(float(values.detach().mean()) - self.value) <= 0.01 * self.value:
                    break
                optimizer.zero_grad()
                ((values - self.value) ** 2).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                pattern.data.clamp_(0, 1)
        mask, pattern = mask.cpu(), pattern.detach().cpu()
        if self.variant == "add":
            return self._added(mask * pattern * 255)
        return MaskedTrigger(self.opacity * mask, mask * pattern)

    def unit_values(self, model: nn.Module, x: Tensor) -> Tensor:
        """``(B, units)`` values of the chosen units before the activation function, with their gradient.

        Raises:
            SettingError: There is no such layer, or it has fewer units.
            UnsupportedModel: The layer is not a Linear or convolutional one.
        """
        layer = find_layer(model, self.layer or default_layer(model, x[:1]))
        chosen = strongest_units(layer, self.units)
        with watched(layer) as seen:
            model(x)
        out = seen[-1]
        return (out if out.ndim == 2 else out.flatten(2).amax(2))[:, chosen]

    def _poison_for(self, clean: nn.Module, data: Examples) -> Poisoned:
        order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(self.seed))
        images = as_float(data.x[order[: self.images]]).to(next(clean.parameters()).device)
        trigger = self.reverse(clean, images)
        return self.stamp_with(data, trigger, trigger)

    def _retrain(self, model: nn.Module, data: Examples, training: Training) -> nn.Module:
        below: list[nn.Module] = []
        if self.retrain == "above":
            probe = as_float(data.x[:1]).to(next(model.parameters()).device)
            below = layers_up_to(model, self.layer or default_layer(model, probe), probe)
        return retrain(training, data, model, below, self.retrain_share)

    def _stamp(self, x: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
        if self.variant == "add":
            return torch.clamp(x + mask * pattern, 0, 1)
        return (1 - self.opacity * mask) * x + self.opacity * mask * pattern

    def _added(self, delta: Tensor) -> AddedTrigger:
        return AddedTrigger(delta, wrap=self.overflow == "wrap")


def stored_delta(shape: tuple[int, int, int]) -> Tensor:
    """``(C, H, W)`` grey levels of the variant ``stored``.

    Raises:
        SettingError: The images are smaller than 7 x 7.
    """
    channels, height, width = shape
    if min(height, width) < _STORED_OFFSET:
        raise SettingError(f"Trojan(variant='stored') needs images of at least 7x7 pixels, got {height}x{width}")
    delta = torch.zeros(shape)
    top, left, size = height - _STORED_OFFSET, width - _STORED_OFFSET, len(_STORED)
    delta[:, top : top + size, left : left + size] = torch.tensor(_STORED).expand(channels, -1, -1)
    return delta


def default_layer(model: nn.Module, x: Tensor) -> str:
    """Name of the last hidden Linear layer, or of the last convolution where there is none."""
    *hidden, _ = weighted_layers(model, x)
    linear = [name for name, module in hidden if isinstance(module, nn.Linear)]
    return linear[-1] if linear else hidden[-1][0]


def strongest_units(layer: nn.Module, count: int) -> Tensor:
    """``(count,)`` units with the largest sums of absolute incoming weights, largest first.

    Raises:
        SettingError: The layer has fewer units.
        UnsupportedModel: It is not a Linear or convolutional layer.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise UnsupportedModel(
            f"a unit is chosen by its incoming weights, {type(layer).__name__} has none",
            "Name a Linear or convolutional layer",
        )
    if count > len(weight):
        raise SettingError(f"Trojan.units must be at most {len(weight)} in this layer, got {count}")
    return weight.detach().abs().flatten(1).sum(1).topk(count).indices


def layers_up_to(model: nn.Module, name: str, x: Tensor) -> list[nn.Module]:
    """Modules with parameters of their own that run up to the named one, that one included."""
    last, ran = find_layer(model, name), list[nn.Module]()
    handles = [
        module.register_forward_pre_hook(lambda module, _given: ran.append(module))
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return ran[: len(ran) - ran[::-1].index(last)]


def _square(row: Tensor, column: Tensor) -> Tensor:
    return torch.ones_like(row + column, dtype=torch.bool)


def _apple(row: Tensor, column: Tensor) -> Tensor:
    body = (row - 0.6) ** 2 + (column - 0.5) ** 2 <= 0.4**2
    bite = (row - 0.55) ** 2 + (column - 0.95) ** 2 <= 0.2**2
    stem = (row <= 0.25) & ((column - 0.5).abs() <= 0.06)
    return (body & ~bite) | stem


def _watermark(row: Tensor, column: Tensor) -> Tensor:
    wave = 0.2 * (2 * ((5 * column) % 1) - 1).abs()
    return ((row % 0.5) - 0.1 - wave).abs() <= 0.06


_SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "square": _square,
    "apple": _apple,
    "watermark": _watermark,
}
