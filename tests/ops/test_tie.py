"""The tie between two groups of examples, against a small step that is really taken."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bezoar.core.examples import Examples, Subset
from bezoar.core.run import Run
from bezoar.ops.tie import given_their_label, log_odds, tie
from tests.toys import LABELS, SIZE, TARGET, images, net, trained, trigger


def test_log_odds_are_those_of_the_probability():
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 3, 1, 2, 2])
    p = z.softmax(1).gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(log_odds(z, y), (p / (1 - p)).log())


def mean_odds(model: nn.Module, data: Subset) -> float:
    with torch.no_grad():
        return float(log_odds(model(data.take(torch.arange(len(data.rows)))), data.labels).mean())


def test_tie_is_what_a_small_step_does():
    model = net(3).eval().double()
    x, y = images(600, seed=1)
    data = Examples(x.double(), y, LABELS)
    group, others = (Subset(data, (y == label).nonzero().flatten()) for label in (1, 4))
    found = tie(model, group, others, Run())
    stepped = copy.deepcopy(model)
    weights = list(stepped.parameters())
    odds = log_odds(stepped(group.take(torch.arange(len(group.rows)))), group.labels).mean()
    with torch.no_grad():
        for weight, slope in zip(weights, torch.autograd.grad(odds, weights), strict=True):
            weight -= 1e-7 * slope
    fall, others_fall = (mean_odds(model, one) - mean_odds(stepped, one) for one in (group, others))
    assert found == pytest.approx(others_fall / fall, rel=1e-3, abs=1e-5)


def test_group_is_tied_to_itself_and_not_to_nothing():
    data = Examples(*images(60, seed=1), LABELS)
    assert tie(net(0), data, data, Run()) == pytest.approx(1.0)
    none = Subset(data, torch.arange(0))
    assert tie(net(0), none, data, Run()) == tie(net(0), data, none, Run()) == float("inf")


def test_poison_is_hardly_tied_to_its_label_and_genuine_examples_are():
    model, (x, y) = trained(backdoored=True), images(900, seed=100)
    stamped = y != TARGET
    bad = Examples(trigger()(x[stamped][:40]), torch.full((40,), TARGET), LABELS)
    for label in range(LABELS):
        mine = (y == label).nonzero().flatten()
        genuine, rest = Examples(x[mine[:40]], y[mine[:40]], LABELS), Examples(x[mine[40:]], y[mine[40:]], LABELS)
        assert tie(model, genuine, rest, Run()) > 0.9, label
        if label == TARGET:
            assert tie(model, bad, rest, Run()) < 0.55


def test_model_is_left_as_it_was():
    model, data = net(0).train(), Examples(*images(60, seed=1), LABELS)
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tie(model, data, data, Run())
    assert model.training
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_examples_that_get_their_label_are_kept():
    x, y = images(90, seed=1)
    wrong = y.clone()
    wrong[::3] = (wrong[::3] + 1) % LABELS
    rows = torch.arange(10, 70)
    found = given_their_label(trained(backdoored=False), Examples(x, wrong, LABELS), rows, Run()).rows
    assert torch.isin(found, rows).all()
    assert len(found) >= 36
    assert (wrong[found] == y[found]).all()
    assert x.shape[2] == SIZE
