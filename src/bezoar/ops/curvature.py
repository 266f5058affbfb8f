"""How sharp a minimum is: the largest eigenvalue and the trace of the Hessian of a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: The product of a matrix with a vector that is kept as a list of tensors.
Product = Callable[[list[Tensor]], list[Tensor]]


def hessian(loss: Tensor, variables: Sequence[Tensor]) -> Product:
    """Products with the Hessian of a scalar loss, none of which needs the Hessian itself.

    Args:
        loss: Scalar, twice differentiable in the variables (see :func:`bezoar.ops.fisher.twice_differentiable`).
        variables: Tensors that need a gradient.
    """
    slopes = torch.autograd.grad(loss, variables, create_graph=True, allow_unused=True)
    used = [(s, v) for s, v in enumerate(slopes) if v is not None and v.requires_grad]

    def product(vector: list[Tensor]) -> list[Tensor]:
        if not used:
            return [torch.zeros_like(v) for v in variables]
        found = torch.autograd.grad(
            [slope for _, slope in used],
            variables,
            grad_outputs=[vector[number] for number, _ in used],
            retain_graph=True,
            allow_unused=True,
        )
        return [torch.zeros_like(v) if f is None else f for v, f in zip(variables, found, strict=True)]

    return product


def top_eigenvalue(
    product: Product, like: Sequence[Tensor], generator: torch.Generator, *, steps: int = 50, tolerance: float = 1e-3
) -> float:
    """The eigenvalue of largest size of a symmetric matrix, with its sign, by power iteration.

    Args:
        product: Products with the matrix.
        like: Tensors of the shapes of a vector.
        generator: A CPU generator for the first vector.
        steps: Most iterations.
        tolerance: Ends once the estimate changes by less than this share.
    """
    vector = [torch.randn(v.shape, generator=generator).to(v) for v in like]
    value = 0.0
    for _ in range(steps):
        length = _dot(vector, vector) ** 0.5
        if length == 0:
            return 0.0
        vector = [v / length for v in vector]
        following = product(vector)
        before, value = value, _dot(vector, following)
        if abs(value - before) <= tolerance * abs(value):
            break
        vector = following
    return value


def trace(product: Product, like: Sequence[Tensor], generator: torch.Generator, *, samples: int = 20) -> float:
    """The trace of a symmetric matrix, by Hutchinson's estimate: the mean of ``v^T M v`` over random signs ``v``.

    Args:
        product: Products with the matrix.
        like: Tensors of the shapes of a vector.
        generator: A CPU generator for the signs.
        samples: Random vectors, at least 1.
    """
    total = 0.0
    for _ in range(samples):
        signs = [signs_like(v, generator) for v in like]
        total += _dot(signs, product(signs))
    return total / samples


def signs_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs, 1 or -1, of the shape, type and device of a tensor; drawn on the CPU."""
    return (2 * torch.randint(2, like.shape, generator=generator) - 1).to(like)


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float(sum(torch.sum(a * b) for a, b in zip(one, other, strict=True)))
