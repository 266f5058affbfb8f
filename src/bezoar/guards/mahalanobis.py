"""The Mahalanobis distance of an input's features from those of clean images that get the same label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.guarding import Guard, See, seer
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.guards._features import read
from bezoar.ops.head import find_head
from bezoar.ops.mahalanobis import Gaussians, gaussians


@dataclass(frozen=True, kw_only=True)
class Mahalanobis(Guard):
    """Flag an input whose features are unlike those of the clean images that the model gives the same label.

    A trigger moves an image across to its label, but hardly ever to where the genuine images of the label lie. The
    score is the Mahalanobis distance, squared and divided by the number of features, between what goes into the
    last layer and its mean over the clean images of the label that the model answers; the covariance is shared by all
    labels. It costs no further answer of the model, wants no trigger and no scan, and holds for triggers of any kind.
    Whatever else is unlike the clean images, such as another camera or another kind of object, is flagged as well.

    Args:
        shrinkage: Share of the mean variance that is added to the variance in every direction, above 0: with few clean
            images most directions are hardly known.

    References:
        Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
        NeurIPS 2018, section 2.1, at the last layer, with the label that the model answers instead of the nearest one.
        The shrinkage is ours.
    """

    shrinkage: float = 0.1

    def __post_init__(self) -> None:
        self.require("shrinkage", self.shrinkage > 0, "above 0")

    def fit(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> dict[str, Tensor]:
        """See :class:`bezoar.core.guarding.Guard`."""
        del triggers
        answers, features = read(seer(model, self.reads(model, clean.x[:1].to(run.device))), clean.x, run)
        if not torch.isfinite(features).all():
            raise UnsupportedModel("the model has features that are not finite", "Check the weights and the images")
        labels = answers.argmax(1)
        unseen = (torch.bincount(labels, minlength=answers.shape[1]) == 0).nonzero().flatten().tolist()
        if unseen:
            run.warnings.append(
                f"no clean image gets a label of these {len(unseen)}: {unseen[:10]}; there the distance is that to the "
                "mean of all images"
            )
        found = gaussians(features, labels, answers.shape[1], self.shrinkage)
        return {name: value.float() for name, value in vars(found).items()}

    def look(self, see: See, state: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`bezoar.core.guarding.Guard`."""
        answers, features = see(x)
        return answers, Gaussians(**state).distance(features, answers.argmax(1))

    def reads(self, model: nn.Module, x: Tensor) -> nn.Module | None:
        """See :class:`bezoar.core.guarding.Guard`."""
        return find_head(model, x)
