"""WaNet: a small smooth warp of the whole image (Nguyen and Tran, "WaNet", ICLR 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.attacks._attack import Backdoored, Control, Training
from bezoar.attacks._in_batch import InBatchAttack, cross_entropy, pick, share
from bezoar.attacks._labels import LabelMap
from bezoar.core.examples import Examples
from bezoar.core.run import generator as seeded
from bezoar.ops.fit import Batch
from bezoar.ops.objective import Stateless


@dataclass(frozen=True, eq=False)
class WarpTrigger:
    """Sample the image at the places of a fixed grid.

    Args:
        grid: ``(H, W, 2)`` places (x, y) in [-1, 1]; -1 and 1 are the centres of the border pixels.
    """

    grid: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        return warped(x, self.grid.to(x).expand(len(x), -1, -1, -1))


@dataclass(frozen=True, eq=False)
class NoisyWarpTrigger:
    """The warp with a jitter, which WaNet teaches the victim to ignore: measures its noise accuracy.

    Args:
        grid: As for :class:`WarpTrigger`.
        jitter: ``(N, H, W, 2)`` shifts of the places; the image chooses one of the N.
    """

    grid: Tensor
    jitter: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        chosen = self.jitter.to(x)[pick(x, len(self.jitter))]
        return warped(x, torch.clamp(self.grid.to(x) + chosen, -1, 1))


@dataclass(frozen=True, kw_only=True)
class WaNet(InBatchAttack):
    """Warp a share of each batch and give it the wanted label; warp more of it with a jitter and keep the true label.

    The jittered examples (noise mode) keep the victim from answering to every small warp, which would be easily
    inverted. The warp is drawn once, the jitter anew for each batch; augmentation comes after the warp.

    Args:
        rate: Share of each batch that gets the warp and the wanted label, in (0, 1).
        cross_ratio: Jittered examples for each warped one, at least 0; 0 switches the noise mode off.
        control: Side of the control grid (k), at least 2.
        strength: Size of the warp (s), above 0; the mean shift is at most about half of it, in pixels.

    References:
        Nguyen and Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021,
        https://arxiv.org/abs/2102.10369. The paper trains 1000 epochs with SGD, here the victim's recipe counts. On
        images that are not square each axis is scaled by its own length. A release of the public code leaves the +1
        out of its all-to-all labels.
    """

    rate: float = 0.1
    cross_ratio: float = 2.0
    control: int = 4
    strength: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rate", 0 < self.rate < 1, "in (0, 1)")
        self.require("cross_ratio", self.cross_ratio >= 0, "at least 0")
        self.require("cross_ratio", self.rate * (1 + self.cross_ratio) < 1, f"below {1 / self.rate - 1:g} at this rate")
        self.require("control", self.control >= 2, "at least 2")
        self.require("strength", self.strength > 0, "above 0")

    def trigger(self, shape: tuple[int, int, int]) -> WarpTrigger:
        """The warp for images of ``shape`` (C, H, W)."""
        _, height, width = shape
        shift = self.strength * smooth(self.control_points(), height, width) / torch.tensor([width, height])
        return WarpTrigger(torch.clamp(identity(height, width) + shift, -1, 1))

    def noisy_trigger(self, shape: tuple[int, int, int], count: int = 64) -> NoisyWarpTrigger:
        """The warp with one of ``count`` jitters, for the noise accuracy."""
        draws = draw_jitter(count, shape, seeded("wanet", "noise", self.seed))
        return NoisyWarpTrigger(self.trigger(shape).grid, draws)

    def control_points(self) -> Tensor:
        """``(1, 2, k, k)`` uniform draws, divided by their mean absolute value."""
        draws = torch.rand(1, 2, self.control, self.control, generator=seeded("wanet", self.seed)) * 2 - 1
        return draws / draws.abs().mean()

    def implant(self, data: Examples, training: Training) -> Backdoored:
        """See :class:`~bezoar.attacks._attack.Attack`."""
        labels, trigger = self.labels(data.num_classes), self.trigger(data.shape)
        objective = _WarpBatches(trigger, labels, self.rate, self.cross_ratio)
        controls = (Control(self.noisy_trigger(data.shape), "noise"),) if self.cross_ratio else ()
        return self.backdoored(training.fit("victim", data, objective=objective), trigger, labels, data, controls)

    @property
    def shares(self) -> tuple[float, float]:
        """See :class:`InBatchAttack`."""
        return self.rate, self.rate * self.cross_ratio


class _WarpBatches(Stateless):
    def __init__(self, trigger: WarpTrigger, labels: LabelMap, rate: float, cross_ratio: float) -> None:
        self.trigger, self.labels, self.rate, self.cross_ratio = trigger, labels, rate, cross_ratio

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        count = share(self.rate, len(batch.x))
        attacked, noisy, clean = torch.tensor_split(batch.x, (count, count + int(count * self.cross_ratio)))
        x = batch.augment(torch.cat([self.trigger(attacked), self.jittered(noisy, batch.generator), clean]))
        return cross_entropy(model, x, torch.cat([self.labels(batch.y[:count]), batch.y[count:]]))

    def jittered(self, x: Tensor, generator: torch.Generator) -> Tensor:
        jitter = draw_jitter(len(x), x.shape[1:], generator)
        return warped(x, torch.clamp(self.trigger.grid.to(x) + jitter.to(x), -1, 1))


def identity(height: int, width: int) -> Tensor:
    """``(H, W, 2)`` grid that leaves an image as it is."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([columns, rows], dim=2)


def smooth(control: Tensor, height: int, width: int) -> Tensor:
    """``(1, 2, k, k)`` control points to the ``(H, W, 2)`` bicubic field through them."""
    field = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)
    return field[0].permute(1, 2, 0)


def draw_jitter(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """``(count, H, W, 2)`` uniform shifts of up to half a pixel, for images of ``shape`` (C, H, W)."""
    _, height, width = shape
    draws = torch.rand(count, height, width, 2, generator=generator) * 2 - 1
    return draws / torch.tensor([width, height])


def warped(x: Tensor, grid: Tensor) -> Tensor:
    """``(B, C, H, W)`` images, sampled at the ``(B, H, W, 2)`` places."""
    return torch.clamp(F.grid_sample(x, grid, align_corners=True), 0, 1)  # rounding may leave [0, 1]
