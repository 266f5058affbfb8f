"""D-ST: tell poison by how its features move under transformations, and do not learn features from its labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import DataError
from bezoar.core.examples import ExampleSource, Subset
from bezoar.core.filtering import Suspicion
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.training import Trained
from bezoar.ops.consistency import consistency
from bezoar.ops.contrastive import head_input
from bezoar.ops.fit import fit, tell
from bezoar.ops.head import find_head
from bezoar.ops.isolation import whole_part
from bezoar.ops.normalisation import optimizer_from_scratch
from bezoar.ops.objective import Batch, Stateless
from bezoar.ops.recipe import Recipe
from bezoar.trainers._training import Settings, kept
from bezoar.trainers._two_stage import Contrast, OnTheHead, learn_features, learn_head

#: Fewest epochs of features below which a warning says so: a tenth of the authors'.
_FEW = 20


@dataclass(frozen=True, kw_only=True)
class DST(Settings):
    """Distinguish poison by its sensitivity to transformations, and train in two stages that do not trust its labels.

    A network is trained for a moment without augmentation, and then on a loss that turns the means of the labels away
    from each other. The examples whose features move furthest when they are turned and shifted are taken for poison,
    those that move least for clean, and the rest is uncertain. Then a fresh network learns features from views of all
    examples, where the labels of those taken for clean say what belongs together besides; and last its head is trained
    on these, while the loss on those taken for poison is raised a little.

    The poison is told apart only where a transformation takes the trigger away and leaves the class: not with triggers
    that survive turns and shifts, nor with clean labels; and of classes that mean something else when they are turned
    (digits, traffic signs) the clean ones move as well. The model learns labels from the share that is taken for clean
    alone, so expect a lower accuracy, the more so with few epochs.

    Args:
        first_epochs: Epochs without augmentation that the poison is learned in, at least 1.
        apart_epochs: Epochs of the loss between the means of the labels, at least 0.
        first_lr: Learning rate of both, above 0; with SGD, whatever the network.
        degrees: An example is turned by up to this many degrees either way, in [0, 180].
        shift: Then it is shifted by up to this share of its height and width either way, in [0, 1].
        repeats: Draws of the transformation, at least 1; the public code takes 1.
        clean_share: Share of the examples that is taken for clean, in (0, 1).
        poison_share: Share that is taken for poison, in (0, 1); both together at most 1.
        epochs: Epochs of features, at least 1.
        temperature: Of the contrastive loss, above 0.
        head_epochs: Epochs of the last layer, at least 1.
        head_lr: Its learning rate with Adam, above 0. The authors take SGD at 5, which fits the size of their features
            alone.
        unlearning: Weight of the loss that is raised on what is taken for poison, at least 0.
        batch: Examples per step of features and last layer, at least 1.
        lr: Peak learning rate of the features, above 0; None is 0.5 with SGD and 0.001 with Adam. It rises over the
            first fifth (the authors: ten epochs) and falls with the cosine.
        optimizer: Of the features: ``sgd`` or ``adam``; None is SGD for a net with BatchNorm, else Adam.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: L2 penalty of the features, at least 0.
        pad: Random crop for the last layer after padding by this many pixels; 0 switches it off.
        flip: Random horizontal flip of views and crops (the authors: on); wrong for digits, text and traffic signs.
        cutout: Side in pixels of a square that is set to 0 in crops; 0 switches it off.

    References:
        Chen, Wu and Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS 2022,
        and its public code. There a clean example also belongs together with poison of its label, which is left out
        here; the last layer takes views instead of crops; and views shift the hue too.
        Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020.
    """

    first_epochs: int = 2
    apart_epochs: int = 10
    first_lr: float = 0.01
    degrees: float = 180.0
    shift: float = 0.2
    repeats: int = 1
    clean_share: float = 0.2
    poison_share: float = 0.05
    epochs: int = 200
    temperature: float = 0.1
    head_epochs: int = 10
    head_lr: float = 0.01
    unlearning: float = 0.001
    batch: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first_epochs", "repeats", "epochs", "head_epochs"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("apart_epochs", "unlearning"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("first_lr", "temperature", "head_lr"):
            self.require(name, getattr(self, name) > 0, "above 0")
        self.require("degrees", 0 <= self.degrees <= 180, "in [0, 180]")
        self.require("shift", 0 <= self.shift <= 1, "in [0, 1]")
        for name in ("clean_share", "poison_share"):
            self.require(name, 0 < getattr(self, name) < 1, "in (0, 1)")
        self.require("clean_share", self.clean_share + self.poison_share <= 1, "at most 1 with poison_share")

    def train(
        self,
        build: Callable[[], nn.Module],
        examples: ExampleSource,
        run: Run,
        folder: Path | None,
        clean: Clean | None,
    ) -> Trained:
        """See :class:`bezoar.core.training.Trainer`; the suspects are those taken for poison."""
        del clean
        moved = self._moved(build().to(run.device), examples, run, folder)
        order = moved.argsort(stable=True)
        least, most = (whole_part(share, len(order)) for share in (self.clean_share, self.poison_share))
        if not least or not most:
            raise DataError(f"{len(order)} examples are too few to divide", "Give more, or raise the shares")
        trusted, poison = (torch.zeros(len(order), dtype=torch.bool) for _ in range(2))
        trusted[order[:least]], poison[order[-most:]] = True, True
        self._note(trusted, poison, examples, run)
        model = build().to(run.device)
        contrast = Contrast(self.temperature, self.flip, trusted)
        learn_features(model, examples, self._features(model), contrast, run, kept(folder, "features"))
        self._classify(model, examples, trusted, poison, run, folder)
        rule = f"the {self.poison_share:.3g} of all examples whose features move furthest when turned and shifted"
        suspects = order.flip(0)[:most]
        return Trained(model.eval(), suspects, suspicion=Suspicion(moved, poison, rule))

    def _moved(self, model: nn.Module, examples: ExampleSource, run: Run, folder: Path | None) -> Tensor:
        """``(N,)`` how far the features of each example move."""
        recipe = {"batch": 128, "lr": self.first_lr, "weight_decay": 5e-4, "schedule": "constant"}
        for name, epochs, objective in (
            ("first", self.first_epochs, None),
            ("apart", self.apart_epochs, Apart()),
        ):
            if epochs:
                fit(
                    model,
                    examples,
                    examples.labels,
                    Recipe(epochs=epochs, **recipe),  # type: ignore[arg-type]
                    seed=run.seed,
                    objective=objective,
                    progress=tell(run, name),
                    checkpoint=kept(folder, name),
                )
        moved = consistency(model, examples, run, degrees=self.degrees, shift=self.shift, repeats=self.repeats)
        return torch.nan_to_num(moved, nan=0.0, posinf=float(torch.finfo(torch.float32).max))

    def _features(self, model: nn.Module) -> Recipe:
        optimizer = self.optimizer or optimizer_from_scratch(model)[0]
        return self.recipe(
            model, epochs=self.epochs, schedule="onecycle", lr=self.lr or (0.5 if optimizer == "sgd" else 1e-3)
        )

    def _classify(
        self, model: nn.Module, examples: ExampleSource, trusted: Tensor, poison: Tensor, run: Run, folder: Path | None
    ) -> None:
        """Train the last layer on those taken for clean and, the other way, on those taken for poison."""
        rows = (trusted | poison).nonzero().flatten()
        raised, weight = poison[rows], self.unlearning

        def mixed(logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
            bad = raised[index].to(y.device)
            return mixed_cross_entropy(logits, y, bad, weight)

        recipe = Recipe(
            epochs=self.head_epochs,
            batch=self.batch,
            lr=self.head_lr,
            optimizer="adam",
            weight_decay=0.0,
            schedule="cosine",
            **self.augmentation(),
        )
        learn_head(model, Subset(examples, rows), recipe, OnTheHead(mixed), run, kept(folder, "head"))

    def _note(self, trusted: Tensor, poison: Tensor, examples: ExampleSource, run: Run) -> None:
        counts = torch.bincount(examples.labels[trusted], minlength=examples.num_classes)
        run.notes |= {
            "taken_for_clean": int(trusted.sum()),
            "taken_for_poison": int(poison.sum()),
            "fewest_clean_of_a_label": int(counts.min()),
        }
        missing = [label for label in range(examples.num_classes) if not counts[label]]
        if missing:
            shown = ", ".join(map(str, missing[:5])) + (" and more" if len(missing) > 5 else "")
            run.warnings.append(
                f"no example of label {shown} is taken for clean, so it is not learned: raise clean_share"
            )
        if self.epochs < _FEW:
            run.warnings.append(f"{self.epochs} epochs of features are few (the authors: 200): accuracy will suffer")


class Apart(Stateless):
    """Mean cosine between the mean features of the labels of a batch; that of a mean with itself counts as 0."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`; nothing is augmented."""
        head = find_head(model, batch.x[:1])
        return between_means(head_input(model, head, batch.x), batch.y)


def between_means(features: Tensor, y: Tensor) -> Tensor:
    """See :class:`Apart`; ``(B, D)`` features and ``(B,)`` labels."""
    means = torch.stack([features[y == label].mean(0) for label in torch.unique(y)])
    means = F.normalize(means, dim=1)
    cosines = means @ means.T
    return (cosines - cosines.diag().diag()).mean()


def mixed_cross_entropy(logits: Tensor, y: Tensor, poison: Tensor, weight: float) -> Tensor:
    """Cross-entropy of what is taken for clean, minus ``weight`` times that of what is taken for poison ``(B,)``."""
    losses = F.cross_entropy(logits, y, reduction="none")
    clean = losses[~poison].mean() if bool((~poison).any()) else losses.sum() * 0
    return clean - weight * losses[poison].mean() if bool(poison.any()) else clean
