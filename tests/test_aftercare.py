"""Aftercare: fidelity by hand, reactivation of a backdoor that is there, masked or absent, and the second scan."""

from __future__ import annotations

import copy

import pytest
import torch

import bezoar
from bezoar.aftercare import LIMIT, reactivation
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.purifiers.finetune import Finetune
from tests.toys import LABELS, SIZE, TARGET, images, trained, trigger


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = images(240, seed=7)
    return Clean(x=x[:180], y=y[:180], held_x=x[180:], held_y=y[180:], num_classes=LABELS)


def test_backdoor_that_is_there_needs_no_step(clean):
    assert reactivation(trained(backdoored=True), clean, TARGET, trigger(), Run()) == 0


def test_masked_backdoor_is_nearer_than_one_that_was_never_there(clean):
    masked = copy.deepcopy(trained(backdoored=True))
    with torch.no_grad():
        masked[-1].bias[TARGET] -= 6  # the way to the target is still there, only the last step is missing
    near = reactivation(masked, clean, TARGET, trigger(), Run())
    never = reactivation(trained(backdoored=False), clean, TARGET, trigger(), Run())
    assert near is not None
    assert 0 < near < (LIMIT + 1 if never is None else never)


def test_model_is_left_as_it_was_and_the_seed_decides(clean):
    model = trained(backdoored=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (reactivation(model, clean, TARGET, trigger(), Run(seed=3)) for _ in range(2))
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_image_of_another_label(clean):
    only = clean.y == TARGET
    few = Clean(x=clean.x[only], y=clean.y[only], held_x=clean.x[:0], held_y=clean.y[:0], num_classes=LABELS)
    assert reactivation(trained(backdoored=False), few, TARGET, trigger(), Run()) is None


def test_report_of_a_purification_says_it(clean):
    pair = images(240, seed=7)
    same, report = bezoar.purify(trained(backdoored=True), pair, method=Finetune(lr=0.0, epochs=1), size=SIZE)
    care = report.cleaning.aftercare
    assert care.fidelity == pytest.approx(agreement(same, pair), abs=0.05)
    assert (care.reactivation, care.reactivation_other, care.rescan_verdict) == (None, None, None)


def agreement(model: torch.nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    with torch.no_grad():
        return float((model(pair[0]).argmax(1) == trained(backdoored=True)(pair[0]).argmax(1)).float().mean())


def test_rescan_judges_the_cleaned_model():
    pair = images(240, seed=7)
    quick = {"size": SIZE, "seeds": 1, "steps": 60, "additive": False}
    _, report = bezoar.purify(trained(backdoored=True), pair, method="unlearn", rescan=True, **quick)
    assert report.verdict == "backdoored"
    care = report.cleaning.aftercare
    assert care.rescan_verdict != "backdoored"
    assert care.rescan_target is None
    assert care.reactivation is None or care.reactivation > 0
    assert care.reactivation_other is None or care.reactivation_other > 0
