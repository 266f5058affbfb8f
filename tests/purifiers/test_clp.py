"""CLP: the bound of a channel, which convolution belongs to which BatchNorm, and what is shut."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.run import Run
from bezoar.ops.lipschitz import lipschitz, pairs, stands_out
from bezoar.purifiers.clp import CLP
from tests.purifiers.nets import LARGE, NAMES, few, form, make, same, toy_clean
from tests.toys import acc, images, trained


def test_bound_is_the_spectral_norm_times_gain_over_deviation():
    """Channel by channel with another library."""
    model = make("normed")
    layer, norm = model[4], model[5]
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-2, 2, 12))
    found = lipschitz(layer, norm)
    for channel in range(12):
        kernel = layer.weight[channel].detach().numpy().reshape(8, 9).astype(np.float64)
        factor = abs(float(norm.weight[channel].detach())) / np.sqrt(float(norm.running_var[channel]) + norm.eps)
        assert float(found[channel]) == pytest.approx(np.linalg.svd(kernel)[1].max() * factor, rel=1e-6)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, groups=8), nn.Linear(9, 8), nn.Conv2d(9, 8, 1)])
def test_kernel_of_one_row_has_its_length_for_a_bound(layer):
    wanted = layer.weight.detach().double().flatten(1).norm(dim=1)
    torch.testing.assert_close(lipschitz(layer, None), wanted)


@given(st.integers(0, 1000))
def test_no_channel_amplifies_beyond_its_bound(seed):
    """One position of a convolution with BatchNorm in eval mode, pixels of one colour moved by a unit vector each."""
    source = torch.Generator().manual_seed(seed)
    layer, norm = nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5, 4, 3, 3, generator=source))
        norm.weight.copy_(torch.randn(5, generator=source))
        norm.running_var.copy_(torch.rand(5, generator=source) + 0.1)
        a, b = torch.randn(4, generator=source), torch.randn(9, generator=source)
        change = (a / a.norm()).view(1, 4, 1, 1) * (b / b.norm()).view(1, 1, 3, 3)
        x = torch.rand(1, 4, 3, 3, generator=source)
        moved = (norm(layer(x + change)) - norm(layer(x))).abs().flatten().double()
    assert bool((moved <= lipschitz(layer, norm) * (1 + 1e-4) + 1e-5).all())


def test_only_what_is_far_above_the_others_stands_out():
    bounds = torch.tensor([1.0] * 20 + [1.1] * 20 + [9.0, 0.0], dtype=torch.float64)
    assert stands_out(bounds, 3.0).nonzero().flatten().tolist() == [40]
    assert not bool(stands_out(bounds, 7.0).any())
    assert not bool(stands_out(bounds[:1], 0.1).any())


@given(st.lists(st.floats(1e-3, 100), min_size=2, max_size=10))
def test_layers_of_ten_or_less_are_left_alone(values):
    assert not bool(stands_out(torch.tensor(values, dtype=torch.float64), 3.0).any())


def test_pairs_of_a_residual_net():
    model = make("resnet-20")
    found = pairs(model, few(1).x)
    names = {module: name for name, module in model.named_modules()}
    assert len(found) == 19
    for layer, norm in found:
        assert names[norm] == names[layer].replace("conv", "bn")


def test_without_pairs_all_hidden_layers():
    model = make("plain")
    assert [layer for layer, norm in pairs(model, few(1).x) if norm is None] == [model[0], model[3], model[7]]


def amplifying() -> nn.Module:
    model = copy.deepcopy(trained(backdoored=True))
    with torch.no_grad():
        model[5].weight[7] = 60.0
        model[5].bias[7] = -500.0  # hardly ever opens
    return model


def test_loud_channel_is_shut_with_its_shift_and_nothing_else_changes():
    model, before, run = amplifying(), amplifying().state_dict(), Run()
    CLP()(model, toy_clean(), run)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"5.weight", "5.bias"}
    for part in ("weight", "bias"):
        now, was = getattr(model[5], part).detach(), before[f"5.{part}"]
        assert float(now[7]) == 0
        others = torch.arange(32) != 7
        assert torch.equal(now[others], was[others])
    assert run.notes == {"pruned": 1, "channels": 48}
    assert run.warnings == []


def test_clean_images_play_no_part():
    one, other = amplifying(), amplifying()
    CLP()(one, toy_clean(1), Run())
    CLP()(other, toy_clean(100), Run())
    assert same(one, other)


def test_little_is_lost_on_the_toy():
    for backdoored in (True, False):
        model = CLP()(copy.deepcopy(trained(backdoored=backdoored)), toy_clean(), Run())
        assert acc(model, *images(300, seed=8)) > 0.95


def test_net_without_batch_norm_is_judged_by_its_kernels():
    model, run = make("plain"), Run()
    with torch.no_grad():
        model[7].weight[4] *= 100
    CLP()(model, few(2), run)
    assert bool((model[7].weight[4] == 0).all())
    assert float(model[7].bias[4].detach()) == 0
    assert run.notes["pruned"] == 1
    assert "kernels alone" in run.warnings[0]


def test_pairs_of_a_preactivation_net():
    """Inside a block a convolution feeds the BatchNorm; the one behind a sum goes with the last, as in the code."""
    model = make(*LARGE)
    found = {id(norm): layer for layer, norm in pairs(model, few(1).x)}
    block = model.layer3[1]
    assert found[id(block.bn2)] is block.conv1
    assert found[id(block.bn1)] is model.layer3[0].conv2


@pytest.mark.parametrize("name", [*NAMES, *LARGE])
def test_architectures(name):
    model, run = make(name), Run()
    before = form(model)
    out = CLP(u=1.0)(model, few(2), run)
    assert form(out) == before
    assert bool(torch.isfinite(out(few(8).x)).all())
    assert 0 < run.notes["pruned"] < run.notes["channels"] / 2


def test_net_without_hidden_layers_is_refused():
    with pytest.raises(UnsupportedModel, match="no hidden"):
        CLP()(nn.Sequential(nn.Flatten(), nn.Linear(768, 6)).eval(), few(2), Run())


def test_settings_out_of_range():
    with pytest.raises(SettingError, match="CLP.u must be"):
        CLP(u=0.0)
