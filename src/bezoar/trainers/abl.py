"""ABL: isolate the examples that are learned fastest, then unlearn them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite, log
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource, Subset
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.training import Trained
from bezoar.ops.fit import fit, tell
from bezoar.ops.isolation import Floor, isolate, isolated_count
from bezoar.ops.losses import Curves
from bezoar.ops.stats import anomaly_index
from bezoar.ops.tie import given_their_label, tie
from bezoar.trainers._ascent import Joint, Raise, Unlearning
from bezoar.trainers._guard import Guard, slow
from bezoar.trainers._training import Settings, kept

#: Share of each label, of the largest losses, that counts as genuine.
_GENUINE = 0.5
_NOTHING = (
    "Nothing was unlearned: {reason}. That does NOT say that the data are clean: look at the isolated pictures for "
    "something that many of them share; --method filtered looks at the data otherwise, with a few clean images"
)
#: Least that counts as the usual tie of a group to its label: all labels may be poisoned.
_USUAL_TIE = 2 / 3
#: Fewer labels have no deviation that says anything.
_FEW_LABELS = 5
#: Most slowly learned examples of a label that a group is compared with.
_COMPARED = 500
#: Fewest steps of an epoch of unlearning: those of 500 examples in the public code.
_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class ABL(Settings):
    """Anti-backdoor learning: isolate the examples that are learned fastest, and unlearn them.

    Poison is learned within the first epochs. The loss is kept from falling below a floor meanwhile, so that genuine
    examples stay above it, and the examples of the lowest loss are isolated. After training on the rest the loss on the
    isolated ones is raised again, which breaks the tie of trigger and label also for poison that was not isolated.

    Nobody says whether there is poison at all, and where a class is as easy as the poison, or easier, that is what is
    isolated. So after the training on the rest the fastest examples of each label are compared with the half of it that
    was learned slowest (which poison is not): lowering the log odds of genuine ones lowers those of the slow half too,
    while poison gets its label for a reason of its own. Only groups that are hardly tied to their label in this way are
    unlearned. And some of the slow half are held out, and whatever harms these is taken back.

    Args:
        isolation: How the loss is kept above the floor: ``lga`` turns the gradient of each example below it (the
            paper's formula), ``lga-batch`` that of a batch whose mean is below it (the public code), ``flooding`` has
            the same gradient as ``lga-batch`` (the public code's default). Turning single examples pushes poison back
            up among the others, which cost most of the precision where we measured it.
        gamma: The floor, at least 0; with 0 it is plain training.
        isolation_epochs: Most epochs of isolation, at least 1; the paper takes 20, its public code 10. Nothing is
            augmented.
        until_floor: Whether isolation ends after the first epoch that brings half of the examples to the floor. Where
            data are easy that is soon, and from then on the floor pushes genuine examples about; the paper goes on.
        rate: Share of the examples to isolate, in (0, 1): it should lie below the true share of poison.
        epochs: Epochs on the rest, with augmentation, at least 1.
        schedule: How the learning rate changes meanwhile; ``step`` takes a tenth after two thirds, as the public code
            does. With few epochs ``onecycle`` is better.
        unlearning: ``sequential`` trains on the rest first and then raises the loss of the isolated examples (the
            public code); ``joint`` does both in the same steps (the paper).
        max_tie: A sequential ascent is tried on the lowest losses of a label where, per unit by which a small step
            lowers their mean log odds, those of the label's slow half fall by less than this share of what is usual,
            above 0; usual is the median of the labels, and at least 2/3. None tries the isolated examples whatever they
            are, as the paper does. With BadNets and Blend we saw 0.2 to 0.6, in clean labels 0.6 to 1.3.
        min_index: The tie must also lie so many robust standard deviations below the median of the labels, at least 0.
            Fewer than five labels have no such deviation, and are not held to it.
        tries: Most groups that a sequential ascent tries, at least 1; the least tied first. With ``max_tie=None`` they
            are tried in turn until one is forgotten without harm: the isolated examples, then as many of one label, the
            label first whose lowest losses are lowest. The paper has 1.
        unlearn_epochs: Epochs of a sequential ascent, at least 0; the public code takes 4.
        unlearn_lr: Its learning rate, above 0.
        unlearn_batch: Its batch, at least 1; smaller where an epoch would have fewer than 8 steps.
        unlearn_accuracy: It is taken back altogether where more than this share of the isolated examples, in [0, 1],
            cannot be made to lose their label without harm: they are no poison then.
        raising: What is raised: the ``loss`` as in paper and public code, whose gradient vanishes for a network that is
            sure of its poison and explodes once it is not, or the ``log-odds`` against the label, which do neither.
        ceiling: Examples whose loss is above it are not raised further, at least 0; 0 is no ceiling, as in the paper;
            None is the loss of guessing.
        repair: Whether each step of a sequential ascent also lowers the loss of ``batch`` examples of the slow half.
            The paper's joint objective does that on all of the rest, poison included; the public code does not.
        statistics: BatchNorm during a sequential ascent: ``train`` as in the public code, or ``eval``, which keeps the
            running statistics from becoming those of the isolated examples.
        held_out: Share of each label of the rest that is only watched, in (0, 0.25].
        max_drop: How far the accuracy on what is watched may fall, in [0, 1].
        max_label_drop: The same for a single label. A joint ascent, which has nothing to compare with, ends where a
            label falls below half of its best instead.
        batch: Examples per step, at least 1.
        lr: Learning rate, above 0; None is 0.1 with SGD and 0.001 with Adam.
        optimizer: ``sgd`` or ``adam``; None is SGD for a net with BatchNorm, else Adam. The ascent takes SGD.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: L2 penalty, at least 0.
        pad: Random crop after padding by this many pixels; 0 switches it off.
        flip: Random horizontal flip (the authors: on); wrong for digits, text and traffic signs.
        cutout: Side in pixels of a square that is set to 0 (the authors: on); 0 switches it off.

    References:
        Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021, and its public code.
        The tie, the guard, the ceiling and the shuffling of the isolation are ours.
    """

    isolation: Floor = "lga-batch"
    gamma: float = 0.5
    isolation_epochs: int = 10
    until_floor: bool = True
    rate: float = 0.01
    epochs: int = 60
    schedule: Literal["constant", "cosine", "onecycle", "step"] = "step"
    unlearning: Literal["sequential", "joint"] = "sequential"
    max_tie: float | None = 0.65
    min_index: float = 2.5
    tries: int = 10
    unlearn_epochs: int = 20
    unlearn_lr: float = 5e-4
    unlearn_batch: int = 64
    unlearn_accuracy: float = 0.5
    raising: Raise = "log-odds"
    ceiling: float | None = None
    repair: bool = True
    statistics: Literal["train", "eval"] = "eval"
    held_out: float = 0.05
    max_drop: float = 0.02
    max_label_drop: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("isolation", self.isolation in ("lga", "lga-batch", "flooding"), "lga, lga-batch or flooding")
        self.require("schedule", self.schedule in ("constant", "cosine", "onecycle", "step"), "a known schedule")
        self.require("unlearning", self.unlearning in ("sequential", "joint"), "sequential or joint")
        self.require("statistics", self.statistics in ("train", "eval"), "train or eval")
        for name in ("isolation_epochs", "epochs", "unlearn_batch", "tries"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("raising", self.raising in ("log-odds", "loss"), "log-odds or loss")
        for name in ("gamma", "unlearn_epochs"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("ceiling", self.ceiling is None or self.ceiling >= 0, "at least 0, or None")
        self.require("max_tie", self.max_tie is None or self.max_tie > 0, "above 0, or None")
        self.require("min_index", self.min_index >= 0, "at least 0")
        self.require("rate", 0 < self.rate < 1, "in (0, 1)")
        self.require("unlearn_lr", self.unlearn_lr > 0, "above 0")
        self.require("held_out", 0 < self.held_out <= 0.25, "in (0, 0.25]")
        for name in ("unlearn_accuracy", "max_drop", "max_label_drop"):
            self.require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")

    def train(
        self,
        build: Callable[[], nn.Module],
        examples: ExampleSource,
        run: Run,
        folder: Path | None,
        clean: Clean | None,
    ) -> Trained:
        """See :class:`bezoar.core.training.Trainer`."""
        del clean
        count = isolated_count(self.rate, len(examples.labels))
        model = build().to(run.device)
        place = None if folder is None else folder / "losses.npy"
        curves = Curves(self.isolation_epochs + 1, len(examples.labels), place)
        done = self._isolate(model, examples, curves, run, folder)
        losses = curves.table[done].clone()
        order = losses.argsort(stable=True)
        isolated, rest = order[:count], order[count:].sort().values
        _note(examples.labels[isolated], run)
        genuine = rest[slow(losses[rest], examples.labels[rest], _GENUINE)]
        watched = drawn(examples.labels, genuine, self.held_out / _GENUINE, run.generator("abl", "held out"))
        parts = _Parts(
            isolated=Subset(examples, isolated),
            rest=Subset(examples, rest[~torch.isin(rest, watched)]),
            genuine=Subset(examples, genuine[~torch.isin(genuine, watched)]),
            guard=Guard(Subset(examples, watched), run, self.max_drop, self.max_label_drop),
        )
        self._train_on_rest(model, parts, run, folder)
        if self.unlearning == "sequential" and self.unlearn_epochs:
            isolated = self._forget(model, losses, isolated, parts, run, folder)
        return Trained(model.eval(), isolated, curves.table[: done + 1])

    def _forget(
        self, model: nn.Module, losses: Tensor, isolated: Tensor, parts: _Parts, run: Run, folder: Path | None
    ) -> Tensor:
        """Unlearn what can be unlearned; ``(S,)`` positions of what was, else of what is isolated."""
        examples = parts.isolated.examples
        groups = candidates(losses, examples.labels, isolated)
        if self.max_tie is not None:
            groups = self._loose(model, groups, parts, run)
        forgotten: list[Tensor] = []
        for attempt, rows in enumerate(groups[: self.tries]):
            if self._unlearn(model, replace(parts, isolated=Subset(examples, rows)), run, folder, attempt):
                forgotten.append(rows)
                if self.max_tie is None:
                    break
        run.notes["unlearned"] = bool(forgotten)
        if not forgotten:
            why = "could be made to lose its label without harm to what looks genuine" if groups else "stands apart"
            run.warnings.append(_NOTHING.format(reason=f"nothing that was learned fast {why}"))
            return isolated
        found = torch.cat(forgotten)
        _note(examples.labels[found], run)
        return found

    def _loose(self, model: nn.Module, groups: list[Tensor], parts: _Parts, run: Run) -> list[Tensor]:
        """The groups of a single label that are hardly tied to its slow half, the least tied first."""
        assert self.max_tie is not None
        examples, slowest = parts.isolated.examples, parts.genuine.rows
        ties: list[tuple[float, int, Tensor]] = []
        for done, rows in enumerate(groups, start=1):
            label = int(examples.labels[rows[0]])
            if not bool((examples.labels[rows] == label).all()):
                continue
            others = slowest[examples.labels[slowest] == label][:_COMPARED]
            group, slow_half = (given_their_label(model, examples, some, run) for some in (rows, others))
            ties.append((tie(model, group, slow_half, run), label, rows))
            run.progress.report("compare", done, len(groups), "")
        ties.sort(key=lambda one: one[:2])
        run.notes["ties"] = {str(label): round(value, 3) for value, label, _ in ties[:10] if isfinite(value)}
        loose = hardly_tied([value for value, _, _ in ties], self.max_tie, self.min_index)
        return [rows for (_, _, rows), wanted in zip(ties, loose, strict=True) if wanted]

    def _isolate(self, model: nn.Module, examples: ExampleSource, curves: Curves, run: Run, folder: Path | None) -> int:
        return isolate(
            model,
            examples,
            self.recipe(model, epochs=self.isolation_epochs, schedule="constant"),
            curves,
            run,
            how=self.isolation,
            gamma=self.gamma,
            until_floor=self.until_floor,
            checkpoint=kept(folder, "isolate"),
        )

    def _train_on_rest(self, model: nn.Module, parts: _Parts, run: Run, folder: Path | None) -> None:
        joint = None
        if self.unlearning == "joint":
            joint = Joint(parts.isolated, ceiling=self._ceiling(parts), how=self.raising, guard=parts.guard)
        settings = {"epochs": self.epochs, "schedule": self.schedule, "milestones": (2 / 3,)}
        fit(
            model,
            parts.rest,
            parts.rest.labels,
            self.recipe(model, **settings, **self.augmentation()),
            seed=run.seed + 1,
            objective=joint,
            progress=tell(run, "train on the rest"),
            checkpoint=kept(folder, "rest"),
        )
        if joint is not None and not joint.rising:
            run.warnings.append("The joint ascent ended early, since a label was lost to it")

    def _unlearn(self, model: nn.Module, parts: _Parts, run: Run, folder: Path | None, attempt: int = 0) -> bool:
        """Raise the loss of the isolated examples; the weights that forget most without harm are taken.

        Returns:
            Whether they could be forgotten without harm; else the model is as before.
        """
        parts.guard.start(model)
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        unlearning = Unlearning(
            parts.isolated,
            parts.genuine if self.repair else None,
            batch=self.batch,
            fixed=self.statistics == "eval",
            ceiling=self._ceiling(parts),
            how=self.raising,
            guard=parts.guard,
        )
        batch = max(2, min(self.unlearn_batch, len(parts.isolated.rows) // _STEPS))
        settings = {"epochs": self.unlearn_epochs, "batch": batch, "lr": self.unlearn_lr}
        fit(
            model,
            parts.isolated,
            parts.isolated.labels,
            self.recipe(model, **settings, optimizer="sgd", schedule="constant"),
            seed=run.seed + 2 + attempt,
            objective=unlearning,
            progress=tell(run, "unlearn"),
            checkpoint=kept(folder, f"unlearn-{attempt}"),
        )
        unlearning.epoch(model, self.unlearn_epochs, self.unlearn_epochs)
        left, forgotten = unlearning.best["left"], unlearning.best["left"] <= self.unlearn_accuracy
        model.load_state_dict(unlearning.best["weights"] if forgotten else before)
        run.notes["unlearned"], run.notes["isolated_accuracy"] = bool(forgotten), round(left, 4)
        return bool(forgotten)

    def _ceiling(self, parts: _Parts) -> float:
        return log(parts.rest.num_classes) if self.ceiling is None else self.ceiling


@dataclass(frozen=True)
class _Parts:
    """The examples, divided: to forget, to train on, the slow half of these, and what is only watched."""

    isolated: Subset
    rest: Subset
    genuine: Subset
    guard: Guard


def candidates(losses: Tensor, labels: Tensor, isolated: Tensor) -> list[Tensor]:
    """Groups of examples to unlearn: those isolated, then as many of the lowest losses of each label.

    Of a label it is at most half; the labels come in the order of their mean lowest losses, without a group that is the
    isolated one again.

    Args:
        losses: ``(N,)`` loss of each example.
        labels: ``(N,)`` labels.
        isolated: ``(S,)`` positions.
    """
    groups = []
    for label in torch.unique(labels).tolist():
        mine = (labels == label).nonzero().flatten()
        rows = mine[losses[mine].argsort(stable=True)][: min(len(isolated), len(mine) // 2)]
        if len(rows) and not torch.equal(rows, isolated):
            groups.append(rows)
    groups.sort(key=lambda rows: float(losses[rows].mean()))
    return [isolated, *groups]


def hardly_tied(ties: list[float], max_tie: float, min_index: float) -> list[bool]:
    """Which of the labels' ties are low enough for an ascent, see :class:`ABL`; infinite ones are not."""
    finite = [value for value in ties if isfinite(value)]
    if not finite:
        return [False] * len(ties)
    most = max_tie * max(_USUAL_TIE, median(finite))
    index = anomaly_index(ties, finite) if len(finite) >= _FEW_LABELS else [min_index] * len(ties)
    return [value < most and apart >= min_index for value, apart in zip(ties, index, strict=True)]


def drawn(labels: Tensor, rows: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the positions ``rows`` of each label, at least one and not all, ascending."""
    found = []
    for label in torch.unique(labels[rows]).tolist():
        mine = rows[labels[rows] == label]
        count = min(max(1, round(share * len(mine))), len(mine) - 1)
        found.append(mine[torch.randperm(len(mine), generator=generator)[:count]])
    return torch.cat(found).sort().values


def _note(labels: Tensor, run: Run) -> None:
    counts = torch.bincount(labels)
    run.notes["isolated"] = len(labels)
    run.notes["isolated_label"] = int(counts.argmax())
    run.notes["isolated_share"] = round(float(counts.max() / counts.sum()), 4)
