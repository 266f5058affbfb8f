"""Gates: found on any architecture, applied without a change of the model, folded exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.nets.registry import find
from bezoar.ops.channels import Gates, find_sites


class Depthwise(nn.Sequential):
    def __init__(self) -> None:
        block = (nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(2, 8), nn.ReLU6(), nn.Conv2d(8, 12, 1))
        super().__init__(nn.Conv2d(3, 8, 3, stride=2), *block, nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.append(nn.Flatten())
        self.append(nn.Linear(12, 5))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.norm = nn.LayerNorm(16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.block(self.norm(self.patch(x).flatten(2).transpose(1, 2)))
        return self.head(tokens.mean(1))


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    own = {"depthwise": Depthwise, "tokens": Tokens}
    if name in own:
        return own[name]()
    found = find(name)
    assert found is not None
    return found[0](5, 3, 32)


NAMES = ["wrn-10-1", "preactresnet-18", "resnet-20", "vgg-11", "small-vgg", "nc-gtsrb", "depthwise", "tokens"]


def warmed(name: str) -> nn.Module:
    """In eval mode, with gains, shifts and running statistics that are not those of a new net."""
    model = net(name)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "bias", None) is not None and isinstance(module.bias, Tensor):
                module.bias.copy_(0.3 * torch.randn(module.bias.shape, generator=source))
        model(torch.rand(8, 3, 32, 32, generator=source))
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_ones_change_nothing_and_the_model_is_left_alone(name):
    model, x = warmed(name), torch.rand(2, 3, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wanted = model(x)
    gates = Gates(find_sites(model, x[:1]))
    with gates.applied():
        assert torch.equal(model(x), wanted), "not even by rounding"
    assert torch.equal(model(x), wanted), "no hook is left"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("name", NAMES)
def test_folded_does_what_gated_did(name):
    model, x = warmed(name), torch.rand(2, 3, 32, 32)
    gates = Gates(find_sites(model, x[:1]))
    source = torch.Generator().manual_seed(2)
    for site in gates.sites:
        gates.gain[site.name] = torch.rand(site.channels, generator=source).round(decimals=1)
        gates.shift[site.name] = 1 + 0.2 * torch.rand(site.channels, generator=source)
    plain = model(x)
    with gates.applied():
        gated = model(x)
    gates.fold()
    torch.testing.assert_close(model(x), gated, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(gated, plain, atol=1e-3)


def test_norms_where_there_are_any_else_hidden_layers():
    x = torch.rand(1, 3, 32, 32)
    assert all(s.norm for s in find_sites(net("preactresnet-18"), x))
    plain = find_sites(net("nc-gtsrb"), x)
    assert not any(s.norm for s in plain)
    assert [s.channels for s in plain] == [32, 32, 64, 64, 128, 128, 512], "not the layer that gives the logits"
    kinds = {type(s.module) for s in find_sites(net("depthwise"), x)}
    assert kinds == {nn.GroupNorm, nn.BatchNorm2d}


def test_closed_channel_of_a_plain_layer_gives_nothing_and_of_a_norm_its_shift():
    model, x = warmed("nc-gtsrb"), torch.rand(1, 3, 32, 32)
    seen: list[Tensor] = []
    gates = Gates(find_sites(model, x))
    first = gates.sites[0]
    gates.gain[first.name][3] = 0
    gates.fold()
    first.module.register_forward_hook(lambda _m, _g, out: seen.append(out))
    model(x)
    assert bool((seen[0][:, 3] == 0).all())
    model, seen = warmed("wrn-10-1"), []
    gates = Gates(find_sites(model, x))
    site = gates.sites[0]
    gates.gain[site.name][3] = 0
    gates.fold()
    site.module.register_forward_hook(lambda _m, _g, out: seen.append(out))
    model(x)
    torch.testing.assert_close(seen[0][:, 3], site.module.bias[3].expand_as(seen[0][:, 3]))


def test_gradients_reach_the_gates():
    model, x = warmed("wrn-10-1"), torch.rand(2, 3, 32, 32)
    gates = Gates(find_sites(model, x[:1]))
    gain = {k: v.requires_grad_() for k, v in gates.gain.items()}
    with gates.applied(gain=gain):
        model(x).square().sum().backward()
    assert all(v.grad is not None and bool(v.grad.abs().sum() > 0) for v in gain.values())


def test_model_without_channels_is_refused():
    with pytest.raises(UnsupportedModel, match="no channels to gate"):
        find_sites(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2))


class ChannelsFirst(nn.LayerNorm):
    """LayerNorm over the channels of an image, as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Activated(nn.BatchNorm2d):
    """BatchNorm with its activation inside, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize(
    "norm",
    [ChannelsFirst(4), Activated(4), nn.LayerNorm([4, 6, 6]), nn.InstanceNorm2d(4, affine=True), nn.RMSNorm(6)],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_of_every_kind_are_gated_as_they_are_folded(norm):
    norm = copy.deepcopy(norm)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()).view(parameter.shape))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(144, 5)).eval()
    x = torch.rand(2, 3, 8, 8)
    gates = Gates(find_sites(model, x[:1]))
    assert len(gates.sites) == 1
    source = torch.Generator().manual_seed(2)
    for name in gates.gain:
        gates.gain[name] = torch.rand(len(gates.gain[name]), generator=source)
        gates.shift[name] = torch.rand(len(gates.gain[name]), generator=source)
    with torch.no_grad():
        plain = model(x)
        with gates.applied():
            gated = model(x)
        gates.fold()
        assert torch.equal(model(x), gated)
    assert not torch.allclose(gated, plain)


def test_weights_that_a_parametrisation_computes_are_left_out():
    hidden = nn.utils.parametrizations.weight_norm(nn.Linear(12, 8))
    model = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    assert [site.channels for site in find_sites(model, torch.rand(1, 3, 2, 2))] == [6]


@pytest.mark.parametrize("first", [nn.Identity(), nn.Conv2d(3, 3, 1, groups=3)], ids=["images", "depthwise"])
def test_group_norm_behind_frozen_layers_and_channels_last(first):
    """torch 2.13 crashes here on the CPU unless the input is made contiguous."""
    model = nn.Sequential(first, nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(192, 2)).requires_grad_(False)
    x = torch.rand(24, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    gates = Gates(find_sites(model, x[:1]))
    gain = {name: one.requires_grad_() for name, one in gates.gain.items()}
    for _ in range(20):
        with gates.applied(gain=gain):
            model(x).square().sum().backward()
    assert all(bool(torch.isfinite(one.grad).all()) for one in gain.values())
