"""ABS: neurons held at a value, what they lift, and the triggers of those that lift one label."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bezoar.core.errors import SettingError
from bezoar.core.evidence import Scores
from bezoar.core.run import Run
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.channels import Site, find_sites
from bezoar.scorers._stimulate import Layer, Neuron, layers_of, leaders, lifts, stimulated
from bezoar.scorers.abs_stimulation import ABSStimulation, bounded, chosen, odds
from tests.purifiers.nets import CLASSES, NAMES, few, hooks, make, toy_clean
from tests.toys import TARGET, acc, images, trained

BRIEF = ABSStimulation(images=1, values=2, channels=8, neurons=3, steps=3, batch=4)


@functools.cache
def toy(backdoored: bool) -> Scores:
    return ABSStimulation(steps=60)(trained(backdoored), toy_clean(), Run(seed=3))


def inside(model: nn.Module, first: int, end: int, x: Tensor) -> Tensor:
    """What some layers of a sequence make of it."""
    for layer in list(model.children())[first:end]:
        x = layer(x)
    return x


def test_a_neuron_is_held_at_each_value():
    model, x = make("plain"), few(3).x
    layer = layers_of(model, x, find_sites(model, x[:1]))[1]
    out = stimulated(model, x, layer, torch.tensor([4, 7]), torch.tensor([0.5, 2.0]))
    assert out.shape == (2, 2, 3, CLASSES)
    for row, channel in enumerate((4, 7)):
        for column, value in enumerate((0.5, 2.0)):
            with torch.no_grad():
                inner = inside(model, 0, 4, x)
                inner[:, channel] = value
                wanted = inside(model, 4, 10, inner)
            torch.testing.assert_close(out[row, column], wanted, rtol=1e-4, atol=1e-4)
    assert hooks(model) == 0


def test_range_of_a_layer_is_that_of_its_activations():
    model, x = make("plain"), few(3).x
    layers = layers_of(model, x, find_sites(model, x[:1]))
    with torch.no_grad():
        assert layers[0].top == pytest.approx(float(inside(model, 0, 1, x).max()))
        assert layers[1].spread == pytest.approx(float(inside(model, 0, 4, x).std()), rel=1e-4)


def test_lift_is_the_least_over_images_of_other_labels_of_the_most_over_values():
    natural = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    out = torch.tensor([[[[1.0, 3.0, 0.0], [0.0, 9.0, 1.0]], [[2.0, 1.0, 0.0], [4.0, 1.0, 0.5]]]])
    found = lifts(out, natural, torch.tensor([0, 1]))
    assert found.tolist() == [[4.0, 3.0, 0.0]]
    labels, gaps = leaders(found)
    assert (labels.tolist(), gaps.tolist()) == ([0], [1.0])


def neuron(label: int, gap: float) -> Neuron:
    layer = Layer(Site("", nn.Identity(), 1, False), 1, 1.0, 1.0)
    return Neuron(layer, 0, label, gap)


def test_candidates_are_the_largest_gaps_with_few_of_each_label():
    found = chosen([neuron(0, 5.0), neuron(0, 4.0), neuron(0, 3.0), neuron(1, 1.0), neuron(2, 2.0)], 4, 2)
    assert [(one.label, one.gap) for one in found] == [(0, 5.0), (0, 4.0), (2, 2.0), (1, 1.0)]


def test_trigger_is_scaled_down_to_its_bound():
    trigger = MaskedTrigger(torch.full((1, 4, 4), 0.5), torch.rand(3, 4, 4))
    assert bounded(trigger, 2.0).size == pytest.approx(2.0)
    assert torch.equal(bounded(trigger, 20.0).mask, trigger.mask)


def test_odds_are_even_at_one_half_and_finite_at_the_ends():
    assert odds(5, 10) == 0
    assert odds(10, 10) == -odds(0, 10) == pytest.approx(math.log(21))


def test_planted_label_leads_by_a_small_trigger_and_the_clean_toy_scores_lower():
    found, clean = toy(True), toy(False)
    assert found.leader == TARGET
    assert found.suspect
    assert found.model > clean.model + 1
    assert clean.suspect is False
    trigger = found.triggers[TARGET]
    assert trigger.size <= 0.06 * 144 + 1e-4
    x, y = images(300, seed=8)
    others = y != TARGET
    wanted = torch.full((int(others.sum()),), TARGET)
    assert acc(trained(True), trigger(x[others]), wanted) > 0.88


def test_score_is_the_odds_of_the_reasr():
    run = Run()
    found = ABSStimulation(steps=5)(trained(True), toy_clean(), run)
    count = int((toy_clean().y != found.leader).sum())
    assert found.model == pytest.approx(odds(round(run.notes["reasr"] * count), count), abs=0.02)


def test_paper_searches_by_the_neuron_alone():
    runs = (ABSStimulation(label=weight, steps=3)(trained(True), toy_clean(), Run(seed=3)) for weight in (0.0, 1.0))
    alone, both = (found.triggers[TARGET] for found in runs)
    assert not torch.equal(alone.pattern, both.pattern)


@pytest.mark.parametrize("name", NAMES)
def test_architectures(name):
    model = make(name)
    found = BRIEF(model, few(24), Run())
    assert found.labels.keys() == set(range(CLASSES))
    assert all(np.isfinite(value) for value in found.labels.values())
    assert hooks(model) == 0


def test_same_seed_same_scores_and_chunks_are_of_memory_only():
    first, again = (BRIEF(trained(True), toy_clean(), Run(seed=5)) for _ in range(2))
    assert first.labels == again.labels
    small = ABSStimulation(**{**BRIEF.config(), "pixels_per_pass": 1})
    assert small.candidates(trained(True), toy_clean(), Run()) == BRIEF.candidates(trained(True), toy_clean(), Run())


def test_a_label_without_images_is_left_out():
    clean = toy_clean()
    rows: Tensor = clean.y != 1
    some = type(clean)(x=clean.x[rows], y=clean.y[rows], held_x=clean.x[:0], held_y=clean.y[:0], num_classes=6)
    assert len(BRIEF(trained(True), some, Run()).labels) == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("images", 0), ("values", 0), ("channels", 0), ("neurons", 0), ("per_label", 0), ("batch", 0)),
        *(("steps", -1), ("others", -1.0), ("label", -1.0), ("pressure", -1.0), ("size", 0.0), ("reasr", 1.1)),
        *(("lr", 0.0), ("pixels_per_pass", 0)),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"ABSStimulation.{name} must be"):
        ABSStimulation(**{name: value})
