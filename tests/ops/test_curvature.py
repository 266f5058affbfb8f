"""Curvature against matrices that are known."""

from __future__ import annotations

import pytest
import torch

from bezoar.ops.curvature import hessian, signs_like, top_eigenvalue, trace


def quadratic(values: list[float]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """``x^T A x / 2`` of two tensors x, with a full symmetric A of these eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    matrix = turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.T
    parts = [torch.randn(2, 2, dtype=torch.float64, generator=generator), torch.ones(len(values) - 4).double()]
    for part in parts:
        part.requires_grad_(True)
    flat = torch.cat([p.flatten() for p in parts])
    return flat @ matrix @ flat / 2, parts, matrix


@pytest.mark.parametrize(("values", "largest"), [([5.0, 2, 1, 1, 0, 0.5], 5.0), ([-7.0, 3, 2, 1, 1, 0], -7.0)])
def test_top_eigenvalue_with_its_sign(values, largest):
    loss, parts, _ = quadratic(values)
    found = top_eigenvalue(hessian(loss, parts), parts, torch.Generator().manual_seed(1), tolerance=1e-7)
    assert found == pytest.approx(largest, rel=1e-4)


def test_product_is_that_of_the_matrix():
    loss, parts, matrix = quadratic([5.0, 2, 1, -1, 0, 0.5])
    vector = [torch.arange(4.0, dtype=torch.float64).view(2, 2), torch.tensor([-1.0, 2.0]).double()]
    found = torch.cat([v.flatten() for v in hessian(loss, parts)(vector)])
    torch.testing.assert_close(found, matrix @ torch.cat([v.flatten() for v in vector]))


def test_trace():
    loss, parts, matrix = quadratic([5.0, 2, 1, -1, 0, 0.5])
    found = trace(hessian(loss, parts), parts, torch.Generator().manual_seed(1), samples=2000)
    assert found == pytest.approx(float(matrix.trace()), abs=0.3)


def test_trace_of_a_diagonal_matrix_is_exact_with_one_sample():
    parts = [torch.ones(3, requires_grad=True)]
    loss = (torch.tensor([1.0, 2.0, 4.0]) * parts[0].square()).sum() / 2
    assert trace(hessian(loss, parts), parts, torch.Generator(), samples=1) == pytest.approx(7)


def test_linear_loss_has_no_curvature():
    parts = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    product = hessian(parts[0].sum(), parts)
    assert top_eigenvalue(product, parts, torch.Generator()) == 0
    assert trace(product, parts, torch.Generator()) == 0


def test_signs():
    found = signs_like(torch.zeros(1000, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert found.dtype == torch.float64
    assert set(found.tolist()) == {-1.0, 1.0}
    assert abs(float(found.mean())) < 0.15
