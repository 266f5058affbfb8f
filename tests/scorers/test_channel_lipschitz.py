"""Channel Lipschitz constants: the index is CLP's, and a channel is charged to the label that it lifts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.run import Run
from bezoar.ops.lipschitz import lipschitz, pairs
from bezoar.scorers.channel_lipschitz import ChannelLipschitz, standing_out
from tests.purifiers.nets import CLASSES, NAMES, few, make, toy_clean
from tests.toys import LABELS, trained

WIDTH = 24


def wired(loud: int, label: int) -> nn.Sequential:
    """A net in which one channel has a large gain, and each channel feeds one label."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv, norm = nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
    head = nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        norm.weight[loud] = 30.0
        head.weight.zero_()
        head.bias.zero_()
        for channel in range(WIDTH):
            head.weight[label if channel == loud else channel % CLASSES, channel] = 1.0
    return nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def test_index_is_that_of_an_independent_computation():
    model = make("normed")
    x = few(1).x
    wanted = []
    for conv, norm in ((model[0], model[1]), (model[4], model[5])):
        kernels = conv.weight.detach().double().numpy().reshape(len(conv.weight), conv.weight.shape[1], -1)
        bounds = np.array([np.linalg.svd(kernel, compute_uv=False)[0] for kernel in kernels])
        bounds *= np.abs(norm.weight.detach().numpy()) / np.sqrt(norm.running_var.numpy() + norm.eps)
        wanted += ((bounds - bounds.mean()) / bounds.std(ddof=1)).tolist()
    found = [channel.index for channel in standing_out(model, x, 100)]
    np.testing.assert_allclose(found, sorted(wanted, reverse=True), rtol=1e-5)


@pytest.mark.parametrize(("loud", "label"), [(5, 3), (11, 0)])
def test_loud_channel_is_charged_to_the_label_that_it_feeds(loud, label):
    found = ChannelLipschitz()(wired(loud, label), few(24), Run())
    assert found.leader == label
    assert found.model == found.labels[label]
    assert found.model == pytest.approx((WIDTH - 1) / WIDTH**0.5, rel=0.02), "the most that one of n can stand out"
    assert found.suspect


def test_model_score_is_the_largest_index_over_all_layers():
    model, x = trained(backdoored=True), toy_clean().x[:1]
    indices: list[Tensor] = []
    for layer, norm in pairs(model, x):
        bounds = lipschitz(layer, norm)
        indices.append((bounds - bounds.mean()) / bounds.std())
    found = ChannelLipschitz()(model, toy_clean(), Run())
    assert found.model == pytest.approx(float(torch.cat(indices).max()))
    assert found.labels.keys() == set(range(LABELS))


@pytest.mark.parametrize("name", NAMES)
def test_architectures(name):
    found = ChannelLipschitz(channels=5, images=4)(make(name), few(12), Run())
    assert np.isfinite(found.model)
    assert max(found.labels.values()) == found.model


def test_same_seed_same_scores_and_one_image_will_do():
    first, again = (ChannelLipschitz(images=4)(trained(True), toy_clean(), Run(seed=s)) for s in (3, 3))
    assert first == again
    assert ChannelLipschitz()(trained(True), toy_clean(1), Run()).model == first.model


@pytest.mark.parametrize("model", [nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, LABELS)), nn.Flatten()])
def test_without_hidden_layers(model):
    with pytest.raises(UnsupportedModel, match="hidden layer"):
        ChannelLipschitz()(
            nn.Sequential(model, *([] if len(list(model.parameters())) else [Head()])), toy_clean(), Run()
        )


class Head(nn.Module):
    """A layer of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3 * 12 * 12, LABELS))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize(("name", "value"), [("channels", 0), ("images", 0), ("raised", 0.0), ("u", 0.0)])
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"ChannelLipschitz.{name} must be"):
        ChannelLipschitz(**{name: value})
