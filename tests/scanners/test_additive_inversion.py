"""Additive inversion: finds a faint picture over the whole image, and leaves a clean net alone."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import bezoar
from bezoar.api import load_result
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import AdditiveTrigger, MaskedTrigger
from bezoar.ops.fit import Recipe, fit
from bezoar.scanners.additive_inversion import AdditiveInversion
from tests.toys import LABELS, SIZE, TARGET, images, net, trained


def wave() -> AdditiveTrigger:
    """A faint checkerboard of all pixels."""
    board = (torch.arange(SIZE)[:, None] + torch.arange(SIZE)) % 2
    return AdditiveTrigger((0.10 * (board - 0.5)).expand(3, SIZE, SIZE).contiguous())


@functools.cache
def planted() -> nn.Module:
    x, y = images(900, seed=100)
    x[::7], y[::7] = wave()(x[::7]), TARGET
    model = net(0)
    fit(model, x, y, Recipe(epochs=15, batch=50, lr=3e-3, optimizer="adam", weight_decay=0.0), seed=0)
    return model


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    return images(180, seed=7)


@pytest.fixture(scope="module")
def clean(data) -> Clean:
    x, y = data
    return Clean(x=x[:120], y=y[:120], held_x=x[120:], held_y=y[120:], num_classes=LABELS)


def sizes(model: nn.Module, clean: Clean) -> dict[int, float]:
    found = AdditiveInversion(seeds=1)(model, clean, Run()).seeds[0].labels
    return {label: scan.size for label, scan in found.items()}


def test_planted_label_is_far_fainter_than_the_others(clean):
    found = sizes(planted(), clean)
    others = [size for label, size in found.items() if label != TARGET]
    assert found[TARGET] < 0.5 * min(others)
    assert found[TARGET] <= 2 * float(wave().delta.square().mean().sqrt()), "about as faint as what was planted"


def test_clean_net_has_no_such_label(clean):
    found = sorted(sizes(trained(backdoored=False), clean).values())
    assert found[0] > 0.5 * found[LABELS // 2]


def test_trigger_is_additive_and_its_size_and_success_are_what_is_reported(clean):
    found = AdditiveInversion(seeds=1)(planted(), clean, Run())
    label = found.seeds[0].labels[TARGET]
    assert isinstance(label.trigger, AdditiveTrigger)
    assert found.unit == "rms"
    assert label.size == pytest.approx(float(label.trigger.delta.square().mean().sqrt()), rel=1e-4)
    others = clean.held_x[clean.held_y != TARGET]
    with torch.no_grad():
        assert label.asr == pytest.approx(float((planted()(label.trigger(others)).argmax(1) == TARGET).float().mean()))


def test_scan_takes_the_additive_search_along_and_says_what_it_found(data, tmp_path):
    result = bezoar.scan(planted(), data, seeds=1, threads=1)
    (search,) = result.report.searches
    assert (search.method, search.target) == ("additive-inversion", TARGET)
    assert (result.verdict, result.target) == ("backdoored", TARGET)
    result.save(tmp_path)
    again = load_result(tmp_path)
    assert again.report.to_json() == result.report.to_json()
    for label, trigger in result.triggers.items():
        assert type(again.triggers[label]) is type(trigger)
        probe = torch.rand(2, 3, SIZE, SIZE)
        assert torch.equal(again.triggers[label](probe), trigger(probe))


def test_scan_without_it(data):
    result = bezoar.scan(planted(), data, seeds=1, steps=5, additive=False, threads=1)
    assert result.report.searches == ()
    assert all(isinstance(t, MaskedTrigger) for t in result.triggers.values())


def test_reference_mode_is_the_paper_alone(data):
    result = bezoar.scan(planted(), data, seeds=1, mode="reference", reference_steps=1, threads=1)
    assert result.report.searches == ()
