"""Gradients at other weights: right, and the weights come back."""

from __future__ import annotations

import pytest
import torch

from bezoar.ops.elsewhere import gradients, loss_elsewhere, with_gradient


def test_gradient_is_that_of_the_other_weights():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    value, (found,) = loss_elsewhere([w], [torch.tensor([3.0, 4.0])], lambda: (w**3).sum())
    assert float(value) == 27 + 64
    assert found.tolist() == [27.0, 48.0]
    assert w.tolist() == [1.0, 2.0]


def test_weights_come_back_after_a_failure():
    w = torch.ones(2, requires_grad=True)

    def fails():
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="broke"):
        loss_elsewhere([w], [torch.zeros(2)], fails)
    assert w.tolist() == [1.0, 1.0]


def test_unused_parameters_have_no_gradient():
    w, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    assert gradients(w.sum(), [w, unused])[1].tolist() == [0.0, 0.0, 0.0]


def test_value_and_gradient_are_as_wanted():
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    loss = with_gradient(torch.tensor(7.0), [w], [torch.tensor([0.25, 4.0])])
    loss.backward()
    assert loss.item() == 7.0
    assert w.grad.tolist() == [0.25, 4.0]
