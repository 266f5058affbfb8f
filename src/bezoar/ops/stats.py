"""Outlier statistics."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.stats import median_abs_deviation


def anomaly_index(sizes: ArrayLike, reference: ArrayLike | None = None) -> NDArray[np.float64]:
    """``(median - size) / MAD``: positive for a trigger smaller than the median (Neural Cleanse, section IV-C).

    Args:
        sizes: ``(T,)`` norms.
        reference: ``(R,)`` norms that median and MAD are taken from; ``sizes`` itself by default.

    Returns:
        ``(T,)`` indices. The MAD is scaled by 1.4826, so that an index is in standard deviations of a normal
        distribution; a MAD of zero gives 0 at the median and infinity elsewhere.
    """
    values = np.asarray(sizes, dtype=np.float64)
    base = values if reference is None else np.asarray(reference, dtype=np.float64)
    median = np.median(base)
    deviation = median_abs_deviation(base, scale="normal")
    difference = median - values
    if deviation == 0:
        return np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    return np.asarray(difference / deviation, dtype=np.float64)


def wilson(rate: float, count: int, z: float) -> tuple[float, float]:
    """Both ends of the Wilson interval of a rate in [0, 1] over ``count`` trials, ``z`` standard deviations wide."""
    square = z**2 / count
    middle = rate + square / 2
    half = z * math.sqrt(rate * (1 - rate) / count + square / (4 * count))
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


def log_ratios(values: ArrayLike) -> NDArray[np.float64]:
    """Logarithm of each value over the median of the others: 0 is ordinary, 0.69 is twice the others.

    Args:
        values: ``(T,)`` values that are above 0 where they mean anything; others count as a thousandth of the largest.

    Returns:
        ``(T,)`` logarithms; all 0 where there is only one value, or none above 0.
    """
    given = np.asarray(values, dtype=np.float64)
    top = given.max(initial=0.0)
    if len(given) < 2 or top <= 0:
        return np.zeros_like(given)
    floored = np.log(np.maximum(given, 1e-3 * top))
    return np.asarray([own - np.median(np.delete(floored, row)) for row, own in enumerate(floored)], dtype=np.float64)


def largest_pvalue(values: ArrayLike, null: Literal["gamma", "exponential"] = "gamma") -> float:
    """How likely the largest of T values would be at least that large, if it were of the same kind as the others.

    The others' distribution is fitted by maximum likelihood, its location too. Of T draws from it the largest stays
    below v with probability ``F(v)^T``.

    Args:
        values: ``(T,)`` values.
        null: Family of the others' distribution.

    Returns:
        In [0, 1]; NaN with fewer than 4 values, of which a distribution of three parameters says nothing.
    """
    given = np.sort(np.asarray(values, dtype=np.float64))
    others, largest = given[:-1], given[-1]
    if len(given) < 4:
        return math.nan
    if others[-1] - others[0] <= 1e-9 * max(1.0, abs(others[-1])):
        return float(largest <= others[-1])
    family = stats.gamma if null == "gamma" else stats.expon
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the search for the parameters passes through odd places
        try:
            below = float(family.cdf(largest, *family.fit(others)))
        except stats.FitError:
            below = float(stats.expon.cdf(largest, *stats.expon.fit(others)))
    return max(0.0, float(-np.expm1(len(given) * np.log(below)))) if below > 0 else 1.0
