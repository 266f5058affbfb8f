"""The anomaly index, held to published values and to NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bezoar.ops.stats import anomaly_index

sizes = st.lists(st.integers(0, 4000).map(lambda n: n / 4), min_size=3, max_size=40)


def test_published_example_of_gtsrb():
    """Target 33 of the authors' GTSRB model: median 64.466667, scaled MAD 13.238736, norm 16.117647."""
    median, deviation, target = 64.466667, 13.238736 / 1.4826, 16.117647
    # 43 norms, 21 on each side, half of the 42 others at most one deviation away, and the target itself far below.
    below = [median - deviation * k for k in np.linspace(0.05, 1, 10)] + [median - 1.5 * deviation] * 10 + [target]
    above = [median + deviation * k for k in np.linspace(0.05, 1, 11)] + [median + 2.0 * deviation] * 10
    norms = np.array([*below, median, *above])
    assert len(norms) == 43
    assert np.median(norms) == pytest.approx(median)
    assert 1.4826 * np.median(np.abs(norms - np.median(norms))) == pytest.approx(13.238736)
    assert anomaly_index(norms)[20] == pytest.approx(3.652087, abs=1e-4)
    assert int(anomaly_index(norms).argmax()) == 20


def test_even_count_takes_the_mean_of_the_middle_two():
    norms = [12, 55, 60, 62, 64, 66, 70, 75, 80, 90]
    assert anomaly_index(norms)[0] == pytest.approx(4.7664, abs=1e-3)
    assert anomaly_index([12.0], norms)[0] == pytest.approx(4.7664, abs=1e-3)


@given(sizes)
def test_is_what_numpy_says(values):
    found = anomaly_index(values)
    array = np.asarray(values, dtype=np.float64)
    deviation = 1.482602218505602 * np.median(np.abs(array - np.median(array)))
    if deviation > 0:
        np.testing.assert_allclose(found, (np.median(array) - array) / deviation, rtol=1e-9, atol=1e-9)
    assert (found[array < np.median(array)] > 0).all()
    assert (found[array > np.median(array)] < 0).all()


@given(sizes, st.floats(0.5, 20))
def test_scale_does_not_matter(values, factor):
    if len(set(values)) == len(values):
        array = np.asarray(values, dtype=np.float64)
        np.testing.assert_allclose(anomaly_index(array), anomaly_index(array * factor), rtol=1e-6, atol=1e-6)


def test_no_spread():
    assert anomaly_index([5.0, 5.0, 5.0, 1.0, 9.0]).tolist() == [0, 0, 0, np.inf, -np.inf]


def test_reference_alone_gives_median_and_spread():
    assert anomaly_index([0.0, 100.0], [9.0, 10.0, 11.0]) == pytest.approx([10 / 1.4826, -90 / 1.4826], rel=1e-5)
