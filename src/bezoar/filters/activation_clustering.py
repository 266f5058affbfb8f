"""Activation clustering: the examples of a poisoned label fall into two groups, and the small one is the poison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource
from bezoar.core.filtering import Filter, Suspicion
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.filters._classes import Split, by_label, principal, two_means
from bezoar.ops.features import read_features


@dataclass(frozen=True, kw_only=True)
class ActivationClustering(Filter):
    """Cut the features of each label in two with 2-means; a small group that stands well apart is poisoned.

    Independent components are the whitened principal components but for a rotation, and 2-means does not see rotations;
    so ``ica`` whitens and leaves the rotation out. 2-means starts from cuts across the principal directions, not at
    random. Of a label's examples the score is how much nearer they are to the mean of the smaller group, in [-1, 1],
    times the silhouette of the label. Retraining without the group (the paper's exclusionary reclassification) is left
    to the user.

    Args:
        dims: Components kept, at least 1.
        reduce: ``pca``, the default of the authors' code, gives each component the weight of its variance; ``ica`` (the
            paper) gives all the same, and noise that of signal.
        rule: ``size`` (a group of less than ``smallest`` is poisoned), ``silhouette`` (the smaller group is poisoned
            where the groups stand apart), or ``both``.
        smallest: Share of a label below which its smaller group is suspicious, in (0, 0.5].
        silhouette: Mean silhouette above which the groups stand apart, in [-1, 1] (the paper: 0.10 to 0.15).
        most: Examples of a label that the silhouette is taken from, at least 2.

    References:
        Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", SafeAI at AAAI 2019,
        https://arxiv.org/abs/1811.03728. The bound of 35 % is that of the authors' code in the Adversarial Robustness
        Toolbox.
    """

    dims: int = 10
    reduce: Literal["ica", "pca"] = "pca"
    rule: Literal["size", "silhouette", "both"] = "both"
    smallest: float = 0.35
    silhouette: float = 0.1
    most: int = 2000

    def __post_init__(self) -> None:
        self.require("dims", self.dims >= 1, "at least 1")
        self.require("reduce", self.reduce in ("ica", "pca"), "ica or pca")
        self.require("rule", self.rule in ("size", "silhouette", "both"), "size, silhouette or both")
        self.require("smallest", 0 < self.smallest <= 0.5, "in (0, 0.5]")
        self.require("silhouette", -1 <= self.silhouette <= 1, "in [-1, 1]")
        self.require("most", self.most >= 2, "at least 2")

    def filter(self, model: nn.Module, examples: ExampleSource, run: Run, clean: Clean | None) -> Suspicion:
        """See :class:`bezoar.core.filtering.Filter`; the clean examples are not used."""
        del clean
        features = read_features(model, examples, run, folder=run.progress.folder)
        score = torch.zeros(len(features), dtype=torch.float64)
        suspect = torch.zeros(len(features), dtype=torch.bool)
        statistic, flagged = {}, []
        for label, rows in by_label(examples.labels, examples.num_classes, run, least=3):
            reduced = self.reduced(features[rows])
            split = two_means(reduced)
            if split is None:
                statistic[label] = 0.0
                continue
            apart = self._silhouette(reduced, split, run.generator("activation clustering", label))
            statistic[label] = apart
            score[rows] = max(apart, 0.0) * margin(reduced, split)
            if self._poisoned(float(split.second.double().mean()), apart):
                flagged.append(label)
                suspect[rows[split.second]] = True
        return Suspicion(score, suspect, self._words(), statistic, tuple(flagged))

    def reduced(self, features: Tensor) -> Tensor:
        """``(n, k)`` components of ``(n, D)`` features."""
        centred = features.double() - features.double().mean(0)
        directions, variances = principal(centred, self.dims)
        found = centred @ directions
        return found / variances.sqrt() if self.reduce == "ica" else found

    def _silhouette(self, reduced: Tensor, split: Split, generator: torch.Generator) -> float:
        chosen = torch.arange(len(reduced))
        if len(reduced) > self.most:
            chosen = torch.randperm(len(reduced), generator=generator)[: self.most]
        return silhouette(reduced[chosen], split.second[chosen])

    def _poisoned(self, share: float, apart: float) -> bool:
        small, distinct = share < self.smallest, apart > self.silhouette
        return {"size": small, "silhouette": distinct, "both": small and distinct}[self.rule]

    def _words(self) -> str:
        small, distinct = f"of less than {self.smallest:.0%} of its label", f"a silhouette above {self.silhouette:g}"
        words = {"size": small, "silhouette": f"with {distinct}", "both": f"{small} with {distinct}"}
        return f"the smaller of two groups, {words[self.rule]}"


def margin(rows: Tensor, split: Split) -> Tensor:
    """``(n,)`` how much nearer to the mean of the second group than to that of the first, in [-1, 1]."""
    first, second = ((rows - mean).norm(dim=1) for mean in split.means)
    nearer: Tensor = (first - second) / torch.maximum(first, second).clamp(min=1e-30)
    return nearer


def silhouette(rows: Tensor, second: Tensor) -> float:
    """Mean silhouette of two groups, in [-1, 1]; 0 where one is empty, and 0 of a row that is alone (Rousseeuw 1987).

    Args:
        rows: ``(n, D)``.
        second: ``(n,)`` bool.
    """
    sizes = torch.stack([(~second).sum(), second.sum()])
    if int(sizes.min()) == 0:
        return 0.0
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    sums = torch.stack([distance[:, ~second].sum(1), distance[:, second].sum(1)])
    own = second.long()
    inside = sums.gather(0, own[None])[0] / (sizes[own] - 1).clamp(min=1)
    outside = sums.gather(0, 1 - own[None])[0] / sizes[1 - own]
    value = (outside - inside) / torch.maximum(outside, inside).clamp(min=1e-30)
    return float(torch.where(sizes[own] > 1, value, torch.zeros(())).mean())
