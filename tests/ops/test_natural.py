"""The natural gradient of a linear layer: the Newton direction, whatever the features are multiplied by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.surgery import LogProbabilities
from bezoar.ops.head import features_of, find_head
from bezoar.ops.natural import conjugate_gradient, fisher_product
from tests.purifiers.nets import NAMES, examples, make


def problem(count: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return a, weight, torch.randint(4, (count,), generator=generator)


def test_product_is_that_of_the_hessian_of_the_cross_entropy():
    a, weight, y = problem()
    matrix = torch.autograd.functional.hessian(lambda w: F.cross_entropy(a @ w.T, y), weight)
    vector = torch.arange(20.0, dtype=torch.float64).view(4, 5)
    wanted = (matrix.view(20, 20) @ vector.flatten()).view(4, 5)
    torch.testing.assert_close(fisher_product(a, torch.softmax(a @ weight.T, 1), vector), wanted)


def test_conjugate_gradient_solves():
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix, wanted = root @ root.T + torch.eye(6).double(), torch.arange(6.0).double()
    found = conjugate_gradient(lambda v: matrix @ v, wanted)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 100])
def test_conjugate_gradient_of_nothing_and_of_a_singular_matrix(steps):
    assert conjugate_gradient(lambda v: v, torch.zeros(3), steps=steps).tolist() == [0, 0, 0]
    flat = conjugate_gradient(lambda v: v * torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]), steps=steps)
    torch.testing.assert_close(flat, torch.tensor([2.0, 0.0]))
    assert torch.isfinite(conjugate_gradient(lambda v: 0 * v, torch.ones(3), steps=steps)).all()


@pytest.mark.parametrize("name", NAMES)
def test_head_and_its_features(name):
    model, (x, _) = make(name), examples(5)
    head = find_head(model, x[:1])
    assert isinstance(head, nn.Linear)
    features = features_of(model, head, x, batch=2)
    torch.testing.assert_close(head(features), model(x), rtol=1e-4, atol=1e-5)
    assert not head._forward_pre_hooks


def test_probabilities_have_the_features_of_their_logits():
    model, (x, _) = make("plain"), examples(5)
    wrapped = LogProbabilities(nn.Sequential(model, nn.Softmax(1)))
    head = find_head(wrapped, x[:1])
    torch.testing.assert_close(features_of(wrapped, head, x), features_of(model, find_head(model, x[:1]), x))


def test_answer_that_is_not_that_of_the_last_layer_is_refused():
    model, (x, _) = nn.Sequential(make("plain"), nn.Tanh()), examples(5)
    with pytest.raises(UnsupportedModel, match="not those of its last linear layer"):
        features_of(model, find_head(model, x[:1]), x)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(UnsupportedModel, match="no convolution or linear layer"):
        find_head(nn.Flatten(), x[:1])
