"""Units: which inputs of the next layer belong to a channel, their activations, and that shut ones give nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bezoar.core.errors import UnsupportedModel
from bezoar.nets.registry import find
from bezoar.ops.units import Units, last_channels, last_features
from tests.purifiers.nets import NAMES, few, hooks, make


def test_flattened_maps_belong_to_their_channels():
    model = make("plain")
    units = last_channels(model, few(1).x)
    assert units.reader is model[7]
    assert units.count == 12
    assert units.member.tolist() == torch.arange(12).repeat_interleave(16).tolist()


def test_any_order_of_flattening():
    """DeepID flattens channels last, and its last two convolutions each feed a layer."""
    model = find("deepid")[0](6, 3, 55).eval()
    units = last_channels(model, torch.rand(1, 3, 55, 47))
    assert units.reader is model.fc_2
    assert units.count == 80
    assert units.member.tolist() == torch.arange(80).repeat(len(units.member) // 80).tolist()


@pytest.mark.parametrize(("name", "count"), [("wrn-10-1", 64), ("resnet-20", 64), ("depthwise", 12), ("normed", 12)])
def test_channels_of_the_last_convolution(name, count):
    model = make(name)
    assert last_channels(model, few(1).x).count == count


def test_where_channels_mix_the_last_features_are_meant():
    model = make("vit")
    units = last_channels(model, few(1).x)
    assert units.reader is model.head
    assert units.member.tolist() == list(range(16))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [last_channels, last_features])
def test_folded_is_shut_and_a_shut_unit_has_no_say(name, kind):
    model, x = make(name), few(6).x
    units = kind(model, x[:1])
    closed = torch.tensor([1, 3])
    with torch.no_grad():
        plain = model(x)
        with units.shut(closed):
            shut = model(x)
        assert torch.equal(model(x), plain)
        units.fold(closed)
        torch.testing.assert_close(model(x), shut)
        assert not torch.equal(shut, plain)
    gone = torch.isin(units.member, closed)
    inputs = units.reader.weight.transpose(0, 1)
    assert bool((inputs[gone] == 0).all())
    assert bool((inputs[~gone] != 0).any())
    assert hooks(model) == 0


def test_activations_are_means_over_images_and_places():
    model, x = make("normed"), few(10).x
    units = last_channels(model, x[:1])
    with torch.no_grad():
        wanted = nn.Sequential(*list(model)[:8])(x).mean((0, 2, 3))
    torch.testing.assert_close(units.activations(model, x, batch=4), wanted.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_activations_do_not_change_with_copies_of_the_data(name):
    model, x = make(name), few(10).x
    units = last_channels(model, x[:1])
    once, twice = units.activations(model, x), units.activations(model, torch.cat([x, x]))
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-7)


def test_a_convolution_may_give_the_logits():
    model = nn.Sequential(
        *(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ).eval()
    x = torch.rand(3, 3, 8, 8)
    units = last_channels(model, x[:1])
    assert units.reader is model[2]
    assert units.count == 5
    with torch.no_grad():
        wanted = model[:2](x).mean((0, 2, 3)).double()
        torch.testing.assert_close(units.activations(model, x), wanted, rtol=1e-5, atol=1e-6)
        with units.shut(torch.tensor([0])):
            shut = model(x)
        units.fold(torch.tensor([0]))
        torch.testing.assert_close(model(x), shut)


def test_nothing_that_gives_the_logits_is_refused():
    with pytest.raises(UnsupportedModel, match="gives the logits"):
        last_features(nn.Flatten(), torch.rand(1, 3, 2, 2))


def test_is_a_value_with_an_axis():
    assert Units(nn.Linear(2, 2), torch.arange(2), 2).axis == -1
    assert Units(nn.Conv2d(2, 2, 1), torch.arange(2), 2).axis == 1
