"""Neuron pruning: the ranking, both ends of it, and the backdoor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bezoar.core.errors import SettingError
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import AdditiveTrigger, MaskedTrigger
from bezoar.ops.units import last_features
from bezoar.purifiers.neuron_pruning import NeuronPruning, most_excited
from bezoar.scanners.neural_cleanse import NeuralCleanse
from tests.purifiers.nets import NAMES, SIDE, few, form, hooks, make, same, toy_clean
from tests.toys import LABELS, TARGET, acc, asr, images, trained, trigger


def suspect() -> nn.Module:
    return copy.deepcopy(trained(backdoored=True))


def reader() -> nn.Sequential:
    """Four pixels, read as they are: label 0 by default, label 1 for the last pixel."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 9.0]]))
    return model


def pixels() -> Clean:
    """Ten images of label 0, whose last pixel is dark."""
    x = torch.rand(10, 1, 2, 2, generator=torch.Generator().manual_seed(0)).clamp(min=0.2)
    x[:, :, 1, 1] = 0
    y = torch.zeros(10, dtype=torch.long)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=2)


def corner() -> MaskedTrigger:
    mask = torch.zeros(1, 2, 2)
    mask[0, 1, 1] = 1
    return MaskedTrigger(mask, torch.ones(1, 2, 2))


def test_the_neuron_that_the_trigger_excites_comes_first_and_is_enough():
    model, clean, run = reader(), pixels(), Run()
    order = most_excited(model, last_features(model, clean.x[:1]), clean.x, corner()(clean.x))
    assert int(order[0]) == 3
    NeuronPruning()(model, clean, run, {1: corner()})
    assert model[1].weight.detach().tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
    assert run.notes == {"success_1": 0.0, "pruned": 1, "neurons": 4}
    assert run.warnings == []


def test_neurons_that_the_trigger_calms_come_last():
    model, clean = reader(), pixels()
    delta = torch.tensor([[[0.1, -0.2], [0.05, 0.3]]])
    order = most_excited(model, last_features(model, clean.x[:1]), clean.x, AdditiveTrigger(delta)(clean.x))
    assert order.tolist() == [3, 0, 2, 1]


def test_pruning_ends_before_it_costs_too_much():
    """The trigger's neuron is the one that the clean images live on."""
    clean = pixels()
    model, run = reader(), Run()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]]))
    original = copy.deepcopy(model)
    ones = torch.ones(10, dtype=torch.long)
    ones[0] = 0  # an image of another label, on which the trigger works
    clean = Clean(x=clean.x, y=ones, held_x=clean.x[:0], held_y=ones[:0], num_classes=2)
    bright = torch.zeros(1, 2, 2)
    bright[0, 0, 0] = 0.8
    NeuronPruning()(model, clean, run, {1: AdditiveTrigger(bright)})
    assert same(model, original)
    assert run.notes["success_1"] == 1.0
    assert "still works on 100%" in run.warnings[0]


def test_at_most_the_share_is_pruned():
    run = Run()
    NeuronPruning(success=0.0, tolerance=1.0, share=0.02)(suspect(), toy_clean(), run, {TARGET: trigger()})
    assert run.notes["pruned"] <= 5
    assert run.notes["neurons"] == 288


@pytest.mark.parametrize("layer", ["penultimate", "conv"])
def test_backdoor_goes(layer):
    """The defender knows only what the scan found; the planted trigger measures."""
    found = NeuralCleanse(seeds=1, steps=80)(suspect(), toy_clean_with_held(), Run()).seeds[0].labels[TARGET].trigger
    model, held_out, run = suspect(), images(300, seed=8), Run()
    NeuronPruning(layer=layer)(model, toy_clean(), run, {TARGET: found})
    assert asr(model, *held_out) < 0.2
    assert acc(model, *held_out) > 0.95
    assert run.notes[f"success_{TARGET}"] <= (0.05 if layer == "penultimate" else 0.2)
    assert 0 < run.notes["pruned"] <= run.notes["neurons"] / 2


def toy_clean_with_held() -> Clean:
    x, y = images(240, seed=7)
    return Clean(x=x[:180], y=y[:180], held_x=x[180:], held_y=y[180:], num_classes=LABELS)


def test_trigger_that_does_not_work_costs_nothing():
    model, run = copy.deepcopy(trained(backdoored=False)), Run()
    NeuronPruning()(model, toy_clean(), run, {TARGET: trigger()})
    assert same(model, trained(backdoored=False))
    assert run.notes["pruned"] == 0


def test_several_triggers_are_treated_one_after_the_other():
    model, run = suspect(), Run()
    faint = AdditiveTrigger(torch.full((3, 12, 12), 0.01))
    NeuronPruning()(model, toy_clean(), run, {0: faint, TARGET: trigger()})
    assert asr(model, *images(300, seed=8)) < 0.2
    assert {"success_0", f"success_{TARGET}"} <= run.notes.keys()


@pytest.mark.parametrize("count", [100, 10, 1])
def test_few_images(count):
    model, run = suspect(), Run()
    NeuronPruning()(model, toy_clean(count), run, {TARGET: trigger()})
    assert acc(model, *images(300, seed=8)) > 0.9
    assert asr(model, *images(300, seed=8)) < 0.3


def test_images_of_the_target_alone_prune_nothing():
    clean, run, model = toy_clean(), Run(), suspect()
    ours = clean.y == TARGET
    clean = Clean(x=clean.x[ours], y=clean.y[ours], held_x=clean.x[:0], held_y=clean.y[:0], num_classes=LABELS)
    NeuronPruning()(model, clean, run, {TARGET: trigger()})
    assert same(model, trained(backdoored=True))
    assert "no clean images of other labels" in run.warnings[0]


@pytest.mark.parametrize("name", NAMES)
def test_architectures(name):
    model, run = make(name), Run()
    before = form(model)
    bright = AdditiveTrigger(torch.full((3, SIDE, SIDE), 0.5))
    label = int(model(bright(few(1).x)).argmax())
    out = NeuronPruning(tolerance=1.0, layer="conv")(model, few(24), run, {label: bright})
    assert form(out) == before
    assert bool(torch.isfinite(out(few(8).x)).all())
    assert hooks(out) == 0
    assert run.notes["pruned"] > 0


@pytest.mark.parametrize(("name", "value"), [("layer", "first"), ("success", 1.1), ("tolerance", -0.1), ("share", 0.0)])
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"NeuronPruning.{name} must be"):
        NeuronPruning(**{name: value})
