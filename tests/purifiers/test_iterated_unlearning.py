"""Rounds of detection and unlearning: several triggers of one label go, and a clean net is left alone."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from torch import Tensor, nn

import bezoar
from bezoar.core.errors import SettingError
from bezoar.core.evidence import LabelScan, Scan, SeedScan
from bezoar.core.run import Run
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.fit import Recipe, fit
from bezoar.purifiers.iterated_unlearning import IteratedUnlearning, suspects
from tests.purifiers.nets import toy_clean
from tests.toys import LABELS, SIZE, TARGET, acc, images, net, trained, trigger

CORNERS = ((0, 0), (0, SIZE - 2), (SIZE - 2, 0), (SIZE - 2, SIZE - 2))


def corner(top: int, left: int) -> MaskedTrigger:
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, top : top + 2, left : left + 2] = 1
    return MaskedTrigger(mask, torch.ones(3, SIZE, SIZE))


@functools.cache
def several() -> nn.Module:
    """Four triggers, one in each corner, that all cause the target."""
    x, y = images(1200, seed=100)
    for number, place in enumerate(CORNERS):
        poisoned = slice(number, None, 23)
        x[poisoned], y[poisoned] = corner(*place)(x[poisoned]), TARGET
    model = net(0)
    fit(model, x, y, Recipe(epochs=8, batch=50, lr=3e-3, optimizer="adam", weight_decay=0.0), seed=0)
    return model


def success(model: nn.Module, stamp: MaskedTrigger, data: tuple[Tensor, Tensor]) -> float:
    x, y = data
    return acc(model, stamp(x[y != TARGET]), torch.full((int((y != TARGET).sum()),), TARGET))


def test_four_triggers_of_one_label_go():
    held_out = images(300, seed=8)
    assert min(success(several(), corner(*place), held_out) for place in CORNERS) > 0.9
    run = Run()
    cleaned = IteratedUnlearning()(copy.deepcopy(several()), toy_clean(), run)
    assert max(success(cleaned, corner(*place), held_out) for place in CORNERS) < 0.1
    assert acc(cleaned, *held_out) > acc(several(), *held_out) - 0.05
    story = run.notes["rounds"]
    assert 1 <= len(story) <= 5
    assert all(TARGET in one["labels"] for one in story)
    assert run.image_gradients > 0


def test_clean_net_is_left_as_it_was():
    model, run = copy.deepcopy(trained(backdoored=False)), Run()
    before = copy.deepcopy(model.state_dict())
    IteratedUnlearning()(model, toy_clean(), run)
    assert run.notes["rounds"] == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_given_triggers_spare_the_first_search():
    run = Run()
    made = IteratedUnlearning(rounds=1, epochs=1)
    made(copy.deepcopy(trained(backdoored=True)), toy_clean(), run, {TARGET: trigger()})
    assert run.image_gradients == 0
    assert run.notes["rounds"] == [{"labels": [TARGET], "triggers": 1, "mean_size": 4.0}]
    assert any("after 1 rounds" in warning for warning in run.warnings)


def test_patching_all_unlearns_every_label_once():
    run = Run()
    made = IteratedUnlearning(patch="all", seeds=1)
    cleaned = made(copy.deepcopy(several()), toy_clean(), run)
    assert len(run.notes["rounds"]) == 1
    assert len(run.notes["rounds"][0]["labels"]) >= LABELS - 1  # one whose trigger never worked has none
    held_out = images(300, seed=8)
    worst = max(success(several(), corner(*place), held_out) for place in CORNERS)
    assert max(success(cleaned, corner(*place), held_out) for place in CORNERS) < worst
    assert acc(cleaned, *held_out) > acc(several(), *held_out) - 0.05


def test_label_all_of_the_front_door_unlearns_the_triggers_of_all():
    data = images(240, seed=7)
    cleaned, report = bezoar.purify(trained(backdoored=True), data, method="unlearn", label="all", seeds=1)
    assert report.cleaning.target == TARGET
    assert success(cleaned, trigger(), images(300, seed=8)) < 0.1


def scan_of(sizes: list[float], asr: float = 1.0) -> Scan:
    labels = {
        label: LabelScan(float(size), asr, "complete", True, MaskedTrigger(torch.zeros(1, 2, 2), torch.zeros(3, 2, 2)))
        for label, size in enumerate(sizes)
    }
    return Scan((SeedScan(0, labels, True),), len(sizes), 1024)


def test_every_label_that_is_as_small_is_suspect():
    assert suspects(scan_of([60, 62, 5, 58, 61, 66, 59, 64, 63, 57])) == [2]
    assert suspects(scan_of([60, 62, 5, 58, 7, 66, 59, 64, 63, 57])) == [2, 4]
    assert suspects(scan_of([60, 62, 50, 58, 61, 66, 59, 64, 63, 57])) == []
    assert suspects(scan_of([60, 62, 5, 58, 61, 66, 59, 64, 63, 57], asr=0.2)) == []


@pytest.mark.parametrize(("name", "value"), [("rounds", 0), ("patch", "some"), ("seeds", 0), ("search_steps", 0)])
def test_bad_settings(name, value):
    with pytest.raises(SettingError, match=name):
        dataclasses.replace(IteratedUnlearning(), **{name: value})
