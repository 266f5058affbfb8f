"""The Mahalanobis distance of each example's features from those of clean examples of its label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.errors import DataError
from bezoar.core.examples import Examples, ExampleSource
from bezoar.core.filtering import Filter, Suspicion
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.filters._classes import FOLDS, by_label, held_out_limit, over_represented
from bezoar.ops.features import read_features
from bezoar.ops.mahalanobis import gaussians

_PART = 4096


@dataclass(frozen=True, kw_only=True)
class CleanDistance(Filter):
    """Take out the examples whose features are unlike those of the clean examples of their label.

    A model that has learned the poison gives it the label that the attacker wrote down, but hardly for what the genuine
    examples of this label show. The score is the Mahalanobis distance between what goes into the last layer and its
    mean over the clean examples of the label, with one covariance for all labels, divided by the threshold: the
    distance that a share ``false_alarms`` of the clean examples exceed, each held against the others.

    It sees poison that is rare or belongs to one source class, as its rule wants no crowd. The filter does not say
    whether there is poison: of a clean set it takes out what is unlike the clean examples, among it wrong labels and
    rare views. Training examples lie nearer than those that were never seen, so that is less than ``false_alarms``.

    Args:
        false_alarms: Share of the clean examples that may exceed the threshold, in (0, 1).
        shrinkage: Share of the mean variance that is added to the variance in every direction, above 0.

    References:
        Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
        NeurIPS 2018, section 2.1, at the last layer, with the label of the example. That, the threshold and the
        shrinkage are ours.
    """

    needs_clean = True

    false_alarms: float = 0.02
    shrinkage: float = 0.1

    def __post_init__(self) -> None:
        self.require("false_alarms", 0 < self.false_alarms < 1, "in (0, 1)")
        self.require("shrinkage", self.shrinkage > 0, "above 0")

    def filter(self, model: nn.Module, examples: ExampleSource, run: Run, clean: Clean | None) -> Suspicion:
        """See :class:`bezoar.core.filtering.Filter`.

        Raises:
            DataError: There are fewer than 2 clean examples.
        """
        assert clean is not None
        if len(clean.x) < 2:
            raise DataError(f"the filter needs at least 2 clean examples, got {len(clean.x)}", "Give more")
        known = read_features(model, Examples(clean.x, clean.y, clean.num_classes), run).double()
        features = read_features(model, examples, run, folder=run.progress.folder)
        limit = self.limit(known, clean.y, clean.num_classes)
        usual = gaussians(known, clean.y, clean.num_classes, self.shrinkage)
        score = torch.zeros(len(features), dtype=torch.float64)
        unknown = []
        for label, rows in by_label(examples.labels, examples.num_classes, run, least=1):
            if not bool((clean.y == label).any()):
                unknown.append(label)
                continue
            for part in torch.split(rows, _PART):
                score[part] = usual.distance(features[part].double(), examples.labels[part]) / limit
        if unknown:
            run.warnings.append(f"labels without a clean example were not looked at: {unknown[:10]}")
        suspect = score > 1
        return Suspicion(
            score,
            suspect,
            f"distances that {self.false_alarms:.0%} of the clean examples exceed",
            over_represented(suspect, examples.labels, examples.num_classes),
        )

    def limit(self, features: Tensor, labels: Tensor, classes: int) -> float:
        """The distance that a share ``false_alarms`` of clean examples exceeds, each part held against the others.

        Args:
            features: ``(N, D)``, N at least 2.
            labels: ``(N,)``.
            classes: How many labels there are.
        """
        order = torch.sort(labels, stable=True).indices  # each part holds as many of each label
        parts = [order[first::FOLDS] for first in range(min(FOLDS, len(order)))]

        def distances(part: Tensor, others: Tensor) -> Tensor:
            fitted = gaussians(features[others], labels[others], classes, self.shrinkage)
            return fitted.distance(features[part], labels[part])

        return max(held_out_limit(parts, len(order), distances, self.false_alarms), 1e-12)
