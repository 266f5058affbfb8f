"""Input-Aware: each image gets a trigger of its own (Nguyen and Tran, "Input-Aware Dynamic Backdoor Attack", 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.attacks._attack import Backdoored, Control, Training
from bezoar.attacks._generator import Generator, build, on
from bezoar.attacks._in_batch import Companion, InBatchAttack, cross_entropy, frozen, pick, share
from bezoar.attacks._labels import LabelMap
from bezoar.core.examples import Examples
from bezoar.ops.fit import Batch, as_float
from bezoar.ops.objective import Stateless

# Shares of the training at which the generator's learning rate falls to a tenth: epochs 200, 300, 400, 500 of 600.
_GENERATOR_DROPS = (1 / 3, 1 / 2, 2 / 3, 5 / 6)
# The same for the mask: epochs 10 and 20 of 25.
_MASK_DROPS = (0.4, 0.8)
_BETAS = (0.5, 0.9)
_BANK = 64  # images whose triggers are tried on others


@dataclass(frozen=True, eq=False)
class InputAwareTrigger:
    """``(1 - M(x)) x + M(x) P(x)``: pattern and mask come from the image itself.

    Args:
        pattern, mask: Networks in eval mode, ``(B, C, H, W)`` to ``(B, C, H, W)`` and ``(B, 1, H, W)``.
    """

    pattern: nn.Module
    mask: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        return _blend(x, pattern_of(self.pattern, x), mask_of(self.mask, x))

    def cross(self, bank: Tensor) -> CrossTrigger:
        """The trigger of another image, one of ``(N, C, H, W)``, N at least 2."""
        return CrossTrigger(self.pattern, self.mask, bank)


@dataclass(frozen=True, eq=False)
class CrossTrigger:
    """``(1 - M(b)) x + M(b) P(b)`` with another image b, which must not work: measures the cross accuracy.

    Args:
        pattern, mask: As for :class:`InputAwareTrigger`.
        bank: ``(N, C, H, W)`` images, N at least 2, no two alike; x chooses b, never x itself.
    """

    pattern: nn.Module
    mask: nn.Module
    bank: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        bank = as_float(self.bank.to(x.device)).to(x.dtype)
        chosen = pick(x, len(bank))
        itself = (bank[chosen] == x).flatten(1).all(1)
        other = bank[(chosen + itself) % len(bank)]
        return _blend(x, pattern_of(self.pattern, other), mask_of(self.mask, other))


@dataclass(frozen=True, kw_only=True)
class InputAware(InBatchAttack):
    """Train two generators, first of the mask, then of the pattern together with the victim.

    The image's own trigger must cause the wanted label, that of another image (cross examples) must not, and the
    patterns of two images must differ the more the images do. Triggers are made from the image before augmentation.

    Args:
        rate: Share of each batch that gets its own trigger and the wanted label, in (0, 1).
        cross_rate: Share that gets the trigger of another image and keeps its label, in (0, 1).
        density: Share of the pixels that the mask may take (its values above this are penalised), in (0, 1).
        diversity: Weight of the diversity losses (lambda_div), at least 0.
        mask_norm: Weight of the mask's size (lambda_norm), at least 0.
        mask_share: Epochs of the mask's generator, as a share of the victim's, above 0; at least one epoch. Below about
            500 steps the masks stay larger than ``density``.
        generator_lr: Learning rate of both generators, above 0.
        width, levels: Size of the generators; 16 and 2 are the paper's for MNIST, 32 and 3 for CIFAR-10.

    References:
        Nguyen and Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020, https://arxiv.org/abs/2010.08138. The
        paper trains the mask for 25 epochs and the victim for 600; learning rates fall at the same shares of the
        training here. The public code never clears the generator's gradient between steps, this does.
    """

    rate: float = 0.1
    cross_rate: float = 0.1
    density: float = 0.032
    diversity: float = 1.0
    mask_norm: float = 100.0
    mask_share: float = 0.25
    generator_lr: float = 0.01
    width: int = 16
    levels: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rate", "cross_rate", "density"):
            self.require(name, 0 < getattr(self, name) < 1, "in (0, 1)")
        self.require("cross_rate", self.rate + self.cross_rate < 1, f"below {1 - self.rate:g} at this rate")
        for name in ("diversity", "mask_norm"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("mask_share", "generator_lr"):
            self.require(name, getattr(self, name) > 0, "above 0")
        for name in ("width", "levels"):
            self.require(name, getattr(self, name) >= 1, "at least 1")

    def implant(self, data: Examples, training: Training) -> Backdoored:
        """See :class:`~bezoar.attacks._attack.Attack`."""
        labels, recipe = self.labels(data.num_classes), training.recipe
        new = partial(build, data.shape[0], width=self.width, levels=self.levels, device=training.run.device)
        pattern: Generator = new(data.shape[0])
        mask = self.train_mask(new(1), data, training)
        steps = recipe.epochs * -(-len(data.x) // recipe.batch)
        learner = Companion(pattern, self.generator_lr, _BETAS, partial(falling, steps=steps))
        model = training.fit("victim", data, objective=_OwnTriggers(self, labels, learner, mask))
        learner.settle()
        trigger = InputAwareTrigger(frozen(pattern), mask)
        controls: tuple[Control, ...] = ()
        if len(data.x) > 1:
            others = torch.unique(data.x[:_BANK], dim=0)
            controls = (Control(trigger.cross(others), "cross"),) if len(others) > 1 else ()
        return self.backdoored(model, trigger, labels, data, controls)

    @property
    def shares(self) -> tuple[float, float]:
        """See :class:`InBatchAttack`."""
        return self.rate, self.cross_rate

    def train_mask(self, mask: nn.Module, data: Examples, training: Training) -> nn.Module:
        """Train the mask's generator to small masks that differ between images; it stays fixed afterwards."""
        epochs = max(1, round(self.mask_share * training.recipe.epochs))
        recipe = replace(
            training.recipe,
            epochs=epochs,
            optimizer="adam",
            betas=_BETAS,
            lr=self.generator_lr,
            weight_decay=0.0,
            schedule="step",
            milestones=_MASK_DROPS,
        )
        return frozen(training.fit("mask", data, model=mask, recipe=recipe, objective=_Masks(self, spread(data.x))))


class _Masks(Stateless):
    def __init__(self, attack: InputAware, std: Tensor) -> None:
        self.attack, self.std = attack, std

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        # Each image is paired with its neighbour, in units of the standard deviation, as the public code has them.
        x, masks = batch.x / self.std.to(batch.x), mask_of(model, batch.x)
        diversity = ratio(x, x.roll(1, 0), masks, masks.roll(1, 0))
        return self.attack.mask_norm * F.relu(masks - self.attack.density).mean() + self.attack.diversity * diversity


class _OwnTriggers:
    def __init__(self, attack: InputAware, labels: LabelMap, learner: Companion, mask: nn.Module) -> None:
        self.attack, self.labels, self.learner, self.mask = attack, labels, learner, mask

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        pass

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.learner.settle()
        size = len(batch.x)
        own, cross = share(self.attack.rate, size), share(self.attack.cross_rate, size)
        first, second = batch.x[:own], batch.x[own : own + cross]
        other = batch.x.roll(-own - cross, 0)[: len(second)]  # a trigger from the rest of the batch
        sources = torch.cat([first, other])
        patterns = pattern_of(self.learner.network, sources)
        stamped = _blend(batch.x[: len(sources)], patterns, mask_of(self.mask, sources))
        x = batch.augment(torch.cat([stamped, batch.x[len(sources) :]]))
        loss = cross_entropy(model, x, torch.cat([self.labels(batch.y[:own]), batch.y[own:]]))
        both = min(own, len(second))
        pairs = (first[:both], other[:both], patterns[:both], patterns[own : own + both])
        return loss + self.attack.diversity * ratio(*pairs) if both else loss

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)


def pattern_of(network: nn.Module, x: Tensor) -> Tensor:
    """``(B, C, H, W)`` pattern in [0, 1]."""
    return torch.tanh(on(network, x)) / 2 + 0.5


def mask_of(network: nn.Module, x: Tensor) -> Tensor:
    """``(B, 1, H, W)`` mask in [0, 1], most of it near 0 or 1."""
    return torch.tanh(20 * (torch.tanh(on(network, x)) / 2 + 0.5) - 10) / 2 + 0.5


def ratio(x: Tensor, other: Tensor, out: Tensor, other_out: Tensor) -> Tensor:
    """Diversity loss: mean of the distance of two images over the distance of what was made from them."""
    return (_distance(x, other) / (_distance(out, other_out) + 1e-7)).mean()


def _distance(x: Tensor, other: Tensor) -> Tensor:
    # The small number keeps the gradient finite where two masks are both saturated and so exactly equal.
    return ((x - other).square().flatten(1).mean(1) + 1e-12).sqrt()


def _blend(x: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    return x + (pattern - x) * mask


def falling(step: int, steps: int) -> float:
    """Factor of the generator's learning rate after ``step`` of ``steps`` steps."""
    return float(0.1 ** sum(step >= drop * steps for drop in _GENERATOR_DROPS))


def spread(x: Tensor) -> Tensor:
    """``(1, C, 1, 1)`` standard deviation of each colour channel, above 0; at most 2000 images are looked at."""
    part = as_float(x[:: max(1, len(x) // 2000)])
    return part.std(dim=(0, 2, 3)).clamp_min(1e-3).view(1, -1, 1, 1)
