"""Freezing a model and giving it back; models that cannot be scanned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.surgery import frozen, logits, require_independent_rows
from tests.toys import images, net


def mixed() -> nn.Module:
    """Partly in train mode, partly fixed, with one gradient."""
    model = net(seed=0).train()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


def state(model: nn.Module) -> list[object]:
    return [
        [(n, m.training) for n, m in model.named_modules()],
        [(n, p.requires_grad) for n, p in model.named_parameters()],
        {n: b.tolist() for n, b in model.named_buffers()},
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
    ]


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [None, Stop, KeyboardInterrupt])
def test_everything_comes_back(error):
    model = mixed()
    before = state(model)
    try:
        with frozen(model) as inside:
            assert inside is model
            assert not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            model.train()  # a careless method: statistics move
            model(images(12, seed=0)[0])
            assert model[1].num_batches_tracked == 1
            if error:
                raise error
    except (Stop, KeyboardInterrupt):
        assert error is not None
    assert state(model) == before


def test_buffers_stay_the_same_objects():
    model = mixed()
    before = [b.data_ptr() for b in model.buffers()]
    with frozen(model):
        model.train()(images(12, seed=0)[0])
    assert [b.data_ptr() for b in model.buffers()] == before


class Returns(nn.Module):
    """Gives what a function makes of the images."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor):
        return self.function(x)


X = images(4, seed=1)[0]


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: x, r"\(4, 3, 12, 12\)"),
        (lambda x: x.mean((1, 2, 3)), r"\(4,\)"),
        (lambda x: x.mean((0, 2, 3))[None], r"\(1, 3\)"),
        (lambda x: (x.mean((2, 3)),), "tuple"),
        (lambda x: {"logits": x}, "dict"),
    ],
)
def test_output_that_is_no_logits(function, found):
    with pytest.raises(UnsupportedModel, match=rf"expected logits of shape \(4, classes\), got {found}"):
        logits(Returns(function), X)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value):
    with pytest.raises(UnsupportedModel, match="NaN or infinite"):
        require_independent_rows(Returns(lambda x: x.mean((2, 3)).index_fill(1, torch.tensor([1]), value)), X)


def test_rows_that_interact():
    with pytest.raises(UnsupportedModel, match="other images of its batch"):
        require_independent_rows(Returns(lambda x: x.mean((2, 3)) - x.mean((0, 2, 3))), X)
    with pytest.raises(UnsupportedModel, match="other images of its batch"):
        require_independent_rows(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()).eval(), X)


def test_rows_that_do_not_interact():
    require_independent_rows(net(seed=0).eval(), X)
    require_independent_rows(Returns(lambda x: x.mean((2, 3))), X)
