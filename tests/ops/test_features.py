"""Features of many images: the right ones, a few at a time, and a killed run goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.examples import Examples
from bezoar.core.run import Progress, Run
from bezoar.ops.features import penultimate, read_features
from tests.purifiers.nets import CLASSES, NAMES, examples, make
from tests.toys import LABELS, images, trained


def toy(count: int = 70) -> Examples:
    x, y = images(count, seed=5)
    return Examples(x, y, LABELS)


def test_features_are_what_goes_into_the_head():
    data, model = toy(), trained(backdoored=True)
    found = read_features(model, data, Run(), batch=16)
    with torch.no_grad():
        torch.testing.assert_close(found, model[:-1](data.x))
        torch.testing.assert_close(model[-1](found), model(data.x))


@pytest.mark.parametrize("name", NAMES)
def test_logits_follow_from_the_features_of_any_net(name):
    x, y = examples(9)
    model = make(name)
    found = read_features(model, Examples(x, y, CLASSES), Run(), batch=4)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        torch.testing.assert_close(head(found), model(x), rtol=1e-4, atol=1e-5)


def test_a_convolution_as_head_gives_the_mean_over_its_places():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.rand(5, 3, 8, 8)
    found = penultimate(model.eval(), model[2], x)
    with torch.no_grad():
        torch.testing.assert_close(found, model[:2](x).mean((2, 3)))


def test_uint8_images_are_the_same_as_floats():
    x, y = images(12, seed=5)
    levels = (x * 255).round().to(torch.uint8)
    model = trained(backdoored=True)
    one = read_features(model, Examples(levels, y, LABELS), Run())
    assert torch.equal(one, read_features(model, Examples(levels.float() / 255, y, LABELS), Run()))


class Counting(Examples):
    """Counts the images that were read, and fails after so many batches."""

    def __init__(self, data: Examples, fails_after: int = 10**9) -> None:
        super().__init__(data.x, data.labels, data.num_classes)
        object.__setattr__(self, "read", [])
        object.__setattr__(self, "fails_after", fails_after)

    sha256 = "the same"

    def take(self, rows):
        if len(self.read) >= self.fails_after:
            raise KeyboardInterrupt
        self.read.append(len(rows))
        return super().take(rows)


def test_killed_run_goes_on(tmp_path):
    data, model = toy(), trained(backdoored=True)
    run = Run(progress=Progress(every=0.0))
    with pytest.raises(KeyboardInterrupt):
        read_features(model, Counting(data, 4), run, folder=tmp_path, batch=10)  # one for the shape, three batches
    assert json.loads((tmp_path / "features.json").read_text())["done"] == 30
    rest = Counting(data)
    found = read_features(model, rest, run, folder=tmp_path, batch=10)
    assert sum(rest.read) == 1 + 40
    assert torch.equal(found, read_features(model, data, Run(), batch=10))


def test_features_of_another_model_or_data_are_not_taken(tmp_path):
    data = toy()
    read_features(trained(backdoored=True), data, Run(), folder=tmp_path)
    other = Counting(data)
    found = read_features(trained(backdoored=False), other, Run(), folder=tmp_path)
    assert sum(other.read) >= 70
    assert torch.equal(found, read_features(trained(backdoored=False), data, Run()))


@pytest.mark.parametrize("damage", ["state", "file", "both"])
def test_damaged_file_is_as_good_as_none(tmp_path, damage):
    data, model = toy(), trained(backdoored=True)
    read_features(model, data, Run(), folder=tmp_path)
    if damage != "file":
        (tmp_path / "features.json").write_text('{"done": 70')
    if damage != "state":
        (tmp_path / "features.npy").write_bytes(b"\x93NUMPY nonsense")
    found = read_features(model, data, Run(), folder=tmp_path)
    assert torch.equal(found, read_features(model, data, Run()))


def test_file_can_be_read_by_others(tmp_path):
    found = read_features(trained(backdoored=True), toy(), Run(), folder=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy", allow_pickle=False), found)


def test_model_without_a_head_is_refused():
    with pytest.raises(UnsupportedModel):
        read_features(nn.Flatten(), toy(), Run())
