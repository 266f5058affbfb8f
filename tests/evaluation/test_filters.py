"""AUROC and true positive rates, held to their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from bezoar.core.errors import SettingError
from bezoar.evaluation.filters import Scores

few = st.integers(0, 4).map(float)  # few values, so that there are ties
groups = st.tuples(st.lists(few, min_size=1, max_size=15), st.lists(few, min_size=1, max_size=15))


def scores(poisoned: list[float], clean: list[float]) -> Scores:
    return Scores.of([*poisoned, *clean], [True] * len(poisoned) + [False] * len(clean))


@given(groups)
def test_auroc_is_that_of_the_rank_sum_test(drawn):
    expected = mannwhitneyu(*drawn, method="asymptotic").statistic / (len(drawn[0]) * len(drawn[1]))
    assert scores(*drawn).auroc == pytest.approx(expected)


@given(groups)
def test_auroc_is_the_share_of_pairs(drawn):
    pairs = [(p > c) + 0.5 * (p == c) for p in drawn[0] for c in drawn[1]]
    assert scores(*drawn).auroc == pytest.approx(np.mean(pairs))


@given(groups, st.floats(0, 1))
def test_tpr_is_the_best_of_all_thresholds(drawn, fpr):
    poisoned, clean = map(np.array, drawn)
    thresholds = [-np.inf, *np.unique(np.concatenate([poisoned, clean])), np.inf]
    allowed = [t for t in thresholds if (clean > t).sum() <= fpr * len(clean) + 1e-9]
    assert scores(*drawn).tpr(fpr).value == max((poisoned > t).mean() for t in allowed)


@given(groups, groups)
def test_parts_merge(one, other):
    whole = scores(one[0] + other[0], one[1] + other[1])
    for merged in (scores(*one) + scores(*other), scores(*other) + scores(*one)):
        assert merged.auroc == whole.auroc
        assert merged.tpr(0.2) == whole.tpr(0.2)


def test_by_hand():
    found = scores([9, 8, 3, 1], [7, 5, 5, 2, 0, 0, 0, 0, 0, 0])
    assert found.tpr(0.0).value == 0.5
    assert found.tpr(0.1).value == 0.5
    assert found.tpr(0.2).value == 0.5  # the two fives go together
    assert found.tpr(0.3).value == 0.75
    assert found.tpr(1.0).value == 1
    assert scores([2, 1], [0, -math.inf]).auroc == 1


def test_a_rate_that_floats_cannot_hold():
    assert 0.29 * 100 < 29
    assert scores([70.5], list(range(100))).tpr(0.29).value == 1  # 29 clean scores lie above
    assert scores([70.5], list(range(100))).tpr(0.28).value == 0


def test_without_both_groups_there_is_no_auroc():
    assert math.isnan(scores([1], []).auroc)
    assert scores([1], []).tpr(0.01).value == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Scores.of([1, 2], [True]), "one score"),
        (lambda: Scores.of([math.nan], [True]), "NaN"),
        (lambda: scores([1], [0]).tpr(1.5), "fpr"),
    ],
)
def test_bad_input_is_refused(call, said):
    with pytest.raises(SettingError, match=said):
        call()
