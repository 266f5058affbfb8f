"""Smooth: energy in low frequencies only, and the bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn

from bezoar.attacks.smooth import Smooth
from bezoar.core.errors import SettingError
from tests.attacks.sample_data import SHAPE, assert_trigger, pictures


@pytest.mark.parametrize(("shape", "rows", "columns"), [(SHAPE, 4, 4), ((1, 28, 28), 4, 4), ((3, 64, 24), 8, 3)])
def test_energy_is_in_low_frequencies_only(shape, rows, columns):
    delta = Smooth().trigger(shape).delta.double().numpy()
    spectrum = dctn(delta, axes=(1, 2), norm="ortho")
    low = spectrum[:, :rows, :columns]
    assert (low**2).sum() == pytest.approx((spectrum**2).sum(), rel=1e-9)
    assert np.abs(spectrum[:, 0, 0]).max() < 1e-6, "the mean does not change"
    assert (np.abs(low.reshape(shape[0], -1)[:, 1:]) > 1e-4).all(), "all the others are used"


@given(x=pictures(), epsilon=st.floats(0.01, 1), cutoff=st.floats(0.05, 1))
def test_any_image_moves_by_at_most_epsilon(x, epsilon, cutoff):
    trigger = Smooth(epsilon=epsilon, cutoff=cutoff).trigger(tuple(x.shape[1:]))
    assert float(trigger.delta.abs().max()) == pytest.approx(epsilon, rel=1e-5)
    out = assert_trigger(trigger, x)
    assert float((out - x).abs().max()) <= epsilon + 1e-6


def test_default_bound_and_seed():
    assert float(Smooth().trigger(SHAPE).delta.abs().max()) == pytest.approx(16 / 255)
    assert not torch.equal(Smooth().trigger(SHAPE).delta, Smooth(seed=1).trigger(SHAPE).delta)


@pytest.mark.parametrize("settings", [{"epsilon": 0.0}, {"epsilon": 1.1}, {"cutoff": 0.0}, {"cutoff": 1.1}])
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"Smooth.{next(iter(settings))} must be"):
        Smooth(**settings)
