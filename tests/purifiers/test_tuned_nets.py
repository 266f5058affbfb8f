"""Purifiers that tune on clean images, unmodified on nets of many kinds and on very few images."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.trigger import MaskedTrigger
from bezoar.purifiers.bn_cleaning import BNCleaning
from bezoar.purifiers.bn_unlearning import BNUnlearning
from bezoar.purifiers.ft_sam import FTSAM
from bezoar.purifiers.mcr import MCR
from bezoar.purifiers.nad import NAD
from bezoar.purifiers.sms import SMS
from tests.purifiers.nets import CLASSES, NAMES, SIDE, examples, make

METHODS: dict[str, Purifier] = {
    "nad": NAD(epochs=2, teacher_epochs=1, steps=0),
    "ft-sam": FTSAM(epochs=2),
    "mcr": MCR(epochs=2, endpoint_epochs=1),
    "sms": SMS(epochs=2, steps=0),
    "bn-cleaning": BNCleaning(epochs=2),
    "bn-unlearning": BNUnlearning(epochs=2),
}
TRIGGERS: dict[int, Any] = {0: MaskedTrigger(torch.ones(1, SIDE, SIDE) * 0.2, torch.ones(3, SIDE, SIDE))}
#: Nets that a method cannot work on, and says so.
IMPOSSIBLE = {
    *(("sms", name) for name in ("plain", "normed", "depthwise")),
    *((method, "plain") for method in ("bn-cleaning", "bn-unlearning")),
}
every_method = pytest.mark.parametrize("method", METHODS)


def purified(method: str, model: nn.Module, count: int, run: Run | None = None) -> nn.Module:
    x, y = examples(count)
    clean = Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=CLASSES)
    return METHODS[method](model, clean, run or Run(seed=1), TRIGGERS)


def form(model: nn.Module) -> dict[str, Any]:
    return {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    return not all(torch.equal(a, b) for a, b in pairs)


@every_method
@pytest.mark.parametrize("name", NAMES)
def test_any_architecture(method, name):
    model = make(name)
    before = copy.deepcopy(model)
    if (method, name) in IMPOSSIBLE:
        with pytest.raises(UnsupportedModel) as told:
            purified(method, model, 12)
        assert told.value.hint
        return
    model = purified(method, model, 12)
    assert form(model) == form(before)
    assert changed(model, before)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module.training for module in model.modules())
    assert all(getattr(module, "track_running_stats", True) for module in model.modules())


@every_method
@pytest.mark.parametrize("count", [1, 2, 7])
def test_very_few_images(method, count):
    model, run = make("wrn-10-1"), Run(seed=1)
    before = copy.deepcopy(model)
    model = purified(method, model, count, run)
    assert changed(model, before)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert any("single clean image" in one for one in run.warnings) == (count == 1)
    if count == 1:
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before.get_buffer(name)), "one image says nothing about the data"


@every_method
def test_half_precision_stays_so(method):
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = make("wrn-10-1").half()

        def forward(self, x):
            return self.module(x.to(self.module.conv1.weight.dtype)).float()

    model = Half().eval()
    before = copy.deepcopy(model)
    model = purified(method, model, 6)
    assert form(model) == form(before)
    assert changed(model, before)


class Breaking(nn.Module):
    """Works until it is trained for a while, then raises."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.left = make("wrn-10-1"), 3

    def forward(self, x):
        self.left -= self.training
        if self.left < 0:
            raise RuntimeError("the model broke")
        return self.module(x)


@every_method
def test_nothing_is_left_over_after_a_failure(method):
    model = Breaking().eval()
    with pytest.raises(RuntimeError, match="the model broke"):
        purified(method, model, 200)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(getattr(module, "track_running_stats", True) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@every_method
def test_held_out_images_are_not_touched(method):
    model = make("wrn-10-1")
    x, y = examples(12)
    clean = Clean(x=x, y=y, held_x=None, held_y=None, num_classes=CLASSES)  # type: ignore[arg-type]
    METHODS[method](model, clean, Run(), TRIGGERS)
