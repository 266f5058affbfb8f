"""Attention maps: the reference value, what they do not depend on, and where they are taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.core.errors import UnsupportedModel
from bezoar.ops.attention import attention_distance, attention_map, features_at, find_taps
from tests.purifiers.nets import examples, make


def test_reference_value():
    """F = 0..7 as (1, 2, 2, 2), p = 2: sums of squares 16, 26, 40, 58; against a flat map the distance is 0.0442."""
    features = torch.arange(8.0).reshape(1, 2, 2, 2)
    expected = torch.tensor([[[0.2084, 0.3386], [0.5209, 0.7554]]])
    torch.testing.assert_close(attention_map(features), expected, rtol=0, atol=1e-4)
    assert float(attention_distance(features, torch.ones(1, 2, 2, 2))) == pytest.approx(0.0442, abs=5e-5)


def test_equal_features_have_no_distance():
    features = torch.randn(3, 4, 5, 6)
    assert float(attention_distance(features, features.clone())) == 0.0


@given(st.floats(0.1, 100), st.floats(0.5, 4))
def test_scale_does_not_matter(scale, power):
    features = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 2
    torch.testing.assert_close(
        attention_map(scale * features, power), attention_map(features, power), rtol=0, atol=1e-4
    )


def test_against_plain_loops():
    features = torch.randn(2, 3, 4, 5)
    found = attention_map(features, 3.0)
    for image in range(2):
        sums = [[sum(abs(float(v)) ** 3 for v in features[image, :, i, j]) for j in range(5)] for i in range(4)]
        norm = sum(v * v for row in sums for v in row) ** 0.5
        expected = torch.tensor([[v / (norm + 1e-6) for v in row] for row in sums])
        torch.testing.assert_close(found[image], expected)


def test_tokens_are_summed_over_their_features():
    tokens = torch.randn(2, 7, 5)
    picture = tokens.transpose(1, 2).unsqueeze(3)
    torch.testing.assert_close(attention_map(tokens), attention_map(picture).squeeze(2))


def test_dead_features_have_finite_gradients():
    features = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention_distance(features, torch.ones(2, 3, 4, 4)).backward()
    assert torch.isfinite(features.grad).all()


def test_maps_of_other_sizes_are_averaged_down():
    small = torch.rand(2, 3, 4, 4)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert float(attention_distance(large, small)) == pytest.approx(0, abs=1e-12)
    tokens = torch.rand(2, 6, 3)
    assert float(attention_distance(tokens.repeat_interleave(2, 1), tokens)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wrn-10-1", ["block1.layer.0", "block2.layer.0", "block3.layer.0"]),
        ("wrn-16-1", ["block1.layer.1", "block2.layer.1", "block3.layer.1"]),
        ("preactresnet-18", ["layer2.1", "layer3.1", "layer4.1"]),
        ("resnet-20", ["layer1.2", "layer2.2", "layer3.2"]),
        ("plain", ["1", "4"]),
        ("normed", ["2", "6"]),
        ("depthwise", ["6"]),
        ("vit", ["blocks.0", "blocks.1"]),
    ],
)
def test_taps_are_the_stages(name, expected):
    taps = find_taps(make(name), examples(2)[0])
    if name == "depthwise":  # one resolution: thirds
        assert taps[-1].name == expected[-1]
        assert len(taps) == 3
    else:
        assert [tap.name for tap in taps] == expected


def test_as_many_taps_as_asked_for():
    model, x = make("resnet-18"), examples(2)[0]
    assert [tap.name for tap in find_taps(model, x, 1)] == ["layer4.1"]
    assert len(find_taps(model, x, 9)) == 4
    assert len(find_taps(make("vit"), x, 1)) == 1


def test_renamed_modules_make_no_difference():
    model = make("wrn-10-1")
    renamed = nn.Module()
    renamed.first = model
    renamed.forward = lambda x: renamed.first(x)
    names = [tap.name for tap in find_taps(renamed, examples(2)[0])]
    assert names == ["first.block1.layer.0", "first.block2.layer.0", "first.block3.layer.0"]


def test_no_maps_no_taps():
    with pytest.raises(UnsupportedModel, match="no feature maps"):
        find_taps(nn.Sequential(nn.Flatten(), nn.Linear(768, 6)), examples(2)[0])


class SwinBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(5), nn.Linear(5, 5)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class ChannelsLast(nn.Module):
    """Works on (B, H, W, C), as Swin does."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 4, stride=4)
        self.block = SwinBlock() if residual else nn.Linear(5, 5)

    def forward(self, x):
        return self.block(self.first(x).permute(0, 2, 3, 1)).mean((1, 2))


@pytest.mark.parametrize("residual", [True, False])
def test_channels_that_come_last_are_found(residual):
    model, x = ChannelsLast(residual), examples(2)[0]
    tap = find_taps(model, x)[-1]
    assert (tap.name, tap.positions, tap.last) == ("block", (4, 4), True)
    _, (features,) = features_at(model, [tap], x)
    assert features.shape == (2, 5, 4, 4)


class Reused(nn.Module):
    """One activation that runs twice, as in torchvision's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.two(self.relu(self.one(x)))).mean((2, 3))


def test_features_are_those_of_the_call_and_carry_gradients():
    model, x = Reused(), examples(3)[0]
    taps = [tap for tap in find_taps(model, x, 5) if tap.name == "relu"]
    assert [tap.call for tap in taps] == [0, 1]
    out, (first, second) = features_at(model, taps, x)
    torch.testing.assert_close(first, torch.relu(model.one(x)))
    torch.testing.assert_close(second.mean((2, 3)), out)
    first.sum().backward()
    assert model.one.weight.grad is not None


def test_no_hook_stays_after_a_failure():
    model = make("normed")
    taps = find_taps(model, examples(2)[0])
    with pytest.raises(RuntimeError):
        features_at(model, taps, torch.rand(2, 5, 16, 16))
    with pytest.raises(RuntimeError):
        find_taps(model, torch.rand(2, 5, 16, 16))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
