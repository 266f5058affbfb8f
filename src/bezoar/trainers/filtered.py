"""Training, a filter that looks at the data through what was trained, and training again on what it leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bezoar.core.errors import DataError
from bezoar.core.examples import Examples, ExampleSource, Subset
from bezoar.core.fields import fields_from
from bezoar.core.filtering import Filter, Suspicion, taken_out
from bezoar.core.method import Clean, own_randomness
from bezoar.core.registry import find
from bezoar.core.run import Run
from bezoar.core.training import Trained
from bezoar.trainers._training import correct
from bezoar.trainers.plain import Plain


@dataclass(frozen=True, kw_only=True)
class Filtered(Plain):
    """Train, take out what a filter finds suspect, and train again from scratch on the rest.

    The first training is that of ``plain`` without augmentation, since crops can cut a patch in a corner off: so its
    model has learned the poison, if there is any, and the filter sees the examples as that model does. By default there
    are two: SCAn, which takes out nothing where it flags no label, and the distance from clean examples, which takes
    one or two of a hundred out of any set. The second training is that of ``plain`` on what is left: it begins from the
    same first weights and never sees the suspects. It is left out where it would be the first one again: nothing taken
    out, and nothing augmented.

    It costs twice the time of plain training, and the default filter wants a few clean examples (some 25 of each label
    are comfortable). In return it finds poison that is learned no faster than a class, which ABL misses: blended
    pictures, and clean labels.

    Args:
        filter: A filter by name. ``union`` is ``scan`` and ``clean-distance``, which sees rare poison too. ``scan`` and
            ``beatrix`` need clean examples and take nothing out where they flag no label; ``spectral-signatures`` and
            ``spectre`` need none, and take a share out of any set; ``activation-clustering`` needs none, and misses
            poison that is not the smaller part of its label.
        options: Settings of the filter, each ``key=value``, such as ``threshold=5``.
        augment_first: Whether the first training augments too. It is then the answer where nothing is taken out, which
            saves the second one; but a trigger near the border may not be learned, and not be seen.
        max_share: It warns where more than this share of the examples of a label is taken out, in [0, 1].
        max_drop: It warns where the second model gives fewer of the clean examples their label than the first one, by
            more than this, in [0, 1].
        epochs: Passes over the data in each of the two trainings, at least 1.
        schedule: How the learning rate changes, see :class:`bezoar.ops.recipe.Recipe`.
        batch: Examples per step, at least 1.
        lr: Peak learning rate, above 0; None is 0.1 with SGD and 0.001 with Adam.
        optimizer: ``sgd`` or ``adam``; None is SGD for a net with BatchNorm, else Adam.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: L2 penalty, at least 0.
        pad: Random crop after padding by this many pixels; 0 switches it off.
        flip: Random horizontal flip; wrong for digits, text and traffic signs.
        cutout: Side in pixels of a square that is set to 0; 0 switches it off.

    References:
        Tran et al., "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, for training, filtering and training
        again.
        Tang et al., "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection",
        USENIX Security 2021, for SCAn. That it is joined with another filter is ours.
    """

    filter: str = "union"
    options: tuple[str, ...] = ()
    augment_first: bool = False
    max_share: float = 0.75
    max_drop: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_share", "max_drop"):
            self.require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._filter()

    @property
    def needs_clean(self) -> bool:
        """Whether the filter needs clean examples."""
        return self._filter().needs_clean

    def _filter(self) -> Filter:
        kind = find("filters", self.filter)
        made: Filter = kind(**fields_from(kind, self.filter, "options", self.options))
        return made

    def train(
        self,
        build: Callable[[], nn.Module],
        examples: ExampleSource,
        run: Run,
        folder: Path | None,
        clean: Clean | None,
    ) -> Trained:
        """See :class:`bezoar.core.training.Trainer`; the suspects are those that the filter took out."""
        first = self.learned(build, examples, run, folder, "train", augmented=self.augment_first)
        with _progress_in(run, None if folder is None else folder / "filter"):
            found = self._filter()(first, examples, run, clean)
        out = taken_out(found, examples.labels)
        suspects = ordered(found.score, out)
        run.notes |= {"filter": self.filter, "flagged": _plain(found.flagged), "taken_out": len(suspects)}
        if not len(suspects) and (self.augment_first or not any(self.augmentation().values())):
            return Trained(first, suspicion=found)
        self._warn(found, out, examples, run, clean)
        rest = (~out).nonzero().flatten()
        if not len(rest):
            raise DataError(
                f"{self.filter} finds all {len(out)} examples suspect, so nothing is left to train on",
                "Look at them with bezoar filter data, or use another filter: --set filter=NAME",
            )
        # The folder is that of these examples: another selection is another training, and no damage to this one.
        place = None if folder is None else folder / f"rest-{hashlib.sha256(rest.numpy().tobytes()).hexdigest()[:16]}"
        with own_randomness(run):  # so that the first weights are those of the first training
            kept = Subset(examples, rest) if len(suspects) else examples
            second = self.learned(build, kept, run, place, "retrain")
        if clean is not None and len(clean.x):
            self._compare(first, second, clean, run)
        return Trained(second, suspects, suspicion=found)

    def _warn(self, found: Suspicion, out: Tensor, examples: ExampleSource, run: Run, clean: Clean | None) -> None:
        if not found.decides and not found.flagged and bool(out.any()):
            run.warnings.append(
                f"{self.filter} takes examples out of a clean set too, so what it took out is no sign of poison: look "
                "at the pictures"
            )
        counts = torch.bincount(examples.labels, minlength=examples.num_classes).tolist()
        gone = torch.bincount(examples.labels[out], minlength=examples.num_classes).tolist()
        for label, (lost, count) in enumerate(zip(gone, counts, strict=True)):
            if lost > self.max_share * count:
                run.warnings.append(
                    f"{lost} of the {count} examples of label {label} were taken out, more than {self.max_share:.0%}: "
                    "look at them, and see that enough genuine ones are left"
                )
            if lost and self.needs_clean and clean is not None and not bool((clean.y == label).any()):
                run.warnings.append(
                    f"there is no clean example of label {label}, so which of its examples are poisoned is a guess: "
                    "give some"
                )

    def _compare(self, first: nn.Module, second: nn.Module, clean: Clean, run: Run) -> None:
        """Neither model was trained on the clean examples, so they tell what the second training cost."""
        known = Examples(clean.x, clean.y, clean.num_classes)
        before, after = (float(correct(model, known, run).double().mean()) for model in (first, second))
        run.notes["clean_accuracy"] = [round(before, 4), round(after, 4)]
        if before - after > self.max_drop:
            run.warnings.append(
                f"without the suspects, accuracy on the clean examples is {after:.1%} instead of {before:.1%}: some "
                "that were taken out may be genuine"
            )


def ordered(score: Tensor, chosen: Tensor) -> Tensor:
    """Positions of the chosen examples, highest score first, equal ones in their order."""
    rows = chosen.nonzero().flatten()
    return rows[score[rows].sort(descending=True, stable=True).indices]


def _plain(flagged: tuple[int, ...] | None) -> list[int] | None:
    return None if flagged is None else list(flagged)


@contextmanager
def _progress_in(run: Run, folder: Path | None) -> Iterator[None]:
    before, run.progress.folder = run.progress.folder, folder
    try:
        yield
    finally:
        run.progress.folder = before
