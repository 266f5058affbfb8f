"""BPPA: quantisation, dithering against a slow loop, and negative examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bezoar.attacks.bppa import BPPA, dithered, nearest
from bezoar.core.errors import SettingError
from tests.attacks.sample_data import SHAPE, assert_trigger, floats, levels, pictures


def slow_dither(image: np.ndarray, count: int) -> np.ndarray:
    """Floyd-Steinberg on one ``(H, W)`` channel, pixel by pixel, in the same float type."""
    work, one = image.copy(), image.dtype.type
    height, width = image.shape
    for y in range(height):
        for x in range(width):
            old = work[y, x]
            new = one(min(max(np.round(old * one(count - 1)), 0), count - 1)) / one(count - 1)
            work[y, x] = new
            error = old - new
            for down, right, share in ((1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16), (0, 1, 7 / 16)):
                if y + down < height and 0 <= x + right < width:
                    work[y + down, x + right] += error * one(share)
    return work


@settings(max_examples=20)
@given(x=pictures(1, 11), count=st.integers(2, 16))
def test_dithering_is_that_of_a_slow_loop(x, count):
    out = dithered(x, count).numpy()
    for image, wanted in zip(x.flatten(0, 1).numpy(), out.reshape(-1, *out.shape[2:]), strict=True):
        np.testing.assert_array_equal(slow_dither(image, count), wanted)


def test_dithering_keeps_the_brightness_that_rounding_loses():
    x = torch.full((1, 1, 32, 32), 0.55)  # rounds up to 4/7 = 0.571
    assert float(nearest(x, 8).mean()) == pytest.approx(4 / 7, abs=1e-6)
    assert float(dithered(x, 8).mean()) == pytest.approx(0.55, abs=0.003)


def test_quantisation_is_the_formula_on_all_grey_levels():
    x = torch.arange(256, dtype=torch.float32).view(1, 1, 16, 16)
    wanted = torch.round(x / 255 * 7) / 7 * 255
    out = BPPA().trigger((1, 16, 16))(x / 255) * 255
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-3)
    assert len(out.unique()) == 8
    assert float((out - x).abs().max()) <= 255 / 14 + 1e-3, "at most half a step"


@settings(max_examples=15)
@given(x=pictures(), count=st.sampled_from([2, 5, 8, 128]), dithering=st.booleans())
def test_any_image_keeps_few_values(x, count, dithering):
    out = assert_trigger(BPPA(levels=count, dithering=dithering).trigger(tuple(x.shape[1:])), x)
    steps = out * (count - 1)
    assert float((steps - steps.round()).abs().max()) < 1e-4


@pytest.mark.parametrize("make", [floats, levels])
@pytest.mark.parametrize("negatives", ["residual", "levels"])
def test_negative_examples_keep_their_label_and_are_not_the_trigger(make, negatives):
    data = make(60)
    attack = BPPA(negatives=negatives, rate=0.2, cover_rate=0.3)
    poisoned = attack.poison(data)
    index, cover = poisoned.index, poisoned.cover
    assert (len(index), len(cover)) == (12, 18)
    assert not set(index.tolist()) & set(cover.tolist())
    assert torch.equal(poisoned.data.y[cover], data.y[cover])
    x = data.x / 255 if data.x.dtype == torch.uint8 else data.x
    after = poisoned.data.x / 255 if data.x.dtype == torch.uint8 else poisoned.data.x
    triggered = attack.trigger(SHAPE)(x)
    torch.testing.assert_close(after[index], triggered[index], rtol=0, atol=0.51 / 255)
    changed = (after[cover] - x[cover]).flatten(1).abs().amax(1)
    assert bool((changed > 0.01).all()), "every one is changed"
    assert bool(((after[cover] - triggered[cover]).flatten(1).abs().amax(1) > 0.01).all()), "and not by the trigger"


def test_residuals_are_those_of_another_image():
    data = floats(40)
    poisoned = BPPA(rate=0.1, cover_rate=0.5).poison(data)
    residuals = nearest(data.x, 8) - data.x
    for place in poisoned.cover.tolist():
        change = poisoned.data.x[place] - data.x[place]
        same = [j for j in range(40) if torch.allclose(change, residuals[j], atol=1e-6)]
        assert len(same) == 1
        assert same != [place]


def test_negatives_come_from_every_class():
    poisoned = BPPA(rate=0.1, cover_rate=0.5, target=1).poison(floats(200))
    assert set(poisoned.data.y[poisoned.cover].tolist()) == set(range(5))


@pytest.mark.parametrize("settings", [{"levels": 1}, {"levels": 129}, {"negatives": "none"}, {"cover_rate": 1.0}])
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"BPPA.{next(iter(settings))} must be"):
        BPPA(**settings)
