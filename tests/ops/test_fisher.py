"""The Fisher information: against closed forms, and against gradients taken one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bezoar.ops.curvature import hessian, trace
from bezoar.ops.fisher import (
    diagonal,
    gradients_of_each,
    of_model,
    sampled_labels,
    trace_estimate,
    twice_differentiable,
)
from tests.purifiers.nets import NAMES, examples, make


def linear(count: int = 20) -> tuple[nn.Module, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, 5, generator=generator))
    x = torch.randn(count, 5, generator=generator)
    return model, dict(model.named_parameters()), x, torch.softmax(x @ model.weight.T, 1).detach()


def test_trace_of_a_softmax_model_is_the_closed_form():
    """Tr F = E[(1 - sum p^2) |x|^2], as F = E[(diag(p) - p p^T) x x x^T]."""
    model, trained, x, p = linear()
    found = diagonal(of_model(model), trained, x, None)["weight"]
    wanted = float(((1 - p.square().sum(1)) * x.square().sum(1)).mean())
    assert float(found.sum()) == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(found, (p * (1 - p)).T @ x.square() / len(x), rtol=1e-4, atol=1e-6)


def test_for_a_linear_model_it_is_the_hessian():
    model, trained, x, _ = linear()
    product = hessian(F.cross_entropy(model(x), torch.zeros(20, dtype=torch.long)), [model.weight])
    found = trace(product, [model.weight], torch.Generator().manual_seed(0), samples=1000)
    assert float(diagonal(of_model(model), trained, x, None)["weight"].sum()) == pytest.approx(found, rel=0.05)


def test_sampled_labels_have_the_same_trace_on_average():
    model, trained, x, p = linear(4000)
    labels = sampled_labels(x @ model.weight.T, torch.Generator().manual_seed(1))
    found = float(diagonal(of_model(model), trained, x, labels)["weight"].sum())
    wanted = float(((1 - p.square().sum(1)) * x.square().sum(1)).mean())
    assert found == pytest.approx(wanted, rel=0.05)


def test_estimate_is_unbiased():
    model, trained, x, _ = linear(16)
    labels = torch.arange(16) % 4
    source = torch.Generator().manual_seed(2)
    found = [float(trace_estimate(of_model(model), trained, x, labels, source).detach()) for _ in range(3000)]
    wanted = float(diagonal(of_model(model), trained, x, labels)["weight"].sum())
    assert sum(found) / len(found) == pytest.approx(wanted, rel=0.05)


def test_estimate_of_one_image_is_exact_and_so_is_its_gradient():
    model, trained, x, p = linear(1)
    labels = torch.tensor([2])
    found = trace_estimate(of_model(model), trained, x, labels, torch.Generator())
    wrong = torch.softmax(model(x), 1) - F.one_hot(labels, 4)
    wanted = wrong.square().sum() * x.square().sum()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(v, model.weight)[0] for v in (found, wanted)))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_single_images(name):
    model, (x, y) = make(name), examples(3)
    trained = dict(model.named_parameters())
    with twice_differentiable():
        found = gradients_of_each(of_model(model), trained, x, y)
    for row in range(3):
        loss = F.cross_entropy(model(x[row : row + 1]), y[row : row + 1])
        wanted = torch.autograd.grad(loss, list(trained.values()))
        for (parameter, each), one in zip(found.items(), wanted, strict=True):
            assert each.shape == (3, *trained[parameter].shape)
            torch.testing.assert_close(each[row], one, rtol=1e-3, atol=1e-5)


def test_model_that_cannot_be_vectorised_is_asked_image_by_image():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else self.layer(-x)

    model, x, y = Branching(), torch.randn(6, 5), torch.arange(6) % 4
    found = gradients_of_each(of_model(model), dict(model.named_parameters()), x, y)["layer.weight"]
    for row in range(6):
        loss = F.cross_entropy(model(x[row : row + 1]), y[row : row + 1])
        torch.testing.assert_close(found[row], torch.autograd.grad(loss, model.layer.weight)[0])


def test_diagonal_is_no_square_of_a_mean_and_chunks_change_nothing():
    model, (x, y) = make("normed"), examples(7)
    trained = dict(model.named_parameters())
    each = gradients_of_each(of_model(model), trained, x, y)
    for chunk in (1, 3, 50):
        found = diagonal(of_model(model), trained, x, y, chunk=chunk)
        for name, value in found.items():
            torch.testing.assert_close(value, each[name].square().mean(0), rtol=1e-4, atol=1e-8)
    assert float(sum(v.sum() for v in found.values())) > 2 * float(sum(v.mean(0).square().sum() for v in each.values()))


def test_estimate_has_a_gradient_on_every_net():
    for name in NAMES:
        model, (x, y) = make(name), examples(3)
        with twice_differentiable():
            estimate = trace_estimate(of_model(model), dict(model.named_parameters()), x, y, torch.Generator())
            estimate.backward()
        assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.parameters()), name
