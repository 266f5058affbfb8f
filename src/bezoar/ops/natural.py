"""The natural gradient of a linear head under softmax, exactly and without its matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fisher_product(features: Tensor, chances: Tensor, vector: Tensor) -> Tensor:
    """``F v`` with the Fisher information ``F = E[(diag(p) - p p^T) x a a^T]`` of a softmax head, labels by the model.

    For a linear head it equals the Hessian of the cross-entropy, whatever the labels.

    Args:
        features: ``(N, D)`` what goes into the head; a column of ones stands for a bias.
        chances: ``(N, K)`` the model's probabilities.
        vector: ``(K, D)``, of the shape of the weight.
    """
    moved = features @ vector.T
    weighed = chances * (moved - (chances * moved).sum(1, keepdim=True))
    return weighed.T @ features / len(features)


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], wanted: Tensor, *, steps: int = 100, tolerance: float = 1e-6
) -> Tensor:
    """Solves ``M v = wanted`` for a symmetric, positive (semi-)definite matrix.

    Args:
        product: Products with the matrix.
        wanted: Right side, of any shape.
        steps: Most iterations.
        tolerance: Ends once the rest is below this share of the right side.
    """
    solution, rest = torch.zeros_like(wanted), wanted.clone()
    direction, squared = rest.clone(), rest.square().sum()
    goal = tolerance**2 * squared
    for _ in range(steps):
        if squared <= goal or squared == 0:
            break
        image = product(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:  # only rounding is left
            break
        length = squared / curvature
        solution = solution + length * direction
        rest = rest - length * image
        before, squared = squared, rest.square().sum()
        direction = rest + squared / before * direction
    return solution
