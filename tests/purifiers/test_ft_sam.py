"""Sharpness-aware fine-tuning: the displaced weights, what is remembered where, and what becomes of the backdoor."""

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
from bezoar.ops.fit import Batch, fit
from bezoar.purifiers.ft_sam import FTSAM, Sharpness, displacement
from tests.purifiers.nets import examples, make
from tests.toys import LABELS, acc, asr, images, trained


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = images(180, seed=7)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


def suspect():
    return copy.deepcopy(trained(backdoored=True))


def batch(count=6):
    x, y = examples(count)
    return Batch(x, y, torch.arange(count), lambda images: images, torch.Generator())


def test_backdoor_goes_and_accuracy_stays(clean):
    held_out = images(240, seed=8)
    model = FTSAM()(suspect(), clean, Run())
    assert asr(model, *held_out) < 0.2
    assert acc(model, *held_out) > 0.95


@pytest.mark.parametrize("rho", [0.0, 1e-7])
def test_no_radius_is_fine_tuning(clean, rho):
    method, tuned = FTSAM(rho=rho, epochs=2, label_smoothing=0.0), suspect()
    fit(tuned, clean.x, clean.y, method.recipe(), seed=5)
    model = method(suspect(), clean, Run(seed=5))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, tuned.state_dict()[name], rtol=1e-4, atol=1e-5)


@given(st.floats(0.01, 10), st.booleans())
def test_displacement_has_the_radius_in_units_of_the_weights(rho, adaptive):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]
    gradient = [torch.randn(p.shape, generator=generator) for p in parameters]
    steps = displacement(parameters, gradient, rho, adaptive)
    scale = [p.abs() if adaptive else torch.ones_like(p) for p in parameters]
    length = torch.cat([(s / t).flatten() for s, t in zip(steps, scale, strict=True)]).norm()
    assert float(length) == pytest.approx(rho, rel=1e-4)
    rise = sum(float((s * g).sum()) for s, g in zip(steps, gradient, strict=True))
    other = displacement(parameters, [torch.randn(p.shape, generator=generator) for p in parameters], rho, adaptive)
    assert rise > sum(float((s * g).sum()) for s, g in zip(other, gradient, strict=True)), "the steepest one"


def test_displacement_of_no_gradient_is_none():
    (step,) = displacement([torch.ones(3)], [torch.zeros(3)], 2.0, True)
    assert step.tolist() == [0.0, 0.0, 0.0]


def test_gradient_is_that_at_the_displaced_weights():
    model = make("plain").requires_grad_(True)
    data = batch()
    method = FTSAM(rho=0.5, label_smoothing=0.1)
    loss = Sharpness(method, False).loss(model, data)
    loss.backward()

    def smoothed(net):
        return F.cross_entropy(net(data.x), data.y, label_smoothing=0.1)

    there = copy.deepcopy(model)
    here = torch.autograd.grad(smoothed(there), list(there.parameters()))
    norm = sum(float((p.detach() * g).square().sum()) for p, g in zip(there.parameters(), here, strict=True)) ** 0.5
    with torch.no_grad():
        for p, g in zip(there.parameters(), here, strict=True):
            p.add_(0.5 * p.square() * g / norm)
    expected = torch.autograd.grad(smoothed(there), list(there.parameters()))
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)
    assert loss.item() == pytest.approx(smoothed(model).item(), rel=1e-5), "the loss told is that of the weights kept"


def test_only_the_pass_at_the_kept_weights_is_remembered():
    model, other, data = make("normed"), make("normed"), batch()
    Sharpness(FTSAM(rho=5.0), False).loss(model.train(), data)
    other.train()(data.x)
    assert not torch.equal(model[1].running_mean, make("normed")[1].running_mean)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(name))
    for name, value in model.named_parameters():
        assert torch.equal(value, other.get_parameter(name)), "the weights came back"


def test_a_weight_of_zero_stays_where_the_radius_is_relative():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0, 0] = 0
    steps = displacement(list(layer.parameters()), [torch.ones(2, 3), torch.ones(2)], 1.0, True)
    assert float(steps[0][0, 0]) == 0.0
    assert float(steps[0][0, 1]) > 0.0


@pytest.mark.parametrize(
    ("name", "value"), [("rho", -1.0), ("label_smoothing", 1.0), ("epochs", 0), ("batch", 1), ("clip", -1.0)]
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"FTSAM.{name} must be"):
        FTSAM(**{name: value})
