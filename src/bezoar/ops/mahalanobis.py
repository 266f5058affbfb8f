"""Distances of features from the mean of their label, in the units of how clean features vary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALL = 1e-12


@dataclass(frozen=True, eq=False)
class Gaussians:
    """One Gaussian for each label, with a covariance that all share.

    Attributes:
        mean: ``(K, D)``.
        directions: ``(R, D)`` orthonormal directions in which the features vary.
        along: ``(R,)`` one over D times the variance in each of them.
        across: One over D times the variance in all others.
    """

    mean: Tensor
    directions: Tensor
    along: Tensor
    across: Tensor

    def distance(self, features: Tensor, labels: Tensor) -> Tensor:
        """``(N,)`` squared Mahalanobis distance of ``(N, D)`` features from the mean of their label, divided by D."""
        off = features - self.mean[labels]
        along = off @ self.directions.T
        rest = off - along @ self.directions
        return (along.pow(2) * self.along).sum(1) + rest.pow(2).sum(1) * self.across


def gaussians(features: Tensor, labels: Tensor, classes: int, shrinkage: float) -> Gaussians:
    """The mean of each label, and the covariance around these means.

    Labels without features get the mean of all. Where each label has a single one, the covariance is that around the
    mean of all.

    Args:
        features: ``(N, D)`` floats, finite.
        labels: ``(N,)`` in [0, classes).
        classes: K.
        shrinkage: Share of the mean variance that is added to the variance in every direction, above 0: of few features
            most directions are hardly known.
    """
    counts = torch.bincount(labels, minlength=classes)
    mean = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    mean = torch.where(counts[:, None] > 0, mean / counts.clamp(min=1)[:, None], features.mean(0))
    off = features - mean[labels]
    if not bool((off.abs() > _SMALL).any()):
        off = features - features.mean(0)
    width = features.shape[1]
    floor = shrinkage * off.pow(2).mean().clamp(min=_SMALL)
    # In the directions in which these features do not vary at all, the variance is the floor.
    _, spread, directions = torch.linalg.svd(off, full_matrices=False)
    kept = spread > spread[0] * 1e-6
    variance = spread[kept].pow(2) / len(off) + floor
    return Gaussians(mean, directions[kept], 1 / (variance * width), 1 / (floor * width))
