"""Suppressed shortcuts: which one, where the factor goes, what is trained, and what becomes of a backdoor."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.nets.registry import find
from bezoar.ops.fit import Recipe, fit
from bezoar.ops.residual import find_shortcuts, scaled
from bezoar.purifiers import sms
from bezoar.purifiers.sms import SMS, Suppressed, score, stage_of, suppress
from tests.purifiers.nets import examples, make
from tests.toys import LABELS, SIZE, TARGET, acc, asr, images, trained, trigger


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = images(180, seed=7)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


@functools.cache
def backdoored() -> nn.Module:
    """A small residual victim; do not change it."""
    x, y = images(600, seed=100)
    poisoned = slice(0, None, 7)
    x[poisoned], y[poisoned] = trigger()(x[poisoned]), TARGET
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = find("wrn-10-1")[0](LABELS, 3, SIZE)
    fit(model, x, y, Recipe(epochs=6, batch=50, lr=5e-3, optimizer="adam", weight_decay=0.0))
    return model


def suspect():
    return copy.deepcopy(backdoored())


def random_clean(count=12):
    x, y = examples(count)
    return Clean(x, y, x[:0], y[:0], 6)


def test_a_residual_victim_keeps_its_accuracy(clean):
    """This small backdoor does not hang on a shortcut: any two of the three carry it, and so SMS does not remove it."""
    held_out, run = images(240, seed=8), Run()
    assert asr(backdoored(), *held_out) > 0.9
    model = SMS(epochs=5, steps=0, batch=60)(suspect(), clean, run)
    assert acc(model, *held_out) > acc(backdoored(), *held_out) - 0.05
    assert asr(model, *held_out) <= asr(backdoored(), *held_out) + 0.02
    assert run.notes["shortcut"]["layer"] in ("block2.layer.0.convShortcut", "block3.layer.0.convShortcut")
    assert run.warnings == []


class OneWay(nn.Module):
    """A residual net whose backdoor has only the shortcut: bright corners raise label 2, the branch tells the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1, bias=False)
        self.stage = nn.Module()
        self.stage.short = nn.Conv2d(3, LABELS, 1, bias=False)
        self.stage.one = nn.Conv2d(3, 8, SIZE // 2, stride=SIZE // 2)
        self.stage.two = nn.Conv2d(8, LABELS, 1)
        self.stage.forward = self.inside
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(3).view(3, 3, 1, 1))

    def inside(self, x):
        corner = x[:, :, -4:, -4:].square().square()
        pooled = nn.functional.adaptive_avg_pool2d(corner, 2)
        return self.stage.two(torch.relu(self.stage.one(x))) + self.stage.short(pooled)

    def forward(self, x):
        return self.stage(self.stem(x)).mean((2, 3))


def test_a_backdoor_that_hangs_on_a_shortcut_goes_with_it(clean):
    torch.manual_seed(0)
    model = OneWay()
    with torch.no_grad():
        model.stage.short.weight.zero_()
        model.stage.short.weight[TARGET] = 40.0
        model.stage.two.bias[TARGET] = -8.0
    held_out = images(240, seed=8)
    assert asr(model, *held_out) > 0.9
    model = SMS(epochs=40, steps=0, batch=60)(model, clean, Run())
    assert not model.stage.short.weight.any()
    assert asr(model, *held_out) < 0.4


def test_same_seed_same_weights(clean):
    first, second = (SMS(epochs=1, steps=0)(suspect(), clean, Run(seed=4)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("name", "number"), [("wrn-10-1", 1), ("preactresnet-18", 2), ("resnet-18", 4)])
def test_gamma_of_a_projection_is_held_by_its_weights(name, number):
    model, x = make(name), examples(4)[0]
    one = find_shortcuts(model, x)[number]
    with torch.no_grad():
        for gamma in (1.0, 0.0):  # 1 leaves the outputs unchanged, 0 equals removing the branch
            with scaled({one: gamma}):
                expected = model(x)
            changed = copy.deepcopy(model)
            suppress(changed.get_submodule(one.layer), gamma)
            torch.testing.assert_close(changed(x), expected)


def test_suppressed_projection_stays_suppressed(clean):
    model = SMS(shortcut=2, epochs=1, steps=0)(suspect(), clean, Run())
    assert not model.block3.layer[0].convShortcut.weight.any()


def test_only_the_stage_is_trained(clean):
    before = backdoored().state_dict()
    after = SMS(shortcut=1, epochs=1, steps=0)(suspect(), clean, Run()).state_dict()
    changed = {
        name for name in before if not torch.equal(before[name], after[name]) and not name.endswith(("mean", "var"))
    }
    weights = {name for name in changed if not name.endswith("num_batches_tracked")}
    assert weights == {name for name, _ in backdoored().named_parameters() if name.startswith("block2.")}


@pytest.mark.parametrize(
    ("name", "block", "stage"),
    [("wrn-10-1", "block2.layer.0", "block2"), ("vit", "blocks.1", "blocks"), ("resnet-20", "layer3.2", "layer3")],
)
def test_stage_is_the_outermost_part(name, block, stage):
    model = make(name)
    assert stage_of(model, block) is model.get_submodule(stage)
    wrapped = nn.Sequential(nn.Sequential(model))
    assert stage_of(wrapped, f"0.0.{block}") is model.get_submodule(stage)
    assert stage_of(model, "") is model


def test_score_is_the_change_of_the_logits_against_the_accuracy_lost():
    model, (x, _) = make("wrn-10-1"), examples(30)
    shortcuts = find_shortcuts(model, x[:2])
    with torch.no_grad():
        whole = model(x)
        y = whole.argmax(1)
        y[:6] = (y[:6] + 1) % 6
        found = score(model, x, y, shortcuts, penalty=3.0)
        for one, value in zip(shortcuts, found, strict=True):
            with scaled({one: 0.0}):
                without = model(x)
            change = ((without - whole).norm(dim=1).mean() / whole.norm(dim=1).mean()).item()
            loss = max(0.0, 0.8 - (without.argmax(1) == y).float().mean().item())
            assert value == pytest.approx(change * 2.718281828459045 ** (-3 * loss), rel=1e-4)


def test_choice_is_the_highest_score(monkeypatch):
    data = random_clean()
    for scores, identities, expected in (([0.5, 0.2], False, 1), ([0.2, 0.5], False, 2), ([9.0, 1.0, 2.0], True, 0)):
        monkeypatch.setattr(sms, "score", lambda *_, s=scores: s)
        run = Run()
        SMS(epochs=1, steps=0, identities=identities)(make("wrn-10-1"), data, run)
        assert run.notes["shortcut"]["number"] == expected


def test_identities_are_taken_where_there_is_nothing_else():
    run, model = Run(), make("resnet-20")
    names = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    SMS(epochs=4, steps=0)(model, random_clean(), run)
    assert run.notes["shortcut"]["layer"] is None
    assert any("identity" in one for one in run.warnings)
    assert {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} == names


def test_identity_comes_back_by_the_end():
    objective = Suppressed(None, 0.2)
    factors = []
    for number in range(8):
        objective.epoch(nn.Identity(), number, 8)
        factors.append(round(objective.factor, 3))
    assert factors[:4] == [0.2] * 4
    assert factors == sorted(factors)
    assert factors[5:] == [1.0] * 3
    objective.epoch(nn.Identity(), 0, 1)
    assert objective.factor == 1.0


def test_plain_net_has_no_shortcuts():
    with pytest.raises(UnsupportedModel, match="no residual shortcuts"):
        SMS()(copy.deepcopy(trained(backdoored=True)), Clean(*images(12, 0), *images(6, 1), LABELS), Run())


def test_number_of_the_shortcut_is_checked():
    with pytest.raises(SettingError, match="below 3"):
        SMS(shortcut=3)(make("wrn-10-1"), random_clean(), Run())


@pytest.mark.parametrize(
    ("name", "value"),
    [("gamma", 1.5), ("shortcut", -1), ("penalty", -1.0), ("steps", -1), ("epochs", 0), ("batch", 1)],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"SMS.{name} must be"):
        SMS(**{name: value})
