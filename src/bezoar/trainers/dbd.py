"""DBD: features without any label, and labels only of the examples that these features agree with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bezoar.core.errors import DataError
from bezoar.core.examples import ExampleSource
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.training import Trained
from bezoar.ops.fit import fit, tell
from bezoar.ops.isolation import lowest, whole_part
from bezoar.ops.losses import losses_of
from bezoar.ops.normalisation import optimizer_from_scratch
from bezoar.ops.recipe import Recipe
from bezoar.trainers._mixmatch import MixMatch
from bezoar.trainers._training import Settings, kept
from bezoar.trainers._two_stage import (
    Contrast,
    OnTheHead,
    learn_features,
    learn_head,
    symmetric_cross_entropy,
)

#: Fewest epochs of features below which a warning says so: a tenth of the authors'.
_FEW = 100


@dataclass(frozen=True, kw_only=True)
class DBD(Settings):
    """Decouple the training: features without labels, then the last layer, then all of it with the credible labels.

    Where labels play no part, an image with a trigger comes to lie among those of its true class (SimCLR). A last layer
    that is trained on these features, with symmetric cross-entropy, then has a high loss on poison. The half of the
    examples with the lower loss keeps its labels, the other half loses them, and the whole network is trained on both
    (MixMatch).

    It isolates no example: half of the genuine ones lose their label too. It costs many times a plain training, and the
    features need many epochs; with few of them the accuracy is far below that of plain training. Poison with clean
    labels lies in its true class from the start, so its label stays.

    Args:
        epochs: Epochs of features, at least 1.
        temperature: Of the contrastive loss, above 0.
        head_epochs: Epochs of the last layer alone, at least 1.
        head_lr: Its learning rate with Adam, and that of the last stage, above 0.
        cross_entropy: Weight of the cross-entropy in the symmetric one, at least 0.
        reverse: Weight of the reverse cross-entropy in it, above 0.
        credible: Share of the examples, of the lowest loss, that keeps its labels, in (0, 1).
        divided: Whether they are chosen anew before each ``epoch`` of the last stage, as the public code does, or
            ``once``, as the paper has it.
        semi_epochs: Epochs of the last stage, at least 1. The authors have 190 of 1,024 steps, with 64 examples that
            keep their labels and 64 others in each: 500 passes over 50,000 examples.
        sharpening: Temperature of the guesses, above 0.
        mix: Alpha of the Beta distribution of the mixtures, above 0.
        guess_weight: Weight of the guesses at the end of the last stage, at least 0; it rises linearly.
        semi_batch: Examples per step of the last layer and of the last stage, at least 2.
        batch: Examples per step of the features, at least 1.
        lr: Peak learning rate of the features, above 0; None is 0.4 with SGD and 0.001 with Adam; it falls with the
            cosine.
        optimizer: Of the features: ``sgd`` or ``adam``; None is SGD for a net with BatchNorm, else Adam.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: L2 penalty of the features, at least 0.
        pad: Random crop for the last two stages after padding by this many pixels; 0 switches it off.
        flip: Random horizontal flip of views and crops (the authors: on); wrong for digits, text and traffic signs.
        cutout: Side in pixels of a square that is set to 0 in crops; 0 switches it off.

    References:
        Huang et al., "Backdoor Defense via Decoupling the Training Process", ICLR 2022, and its public code. There the
        views are blurred and shift the hue too, and only the first view of each image is compared with all.
        Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020. Wang et al.,
        "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019. Berthelot et al., "MixMatch: A
        Holistic Approach to Semi-Supervised Learning", NeurIPS 2019.
    """

    epochs: int = 1000
    temperature: float = 0.5
    head_epochs: int = 10
    head_lr: float = 0.002
    cross_entropy: float = 0.1
    reverse: float = 1.0
    credible: float = 0.5
    divided: Literal["epoch", "once"] = "epoch"
    semi_epochs: int = 500
    sharpening: float = 0.5
    mix: float = 0.75
    guess_weight: float = 15.0
    semi_batch: int = 128
    batch: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "head_epochs", "semi_epochs"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("temperature", "head_lr", "reverse", "sharpening", "mix"):
            self.require(name, getattr(self, name) > 0, "above 0")
        for name in ("cross_entropy", "guess_weight"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("credible", 0 < self.credible < 1, "in (0, 1)")
        self.require("divided", self.divided in ("epoch", "once"), "epoch or once")
        self.require("semi_batch", self.semi_batch >= 2, "at least 2")

    def train(
        self,
        build: Callable[[], nn.Module],
        examples: ExampleSource,
        run: Run,
        folder: Path | None,
        clean: Clean | None,
    ) -> Trained:
        """See :class:`bezoar.core.training.Trainer`; no example is isolated."""
        del clean
        if not whole_part(self.credible, len(examples.labels)):
            raise DataError(f"{len(examples.labels)} examples are too few to divide", "Give more, or raise credible")
        if self.epochs < _FEW:
            run.warnings.append(f"{self.epochs} epochs of features are few (the authors: 1,000): accuracy will suffer")
        model = build().to(run.device)
        features = self._features(model)
        learn_features(model, examples, features, Contrast(self.temperature, self.flip), run, kept(folder, "features"))
        alpha, beta = self.cross_entropy, self.reverse

        def symmetric(logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
            del index
            return symmetric_cross_entropy(logits, y, alpha, beta).mean()

        head = OnTheHead(symmetric)
        learn_head(model, examples, self._last(self.head_epochs), head, run, kept(folder, "head"))
        mixing = MixMatch(
            lambda model: self._credible(model, examples, run),
            examples.num_classes,
            every=self.divided == "epoch",
            temperature=self.sharpening,
            mix=self.mix,
            weight=self.guess_weight,
        )
        fit(
            model,
            examples,
            examples.labels,
            self._last(self.semi_epochs),
            seed=run.seed + 2,
            objective=mixing,
            progress=tell(run, "all of it"),
            checkpoint=kept(folder, "semi"),
        )
        unlabelled = torch.bincount(examples.labels[~mixing.labelled], minlength=examples.num_classes)
        run.notes["without_label"] = {str(label): int(count) for label, count in enumerate(unlabelled[:100])}
        return Trained(model.eval())

    def _features(self, model: nn.Module) -> Recipe:
        optimizer = self.optimizer or optimizer_from_scratch(model)[0]
        return self.recipe(
            model, epochs=self.epochs, schedule="cosine", lr=self.lr or (0.4 if optimizer == "sgd" else 1e-3)
        )

    def _last(self, epochs: int) -> Recipe:
        return Recipe(
            epochs=epochs,
            batch=self.semi_batch,
            lr=self.head_lr,
            optimizer="adam",
            weight_decay=0.0,
            schedule="constant",
            **self.augmentation(),
        )

    def _credible(self, model: nn.Module, examples: ExampleSource, run: Run) -> Tensor:
        """``(N,)`` bool: the share of the lowest symmetric cross-entropy, without augmentation."""
        symmetric = partial(symmetric_cross_entropy, alpha=self.cross_entropy, beta=self.reverse)
        losses = losses_of(model, examples, run, loss=symmetric)
        return lowest(losses, whole_part(self.credible, len(losses)))
