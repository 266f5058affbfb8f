"""Neural Attention Distillation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import SettingError
from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.attention import Tap, attention_distance, features_at, find_taps
from bezoar.ops.fit import Batch, Recipe, fit
from bezoar.ops.precision import full_precision
from bezoar.purifiers._objective import CleanLoss, enough_epochs, too_few_for_statistics


@dataclass(frozen=True, kw_only=True)
class NAD(Purifier):
    """Fine-tune a copy as the teacher, then the suspect so that it looks where the teacher looks.

    Taps are found by watching a forward pass: the last block at each resolution of a residual network, the last layer
    at each resolution of a plain one, thirds of the blocks of a transformer. The teacher is in eval mode. The weights
    are those after the last epoch: the authors' "best" ones were chosen with the trigger.

    Args:
        teacher_epochs: Passes over the clean images for the teacher (the paper: 10), at least 1.
        epochs: Passes for the student (the paper's code: 20), at least 1.
        steps: At least so many steps for the student, and in proportion for the teacher: with few images both take more
            passes, at most 50 (the paper's 2,500 images give 800 steps in 20). 0 counts passes alone.
        betas: Weights of the distances from the shallowest to the deepest tap, each at least 0; as many as there are
            taps at most, where there are fewer, the last ones are used. They look large since the distance is a mean
            over all positions of the map.
        power: Exponent of the activations in the attention map, above 0.
        lr: Learning rate of SGD (momentum 0.9, Nesterov) in the first tenth of ``epochs``, for teacher and student; a
            tenth of it afterwards.
        batch: Images per step, at least 2.
        weight_decay: L2 penalty.
        pad: Random crop after padding by this many pixels.
        flip: Random horizontal flip; off by default, since signs, digits and text must not be mirrored.
        cutout: Side of a square that is set to 0, which needs kornia; the authors' code says 3 and cuts 2, and their
            published figure was reached without.
        clip: Largest gradient norm; 0 switches clipping off, as in the paper, where the first steps may then wreck a
            network: with these betas and this learning rate they are long.

    References:
        Li et al., "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR 2021.
    """

    teacher_epochs: int = 10
    epochs: int = 20
    steps: int = 400
    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    power: float = 2.0
    lr: float = 0.1
    batch: int = 64
    weight_decay: float = 1e-4
    pad: int = 2
    flip: bool = False
    cutout: int = 0
    clip: float = 5.0

    def __post_init__(self) -> None:
        for name, least in (("teacher_epochs", 1), ("epochs", 1), ("batch", 2)):
            self.require(name, getattr(self, name) >= least, f"at least {least}")
        for name in ("steps", "lr", "weight_decay", "pad", "cutout", "clip"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("betas", len(self.betas) > 0 and min(self.betas) >= 0, "one or more numbers, at least 0")
        self.require("power", self.power > 0, "above 0")

    def recipe(self, epochs: int, hot: float) -> Recipe:
        """The training recipe of teacher or student, with the full learning rate for the first ``hot`` passes."""
        return Recipe(
            epochs=epochs,
            lr=self.lr,
            batch=self.batch,
            weight_decay=self.weight_decay,
            schedule="step",
            milestones=(min(hot / epochs, 0.9),),
            gamma=0.1,
            pad=self.pad,
            flip=self.flip,
            cutout=self.cutout,
            clip=self.clip,
        )

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        count = len(clean.x)
        fixed = too_few_for_statistics(model, count, run)
        device = next(model.parameters()).device
        probe = clean.x[:2].to(device)
        taps = find_taps(model, probe if count > 1 else probe.repeat(2, 1, 1, 1), len(self.betas))
        run.notes["attention"] = [tap.name for tap in taps]
        epochs = enough_epochs(count, self.batch, self.epochs, self.steps)
        teacher_epochs = max(1, round(epochs * self.teacher_epochs / self.epochs))
        hot = epochs / 10  # the authors' first two of 20, of the teacher too
        per_epoch = -(-count // self.batch)
        total = per_epoch * (epochs + teacher_epochs)
        with full_precision(model):
            teacher = copy.deepcopy(model)
            fit(
                *(teacher, clean.x, clean.y, self.recipe(teacher_epochs, hot)),
                seed=run.seed,
                objective=CleanLoss(fixed),
                progress=_part(run, 0, total),
            )
            fit(
                *(model, clean.x, clean.y, self.recipe(epochs, hot)),
                seed=run.seed,
                objective=Distillation(teacher, taps, self.betas, self.power, fixed),
                progress=_part(run, per_epoch * teacher_epochs, total),
            )
        return model


def _part(run: Run, before: int, total: int) -> Callable[[int, int, float], None]:
    return lambda done, _, loss: run.progress.training(before + done, total, loss)


class Distillation(CleanLoss):
    """Cross-entropy, and the distance of the attention maps from those of a teacher.

    Args:
        teacher: Frozen here, in eval mode.
        taps: Where to look in both.
        betas: Weights of the distances; the last ones where there are more of them than taps.
        power: See :func:`bezoar.ops.attention.attention_map`.
        fixed: See :class:`bezoar.purifiers._objective.CleanLoss`.
    """

    def __init__(
        self, teacher: nn.Module, taps: list[Tap], betas: tuple[float, ...], power: float, fixed: bool = False
    ) -> None:
        super().__init__(fixed)
        if len(taps) > len(betas):
            raise SettingError(f"{len(taps)} taps need as many betas, got {len(betas)}")
        self.teacher = teacher.eval().requires_grad_(False)
        self.taps, self.betas, self.power = taps, betas[-len(taps) :], power

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`."""
        images = self.images(model, batch)
        with torch.no_grad():
            _, wanted = features_at(self.teacher, self.taps, images)
        out, found = features_at(model, self.taps, images)
        loss = F.cross_entropy(out, batch.y)
        for beta, one, other in zip(self.betas, found, wanted, strict=True):
            loss = loss + beta * attention_distance(one, other, self.power)
        return loss
