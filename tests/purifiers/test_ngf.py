"""NGF: its step is Newton's, does not care for the scale of the features, and moves the head alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.purifiers.ngf import NGF, _diagonal, _slope, natural_step
from tests.purifiers.nets import CLASSES, NAMES, examples, make
from tests.toys import LABELS, acc, asr, images, trained


def clean(count: int) -> Clean:
    x, y = images(count, seed=7)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


def suspect() -> nn.Module:
    return copy.deepcopy(trained(backdoored=True))


def problem(count: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return a, weight, torch.randint(4, (count,), generator=generator)


def test_step_is_newtons():
    a, weight, y = problem()
    _, slope, chances = _slope(a, y, weight)
    matrix = torch.autograd.functional.hessian(lambda w: F.cross_entropy(a @ w.T, y), weight).view(20, 20)
    torch.testing.assert_close(slope, torch.autograd.functional.jacobian(lambda w: F.cross_entropy(a @ w.T, y), weight))
    wanted = torch.linalg.pinv(matrix) @ slope.flatten()
    torch.testing.assert_close(natural_step(a, chances, slope, damping=0.0).flatten(), wanted, rtol=1e-4, atol=1e-5)
    damped = torch.linalg.solve(matrix + 0.1 * torch.eye(20).double(), slope.flatten())
    torch.testing.assert_close(natural_step(a, chances, slope, damping=0.1).flatten(), damped, rtol=1e-4, atol=1e-5)


def test_step_does_not_care_for_an_invertible_map_of_the_features():
    a, weight, y = problem()
    mixed = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3 * torch.eye(5)
    other, its_weight = a @ mixed, weight @ torch.linalg.inv(mixed).T
    torch.testing.assert_close(a @ weight.T, other @ its_weight.T)
    moves = []
    for features, at in ((a, weight), (other, its_weight)):
        _, slope, chances = _slope(features, y, at)
        moves.append(features @ natural_step(features, chances, slope, damping=0.0).T)
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-3, atol=1e-4)
    plain = [f @ _slope(f, y, w)[1].T for f, w in ((a, weight), (other, its_weight))]
    assert float((plain[0] - plain[1]).abs().max()) > 1, "which the plain gradient does"


def test_diagonal():
    a, weight, y = problem()
    matrix = torch.autograd.functional.hessian(lambda w: F.cross_entropy(a @ w.T, y), weight).view(20, 20)
    torch.testing.assert_close(_diagonal(a, torch.softmax(a @ weight.T, 1)).flatten(), matrix.diagonal())


def test_head_alone_moves_and_accuracy_stays():
    run, held_out = Run(), images(240, seed=8)
    model, old = NGF()(suspect(), clean(180), run), trained(backdoored=True).state_dict()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, old[k])}
    assert moved == {"9.weight", "9.bias"}
    assert acc(model, *held_out) > 0.93
    assert asr(model, *held_out) <= asr(suspect(), *held_out)
    assert run.notes["head_moved"] > 0


def test_lowers_the_loss():
    model, data = suspect(), clean(180)
    with torch.no_grad():
        model[9].weight.mul_(0.05)
    before = float(F.cross_entropy(model(data.x), data.y).detach())
    NGF(steps=50, pad=0)(model, data, Run())
    assert float(F.cross_entropy(model(data.x), data.y).detach()) < 0.5 * before


def test_anchor_holds_the_head():
    moved = {}
    for anchor in (0.0, 100.0):
        run = Run()
        NGF(anchor=anchor, steps=100)(suspect(), clean(60), run)
        moved[anchor] = run.notes["head_moved"]
    assert moved[100.0] < 0.5 * moved[0.0]


def test_steps_are_shortened():
    moved = []
    for limit in (1e-8, 1e8):
        run = Run()
        NGF(steps=1, lr=1.0, kl_clip=limit, damping=0.1)(suspect(), clean(180), run)
        moved.append(run.notes["head_moved"])
    assert moved[0] < 0.01 * moved[1]


@pytest.mark.parametrize("count", [1, 6])
def test_small_sets(count):
    model = NGF(steps=20)(suspect(), clean(count), Run())
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_every_net(name):
    x, y = examples(12)
    data = Clean(x=x, y=y, held_x=x, held_y=y, num_classes=CLASSES)
    before = make(name).state_dict()
    model = NGF(steps=5)(make(name), data, Run())
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert len(moved) == 2
    assert {before[k].ndim for k in moved} == {1, 2}


def test_head_without_a_bias():
    x, y = examples(12)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, CLASSES, bias=False))
    before = model[2].weight.detach().clone()
    NGF(steps=2)(model, Clean(x=x, y=y, held_x=x, held_y=y, num_classes=CLASSES), Run())
    assert not torch.equal(model[2].weight, before)


def test_head_that_is_no_linear_layer_is_refused():
    model = nn.Sequential(nn.Conv2d(3, LABELS, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UnsupportedModel, match="no linear layer but Conv2d"):
        NGF()(model, clean(6), Run())


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch", 0), ("copies", 0), ("lr", -1.0), ("damping", 0.0), ("kl_clip", 0.0), ("momentum", 1.0)],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"NGF.{name} must be"):
        NGF(**{name: value})
