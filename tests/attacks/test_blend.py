"""Blend: patterns and pictures. Its formula is in test_patterns.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bezoar.attacks.blend import Blend
from bezoar.core.errors import DataError, SettingError
from tests.attacks.sample_data import SHAPE, assert_trigger, floats, pictures


@pytest.fixture
def picture(tmp_path):
    values = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3) % 251
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "pattern.png")
    return tmp_path / "pattern.png", torch.from_numpy(values.astype(np.float32) / 255).permute(2, 0, 1)


def test_picture_is_blended_in(picture):
    path, pixels = picture
    x = floats(2).x
    assert torch.equal(Blend(picture=str(path), alpha=0.3).trigger(SHAPE).pattern, pixels)
    torch.testing.assert_close(
        Blend(picture=str(path), alpha=0.3).trigger(SHAPE)(x), 0.7 * x + 0.3 * pixels, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 40)])
def test_picture_fits_any_image(picture, shape):
    pattern = Blend(picture=str(picture[0])).trigger(shape).pattern
    assert pattern.shape == shape
    assert float(pattern.std()) > 0.05


def test_uniform_noise():
    pattern = Blend(noise="uniform").trigger(SHAPE).pattern
    assert float(pattern.std()) == pytest.approx(12**-0.5, abs=0.01)
    assert not torch.equal(pattern, Blend(noise="uniform", seed=1).trigger(SHAPE).pattern)


@given(x=pictures(), alpha=st.floats(0.01, 1), noise=st.sampled_from(["gaussian", "uniform"]))
def test_any_image_moves_by_at_most_alpha(x, alpha, noise):
    out = assert_trigger(Blend(alpha=alpha, noise=noise).trigger(tuple(x.shape[1:])), x)
    assert float((out - x).abs().max()) <= alpha + 1e-6


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 1.1}, {"noise": "pink"}])
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"Blend.{next(iter(settings))} must be"):
        Blend(**settings)


@pytest.mark.parametrize("content", [b"no picture", None])
def test_picture_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        Blend(picture=str(path)).trigger(SHAPE)
