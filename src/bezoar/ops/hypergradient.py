"""The gradient of a min-max problem that looks through its inner solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: A scalar loss of the inner variable; the outer variables are inside it.
Loss = Callable[[Tensor], Tensor]


def hypergradient(
    inner: Loss, outer: Loss, solution: Tensor, variables: Sequence[Tensor], *, step: float, terms: int
) -> list[Tensor]:
    """``d outer(s(w), w) / dw`` where ``s(w)`` minimises ``inner``, by fixed-point iteration.

    One gradient step ``m(s, w) = s - step d inner/ds`` has the solution as its fixed point, so that by the implicit
    function theorem the derivative is ``d outer/dw + (dm/dw)^T v`` with ``v = (dm/ds)^T v + d outer/ds``. That equation
    is iterated from 0; it converges where the step is below 2 / (largest curvature) of a convex inner loss.

    Args:
        inner: What the inner variable minimises; twice differentiable.
        outer: What the outer variables minimise.
        solution: The inner solution s.
        variables: The outer variables w, which both losses are functions of.
        step: Size of the gradient step that the fixed point is of, above 0.
        terms: Iterations, at least 0; with 0 the solution counts as a constant.

    Returns:
        One gradient for each variable.

    References:
        Grazzi et al., "On the Iteration Complexity of Hypergradient Computation", ICML 2020, fixed-point method.
    """
    solution = solution.detach().requires_grad_(True)
    wanted = torch.autograd.grad(outer(solution), (solution, *variables), allow_unused=True)
    direct = [torch.zeros_like(w) if g is None else g for w, g in zip((solution, *variables), wanted, strict=True)]
    at_solution, at_variables = direct[0], direct[1:]
    if not terms:
        return at_variables
    slope = torch.autograd.grad(inner(solution), solution, create_graph=True)[0]
    vector = at_solution
    for _ in range(terms - 1):
        vector = vector - step * _product(slope, solution, vector) + at_solution
    through = torch.autograd.grad(slope, list(variables), grad_outputs=vector, allow_unused=True)
    return [g if t is None else g - step * t for g, t in zip(at_variables, through, strict=True)]


def _product(slope: Tensor, solution: Tensor, vector: Tensor) -> Tensor:
    found = torch.autograd.grad(slope, solution, grad_outputs=vector, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(solution) if found is None else found
