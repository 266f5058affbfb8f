"""Spectral signatures: poisoned examples stand out along the direction in which their label varies most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource
from bezoar.core.filtering import Filter, Suspicion
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.filters._classes import by_label, principal
from bezoar.ops.features import read_features


@dataclass(frozen=True, kw_only=True)
class SpectralSignatures(Filter):
    """Take out, of each label, the examples that lie farthest along its direction of largest variance.

    The score is the squared projection of the centred features, as in the paper. All labels share one feature space,
    so the scores of different labels are compared as they are. The rule takes the same share out of every label, also
    of a clean one: it does not say whether a set is poisoned.

    Args:
        epsilon: Largest share of a label's examples that may be poisoned, in (0, 2/3).
        margin: This many times that share is taken out, at least 1 (the paper: 1.5).

    References:
        Tran, Li and Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018. The 15 % that the defaults take out
        are those of the public code.
    """

    epsilon: float = 0.1
    margin: float = 1.5

    def __post_init__(self) -> None:
        self.require("epsilon", 0 < self.epsilon < 2 / 3, "in (0, 2/3)")
        self.require(
            "margin", self.margin >= 1 and self.margin * self.epsilon <= 1, "at least 1, and 1/epsilon at most"
        )

    def filter(self, model: nn.Module, examples: ExampleSource, run: Run, clean: Clean | None) -> Suspicion:
        """See :class:`bezoar.core.filtering.Filter`; the clean examples are not used."""
        del clean
        features = read_features(model, examples, run, folder=run.progress.folder)
        score = torch.zeros(len(features), dtype=torch.float64)
        suspect = torch.zeros(len(features), dtype=torch.bool)
        statistic = {}
        for label, rows in by_label(examples.labels, examples.num_classes, run, least=2):
            score[rows] = spectral_scores(features[rows])
            suspect[rows[largest(score[rows], self.margin * self.epsilon)]] = True
            statistic[label] = float(score[rows].mean())
        rule = f"of each label, the {self.margin * self.epsilon:.0%} with the largest squared projection"
        return Suspicion(score, suspect, rule, statistic)


def spectral_scores(features: Tensor) -> Tensor:
    """``(n,)`` squared projections of ``(n, D)`` features on their direction of largest variance; 0 without any."""
    centred = features.double() - features.double().mean(0)
    directions, _ = principal(centred, 1)
    return ((centred @ directions) ** 2).sum(1)


def largest(score: Tensor, share: float) -> Tensor:
    """Positions of the ``share`` of largest scores, rounded down; those that tie come in their order."""
    # The small term keeps 0.15 * 100 from being 14.
    count = int(share * len(score) + 1e-9)
    return torch.sort(score, descending=True, stable=True).indices[:count]
