"""Shortcuts: found without names, scaled without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bezoar.ops.residual import find_shortcuts, scaled
from tests.purifiers.nets import NAMES, examples, make


def layers(name):
    return [(one.block, one.layer) for one in find_shortcuts(make(name), examples(2)[0])]


def test_wide_residual_network():
    assert layers("wrn-10-1") == [
        ("block1.layer.0", None),
        ("block2.layer.0", "block2.layer.0.convShortcut"),
        ("block3.layer.0", "block3.layer.0.convShortcut"),
    ]


@pytest.mark.parametrize(("name", "last"), [("resnet-18", "1"), ("preactresnet-18", "0")])
def test_projections_of_residual_networks(name, last):
    found = layers(name)
    assert [block for block, _ in found] == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert [layer for _, layer in found if layer] == [f"layer{i}.0.shortcut.{last}" for i in (2, 3, 4)]


def test_shortcuts_without_parameters_have_no_layer():
    assert layers("resnet-20") == [(f"layer{i}.{j}", None) for i in (1, 2, 3) for j in (0, 1, 2)]


def test_both_sums_of_a_transformer_block():
    assert layers("vit") == [("blocks.0", None), ("blocks.0", None), ("blocks.1", None), ("blocks.1", None)]


def test_torch_transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    found = find_shortcuts(model, torch.rand(2, 5, 8))
    assert [(one.block, one.layer) for one in found] == [("layers.0", None)] * 2 + [("layers.1", None)] * 2


@pytest.mark.parametrize("name", ["plain", "normed", "depthwise"])
def test_plain_nets_have_none(name):
    assert layers(name) == []


class Odd(nn.Module):
    """Sums that are no shortcuts, and one with a layer whose output goes elsewhere too."""

    def __init__(self, share: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.share, self.place = share, nn.Parameter(torch.rand(2, 3, 16, 16))

    def forward(self, x):
        x = x + self.place  # a parameter has no past
        x = self.a(x) + self.b(x)  # equally deep
        side = self.c(x)
        out = self.d(torch.relu(self.d(x)))
        out += side
        return (out + side.mean() if self.share else out).mean((2, 3))


@pytest.mark.parametrize(("share", "layer"), [(False, "c"), (True, None)])
def test_only_sums_of_a_short_and_a_deep_operand(share, layer):
    (one,) = find_shortcuts(Odd(share).eval(), examples(2)[0])
    assert (one.place, one.operand, one.layer) == (2, 1, layer)


@pytest.mark.parametrize("name", NAMES)
def test_factor_one_changes_nothing(name):
    model, x = make(name), examples(3)[0]
    shortcuts = find_shortcuts(model, x)
    with torch.no_grad():
        expected = model(x)
        with scaled(dict.fromkeys(shortcuts, 1.0)):
            torch.testing.assert_close(model(x), expected)  # attention has a quicker way where nobody looks on


def test_factor_zero_is_the_branch_alone():
    model, x = make("wrn-10-1"), examples(3)[0]
    shortcuts = find_shortcuts(model, x)
    block = model.block1.layer[0]
    with torch.no_grad():
        stem = model.conv1(x)
        branch = block.conv2(torch.relu(block.bn2(block.conv1(torch.relu(block.bn1(stem))))))
        out = model.relu(model.bn1(model.block3(model.block2(branch))))
        expected = model.fc(out.mean((2, 3)))
        with scaled({shortcuts[0]: 0.0}):
            torch.testing.assert_close(model(x), expected)


def test_projection_off_is_the_same_as_zero_weights():
    model, x = make("wrn-10-1"), examples(3)[0]
    shortcut = find_shortcuts(model, x)[1]
    with torch.no_grad():
        with scaled({shortcut: 0.3}):
            expected = model(x)
        model.get_submodule(shortcut.layer).weight.mul_(0.3)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize("how", [torch.add, torch.Tensor.__add__, torch.Tensor.__iadd__, torch.Tensor.add_])
def test_every_way_to_write_a_sum(how, operand):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            pair = (x.clone(), self.conv(x))
            return how(pair[operand], pair[1 - operand]).mean((2, 3))

    model, x = Block().eval(), examples(2)[0]
    (one,) = find_shortcuts(model, x)
    assert (one.operand, one.layer) == (operand, None)
    with torch.no_grad(), scaled({one: 0.0}):
        torch.testing.assert_close(model(x), model.conv(x).mean((2, 3)))


def test_model_comes_back_as_it_was_after_a_failure():
    model = make("wrn-10-1").train()
    with pytest.raises(RuntimeError):
        find_shortcuts(model, torch.rand(2, 5, 16, 16))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
