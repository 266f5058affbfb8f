"""Outlier statistics."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
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
