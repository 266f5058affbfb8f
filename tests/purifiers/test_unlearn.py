"""Unlearning: who carries the trigger, with which label, and what becomes of the backdoor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bezoar.core.errors import SettingError
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import MaskedTrigger
from bezoar.purifiers import unlearn
from bezoar.purifiers.finetune import Finetune
from bezoar.purifiers.unlearn import Unlearn
from bezoar.scanners.neural_cleanse import NeuralCleanse
from tests.toys import LABELS, SIZE, TARGET, acc, asr, images, trained, trigger


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = images(240, seed=7)
    return Clean(x=x[:180], y=y[:180], held_x=x[180:], held_y=y[180:], num_classes=LABELS)


def suspect() -> nn.Module:
    return copy.deepcopy(trained(backdoored=True))


def test_no_learning_rate_no_change(clean):
    model = Unlearn(lr=0.0, epochs=1)(suspect(), clean, Run(), {TARGET: trigger()})
    for parameter, old in zip(model.parameters(), trained(backdoored=True).parameters(), strict=True):
        assert torch.equal(parameter, old)


def test_inverted_trigger_removes_the_true_one(clean):
    """The defender knows only what the scan found; the planted trigger measures."""
    found = NeuralCleanse(seeds=1, steps=80)(suspect(), clean, Run()).seeds[0].labels[TARGET].trigger
    held_out = images(240, seed=8)
    cleaned = Unlearn()(suspect(), clean, Run(), {TARGET: found})
    tuned = Finetune(lr=1e-5, epochs=2)(suspect(), clean, Run())
    assert asr(tuned, *held_out) > 0.9
    assert asr(cleaned, *held_out) < 0.2
    assert acc(cleaned, *held_out) > 0.9
    others = held_out[1] != TARGET
    success = (cleaned(found(held_out[0][others])).argmax(1) == TARGET).float().mean()
    assert float(success) < 0.2


class Recorder:
    """Stands in for training: keeps what would have been trained on."""

    def __init__(self) -> None:
        self.stamped: list[torch.Tensor] = []
        self.original: list[torch.Tensor] = []
        self.y: torch.Tensor | None = None

    def __call__(self, model, x, y, recipe, *, seed, stamp, progress):
        generator = torch.Generator().manual_seed(seed)
        self.y = y
        for part in x.split(recipe.batch):
            self.original.append(part)
            self.stamped.append(stamp(part, generator))


def batches(monkeypatch, count: int, triggers: dict[int, MaskedTrigger], **settings) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(unlearn, "fit", recorder)
    x, y = 0.5 * torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 6
    Unlearn(**settings)(suspect(), Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS), Run(), triggers)
    recorder.kept_y = torch.equal(recorder.y, y)
    return recorder


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_share_of_the_images_carries_the_trigger_with_true_labels(share, monkeypatch):
    seen = batches(monkeypatch, 2000, {TARGET: trigger()}, share=share)
    x, stamped = torch.cat(seen.original), torch.cat(seen.stamped)
    carries = (stamped != x).flatten(1).any(1)
    assert float(carries.float().mean()) == pytest.approx(share, abs=0.04)
    assert torch.equal(stamped[carries], trigger()(x[carries]))
    assert torch.equal(stamped[~carries], x[~carries])
    assert seen.kept_y


def test_several_triggers_share_the_images(monkeypatch):
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, :2, :2] = 1
    other = MaskedTrigger(mask, torch.ones(3, SIZE, SIZE))
    seen = batches(monkeypatch, 2000, {TARGET: trigger(), 0: other}, share=0.4)
    stamped = torch.cat(seen.stamped)
    bottom, top = ((stamped[:, 0, row, column] == 1) for row, column in ((-1, -1), (0, 0)))
    assert float(bottom.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float(top.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert not bool((bottom & top).any())


def test_jitter_varies_the_strength(monkeypatch):
    seen = batches(monkeypatch, 500, {TARGET: trigger()}, share=1.0, jitter=0.5)
    x, stamped = (torch.cat(one)[:, :, -2:, -2:] for one in (seen.original, seen.stamped))
    strength = ((stamped - x) / (1 - x)).flatten(1)
    assert float((strength - strength[:, :1]).abs().max()) < 1e-4, "one strength for the whole image"
    assert 0.5 <= float(strength.min()) < 0.55
    assert 0.95 < float(strength.max()) <= 1 + 1e-5


def test_no_trigger():
    x, y = images(12, seed=0)
    clean = Clean(x=x, y=y, held_x=x, held_y=y, num_classes=LABELS)
    for none in (None, {}):
        with pytest.raises(SettingError, match="needs an inverted trigger"):
            Unlearn()(suspect(), clean, Run(), none)


@pytest.mark.parametrize(
    ("name", "value"), [("share", 0.0), ("share", 1.1), ("jitter", 0.0), ("jitter", 2.0), ("epochs", 0), ("lr", -1.0)]
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"Unlearn.{name} must be"):
        Unlearn(**{name: value})
