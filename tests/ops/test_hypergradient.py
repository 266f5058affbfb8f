"""The hypergradient of a quadratic problem, in closed form and by unrolling the inner steps."""

from __future__ import annotations

import pytest
import torch

from bezoar.ops.hypergradient import hypergradient


class Quadratic:
    """Inner ``s^T A s / 2 - s^T B w``, so ``s(w) = A^-1 B w``; outer ``|s - c|^2 / 2 + |w|^2 / 2 + sum(s) sum(w)``."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        self.a = root @ root.T / 4 + torch.eye(4, dtype=torch.float64)
        self.b = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        self.c = torch.randn(4, generator=generator, dtype=torch.float64)
        self.w = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_(True)

    def inner(self, s):
        return s @ self.a @ s / 2 - s @ self.b @ self.w

    def outer(self, s):
        return (s - self.c).square().sum() / 2 + self.w.square().sum() / 2 + s.sum() * self.w.sum()

    def solution(self):
        return torch.linalg.solve(self.a, self.b @ self.w)

    def found(self, terms: int, step: float = 0.2) -> torch.Tensor:
        (answer,) = hypergradient(self.inner, self.outer, self.solution().detach(), [self.w], step=step, terms=terms)
        return answer

    def exact(self) -> torch.Tensor:
        return torch.autograd.grad(self.outer(self.solution()), self.w)[0]

    def unrolled(self, steps: int, step: float = 0.2) -> torch.Tensor:
        s = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            s = s - step * torch.autograd.grad(self.inner(s), s, create_graph=True)[0]
        return torch.autograd.grad(self.outer(s), self.w)[0]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_agrees_with_closed_form_and_unrolling():
    problem = Quadratic()
    assert error(problem.unrolled(200), problem.exact()) < 1e-9
    assert error(problem.found(100), problem.exact()) < 1e-3
    assert error(problem.found(100), problem.unrolled(200)) < 1e-3


def test_error_falls_with_the_terms():
    problem = Quadratic()
    errors = [error(problem.found(terms), problem.exact()) for terms in (1, 2, 5, 10, 20, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[-1]


def test_no_terms_take_the_solution_as_a_constant():
    problem = Quadratic()
    s = problem.solution().detach()
    wanted = torch.autograd.grad(problem.outer(s), problem.w)[0]
    torch.testing.assert_close(problem.found(0), wanted)
    assert error(problem.found(0), problem.exact()) > 0.1


@pytest.mark.parametrize("terms", [0, 3])
def test_variables_that_a_loss_does_not_use(terms):
    w, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    found = hypergradient(
        lambda s: (s - w).square().sum() / 2, lambda s: s.sum(), torch.ones(2), [w, unused], step=1.0, terms=terms
    )
    torch.testing.assert_close(found[0], torch.ones(2) if terms else torch.zeros(2))
    assert found[1].tolist() == [0, 0, 0]
