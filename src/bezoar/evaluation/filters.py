"""Measures of filters, which give each example a score: is it poisoned?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from bezoar.core.errors import SettingError
from bezoar.evaluation.measures import Rate


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a filter, higher for more suspicious; ``+`` merges those of batches or workers, in any order.

    Attributes:
        poisoned: ``(P,)`` scores of the poisoned examples.
        clean: ``(N,)`` scores of the clean ones.
    """

    poisoned: NDArray[np.float64]
    clean: NDArray[np.float64]

    @classmethod
    def of(cls, scores: ArrayLike, poisoned: ArrayLike) -> Scores:
        """Divide scores by the truth.

        Args:
            scores: ``(N,)``, finite or infinite.
            poisoned: ``(N,)`` bool.

        Raises:
            SettingError: The lengths differ, or a score is NaN.
        """
        values, truth = np.asarray(scores, dtype=np.float64), np.asarray(poisoned, dtype=bool)
        if values.ndim != 1 or values.shape != truth.shape:
            raise SettingError(f"expected one score for each example, got {values.shape} and {truth.shape}")
        if np.isnan(values).any():
            raise SettingError("a score is NaN")
        return cls(values[truth], values[~truth])

    def __add__(self, other: Scores) -> Scores:
        return Scores(np.concatenate([self.poisoned, other.poisoned]), np.concatenate([self.clean, other.clean]))

    @property
    def auroc(self) -> float:
        """Chance that a poisoned example scores above a clean one, ties counting half; NaN without one of each."""
        pairs = len(self.poisoned) * len(self.clean)
        if not pairs:
            return float("nan")
        ranks = rankdata(np.concatenate([self.poisoned, self.clean]))[: len(self.poisoned)]
        return float((ranks.sum() - len(ranks) * (len(ranks) + 1) / 2) / pairs)

    def tpr(self, fpr: float) -> Rate:
        """Share of the poisoned examples that are caught.

        Args:
            fpr: Largest share of the clean examples that may be caught with them, in [0, 1]. Examples that tie are
                caught together or not at all; nothing is interpolated.

        Raises:
            SettingError: ``fpr`` is not in [0, 1].
        """
        if not 0 <= fpr <= 1:
            raise SettingError(f"fpr must be in [0, 1], got {fpr}")
        # The small term keeps floor(0.07 * 100) from being 6.
        allowed = int(np.floor(fpr * len(self.clean) + 1e-9))
        if allowed >= len(self.clean):
            return Rate.of(len(self.poisoned), len(self.poisoned))
        # All above the first clean score that may not be caught.
        bound = np.sort(self.clean)[::-1][allowed]
        return Rate.of(int((self.poisoned > bound).sum()), len(self.poisoned))
