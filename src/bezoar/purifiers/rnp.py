"""RNP: unlearn the clean task, see which channels must be shut to get it back, and shut them in the original."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.batches import passes
from bezoar.purifiers._masks import Learned, Pruning, device_of, gates_of, learn, train_mode

#: 500 images in batches of 128, as in the paper, are 4 steps; of fewer images an epoch takes several passes.
_LEAST_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class RNP(Pruning):
    """Reconstructive neuron pruning: forget the clean task, learn channel masks that restore it, prune the lowest.

    A copy of the model is trained to get the clean images wrong until it does; the backdoor survives that. Then masks
    on the gains of its channels are trained to get the images right again. Channels that must be shut for it are those
    of the backdoor, and are shut in the original model. Nets without normalisation have masks on the outputs of their
    hidden layers. An epoch has at least 4 steps, those of 500 images.

    Args:
        unlearn_lr: Learning rate of unlearning (SGD with momentum, weight decay 5e-4); a tenth of it after 10 epochs
            and a hundredth after 20. At least 0.
        unlearn_epochs: Most epochs of unlearning, at least 1.
        unlearn_accuracy: Unlearning ends after the first epoch with at most this accuracy, in [0, 1]. None is twice
            chance, at least 0.1, and with 2 or 3 classes halfway between chance and 1.
        clip: Largest gradient norm of unlearning; 0 switches clipping off, as the public code in effect does, since it
            clips before the gradients are there.
        recover_epochs: Epochs of learning the masks, at least 1.
        alpha: Factor on the loss of learning the masks, above 0: no more than a factor on ``lr``.
        lr: Learning rate of the masks (SGD), at least 0.
        momentum: That of both, in [0, 1).
        batch: Images per step, at least 2.
        pad: Random crop after padding by this many pixels (the authors: 4 of 32).
        flip: Random horizontal flip (the authors: on).
        threshold: Channels whose mask is at most this are pruned, in [0, 1]. None prunes from the lowest mask upwards
            as many as the tolerance allows, up to 0.95; of those at 0, the first to get there comes first.
        tolerance: Share of the accuracy on the clean images that pruning may cost where ``threshold`` is None, in
            [0, 1]; of the confidence where there are fewer than 50 images.

    References:
        Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, and its public code: shift of a
        pruned channel kept, BatchNorm in train mode while learning.
    """

    unlearn_lr: float = 0.01
    unlearn_epochs: int = 21
    unlearn_accuracy: float | None = None
    clip: float = 20.0
    recover_epochs: int = 20
    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("unlearn_lr", "clip"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("unlearn_epochs", "recover_epochs"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        lowest = self.unlearn_accuracy
        self.require("unlearn_accuracy", lowest is None or 0 <= lowest <= 1, "in [0, 1], or None")
        self.require("alpha", self.alpha > 0, "above 0")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        unlearned = copy.deepcopy(model)
        try:
            self.unlearn(unlearned, clean, run)
            note_label(unlearned, clean, run)
            learned = self.recover(unlearned, clean, run)
        except FloatingPointError:
            run.warnings.append("Unlearning diverged and nothing is pruned: lower unlearn_lr, or set clip")
            return model
        self.prune(model, learned, clean, run)
        return model

    def unlearn(self, model: nn.Module, clean: Clean, run: Run) -> None:
        """Ascend the loss on the clean images in place, until their accuracy is low.

        Raises:
            FloatingPointError: The loss is no longer finite.
        """
        stop = stop_at(clean.num_classes) if self.unlearn_accuracy is None else self.unlearn_accuracy
        train_mode(model, len(clean.x), run)
        optimizer = torch.optim.SGD(model.parameters(), lr=self.unlearn_lr, momentum=self.momentum, weight_decay=5e-4)
        for epoch in range(self.unlearn_epochs):
            optimizer.param_groups[0]["lr"] = self.unlearn_lr * 0.1 ** ((epoch >= 10) + (epoch >= 20))
            right = seen = 0
            for step, (x, y) in enumerate(self._epoch(clean, run, "unlearn", epoch, device_of(model))):
                out = logits(model, x)
                self._ascend(model, optimizer, out, y)
                right, seen = right + int((out.argmax(1) == y).sum()), seen + len(y)
                self._tell(clean, run, epoch, step, float(F.cross_entropy(out.detach(), y)))
            run.notes["unlearned_accuracy"], run.notes["unlearn_epochs"] = round(right / seen, 4), epoch + 1
            if right / seen <= stop:
                return
        run.warnings.append(
            f"Unlearning only brought the accuracy down to {right / seen:.0%}, not {stop:.0%}: raise unlearn_epochs"
        )

    def _ascend(self, model: nn.Module, optimizer: torch.optim.Optimizer, out: Tensor, y: Tensor) -> None:
        loss = -F.cross_entropy(out, y)
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError("the loss is not finite")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.clip:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        optimizer.step()

    def recover(self, model: nn.Module, clean: Clean, run: Run) -> Learned:
        """Masks in [0, 1] by site that bring the accuracy back; the model's weights stay, its statistics too.

        Raises:
            FloatingPointError: The loss is no longer finite.
        """
        gates = gates_of(model, clean)
        masks = {name: gain.requires_grad_() for name, gain in gates.gain.items()}
        device = device_of(model)
        batches = (
            one for epoch in range(self.recover_epochs) for one in self._epoch(clean, run, "recover", epoch, device)
        )

        def loss() -> Tensor:
            x, y = next(batches)
            return self.alpha * F.cross_entropy(logits(model, x), y)

        with frozen(model), gates.applied(gain=masks):
            model.train(len(clean.x) > 1)
            return learn(
                masks,
                loss,
                self.recover_epochs * self._steps(clean),
                lr=lambda _: self.lr,
                momentum=self.momentum,
                progress=lambda done, value: self._tell(clean, run, self.unlearn_epochs, done - 1, value),
            )

    def _passes(self, clean: Clean) -> int:
        return -(-_LEAST_STEPS // self._batches(clean))

    def _batches(self, clean: Clean) -> int:
        full, rest = divmod(len(clean.x), self.batch)
        return full + (rest > 1 or full == 0)

    def _steps(self, clean: Clean) -> int:
        """Steps of an epoch."""
        return self._passes(clean) * self._batches(clean)

    def _epoch(
        self, clean: Clean, run: Run, phase: str, epoch: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = run.generator("rnp", phase, epoch)
        for _ in range(self._passes(clean)):
            yield from passes(
                clean.x, clean.y, self.batch, generator, device=device, recipe=self.augmentation(), least=2
            )

    def _tell(self, clean: Clean, run: Run, epoch: int, step: int, loss: float) -> None:
        steps = self._steps(clean)
        run.progress.training(epoch * steps + step + 1, (self.unlearn_epochs + self.recover_epochs) * steps, loss)


def stop_at(num_classes: int) -> float:
    """Accuracy at which the clean task counts as unlearned: 0.2 for the paper's 10 classes."""
    return min(max(2 / num_classes, 0.1), (1 + 1 / num_classes) / 2)


@torch.no_grad()
def note_label(model: nn.Module, clean: Clean, run: Run) -> None:
    """Note which label a model that unlearned the clean task gives most often: the backdoor's, if any."""
    device = device_of(model)
    with frozen(model):
        given = torch.cat([logits(model, part.to(device)).argmax(1) for part in torch.split(clean.x, 256)])
    counts = torch.bincount(given.cpu(), minlength=clean.num_classes)
    run.notes["suspected_label"] = int(counts.argmax())
    run.notes["suspected_share"] = round(float(counts.max() / counts.sum()), 4)
