"""BN-cleaning: nothing but normalisations changes, and the statistics are those of the clean images."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.ops.normalisation import estimate_statistics
from bezoar.purifiers.bn_cleaning import BNCleaning, train_only_normalisations
from tests.purifiers.nets import examples, make
from tests.toys import LABELS, acc, images, trained


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = images(180, seed=7)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


def suspect():
    return copy.deepcopy(trained(backdoored=True))


def test_only_normalisations_change(clean):
    run, before = Run(), trained(backdoored=True).state_dict()
    after = BNCleaning()(suspect(), clean, run).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert changed - {"1.num_batches_tracked", "5.num_batches_tracked"} == {
        f"{layer}.{kind}" for layer in (1, 5) for kind in kinds[:4]
    }
    assert run.notes["tuned"] == 2 * (16 + 32)


def test_without_a_learning_rate_only_the_statistics_are_new(clean):
    expected = suspect()
    estimate_statistics(expected, clean.x)
    model = BNCleaning(lr=0.0, epochs=1)(suspect(), clean, Run())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_statistics_at_the_end_are_those_of_the_tuned_network(clean):
    model = BNCleaning(epochs=3)(suspect(), clean, Run())
    again = copy.deepcopy(model)
    estimate_statistics(again, clean.x)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_accuracy_stays(clean):
    held_out = images(240, seed=8)
    assert acc(BNCleaning()(suspect(), clean, Run()), *held_out) > 0.95


def test_a_shifted_network_is_brought_back(clean):
    """Statistics of other images, as a poisoned training leaves them, only better to be seen."""
    model, held_out = suspect(), images(240, seed=8)
    with torch.no_grad():
        model[1].running_mean.add_(0.7)
        model[5].running_var.mul_(9)
    damaged = acc(model, *held_out)
    assert acc(BNCleaning(epochs=5)(model, clean, Run()), *held_out) > max(0.95, damaged)


def test_other_normalisations_are_tuned_too():
    model, (x, y) = make("vit"), examples(30)
    before = copy.deepcopy(model.state_dict())
    BNCleaning(epochs=2)(model, Clean(x, y, x[:0], y[:0], 6), Run())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    norms = {name for name in before if "norm" in name}
    assert changed == norms


def test_statistics_alone_where_there_is_nothing_to_tune():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(784, 6))
    (x, y), run = examples(12), Run()
    BNCleaning(epochs=1)(model, Clean(x, y, x[:0], y[:0], 6), run)
    assert run.notes["tuned"] == 0
    torch.testing.assert_close(model[1].running_mean, model[0](x).detach().mean((0, 2, 3)))


def test_no_normalisation():
    x, y = examples(6)
    with pytest.raises(UnsupportedModel, match="no normalisation"):
        BNCleaning()(make("plain"), Clean(x, y, x[:0], y[:0], 6), Run())
    with pytest.raises(UnsupportedModel, match="no normalisation"):
        train_only_normalisations(make("plain"))


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("batch", 1), ("lr", -1.0)])
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"BNCleaning.{name} must be"):
        BNCleaning(**{name: value})
