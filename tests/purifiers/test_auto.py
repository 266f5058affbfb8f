"""auto: what it keeps, what it rolls back, and what it says about it."""

from __future__ import annotations

import copy
import dataclasses
import time

import pytest
import torch
from torch import nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.purifiers import auto
from bezoar.purifiers._probe import Probe
from bezoar.purifiers.auto import Auto
from tests.toys import LABELS, TARGET, acc, asr, images, trained, trigger


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = images(300, seed=7)
    return Clean(x=x[:200], y=y[:200], held_x=x[200:], held_y=y[200:], num_classes=LABELS)


def suspect() -> nn.Module:
    return copy.deepcopy(trained(backdoored=True))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_backdoor_goes_and_the_choice_is_explained(clean):
    held_out, run = images(300, seed=8), Run()
    cleaned = Auto()(suspect(), clean, run)
    assert asr(cleaned, *held_out) < 0.2
    assert acc(cleaned, *held_out) > acc(trained(backdoored=True), *held_out) - 0.05
    tried = {one["method"]: one for one in run.notes["tried"]}
    assert tried["none"]["response"] > 0.8
    assert run.notes["kept"] in tried
    assert tried[run.notes["kept"]]["response"] < tried["none"]["response"]


def steps(monkeypatch, **made: type[Purifier] | Exception) -> None:
    """Replace the methods that auto finds."""

    def find(_kind: str, name: str) -> object:
        found = made[name.replace("-", "_")]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(auto, "find", find)


def method(change) -> object:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Changed(Purifier):
        epochs: int = 20
        share: float = 0.1
        distill: float = 2.0

        def purify(self, model, clean, run, triggers):
            assert len(clean.held_x) == 0, "a method must not see the images that judge it"
            change(model)
            return model

    return Changed


@torch.no_grad()
def forget_everything(model: nn.Module) -> None:
    model[-1].weight.zero_()


def clean_net(model: nn.Module) -> None:
    model.load_state_dict(trained(backdoored=False).state_dict())


def test_harm_is_rolled_back(clean, monkeypatch):
    steps(monkeypatch, clp=method(forget_everything), repeated_unlearning=method(forget_everything))
    run = Run()
    assert same(Auto()(suspect(), clean, run), trained(backdoored=True))
    assert run.notes["kept"] == "none"
    assert len(run.notes["tried"]) == 4, "the more gentle attempt was made as well"


def test_better_one_is_kept(clean, monkeypatch):
    steps(monkeypatch, clp=method(lambda model: None), repeated_unlearning=method(clean_net))
    run = Run()
    assert same(Auto()(suspect(), clean, run), trained(backdoored=False))
    assert run.notes["kept"].startswith("clp + repeated-unlearning")


def test_method_that_refuses_is_passed_over(clean, monkeypatch):
    steps(monkeypatch, clp=UnsupportedModel("no channels"), repeated_unlearning=method(clean_net))
    run = Run()
    assert same(Auto()(suspect(), clean, run), trained(backdoored=False))
    assert run.notes["skipped"] == ["clp: no channels"]


def test_no_time_no_trial(clean, monkeypatch):
    steps(monkeypatch, clp=method(lambda model: time.sleep(0.3)), repeated_unlearning=method(clean_net))
    run = Run(budget=0.05)
    assert same(Auto()(suspect(), clean, run), trained(backdoored=True))
    assert run.budget_spent


def test_few_held_out_images_are_not_relied_on(clean):
    few = dataclasses.replace(clean, held_x=clean.held_x[:4], held_y=clean.held_y[:4])
    judge = auto._Judge(Auto(), suspect(), few, Run(), {})
    assert len(judge.x) == len(few.x)
    assert len(auto._Judge(Auto(), suspect(), clean, Run(), {}).x) == len(clean.held_x)


def test_probe_measures_success_on_other_labels(clean):
    probe = Probe(((TARGET, trigger()),), clean.x, clean.y)
    expected = asr(trained(backdoored=True), *(part[clean.y != TARGET][:128] for part in (clean.x, clean.y)))
    assert probe.successes(trained(backdoored=True), Run()) == [(TARGET, pytest.approx(expected))]
    assert probe.response(trained(backdoored=False), Run()) < 0.1


def test_triggers_of_a_scan_join_the_probe(clean):
    probe = Probe.of(suspect(), clean, Run(), {TARGET: trigger()}, clean.x, clean.y)
    assert len(probe.triggers) == 2 * LABELS + 1


@pytest.mark.parametrize("settings", [{"tolerance": -0.1}, {"free": 2.0}, {"response": 1.5}, {"epochs": 0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(SettingError):
        Auto(**settings)
