"""Mode connectivity repair: the ends of the curve, what training the bend gains, and what is taken from it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.core.errors import SettingError
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.ops.fit import Batch, Recipe, fit
from bezoar.ops.normalisation import estimate_statistics
from bezoar.purifiers import mcr
from bezoar.purifiers.mcr import MCR, CurveLoss, bezier, hold, weights
from tests.purifiers.nets import examples, make
from tests.toys import LABELS, acc, asr, images, trained


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = images(180, seed=7)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


def suspect():
    return copy.deepcopy(trained(backdoored=True))


def three(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)] for _ in range(3)]


def test_ends_are_exact():
    start, bend, end = three()
    assert all(torch.equal(a, b) for a, b in zip(bezier(0.0, start, bend, end), start, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bezier(1.0, start, bend, end), end, strict=True))


@given(st.floats(0, 1))
def test_a_bend_half_way_makes_the_chord(t):
    start, _, end = three()
    bend = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
    for a, b, there in zip(start, end, bezier(t, start, bend, end), strict=True):
        torch.testing.assert_close(there, (1 - t) * a + t * b, rtol=0, atol=1e-5)


def test_gradient_of_the_bend_by_the_chain_rule():
    model, other, end = make("plain").requires_grad_(True), make("plain", 1), make("plain", 2)
    start = weights(other.requires_grad_(True))
    last = weights(end.requires_grad_(True))
    (x, y), generator = examples(5), torch.Generator().manual_seed(3)
    t = float(torch.rand((), generator=torch.Generator().manual_seed(3)))
    batch = Batch(x, y, torch.arange(5), lambda images: images, generator)
    loss = CurveLoss(start, last).loss(model, batch)
    loss.backward()
    bend = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    names = list(bend)
    there = bezier(t, start, list(bend.values()), last)
    expected = F.cross_entropy(torch.func.functional_call(model, dict(zip(names, there, strict=True)), x), y)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, bend[name].grad, rtol=1e-4, atol=1e-6)


def test_curve_is_no_worse_than_the_chord_for_a_linear_model():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60, 1, 2, 2, generator=generator)
    y = (x.flatten(1)[:, 0] > x.flatten(1)[:, 1]).long()
    ends = [[torch.randn(2, 4, generator=generator), torch.randn(2, generator=generator)] for _ in range(2)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    def mean_loss(bend):
        found = []
        for t in torch.linspace(0, 1, 21).tolist():
            hold(model, bezier(t, ends[0], bend, ends[1]))
            with torch.no_grad():
                found.append(float(F.cross_entropy(model(x), y)))
        return sum(found) / len(found)

    chord = [(a + b) / 2 for a, b in zip(*ends, strict=True)]
    straight = mean_loss(chord)
    hold(model, chord)
    fit(model, x, y, Recipe(epochs=60, batch=20, lr=0.1, weight_decay=0.0), objective=CurveLoss(*ends))
    assert mean_loss(weights(model)) < straight - 0.05


def test_ends_of_the_run_are_the_suspect_and_its_tuned_copy(clean, monkeypatch):
    seen = []

    def training(model, *args, objective, **rest):
        seen.append((objective, copy.deepcopy(model)))
        losses = fit(model, *args, objective=objective, **rest)
        seen.append(copy.deepcopy(model))
        return losses

    monkeypatch.setattr(mcr, "fit", training)
    settings = {"epochs": 2, "endpoint_epochs": 2}
    first = MCR(t=0.0, **settings)(suspect(), clean, Run())
    last = MCR(t=1.0, **settings)(suspect(), clean, Run())
    tuned, (curve, bent) = seen[1], seen[2]
    for model, expected in ((first, suspect()), (last, tuned)):
        assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(expected), strict=True))
    chord = [(a + b) / 2 for a, b in zip(weights(suspect()), weights(tuned), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(weights(bent), chord, strict=True)), "the bend starts on the chord"
    assert all(torch.equal(a, b) for a, b in zip(curve.start, weights(suspect()), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(seen[3]), chord, strict=True)), "and is trained"


def test_statistics_are_those_of_the_network_that_is_taken(clean):
    model = MCR(t=0.5, epochs=2, endpoint_epochs=2)(suspect(), clean, Run())
    again = copy.deepcopy(model)
    estimate_statistics(again, clean.x)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize(("accuracies", "expected"), [({}, 0.5), ({0.7: 0.4}, 0.8), ({0.9: 0.1}, 1.0)])
def test_place_is_the_nearest_to_the_middle_that_is_accurate(clean, monkeypatch, accuracies, expected):
    at = []
    monkeypatch.setattr(mcr, "bezier", lambda t, start, bend, end: at.append(t) or bezier(t, start, bend, end))
    monkeypatch.setattr(mcr, "accuracy", lambda *_: accuracies.get(at[-1], 1.0) if at else 1.0)
    monkeypatch.setattr(CurveLoss, "loss", lambda self, model, batch: sum(p.sum() * 0 for p in model.parameters()))
    run = Run()
    MCR(epochs=1, endpoint_epochs=1)(suspect(), clean, run)
    assert run.notes["t"] == expected
    assert at[-1] == expected
    assert bool(run.warnings) == (expected == 1.0)


def test_little_harm_and_some_help(clean):
    held_out = images(240, seed=8)
    model = MCR()(suspect(), clean, Run())
    assert acc(model, *held_out) > 0.95
    assert asr(model, *held_out) < asr(suspect(), *held_out)


@pytest.mark.parametrize(
    ("name", "value"),
    [("t", -0.1), ("t", 1.1), ("tolerance", 2.0), ("epochs", 0), ("endpoint_epochs", 0), ("endpoint_lr", -1.0)],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"MCR.{name} must be"):
        MCR(**{name: value})
