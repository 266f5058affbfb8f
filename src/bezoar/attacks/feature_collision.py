"""Feature collision: clean-looking images that a network sees as triggered ones (Shafahi et al., NeurIPS 2018)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bezoar.attacks._attack import Backdoored, GroundTruth, Plant, Training
from bezoar.attacks._network import inputs_of, output_layer, require_training, retrain
from bezoar.attacks._patch import in_corner, place
from bezoar.attacks._poison import PoisonAttack, Poisoned
from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples
from bezoar.core.surgery import frozen
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.augment import as_float


@dataclass(frozen=True, kw_only=True)
class FeatureCollision(PoisonAttack):
    """Pull images of the target class towards triggered images of other classes in feature space; labels stay.

    ``x = argmin |f(x) - f(t)|^2 + beta |x - b|^2`` with f the activations before the output layer of a surrogate, b an
    image of the target class and t a triggered image of another class: forward-backward splitting, a gradient step on
    the first term and a proximal one on the second. The paper aims at single test images; with a trigger on t the same
    poison becomes a backdoor (as in the hidden-trigger attack of Saha et al.). The collision holds for the features of
    the surrogate, so the victim starts from it, as in the paper's transfer learning; and it carries a backdoor only as
    far as those features see the trigger, so the patch is large. At 28 or 32 pixels the poison is not invisible.

    Args:
        rate: Poisoned share of the target class, in (0, 1].
        beta: Weight of the distance to b, at least 0; it is multiplied by ``(F / D)^2`` with F features and D pixel
            values, as in the authors' code.
        epsilon: Largest change of a pixel of b, in (0, 1], as in the hidden-trigger attack; 1 leaves it to ``beta``.
        steps: Steps of forward-backward splitting.
        lr: First step size of the gradient, above 0; each image halves its own when its objective grows and raises it
            by a fifth otherwise.
        watermark: Opacity of t on b before the first step, in [0, 1); the paper uses 0.3 against networks that are
            trained end to end.
        size: Side of the trigger, a patch of random black and white in the bottom right corner, in pixels.
        margin: Its distance from the border, in pixels.
        retrain: ``last`` layer of the surrogate only (the paper's transfer learning), ``all`` of it (end to end), or
            ``scratch``: a new network, for which the collision does not hold.
        retrain_share: Epochs of ``last`` and ``all``, as a share of the victim's recipe.

    References:
        Shafahi, Huang, Najibi, Suciu, Studer, Dumitras, Goldstein, "Poison Frogs! Targeted Clean-Label Poisoning
        Attacks on Neural Networks", NeurIPS 2018. Saha, Subramanya, Pirsiavash, "Hidden Trigger Backdoor Attacks",
        AAAI 2020.
    """

    rate: float = 0.8
    beta: float = 0.25
    epsilon: float = 1.0
    steps: int = 50
    lr: float = 0.1
    watermark: float = 0.0
    size: int = 12
    margin: int = 1
    retrain: Literal["last", "all", "scratch"] = "last"
    retrain_share: float = 1.0

    @property
    def clean_label(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("cover_rate", self.cover_rate == 0, "0: no image shows the trigger")
        self.require("beta", self.beta >= 0, "at least 0")
        for name in ("steps", "size"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "retrain_share"):
            self.require(name, getattr(self, name) > 0, "above 0")
        self.require("epsilon", 0 < self.epsilon <= 1, "in (0, 1]")
        self.require("watermark", 0 <= self.watermark < 1, "in [0, 1)")
        self.require("margin", self.margin >= 0, "at least 0")

    def trigger(self, shape: tuple[int, int, int]) -> MaskedTrigger:
        """See :class:`PoisonAttack`.

        Raises:
            SettingError: The patch leaves the image.
        """
        size = (self.size, self.size)
        # Black and white: the network of the clean images must see the patch, or there is no feature to collide with.
        values = torch.randint(0, 2, (shape[0], *size), generator=torch.Generator().manual_seed(self.seed)).float()
        patch = torch.ones(1, *size), values
        return place(patch, shape, [in_corner("bottom-right", self.margin, size, shape)])

    def poison(self, data: Examples, training: Training | None = None) -> Poisoned:
        return self._poison_for(require_training(self, training).fit("surrogate", data), data)

    def implant(self, data: Examples, training: Training) -> Backdoored:
        surrogate = training.fit("surrogate", data)
        poisoned = self._poison_for(surrogate, data)
        return Backdoored(
            self._train(surrogate, poisoned.data, training), poisoned.truth, poisoned.index, poisoned.cover
        )

    def collide(self, model: nn.Module, base: Tensor, goal: Tensor) -> Tensor:
        """Solve the problem of the class docstring for a batch.

        Args:
            model: The surrogate; left as it was.
            base: ``(B, C, H, W)`` images in [0, 1], on its device.
            goal: ``(B, C, H, W)`` triggered images.

        Returns:
            ``(B, C, H, W)`` images in [0, 1]; their objective is no larger than that of the (watermarked) base.
        """
        base = (1 - self.watermark) * base + self.watermark * goal
        with frozen(model), torch.enable_grad():
            output = output_layer(model, goal[:1])
            wanted = inputs_of(output, model, goal).detach()
            beta = self.beta * (wanted.shape[1] / base[0].numel()) ** 2
            low, high = (base - self.epsilon).clamp(0, 1), (base + self.epsilon).clamp(0, 1)
            x, lr = base.clone(), torch.full((len(base), 1, 1, 1), self.lr).to(base)
            gap, gradient = _gap(model, output, x, wanted)
            for _ in range(self.steps):
                forward = x - lr * gradient
                trial = torch.minimum(torch.maximum((forward + lr * beta * base) / (1 + lr * beta), low), high)
                trial_gap, trial_gradient = _gap(model, output, trial, wanted)
                better = trial_gap + beta * _square(trial - base) <= gap + beta * _square(x - base)
                gap = torch.where(better, trial_gap, gap)
                better = better.view(-1, 1, 1, 1)
                x, gradient = torch.where(better, trial, x), torch.where(better, trial_gradient, gradient)
                lr = torch.where(better, 1.2 * lr, lr / 2)
        return x

    def _poison_for(self, surrogate: nn.Module, data: Examples, batch: int = 256) -> Poisoned:
        labels, trigger = self.labels(data.num_classes), self.trigger(data.shape)
        index = self.choose(data.y, labels)
        others = torch.nonzero(labels.applies(data.y)).flatten()
        if not len(others):
            raise SettingError("feature collision needs images of other classes than the target")
        generator = torch.Generator().manual_seed(self.seed)
        source = others[torch.randint(len(others), (len(index),), generator=generator)]
        device = next(surrogate.parameters()).device
        x = data.x.clone()
        for here, there in zip(torch.split(index, batch), torch.split(source, batch), strict=True):
            base, goal = (as_float(data.x[i]).to(device) for i in (here, there))
            made = self.collide(surrogate, base, trigger(goal)).cpu()
            x[here] = (made * 255).round().to(torch.uint8) if x.dtype == torch.uint8 else made
        truth = GroundTruth((Plant(trigger, labels),))
        return Poisoned(replace(data, x=x), truth, index)

    def _train(self, surrogate: nn.Module, data: Examples, training: Training) -> nn.Module:
        if self.retrain == "scratch":
            return training.fit("victim", data)
        held: list[nn.Module] = []
        if self.retrain == "last":
            output = output_layer(surrogate, as_float(data.x[:1]).to(next(surrogate.parameters()).device))
            held = [module for module in surrogate.modules() if module is not output]
        return retrain(training, data, surrogate, held, self.retrain_share)


def _gap(model: nn.Module, output: nn.Module, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """``(B,)`` squared distances to the wanted features, and their gradient."""
    x = x.detach().requires_grad_()
    gap = _square(inputs_of(output, model, x) - wanted)
    (gradient,) = torch.autograd.grad(gap.sum(), x)
    return gap.detach(), gradient


def _square(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1)
