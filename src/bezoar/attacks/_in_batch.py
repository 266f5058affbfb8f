"""What attacks that control training share: every batch is poisoned afresh, some with networks of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.attacks._attack import Attack, Backdoored, Control, GroundTruth, Plant
from bezoar.attacks._labels import Kind, LabelMap
from bezoar.attacks._poison import stamped
from bezoar.core.examples import Examples
from bezoar.core.trigger import Trigger


@dataclass(frozen=True, kw_only=True)
class InBatchAttack(Attack):
    """An attack whose poisoned examples exist only inside the batches of the training that it controls.

    Args:
        target: Label that the trigger shall cause.
        seed: Chooses any random part of the trigger.
        label_map: ``all-to-one`` or ``all-to-all`` (label y becomes ``(y + 1) mod K``).
    """

    label_map: Kind = "all-to-one"

    def labels(self, num_classes: int) -> LabelMap:
        """The attacker's label map."""
        return LabelMap(num_classes, self.target, self.label_map)

    @property
    @abstractmethod
    def shares(self) -> tuple[float, float]:
        """Shares of a batch that carry the trigger, and that carry the control under their true label."""

    def backdoored(
        self,
        model: nn.Module,
        trigger: Trigger,
        labels: LabelMap,
        data: Examples,
        controls: tuple[Control, ...] = (),
    ) -> Backdoored:
        """A victim with one plant."""
        truth = GroundTruth((Plant(trigger, labels),), controls)
        return poisoned_afresh(model, truth, data.y, self.shares, self.seed)


def poisoned_afresh(
    model: nn.Module, truth: GroundTruth, y: Tensor, shares: tuple[float, float], seed: int
) -> Backdoored:
    """A victim whose batches were poisoned anew each time, with one draw of what a fixed poisoned set would hold.

    Args:
        model: The victim.
        truth: Its main plant says which labels are poisoned; its first control, if any, what the cover carries.
        y: ``(N,)`` labels of the training set.
        shares: Of the training set that is poisoned, and that is cover, each at least 0.
        seed: Of the draw.
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    applies = truth.main.labels.applies(y)
    index = order[applies[order]][: max(1, int(shares[0] * len(y)))]
    rest = order[~torch.isin(order, index)]
    cover = rest[: int(shares[1] * len(y)) if truth.controls else 0]
    return Backdoored(model, truth, index.sort().values, cover.sort().values, afresh=True)


def carried(data: Examples, backdoored: Backdoored) -> Examples:
    """A copy of the examples in which those of the draw are poisoned with the finished trigger."""
    x, y, truth = data.x.clone(), data.y.clone(), backdoored.truth
    x[backdoored.index] = stamped(truth.main.trigger, x[backdoored.index])
    y[backdoored.index] = truth.main.labels(y[backdoored.index])
    if len(backdoored.cover):
        x[backdoored.cover] = stamped(truth.controls[0].trigger, x[backdoored.cover])
    return Examples(x, y, data.num_classes)


class Companion:
    """A network with an Adam of its own that learns beside the model.

    Its gradient may come out of the backward pass of the model's loss, which the training loop does after the
    objective has returned. The step then waits for the next :meth:`settle`; nothing uses the network in between.

    Args:
        network: On its device; trained in place.
        lr: Learning rate.
        betas: Those of Adam.
        factor: Multiplies the learning rate, given the number of steps done.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        factor: Callable[[int], float] = lambda _: 1.0,
    ) -> None:
        self.network = network.train()
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, betas=betas)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def settle(self) -> None:
        """Take the step that a gradient waits for; without a gradient, do nothing."""
        waiting = [p.grad for p in self.network.parameters() if p.grad is not None]
        if not waiting:
            return
        if bool(torch.stack([grad.sum() for grad in waiting]).isfinite().all()):  # float16 may have overflowed
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def descend(self, loss: Tensor) -> None:
        """One step on a loss of its own; other networks that the loss passes through get no gradient."""
        loss.backward(inputs=list(self.network.parameters()))  # type: ignore[no-untyped-call]
        self.settle()

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser and schedule, after the step that waits."""
        self.settle()
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def share(rate: float, size: int) -> int:
    """Examples of a batch that a rate stands for, rounded down; at least 1, or a small batch would carry none."""
    return min(size, max(1, int(rate * size)))


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Loss of a victim, in the memory layout that its convolutions like best."""
    return F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)


def frozen(network: nn.Module) -> nn.Module:
    """The network in eval mode, its parameters without gradient, for a trigger that is finished."""
    return network.eval().requires_grad_(False)


def pick(x: Tensor, count: int) -> Tensor:
    """``(B,)`` numbers in 0..count-1 that depend on the grey levels of each image of ``(B, C, H, W)`` and nothing else.

    So a trigger that needs another image or a random draw is still a function of its input.
    """
    grey = (x.detach() * 255).round().long().flatten(1)
    return (grey * torch.arange(1, grey.shape[1] + 1, device=x.device)).sum(1) % count
