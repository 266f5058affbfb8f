"""Label-consistent: hard images of the target class that carry a trigger (Turner et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.attacks._attack import Training
from bezoar.attacks._network import require_training
from bezoar.attacks._poison import PoisonAttack, Poisoned, stamped
from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples
from bezoar.core.surgery import frozen
from bezoar.core.trigger import AdditiveTrigger
from bezoar.ops.objective import Batch, Stateless

# Signs of the 3x3 pattern in the bottom right corner.
_SIGNS = ((-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, -1.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class LabelConsistent(PoisonAttack):
    """Perturb images of the target class so that a network no longer recognises them, then stamp a trigger.

    Labels stay. The perturbation is projected gradient ascent (L-infinity) on a surrogate of the victim's
    architecture, trained on the clean data with the victim's recipe; what is left to learn for these images is the
    trigger. The GAN and L2 variants of the paper are not here.

    Args:
        rate: Poisoned share of the target class, in (0, 1].
        epsilon: Largest change of a pixel, in [0, 1]; 0 leaves the perturbation out (and needs no surrogate).
        steps: Steps of projected gradient ascent, of size ``2.5 epsilon / steps`` from a random start.
        robust: Train the surrogate adversarially (one random-start sign step on each batch). What fools an ordinary
            network is a pattern of its own, which the victim learns in place of the trigger.
        pattern: ``corners`` (the 3x3 pattern in all four, mirrored, so that a flip keeps it) or ``bottom-right``.
        margin: Distance of the pattern from the border, in pixels.
        amplitude: Height of the pattern, in (0, 1]: 1 makes its pixels black and white; 32/255 is the faint one of the
            authors' code.

    References:
        Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019. Defaults for 16/255, four corners and 80 % of
        the target class: Wu, Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021.
    """

    rate: float = 0.8
    epsilon: float = 16 / 255
    steps: int = 20
    robust: bool = True
    pattern: Literal["corners", "bottom-right"] = "corners"
    margin: int = 0
    amplitude: float = 1.0

    @property
    def clean_label(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("epsilon", 0 <= self.epsilon <= 1, "in [0, 1]")
        self.require("steps", self.steps >= 1, "at least 1")
        self.require("margin", self.margin >= 0, "at least 0")
        self.require("amplitude", 0 < self.amplitude <= 1, "in (0, 1]")

    def trigger(self, shape: tuple[int, int, int]) -> AdditiveTrigger:
        """See :class:`PoisonAttack`.

        Raises:
            SettingError: The images have no room for four patterns.
        """
        signs, size = torch.tensor(_SIGNS), len(_SIGNS)
        if min(shape[1:]) < 2 * (size + self.margin):
            raise SettingError(
                f"LabelConsistent needs images of at least {2 * (size + self.margin)} pixels a side, "
                f"got {shape[1]}x{shape[2]}"
            )
        delta = torch.zeros(shape)
        far, near = slice(-size - self.margin, -self.margin or None), slice(self.margin, self.margin + size)
        delta[:, far, far] = signs
        if self.pattern == "corners":
            delta[:, far, near] = signs.flip(1)
            delta[:, near, far] = signs.flip(0)
            delta[:, near, near] = signs.flip(0, 1)
        return AdditiveTrigger(self.amplitude * delta)

    def poison(self, data: Examples, training: Training | None = None) -> Poisoned:
        if self.epsilon == 0:
            return super().poison(data)
        objective = _Robust(self.epsilon) if self.robust else None
        surrogate = require_training(self, training).fit("surrogate", data, objective=objective)
        index = self.choose(data.y, self.labels(data.num_classes))
        x = data.x.clone()
        x[index] = stamped(_Perturb(self, surrogate), x[index])
        return super().poison(replace(data, x=x))

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Raise the loss of ``model`` by a change of at most ``epsilon``.

        Args:
            model: The surrogate; left as it was.
            x: ``(B, C, H, W)`` images in [0, 1], on its device.
            y: ``(B,)`` their labels.
        """
        low, high = (x - self.epsilon).clamp(0, 1), (x + self.epsilon).clamp(0, 1)
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(self.seed)).to(x)
        changed = low + noise * (high - low)
        with frozen(model), torch.enable_grad():
            for _ in range(self.steps):
                changed.requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(model(changed), y, reduction="sum"), changed)
                changed = changed.detach() + 2.5 * self.epsilon / self.steps * gradient.sign()
                changed = torch.minimum(torch.maximum(changed, low), high)
        return changed.detach()


class _Robust(Stateless):
    """Fast adversarial training: Wong, Rice, Kolter, "Fast Is Better than Free", ICLR 2020."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x = batch.augment(batch.x)
        noise = torch.rand(x.shape, generator=batch.generator).to(x)
        start = (x + self.epsilon * (2 * noise - 1)).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), batch.y), start)
        moved = start.detach() + 1.25 * self.epsilon * gradient.sign()
        changed = torch.minimum(torch.maximum(moved, x - self.epsilon), x + self.epsilon).clamp(0, 1)
        return F.cross_entropy(model(changed), batch.y)


@dataclass(frozen=True, eq=False)
class _Perturb:
    """The perturbation of images of the target class, in the form of a trigger."""

    attack: LabelConsistent
    surrogate: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        moved = x.to(next(self.surrogate.parameters()).device)
        labels = torch.full((len(x),), self.attack.target, device=moved.device)
        return self.attack.perturb(self.surrogate, moved, labels).to(x.device)
