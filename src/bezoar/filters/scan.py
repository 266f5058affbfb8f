"""SCAn: a poisoned label is two groups of examples where a clean one is a single group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.examples import Examples, ExampleSource
from bezoar.core.filtering import Filter, Suspicion
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.filters._classes import by_label, stands_out, two_means
from bezoar.ops.features import read_features

_STEPS, _TOLERANCE, _RANK = 100, 1e-5, 1e-10


@dataclass(frozen=True, kw_only=True)
class SCAn(Filter):
    """Untangle each label into two groups, and ask whether two explain its features much better than one.

    The covariances of the features within a label and between labels come from the clean examples, by EM. In the metric
    of the first, each label of the suspects is cut in two; the statistic is the mean log likelihood ratio of two groups
    against one, whose mean is the posterior one. A label whose statistic stands out above those of the others is
    poisoned, and its suspects are the group that holds fewer of the label's clean examples. An example's score is the
    anomaly index of its label times a share in (0, 1) that grows with the log odds of that group.

    The paper looks at deviations both ways; only a high statistic is a sign here. The public code leaves a factor out
    of the mean of the single group, which then is near the mean of all labels; the paper's formula is used.

    Args:
        threshold: Anomaly index above which a label is poisoned, above 0 (the paper: e^2, 7.389; a public port: e).
        ridge: Share of the mean variance within a label that is added to every direction, at least 0. It lets features
            count that no clean example excites; 0 leaves them out, as the public code does.
        least: Labels with fewer examples are not judged, at least 3: few examples fit two groups by chance.

    References:
        Tang et al., "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection",
        USENIX Security 2021.
    """

    needs_clean = True

    threshold: float = math.exp(2)
    ridge: float = 1e-3
    least: int = 10

    def __post_init__(self) -> None:
        self.require("threshold", self.threshold > 0, "above 0")
        self.require("ridge", self.ridge >= 0, "at least 0")
        self.require("least", self.least >= 3, "at least 3")

    def filter(self, model: nn.Module, examples: ExampleSource, run: Run, clean: Clean | None) -> Suspicion:
        """See :class:`bezoar.core.filtering.Filter`."""
        assert clean is not None
        known = read_features(model, Examples(clean.x, clean.y, clean.num_classes), run).double()
        features = read_features(model, examples, run, folder=run.progress.folder)
        metric = decompose(known, clean.y, self.ridge)
        middle = features.mean(0, dtype=torch.float64)
        known = (known - middle) @ metric.basis
        score = torch.zeros(len(features), dtype=torch.float64)
        suspect = torch.zeros(len(features), dtype=torch.bool)
        statistic: dict[int, float] = {}
        groups: dict[int, tuple[Tensor, Tensor]] = {}
        for label, rows in by_label(examples.labels, examples.num_classes, run, self.least):
            place = (features[rows].double() - middle) @ metric.basis
            statistic[label], odds = untangle(place, metric.power, known[clean.y == label])
            groups[label] = rows, odds
        index = dict(zip(statistic, stands_out(list(statistic.values())), strict=True))
        if len(index) < 3:
            run.warnings.append(f"SCAn compares labels with each other, and only {len(index)} could be judged")
        flagged = tuple(label for label in index if index[label] > self.threshold)
        for label, (rows, odds) in groups.items():
            # The posterior itself is 0 or 1 for almost all of them, which would tie.
            score[rows] = max(index[label], 0.0) * (1 + odds / (1 + odds.abs())) / 2
            if label in flagged:
                suspect[rows] = odds > 0
        rule = f"the group with fewer clean examples, of labels with an anomaly index above {self.threshold:.2f}"
        return Suspicion(score, suspect, rule, index, flagged)


@dataclass(frozen=True)
class Metric:
    """What clean examples say of the features.

    Attributes:
        basis: ``(D, R)``: ``x @ basis`` has the identity as covariance within a label, and a diagonal one between.
        back: ``(R, D)``: the way back.
        power: ``(R,)`` variances between labels in that basis.
        within, between: ``(D, D)`` covariances.
    """

    basis: Tensor
    back: Tensor
    power: Tensor
    within: Tensor
    between: Tensor


def decompose(features: Tensor, labels: Tensor, ridge: float) -> Metric:
    """Covariances within and between labels, by EM.

    Args:
        features: ``(N, D)`` float64 of clean examples.
        labels: ``(N,)``.
        ridge: See :class:`SCAn`.
    """
    x = features - features.mean(0)
    present, group = torch.unique(labels, return_inverse=True)
    counts = torch.bincount(group, minlength=len(present)).double()[:, None]
    sums = torch.zeros(len(present), x.shape[1], dtype=x.dtype).index_add_(0, group, x)
    means = sums / counts
    for _ in range(_STEPS + 1):
        within, between = _covariance(x - means[group]), _covariance(means[group])
        metric = _diagonal(within, between, ridge)
        posterior = (sums @ metric.basis) * metric.power / (1 + counts * metric.power)
        new = posterior @ metric.back
        moved, means = float((new - means).norm()), new
        if moved <= _TOLERANCE * float(means.norm()):
            break
    return metric


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / max(len(x) - 1, 1)


def _diagonal(within: Tensor, between: Tensor, ridge: float) -> Metric:
    floor = ridge * within.diagonal().mean()
    values, vectors = torch.linalg.eigh(within + floor * torch.eye(len(within), dtype=within.dtype))
    kept = values > _RANK * values.max().clamp(min=1e-30)
    scale, vectors = values[kept].sqrt(), vectors[:, kept]
    power, turn = torch.linalg.eigh((vectors / scale).T @ between @ (vectors / scale))
    return Metric((vectors / scale) @ turn, turn.T * scale @ vectors.T, power.clamp(min=0), within, between)


def untangle(place: Tensor, power: Tensor, known: Tensor) -> tuple[float, Tensor]:
    """Mean log likelihood ratio of two groups against one (times 2), and the log odds of the suspicious group.

    Args:
        place: ``(n, R)`` examples of a label, in the basis of :class:`Metric`.
        power: ``(R,)`` its variances between labels.
        known: ``(m, R)`` clean examples of the label; without any, the smaller group is suspicious.

    Returns:
        The statistic, at least 0, and ``(n,)`` log odds, all 0 where there are no two groups.
    """
    split = two_means(place)
    if split is None:
        return 0.0, torch.zeros(len(place), dtype=place.dtype)
    single = place.mean(0) * len(place) * power / (1 + len(place) * power)
    one = ((place - single) ** 2).sum(1)
    two = _distances(place, split.means)
    clean = _distances(known, split.means)
    suspicious = 1 if int((clean[0] < clean[1]).sum()) * 2 >= len(known) else 0
    odds = (two[1 - suspicious] - two[suspicious]) / 2
    return max(float((one - two.min(0).values).mean()), 0.0), odds


def _distances(place: Tensor, means: Tensor) -> Tensor:
    return torch.stack([((place - mean) ** 2).sum(1) for mean in means])
