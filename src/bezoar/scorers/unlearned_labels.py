"""The label that outlives unlearning: a by-product of RNP."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.evidence import Scores
from bezoar.core.method import Clean, Scorer
from bezoar.core.run import Run
from bezoar.ops.recipe import Recipe
from bezoar.ops.unlearning import Unlearning, predicted_counts, steps_of_epoch, stop_at, unlearn


@dataclass(frozen=True, kw_only=True)
class UnlearnedLabels(Scorer):
    """Forget the clean task, and see which label the model still gives.

    A copy of the model is trained to get the clean images wrong until it does. The backdoor survives that, and most
    clean images end at its label; in a clean model the answers should spread. The public code does the same before it
    prunes. A model that unlearned far collapses to some label even when it is clean, so the share is a sign, not proof.

    The score of a label is the logarithm of how often it is given, over how often it is right, with one image added
    to both: 0 is ordinary, and with 10 balanced labels 2.3 is all images. The model's is that of the leading label. A
    few seconds on one core with small nets and 500 images.

    Args:
        lr: Learning rate of SGD with momentum, weight decay 5e-4; a tenth of it after 10 epochs and a hundredth after
            20. At least 0.
        epochs: Most epochs, at least 1.
        accuracy: Unlearning ends after the first epoch with at most this accuracy, in [0, 1]. None is twice chance, at
            least 0.1, and with 2 or 3 classes halfway between chance and 1.
        clip: Largest gradient norm; 0 switches clipping off, as the public code in effect does.
        momentum: That of SGD, in [0, 1).
        batch: Images per step, at least 2.
        pad: Random crop after padding by this many pixels (the authors: 4 of 32).
        flip: Random horizontal flip (the authors: on).
        majority: A label that is given to more than this share of the images makes the model suspect, in (0, 1]. The
            paper names the most frequent label and has no bound: ours.

    References:
        Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, section on label detection.
    """

    lr: float = 0.01
    epochs: int = 21
    accuracy: float | None = None
    clip: float = 20.0
    momentum: float = 0.9
    batch: int = 128
    pad: int = 2
    flip: bool = False
    majority: float = 0.5

    def __post_init__(self) -> None:
        for name in ("lr", "clip", "pad"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("epochs", self.epochs >= 1, "at least 1")
        self.require("accuracy", self.accuracy is None or 0 <= self.accuracy <= 1, "in [0, 1], or None")
        self.require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self.require("batch", self.batch >= 2, "at least 2, as BatchNorm cannot train on one image")
        self.require("majority", 0 < self.majority <= 1, "in (0, 1]")

    def scores(self, model: nn.Module, clean: Clean, run: Run) -> Scores:
        """See :class:`bezoar.core.method.Scorer`."""
        before = predicted_counts(model, clean.x, clean.num_classes)
        after = predicted_counts(self._unlearned(model, clean, run), clean.x, clean.num_classes)
        ratios = excess(after, before)
        leader = int(ratios.argmax())
        share = float(after.max() / after.sum())
        run.notes["suspected_label"], run.notes["suspected_share"] = leader, round(share, 4)
        return Scores(
            labels={label: float(ratio) for label, ratio in enumerate(ratios)},
            model=float(ratios[leader]),
            meaning="logarithm of how often the unlearned model gives a label, over how often the model gave it",
            suspect=share > self.majority,
        )

    def _unlearned(self, model: nn.Module, clean: Clean, run: Run) -> nn.Module:
        """A copy that forgot the clean task; the model itself where that diverges."""
        changed = copy.deepcopy(model)
        for parameter in changed.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        changed.train(len(clean.x) > 1)
        steps = steps_of_epoch(len(clean.x), self.batch)

        def tell(epoch: int, step: int, loss: float) -> None:
            run.check()
            run.progress.step(run.seed, epoch * steps + step + 1, self.epochs * steps, f"loss {loss:.2f}")

        settings = Unlearning(
            lr=self.lr,
            epochs=self.epochs,
            accuracy=stop_at(clean.num_classes) if self.accuracy is None else self.accuracy,
            clip=self.clip,
            momentum=self.momentum,
            batch=self.batch,
            recipe=Recipe(pad=self.pad, flip=self.flip),
        )
        try:
            # The draws of RNP, so that with the same settings and seed both look at the same unlearned model.
            done = unlearn(
                changed, clean.x, clean.y, settings, lambda epoch: run.generator("rnp", "unlearn", epoch), tell
            )
        except FloatingPointError:
            run.warnings.append("Unlearning diverged and says nothing: lower lr, or set clip")
            return model
        run.notes["unlearned_accuracy"], run.notes["unlearn_epochs"] = round(done.accuracy, 4), done.epochs
        if not done.reached:
            run.warnings.append(
                f"Unlearning only brought the accuracy down to {done.accuracy:.0%}, not {done.wanted:.0%}: raise epochs"
            )
        return changed.eval()


def excess(after: Tensor, before: Tensor) -> Tensor:
    """``(K,)`` logarithms of counts over what they were, with one added to both."""
    return torch.log((after.double() + 1) / (before.double() + 1))
