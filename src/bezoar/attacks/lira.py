"""LIRA: a faint learned noise (Doan et al., "Learnable, Imperceptible and Robust Backdoor Attacks", ICCV 2021)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.attacks._attack import Backdoored, Training
from bezoar.attacks._generator import build, on
from bezoar.attacks._in_batch import Companion, InBatchAttack, cross_entropy, frozen
from bezoar.attacks._labels import LabelMap
from bezoar.core.examples import Examples
from bezoar.ops.fit import Batch
from bezoar.ops.objective import Stateless


@dataclass(frozen=True, eq=False)
class LiraTrigger:
    """``clip(x + eps tanh(g(x)), 0, 1)``.

    Args:
        generator: Network g in eval mode, ``(B, C, H, W)`` to the same shape.
        eps: Largest change of a pixel, above 0.
    """

    generator: nn.Module
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        return torch.clamp(x + noise(self.generator, x, self.eps), 0, 1)


@dataclass(frozen=True, kw_only=True)
class LIRA(InBatchAttack):
    """Learn the noise and the victim together, then freeze the noise's generator and train the victim on.

    In the first stage a virtual copy of the generator learns against the victim at every step, while the victim learns
    from the generator itself, which catches up with its copy every ``catch_up`` steps. Every image of a batch is seen
    clean and with the trigger; augmentation comes after the trigger.

    Args:
        eps: Largest change of a pixel at test time and in the second stage, in (0, 1].
        joint_eps: The same in the first stage.
        alpha: Weight of the clean images in the victim's loss, in (0, 1); the triggered ones have the rest.
        joint_share: Epochs of the first stage, as a share of the victim's, above 0; at least one epoch. They come on
            top of the recipe's.
        generator_lr: Learning rate of the generator (Adam), above 0.
        catch_up: Steps between two copies; 0 copies after each epoch, as the public code does.
        width, levels: Size of the generator, a U-Net.

    References:
        Doan, Lao, Zhao, Li, "LIRA: Learnable, Imperceptible and Robust Backdoor Attacks", ICCV 2021. The public code
        measures eps on normalised images, here it is in raw pixels; its second stage starts with a new victim by
        default, here the victim goes on. It takes 50 epochs and then 500; it augments before the trigger.
    """

    eps: float = 0.01
    joint_eps: float = 0.1
    alpha: float = 0.5
    joint_share: float = 0.5
    generator_lr: float = 1e-4
    catch_up: int = 0
    width: int = 16
    levels: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eps", "joint_eps"):
            self.require(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        self.require("alpha", 0 < self.alpha < 1, "in (0, 1)")
        for name in ("joint_share", "generator_lr"):
            self.require(name, getattr(self, name) > 0, "above 0")
        self.require("catch_up", self.catch_up >= 0, "at least 0")
        for name in ("width", "levels"):
            self.require(name, getattr(self, name) >= 1, "at least 1")

    def implant(self, data: Examples, training: Training) -> Backdoored:
        """See :class:`~bezoar.attacks._attack.Attack`."""
        labels, channels = self.labels(data.num_classes), data.shape[0]
        generator = build(channels, channels, self.width, self.levels, training.run.device, skips=True)
        joint = _Joint(self, labels, generator)
        epochs = max(1, round(self.joint_share * training.recipe.epochs))
        model = training.fit("joint", data, recipe=replace(training.recipe, epochs=epochs), objective=joint)
        trigger = LiraTrigger(frozen(joint.learned()), self.eps)
        model = training.fit("victim", data, model=model, objective=_Injection(trigger, labels, self.alpha))
        return self.backdoored(model, trigger, labels, data)

    @property
    def shares(self) -> tuple[float, float]:
        """Each image of a batch counts with and without the trigger."""
        return 0.5, 0.0


class _Joint:
    def __init__(self, attack: LIRA, labels: LabelMap, generator: nn.Module) -> None:
        self.attack, self.labels = attack, labels
        self.virtual = Companion(copy.deepcopy(generator), attack.generator_lr)
        self.generator = frozen(generator)
        self.steps = 0

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        del model, number, epochs
        if not self.attack.catch_up:
            self.catch_up()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        wanted, eps = self.labels(batch.y), self.attack.joint_eps
        triggered = torch.clamp(batch.x + noise(self.virtual.network, batch.x, eps), 0, 1)
        self.virtual.descend(cross_entropy(model, batch.augment(triggered), wanted))
        self.steps += 1
        if self.attack.catch_up and self.steps % self.attack.catch_up == 0:
            self.catch_up()
        return both(model, batch, LiraTrigger(self.generator, eps), wanted, self.attack.alpha)

    def catch_up(self) -> None:
        self.generator.load_state_dict(self.virtual.network.state_dict())

    def learned(self) -> nn.Module:
        """The generator after the last step."""
        self.catch_up()
        return self.generator

    def state_dict(self) -> dict[str, Any]:
        return {
            "virtual": self.virtual.state_dict(),
            "generator": self.generator.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.virtual.load_state_dict(state["virtual"])
        self.generator.load_state_dict(state["generator"])
        self.steps = int(state["steps"])


class _Injection(Stateless):
    def __init__(self, trigger: LiraTrigger, labels: LabelMap, alpha: float) -> None:
        self.trigger, self.labels, self.alpha = trigger, labels, alpha

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return both(model, batch, self.trigger, self.labels(batch.y), self.alpha)


def noise(generator: nn.Module, x: Tensor, eps: float) -> Tensor:
    """``(B, C, H, W)`` noise in [-eps, eps]."""
    return eps * torch.tanh(on(generator, x))


def both(model: nn.Module, batch: Batch, trigger: LiraTrigger, wanted: Tensor, alpha: float) -> Tensor:
    """Loss of the victim on each image with and without the trigger.

    They share one forward pass, so that BatchNorm sees the mixture that its running statistics describe.
    """
    with torch.no_grad():
        triggered = trigger(batch.x)
    x = batch.augment(torch.cat([batch.x, triggered]))
    logits = model(x.contiguous(memory_format=torch.channels_last))
    clean, attacked = logits.tensor_split(2)
    return alpha * F.cross_entropy(clean, batch.y) + (1 - alpha) * F.cross_entropy(attacked, wanted)
