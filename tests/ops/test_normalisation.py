"""What BatchNorm remembers, and the gains and shifts of normalisations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bezoar.ops.normalisation import (
    batch_norms,
    estimate_statistics,
    fix_statistics,
    gains_and_shifts,
    statistics_kept,
)
from tests.purifiers.nets import examples, make


def test_statistics_are_those_of_the_images():
    model = nn.Sequential(nn.BatchNorm2d(3))
    x = examples(50)[0]
    estimate_statistics(model, x, batch=50)
    layer = model[0]
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, x.transpose(0, 1).flatten(1).var(1))
    assert layer.momentum == 0.1
    assert layer.training


def test_batches_count_the_same():
    model = nn.Sequential(nn.BatchNorm2d(3))
    x = examples(21)[0]
    estimate_statistics(model, x, batch=10)
    means = torch.stack([part.mean((0, 2, 3)) for part in torch.tensor_split(x, 2)])
    torch.testing.assert_close(model[0].running_mean, means.mean(0))


def test_a_deeper_layer_sees_normalised_images():
    model, x = make("normed"), examples(40)[0]
    estimate_statistics(model, x)
    with torch.no_grad():
        norm = model[1]
        seen = nn.functional.batch_norm(model[0](x), None, None, norm.weight, norm.bias, training=True)
        inputs = model[4](model[3](torch.relu(seen)))
    torch.testing.assert_close(model[5].running_mean, inputs.mean((0, 2, 3)))


def test_a_single_image_changes_nothing():
    model = make("normed")
    before = copy.deepcopy(model.state_dict())
    estimate_statistics(model, examples(1)[0])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_modes_come_back_after_a_failure():
    model = make("normed")
    model[5].train()
    with pytest.raises(RuntimeError):
        estimate_statistics(model, torch.rand(4, 5, 16, 16))
    assert [m.training for m in (model, model[1], model[5])] == [False, False, True]
    assert model[1].momentum == 0.1


def test_inside_nothing_is_remembered_and_outside_it_is():
    model, x = make("normed").train(), examples(8)[0]
    before = copy.deepcopy(model.state_dict())
    with statistics_kept(model):
        inside = model(x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(inside, model(x))  # it normalises by the batch all the same
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_fixed_statistics_stay_in_train_mode():
    model = make("normed").train()
    fix_statistics(model)
    before = copy.deepcopy(model.state_dict())
    model(examples(1)[0])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize(("name", "norms", "batch"), [("plain", 0, 0), ("normed", 40, 2), ("depthwise", 40, 1)])
def test_finds_layers_by_type(name, norms, batch):
    model = make(name)
    assert sum(p.numel() for p in gains_and_shifts(model)) == norms
    assert len(batch_norms(model)) == batch


def test_layer_norms_are_found():
    assert len(gains_and_shifts(make("vit"))) == 2 * 5
