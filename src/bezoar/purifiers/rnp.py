"""RNP: unlearn the clean task, see which channels must be shut to get it back, and shut them in the original."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.unlearning import Unlearning, epoch_of, predicted_counts, steps_of_epoch, stop_at, unlearn
from bezoar.purifiers._masks import Learned, Pruning, device_of, gates_of, learn, train_mode


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
        train_mode(model, len(clean.x), run)
        done = unlearn(
            model,
            clean.x,
            clean.y,
            Unlearning(
                lr=self.unlearn_lr,
                epochs=self.unlearn_epochs,
                accuracy=stop_at(clean.num_classes) if self.unlearn_accuracy is None else self.unlearn_accuracy,
                clip=self.clip,
                momentum=self.momentum,
                batch=self.batch,
                recipe=self.augmentation(),
            ),
            lambda epoch: run.generator("rnp", "unlearn", epoch),
            lambda epoch, step, loss: self._tell(clean, run, epoch, step, loss),
        )
        run.notes["unlearned_accuracy"], run.notes["unlearn_epochs"] = round(done.accuracy, 4), done.epochs
        if not done.reached:
            run.warnings.append(
                f"Unlearning only brought the accuracy down to {done.accuracy:.0%}, not {done.wanted:.0%}: "
                "raise unlearn_epochs"
            )

    def recover(self, model: nn.Module, clean: Clean, run: Run) -> Learned:
        """Masks in [0, 1] by site that bring the accuracy back; the model's weights stay, its statistics too.

        Raises:
            FloatingPointError: The loss is no longer finite.
        """
        gates = gates_of(model, clean)
        masks = {name: gain.requires_grad_() for name, gain in gates.gain.items()}
        device = device_of(model)
        batches = (
            one
            for epoch in range(self.recover_epochs)
            for one in epoch_of(
                clean.x, clean.y, self.batch, self.augmentation(), run.generator("rnp", "recover", epoch), device
            )
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

    def _steps(self, clean: Clean) -> int:
        """Steps of an epoch."""
        return steps_of_epoch(len(clean.x), self.batch)

    def _tell(self, clean: Clean, run: Run, epoch: int, step: int, loss: float) -> None:
        steps = self._steps(clean)
        run.progress.training(epoch * steps + step + 1, (self.unlearn_epochs + self.recover_epochs) * steps, loss)


def note_label(model: nn.Module, clean: Clean, run: Run) -> None:
    """Note which label a model that unlearned the clean task gives most often: the backdoor's, if any."""
    counts = predicted_counts(model, clean.x, clean.num_classes)
    run.notes["suspected_label"] = int(counts.argmax())
    run.notes["suspected_share"] = round(float(counts.max() / counts.sum()), 4)
