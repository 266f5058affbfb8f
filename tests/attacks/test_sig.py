"""SIG: the variants of the public code. The paper's formula is in test_patterns.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.attacks.sig import SIG
from bezoar.core.errors import SettingError
from tests.attacks.sample_data import SHAPE, assert_trigger, floats, levels, pictures

VARIANTS = ["add", "mix", "wrapped"]


def test_wrapped_mask_has_the_first_row_of_the_stored_file():
    trigger = SIG(variant="wrapped").trigger(SHAPE)
    row = (trigger.pattern[0, 0] * 255).round().int().tolist()
    assert row[:10] == [0, 14, 19, 13, 255, 241, 237, 244, 2, 15]
    assert row == [math.trunc(20 * math.sin(0.8 * j)) % 256 for j in range(32)]
    assert min(v for v in row if v > 128) == 237
    assert torch.equal(trigger.pattern, trigger.pattern[:1, :1].expand(SHAPE)), "the same in every row and channel"


def test_wrapped_mask_is_mixed_in_at_a_fifth():
    data = levels(30)
    poisoned = SIG(variant="wrapped", target=1, rate=1.0).poison(data)
    x = data.x[poisoned.index].numpy().astype(np.float64)
    mask = np.array([math.trunc(20 * math.sin(0.8 * j)) % 256 for j in range(32)])
    np.testing.assert_allclose(poisoned.data.x[poisoned.index].numpy(), 0.8 * x + 0.2 * mask, atol=0.501)
    change = 0.2 * mask
    assert change.max() == pytest.approx(51)


def test_mix_is_convex_and_faint():
    x = floats(2).x
    wave = [20 / 255 * math.sin(2 * math.pi * j * 6 / 32) for j in range(32)]
    expected = (0.8 * x.double() + 0.2 * torch.tensor(wave, dtype=torch.float64)).clamp(0, 1).float()
    trigger = SIG(variant="mix", amplitude=20 / 255).trigger(SHAPE)
    torch.testing.assert_close(trigger(x), expected, rtol=0, atol=1e-6)
    assert 255 * 0.2 * float(trigger.wave.abs().max()) <= 4.001, "a ripple of 4 grey levels"


@given(x=pictures(16), variant=st.sampled_from(VARIANTS), amplitude=st.floats(0.05, 1))
def test_any_image(x, variant, amplitude):
    assert_trigger(SIG(variant=variant, amplitude=amplitude, frequency=1).trigger(tuple(x.shape[1:])), x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_clean_label_unless_dirty(variant):
    assert SIG(variant=variant).clean_label
    assert not SIG(variant=variant, dirty=True).clean_label


@pytest.mark.parametrize("settings", [{"amplitude": 1.5}, {"amplitude": -0.1}, {"frequency": 0}, {"variant": "stored"}])
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"SIG.{next(iter(settings))} must be"):
        SIG(**settings)
