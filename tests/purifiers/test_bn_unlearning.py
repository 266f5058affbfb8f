"""BN-unlearning: like unlearning, with nothing but gains and shifts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.fit import Batch
from bezoar.purifiers import bn_unlearning
from bezoar.purifiers.bn_unlearning import BNUnlearning
from tests.purifiers.nets import examples, make
from tests.toys import LABELS, TARGET, acc, asr, images, trained, trigger


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = images(180, seed=7)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


def suspect():
    return copy.deepcopy(trained(backdoored=True))


def test_backdoor_goes_and_accuracy_stays(clean):
    held_out, run = images(240, seed=8), Run()
    model = BNUnlearning()(suspect(), clean, run, {TARGET: trigger()})
    assert asr(model, *held_out) < 0.2
    assert acc(model, *held_out) > 0.95
    assert run.notes["tuned"] == 2 * (16 + 32)


def test_only_normalisations_change(clean):
    before = trained(backdoored=True).state_dict()
    after = BNUnlearning(epochs=1)(suspect(), clean, Run(), {TARGET: trigger()}).state_dict()
    assert {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"1", "5"}


def test_a_share_of_the_images_carries_the_trigger_with_true_labels(clean, monkeypatch):
    kept = {}
    monkeypatch.setattr(bn_unlearning, "fit", lambda *given, **named: kept.update(given=given, **named))
    BNUnlearning(share=0.5)(suspect(), clean, Run(), {TARGET: trigger()})
    x = torch.cat([clean.x * 0.5] * 6)
    y = torch.cat([clean.y] * 6)
    batch = Batch(x, y, torch.arange(len(x)), lambda images: images, torch.Generator().manual_seed(0))
    stamped = kept["objective"].images(suspect(), batch)
    carries = (stamped != x).flatten(1).any(1)
    assert float(carries.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(stamped[carries], trigger()(x[carries]))
    assert torch.equal(kept["given"][2], clean.y)


def test_nothing_to_tune():
    (x, y), stamp = examples(6), {1: MaskedTrigger(torch.ones(1, 16, 16), torch.ones(3, 16, 16))}
    data = Clean(x, y, x[:0], y[:0], 6)
    with pytest.raises(UnsupportedModel, match="no normalisation"):
        BNUnlearning()(make("plain"), data, Run(), stamp)
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(784, 6))
    with pytest.raises(UnsupportedModel, match="no gains"):
        BNUnlearning()(bare, data, Run(), stamp)


@pytest.mark.parametrize(("name", "value"), [("share", 0.0), ("jitter", 2.0), ("epochs", 0), ("batch", 1)])
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"BNUnlearning.{name} must be"):
        BNUnlearning(**{name: value})
