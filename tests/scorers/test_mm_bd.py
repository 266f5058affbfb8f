"""MM-BD: margins of a linear model are known, no image is looked at, and a backdoor's margin stands out."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.evidence import Scores
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.ops.chunks import label_chunks
from bezoar.ops.stats import largest_pvalue, log_ratios
from bezoar.scorers.mm_bd import MMBD, margin
from tests.purifiers.nets import CLASSES, NAMES, SIDE, few, make, toy_clean
from tests.toys import LABELS, TARGET, trained

BRIEF = MMBD(starts=2, steps=5)


def unseen(classes: int, side: int, channels: int = 3) -> Clean:
    """Clean examples that nobody can look at: they have a shape and no values."""
    x, y = torch.empty(4, channels, side, side, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    return Clean(x=x, y=y, held_x=x, held_y=y, num_classes=classes)


@functools.cache
def toy(backdoored: bool, seed: int = 0) -> Scores:
    return MMBD(starts=2, steps=100)(trained(backdoored, seed), toy_clean(), Run(seed=3))


def test_margin_is_the_logit_less_the_largest_other():
    out = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]])
    assert margin(out, torch.tensor([0, 2])).tolist() == [1.0, -6.0]


@pytest.mark.parametrize("projected", [True, False])
def test_margins_of_a_linear_model_are_its_own_bounds(projected):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    apart, shift = weight[0] - weight[1], float(bias[0] - bias[1])
    bounds = [float(apart.clamp(min=0).sum()) + shift, float((-apart).clamp(min=0).sum()) - shift]
    found = MMBD(lr=1.0, steps=200, tolerance=0.0, projected=projected).margins(model, unseen(2, 4, 1), Run())
    np.testing.assert_allclose(found, bounds, rtol=1e-6)


def test_no_image_is_looked_at():
    found = BRIEF(make("normed"), unseen(CLASSES, SIDE), Run())
    assert found.labels == BRIEF(make("normed"), few(12), Run()).labels
    assert not MMBD.needs_clean


def test_chunks_change_nothing():
    whole = MMBD(starts=3, steps=5).margins(trained(True), toy_clean(), Run())
    parts = MMBD(starts=3, steps=5, pixels_per_pass=1).margins(trained(True), toy_clean(), Run())
    np.testing.assert_allclose(whole, parts, rtol=1e-4)
    assert label_chunks([3, 1, 2], 10, 25) == [[3, 1], [2]]
    assert label_chunks([3, 1], 10, 1) == [[3], [1]]


def test_a_label_that_no_longer_moves_costs_nothing_more():
    run = Run()
    MMBD(starts=1, steps=50, tolerance=1.0)(make("normed"), few(12), run)
    assert run.image_gradients <= 3 * CLASSES


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_label_leads_and_the_rule_finds_it(seed):
    found = toy(True, seed)
    assert found.leader == TARGET
    assert found.model == found.labels[TARGET] > 0.4
    assert found.suspect
    assert found.pvalue is not None
    assert found.pvalue < 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_clean_toy_scores_lower(seed):
    found = toy(False, seed)
    assert found.model < toy(True, seed).model - 0.15
    assert found.pvalue is not None
    assert found.pvalue > (toy(True, seed).pvalue or 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_architectures(name):
    found = BRIEF(make(name), unseen(CLASSES, SIDE), Run())
    assert found.labels.keys() == set(range(CLASSES))
    assert all(np.isfinite(value) for value in found.labels.values())


@pytest.mark.parametrize("classes", [2, 3, 300])
def test_two_to_hundreds_of_labels(classes):
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 16, classes))
    found = MMBD(starts=1, steps=2)(model, unseen(classes, 16), Run())
    assert len(found.labels) == classes
    assert (found.pvalue is None) == (found.suspect is None) == (classes < 4)


def test_one_label_and_broken_weights_are_refused():
    with pytest.raises(UnsupportedModel, match="at least 2 labels"):
        BRIEF(nn.Sequential(nn.Flatten(), nn.Linear(48, 1)), unseen(1, 4), Run())
    broken = copy.deepcopy(make("normed"))
    with torch.no_grad():
        broken[-1].bias.fill_(torch.nan)
    with pytest.raises(UnsupportedModel, match="NaN"):
        BRIEF(broken, unseen(CLASSES, SIDE), Run())


def test_exponential_null_in_closed_form():
    others, largest = np.array([1.0, 2.0, 4.0, 2.5]), 9.0
    below = 1 - np.exp(-(largest - 1.0) / (others.mean() - 1.0))
    assert largest_pvalue([*others, largest], "exponential") == pytest.approx(1 - below**5)


def test_gamma_null_is_that_of_the_public_code():
    values = stats.gamma.rvs(4, size=12, random_state=1).tolist()
    rest = sorted(values)[:-1]
    shape, loc, scale = stats.gamma.fit(rest)
    wanted = 1 - stats.gamma.cdf(max(values), a=shape, loc=loc, scale=scale) ** 12
    assert largest_pvalue(values) == pytest.approx(wanted, rel=1e-5)


def test_pvalues_of_odd_samples():
    assert np.isnan(largest_pvalue([1, 2, 9]))
    assert largest_pvalue([5, 5, 5, 5]) == 1
    assert largest_pvalue([5, 5, 5, 6]) == 0


@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=20), st.floats(0.01, 100))
def test_log_ratios_know_no_unit(values, factor):
    ratios = log_ratios(values)
    np.testing.assert_allclose(ratios, log_ratios(np.array(values) * factor), atol=1e-6)
    first = np.log(values[0] / np.exp(np.median(np.log(values[1:]))))
    assert ratios[0] == pytest.approx(max(first, np.log(1e-3) - 10), abs=1e-6)


def test_log_ratios_of_odd_samples():
    assert log_ratios([3.0]).tolist() == [0.0]
    assert log_ratios([-1.0, -2.0]).tolist() == [0.0, 0.0]
    assert log_ratios([-5.0, 1.0, 1.0])[0] == pytest.approx(np.log(1e-3))


def test_labels_are_those_of_the_model():
    assert toy(True).labels.keys() == set(range(LABELS))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("starts", 0), ("steps", 0), ("lr", 0.0), ("tolerance", -1.0), ("null", "normal"), ("level", 1.0)),
        ("pixels_per_pass", 0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"MMBD.{name} must be"):
        MMBD(**{name: value})
