"""SPECTRE: whitened by a robust covariance, the poison is the direction that is left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource
from bezoar.core.filtering import Filter, Suspicion
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.filters._classes import by_label, principal
from bezoar.filters.spectral_signatures import largest
from bezoar.ops.features import read_features

_C, _TAU, _SHIFT = 10.0, 0.1, 3.0  # constants of the authors' code
_FLOOR = 1e-8  # of the largest variance


@dataclass(frozen=True, kw_only=True)
class SPECTRE(Filter):
    """Estimate mean and covariance of each label robustly, whiten with them, and score by quantum entropy (QUE).

    For several numbers of principal components the features of a label are whitened by the covariance of examples that
    a robust filter keeps (Diakonikolas et al.), and the QUE score is taken; the number with the largest mean score of
    the whole, whitened by what would be kept, is chosen. Whitened scores of different labels compare. The label with
    the largest mean score is taken for the poisoned one, also in a clean set: the rule does not say whether a set is
    poisoned. Each round of the robust filter drops at least its share of what it may drop in all, which is ours and
    bounds the time.

    Args:
        epsilon: Largest share of a label's examples that may be poisoned, in (0, 0.5).
        margin: This many times that share is taken out of the label, at least 1 (the paper: 1.5).
        alpha: Sharpness of the QUE score, at least 0; 0 is the squared norm (the paper: 4).
        dims: Most principal components, at least 1 (the code: 64).
        rounds: Most rounds of the robust filter, at least 1.
        labels: ``top`` takes out of the label with the largest score alone (the paper), ``all`` of every label.

    References:
        Hayase, Kong, Somani and Oh, "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics", ICML 2021;
        Diakonikolas et al., "Being Robust (in High Dimensions) Can Be Practical", ICML 2017.
    """

    epsilon: float = 0.1
    margin: float = 1.5
    alpha: float = 4.0
    dims: int = 64
    rounds: int = 10
    labels: Literal["top", "all"] = "top"

    def __post_init__(self) -> None:
        self.require("epsilon", 0 < self.epsilon < 0.5, "in (0, 0.5)")
        self.require(
            "margin", self.margin >= 1 and self.margin * self.epsilon <= 1, "at least 1, and 1/epsilon at most"
        )
        self.require("alpha", self.alpha >= 0, "at least 0")
        for name in ("dims", "rounds"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("labels", self.labels in ("top", "all"), "top or all")

    def filter(self, model: nn.Module, examples: ExampleSource, run: Run, clean: Clean | None) -> Suspicion:
        """See :class:`bezoar.core.filtering.Filter`; the clean examples are not used."""
        del clean
        features = read_features(model, examples, run, folder=run.progress.folder)
        score = torch.zeros(len(features), dtype=torch.float64)
        suspect = torch.zeros(len(features), dtype=torch.bool)
        statistic, components, members = {}, {}, {}
        for label, rows in by_label(examples.labels, examples.num_classes, run, least=5):
            found, statistic[label], components[str(label)] = self.scores(features[rows], run)
            score[rows], members[label] = found, rows
        run.notes["components"] = components
        top = max(statistic, key=statistic.__getitem__, default=None)
        for label, rows in members.items():
            if self.labels == "all" or label == top:
                suspect[rows[largest(score[rows], self.margin * self.epsilon)]] = True
        where = "the label whose mean QUE score is largest" if self.labels == "top" else "each label"
        rule = f"of {where}, the {self.margin * self.epsilon:.0%} with the largest QUE scores"
        return Suspicion(score, suspect, rule, statistic)

    def scores(self, features: Tensor, run: Run) -> tuple[Tensor, float, int]:
        """``(n,)`` QUE scores of one label's ``(n, D)`` features, their mean that chose, and the components used."""
        centred = features.double() - features.double().mean(0)
        directions, _ = principal(centred, self.dims)
        place = centred @ directions
        best = torch.zeros(len(place), dtype=torch.float64), 0.0, 0
        for count in components_tried(place.shape[1]):
            run.check()
            reduced = place[:, :count]
            kept = robust_rows(reduced, self.epsilon, self.rounds)
            found = que(whitened(reduced, kept), self.alpha)
            left = torch.ones(len(place), dtype=torch.bool)
            left[largest(found, self.margin * self.epsilon)] = False
            mean = float(que(whitened(place, left), self.alpha).mean())
            if mean > best[1]:
                best = found, mean, count
        return best


def components_tried(most: int) -> list[int]:
    """Numbers of components to try: 8 squares from 1 to ``most``, as in the authors' code; empty for 0."""
    return sorted({round(float(root) ** 2) for root in np.linspace(1, math.sqrt(most), 8)}) if most else []


def whitened(place: Tensor, kept: Tensor) -> Tensor:
    """All rows, by mean and covariance of those that are kept.

    Args:
        place: ``(n, k)``.
        kept: ``(n,)`` bool.
    """
    middle = place[kept].mean(0)
    spread = torch.cov(place[kept].T, correction=0).reshape(place.shape[1], -1)
    return torch.matmul(place - middle, _inverse_root(spread))


def _inverse_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    values = torch.maximum(values, (_FLOOR * values.max()).clamp(min=1e-30))
    return torch.matmul(vectors / values.sqrt(), vectors.T)


def que(white: Tensor, alpha: float) -> Tensor:
    """``(n,)`` QUE scores ``x' Q x / tr Q`` with ``Q = exp(alpha (S - I) / (|S| - 1))``, S the covariance of the rows.

    Args:
        white: ``(n, k)`` rows that a robust covariance whitened; their own covariance is not the identity.
        alpha: See :class:`SPECTRE`.
    """
    spread = torch.cov(white.T, correction=0).reshape(white.shape[1], -1)
    values, vectors = torch.linalg.eigh(spread)
    weight = torch.exp(alpha * (values - 1) / (values.max() - 1).clamp(min=1e-9))
    projected = white @ vectors
    found: Tensor = (projected**2 * (weight / weight.sum())).sum(1)
    return found


def robust_rows(place: Tensor, epsilon: float, rounds: int) -> Tensor:
    """``(n,)`` bool: rows that a robust covariance rests on; at most a share of ``2 epsilon`` is dropped.

    In each round the rows are whitened by their own second moments; those far out are dropped at once. Else the
    direction of matrices in which the fourth moments are largest is found, and where these are larger than those of a
    normal distribution can be, the rows that make them large are dropped.

    Args:
        place: ``(n, k)`` with mean zero.
        epsilon: Share that may be poisoned.
        rounds: Most rounds.
    """
    count, dims = place.shape
    kept = torch.ones(count, dtype=torch.bool)
    if dims == 1:
        return kept
    limit = min(round(2 * epsilon * count), count - 2)
    share = -(-limit // rounds)
    while limit > 0:
        rows = kept.nonzero().flatten()
        white = place[rows] @ _inverse_root(place[rows].T @ place[rows] / len(rows))
        size = (white**2).sum(1)
        worst = size >= _C * dims * math.log(len(rows) / _TAU)
        if not bool(worst.any()):
            value, direction = _fourth_moment(white)
            if value <= 1 + _C * epsilon * math.log(1 / epsilon) ** 2:
                break
            size = ((white @ direction) * white).sum(1) / math.sqrt(2)
            size = (size - size.median()).abs()
            worst = size > min(float(size.max()) - _SHIFT, _C * math.log(1 / epsilon) + _SHIFT)
        dropped = min(max(int(worst.sum()), share), limit)
        kept[rows[torch.sort(size, descending=True, stable=True).indices[:dropped]]] = False
        limit -= dropped
    return kept


def _fourth_moment(white: Tensor) -> tuple[float, Tensor]:
    """Largest variance of ``x' V x`` over symmetric V of norm 1, and that V, ``(k, k)``; never built in full."""
    rows = white.numpy()
    dims = rows.shape[1]

    def apply(flat: NDArray[np.float64]) -> NDArray[np.float64]:
        matrix = flat.reshape(dims, dims)
        value = np.einsum("ni,ni->n", rows @ matrix, rows)
        out = (rows * value[:, None]).T @ rows / len(rows) - np.trace(matrix) * np.eye(dims)
        return np.asarray(out.ravel(), dtype=np.float64)

    operator = LinearOperator((dims**2, dims**2), matvec=apply, dtype=np.float64)
    try:
        values, vectors = eigsh(operator, k=1, which="LA", v0=np.ones(dims**2), tol=1e-3)
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
        if not len(values):
            return 0.0, torch.zeros(dims, dims, dtype=torch.float64)
    matrix = torch.from_numpy(vectors[:, -1].reshape(dims, dims).copy())
    return float(values[-1]), (matrix + matrix.T) / 2
