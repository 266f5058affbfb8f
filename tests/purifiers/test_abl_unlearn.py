"""ABL's unlearning: raises the loss on suspects, holds the clean accuracy, and stops in time."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bezoar.core.errors import BudgetSpent, SettingError
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.ops.answers import answers
from bezoar.purifiers._choose import accuracy
from bezoar.purifiers.abl_unlearn import ABLUnlearn
from tests.purifiers.nets import NAMES, examples, few, form, hooks, make, same, toy_clean
from tests.toys import TARGET, acc, asr, images, trained, trigger


def suspects(count: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    """Poisoned training examples of the toy."""
    x, y = images(count, seed=55)
    x = trigger()(x[y != TARGET])
    return x, torch.full((len(x),), TARGET)


def suspect() -> nn.Module:
    return copy.deepcopy(trained(backdoored=True))


def given(clean: Clean | None = None, found: tuple[torch.Tensor, torch.Tensor] | None = None) -> Clean:
    return dataclasses.replace(clean or toy_clean(), suspects=found or suspects())


@pytest.mark.parametrize("order", ["joint", "ascent"])
@pytest.mark.parametrize("statistics", ["fixed", "batch"])
def test_backdoor_goes_and_the_clean_task_stays(order, statistics):
    held_out = images(300, seed=8)
    model, run = suspect(), Run(seed=3)
    ABLUnlearn(order=order, statistics=statistics)(model, given(), run)
    assert asr(model, *held_out) < 0.4 < 0.95 < asr(trained(backdoored=True), *held_out)
    assert acc(model, *held_out) > 0.93
    assert run.notes["suspects_before"] > 0.95
    assert run.notes["suspects_after"] < 0.4


def test_first_step_is_the_gradient_of_the_papers_objective():
    """Loss on clean examples minus that on suspects, one batch each, plain SGD."""
    clean = given(few(4), (examples(4, seed=9)[0], torch.tensor([1, 1, 1, 1])))
    model = make("plain")
    clean = dataclasses.replace(clean, suspects=(clean.suspects[0], answers(model, clean.suspects[0])))
    by_hand = copy.deepcopy(model)
    loss = F.cross_entropy(by_hand(clean.x), clean.y) - F.cross_entropy(by_hand(clean.suspects[0]), clean.suspects[1])
    loss.backward()
    ABLUnlearn(epochs=1, lr=0.01, batch=4, weight_decay=0.0, clip=0.0, tolerance=1.0)(model, clean, Run())
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        # Nesterov with momentum 0.9: the first step is 1.9 times the gradient.
        torch.testing.assert_close(one, other - 0.01 * 1.9 * other.grad)


def test_ascent_alone_does_not_look_at_clean_examples_but_to_stop():
    one, other = suspect(), suspect()
    settings = {"order": "ascent", "epochs": 1, "tolerance": 1.0}
    ABLUnlearn(**settings)(one, given(toy_clean(180)), Run(seed=3))
    ABLUnlearn(**settings)(other, given(toy_clean(60)), Run(seed=3))
    assert same(one, other)


def test_it_stops_where_the_clean_accuracy_would_fall():
    model, run = suspect(), Run(seed=3)
    ABLUnlearn(lr=0.5, clip=0.0, order="ascent")(model, given(), run)
    assert same(model, trained(backdoored=True)), "back to the weights before the first epoch"
    assert run.notes["unlearn_epochs"] == 0
    assert any("stopped after 0 epochs" in warning for warning in run.warnings)
    assert accuracy(model, toy_clean().x, toy_clean().y) > 0.95


def test_model_that_does_not_know_the_suspects_is_unchanged():
    model, run = copy.deepcopy(trained(backdoored=False)), Run()
    ABLUnlearn()(model, given(), run)
    assert same(model, trained(backdoored=False))
    assert any("unchanged" in warning for warning in run.warnings)


def test_only_the_first_suspects_are_used():
    x, y = suspects()
    wrong = torch.cat([x, images(60, seed=3)[0]]), torch.cat([y, torch.zeros(60, dtype=torch.int64)])
    one, other = suspect(), suspect()
    ABLUnlearn(most=len(y), epochs=2)(one, given(found=wrong), Run(seed=3))
    ABLUnlearn(epochs=2)(other, given(), Run(seed=3))
    assert same(one, other)


def test_uint8_suspects_are_the_same_as_floats():
    x, y = suspects()
    levels = (x * 255).round().to(torch.uint8)
    one, other = suspect(), suspect()
    ABLUnlearn(epochs=2)(one, given(found=(levels, y)), Run(seed=3))
    ABLUnlearn(epochs=2)(other, given(found=(levels.float() / 255, y)), Run(seed=3))
    assert same(one, other)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_suspects_and_few_clean_examples_are_no_fault(count):
    x, y = suspects()
    model = suspect()
    ABLUnlearn(epochs=2)(model, given(toy_clean(count), (x[:count], y[:count])), Run())
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_works_on_any_architecture(name):
    model = make(name)
    x, _ = examples(12, seed=4)
    shapes = form(model)
    found = ABLUnlearn(epochs=2, tolerance=1.0)(model, given(few(12), (x, answers(model, x))), Run())
    assert form(found) == shapes
    assert not found.training
    assert not hooks(found)
    assert not same(found, make(name))


class Half(nn.Module):
    """A net of half precision that takes and gives float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make("normed").to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.to(next(self.net.parameters()).dtype)).float()


def test_half_precision_comes_back():
    model, x = Half(), examples(12, seed=4)[0]
    before = copy.deepcopy(model)
    ABLUnlearn(epochs=1, tolerance=1.0)(model, given(few(12), (x, answers(model, x))), Run())
    assert form(model) == form(before)
    assert not same(model, before)


def test_without_suspects_it_says_how_to_find_them():
    with pytest.raises(SettingError, match="thought to be poisoned") as caught:
        ABLUnlearn()(suspect(), toy_clean(), Run())
    assert "bezoar filter data" in caught.value.hint
    empty = (torch.zeros(0, 3, 12, 12), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(SettingError, match="thought to be poisoned"):
        ABLUnlearn()(suspect(), dataclasses.replace(toy_clean(), suspects=empty), Run())


def test_budget_ends_it():
    with pytest.raises(BudgetSpent):
        ABLUnlearn()(suspect(), given(), Run(budget=1e-9))


@pytest.mark.parametrize(
    "settings",
    [
        *({"order": "both"}, {"epochs": 0}, {"lr": -1.0}, {"batch": 1}, {"weight_decay": -1.0}),
        *({"clip": -1.0}, {"tolerance": 1.5}, {"most": 0}, {"statistics": "train"}),
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        ABLUnlearn(**settings)
