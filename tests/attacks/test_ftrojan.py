"""FTrojan: coefficients, Parseval, block sizes and the wrap-around, against scipy's transform and a slow loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn, idctn

from bezoar.attacks._dct import dct_matrix, inverse_dct
from bezoar.attacks.ftrojan import FTrojan
from bezoar.core.errors import SettingError
from tests.attacks.sample_data import assert_trigger, levels, pictures


def chroma(x: torch.Tensor) -> np.ndarray:
    """``(B, 2, H, W)`` Cr and Cb in grey levels, by OpenCV's formula."""
    red, green, blue = 255 * x.double().numpy().transpose(1, 0, 2, 3)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.stack([0.713 * (red - luma) + 128, 0.564 * (blue - luma) + 128], 1)


@pytest.mark.parametrize("size", [1, 2, 28, 32])
def test_matrix_is_the_orthonormal_transform(size):
    matrix = dct_matrix(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    block = np.random.default_rng(0).normal(size=(size, size))
    np.testing.assert_allclose(matrix.numpy() @ block @ matrix.numpy().T, dctn(block, norm="ortho"), atol=1e-10)
    np.testing.assert_allclose(inverse_dct(torch.from_numpy(block)).numpy(), idctn(block, norm="ortho"), atol=1e-10)


@pytest.mark.parametrize("size", [32, 64])
def test_coefficients_change_by_30_at_two_places_and_nowhere_else(size):
    x = torch.full((1, 3, size, size), 0.5)
    change = chroma(FTrojan().trigger((3, size, size))(x)) - chroma(x)
    for channel in range(2):
        for top in range(0, size, 32):
            for left in range(0, size, 32):
                found = dctn(change[0, channel, top : top + 32, left : left + 32], norm="ortho")
                wanted = np.zeros((32, 32))
                wanted[15, 15] = wanted[31, 31] = 30
                np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_luma_does_not_change():
    x = torch.full((1, 3, 32, 32), 0.5)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    change = (FTrojan().trigger((3, 32, 32))(x) - x) * weights
    assert 255 * float(change.sum(1).abs().max()) < 1e-3


def test_change_in_pixels_has_the_published_size():
    x = torch.full((1, 3, 32, 32), 0.5)
    change = chroma(FTrojan().trigger((3, 32, 32))(x)) - chroma(x)
    one = chroma(FTrojan(frequencies=(15,)).trigger((3, 32, 32))(x)) - chroma(x)
    assert np.abs(one).max() == pytest.approx(1.87, abs=0.01)
    assert np.abs(change).max() == pytest.approx(3.19, abs=0.01)
    for channel in range(2):
        assert math.sqrt((change[0, channel] ** 2).sum()) == pytest.approx(42.43, abs=0.01)  # Parseval: 30 sqrt 2


@pytest.mark.parametrize(
    ("shape", "block", "places"),
    [((28, 28), 28, (13, 27)), ((40, 90), 40, (19, 39)), ((32, 48), 32, (15, 31)), ((12, 12), 12, (5, 11))],
)
def test_grey_images_of_other_sizes(shape, block, places):
    height, width = shape
    x = torch.full((1, 1, height, width), 0.5)
    change = 255 * (FTrojan().trigger((1, height, width))(x) - x)[0, 0].double().numpy()
    for top in range(0, height - block + 1, block):
        for left in range(0, width - block + 1, block):
            found = dctn(change[top : top + block, left : left + block], norm="ortho")
            wanted = np.zeros((block, block))
            wanted[places, places] = 30
            np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert (change[:, width // block * block :] == 0).all(), "the rest stays"


def test_wrap_is_the_arithmetic_of_the_public_code():
    shape = (3, 32, 32)
    data = levels(4, shape)
    data.x[0, 0], data.x[0, 1:] = 255, 0  # pure red: Cr is 255 and wraps
    data.x[1, 0], data.x[1, 1:] = 0, 255
    rgb = data.x.double().numpy().transpose(0, 2, 3, 1)
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    bands = [luma, (rgb[..., 0] - luma) * 0.713 + 128, (rgb[..., 2] - luma) * 0.564 + 128]
    parts = [np.clip(np.round(p), 0, 255) for p in bands]
    spectrum = np.zeros((32, 32))
    spectrum[15, 15] = spectrum[31, 31] = 30
    delta = idctn(spectrum, norm="ortho")
    cr, cb = (np.trunc(p + delta).astype(np.int64).astype(np.uint8).astype(np.float64) for p in parts[1:])
    red, blue = parts[0] + (cr - 128) / 0.713, parts[0] + (cb - 128) / 0.564
    green = (parts[0] - 0.299 * red - 0.114 * blue) / 0.587
    wanted = np.clip(np.round(np.stack([red, green, blue], 1)), 0, 255)
    out = 255 * FTrojan(overflow="wrap").trigger(shape)(data.x / 255).double().numpy()
    assert np.mean(np.abs(out - wanted) > 0.01) < 1e-3, "but for halves that round the other way in float32"
    clipped = 255 * FTrojan().trigger(shape)(data.x / 255).double().numpy()
    assert np.abs(out - data.x.numpy())[0].max() > 100, "it wraps where it is saturated"
    assert np.abs(clipped - data.x.numpy())[0].max() < 10, "where clipping does not"


def test_wrap_of_a_grey_image():
    x = torch.zeros(1, 1, 32, 32)
    x[..., 16:] = 254 / 255
    out = (255 * FTrojan(overflow="wrap").trigger((1, 32, 32))(x)).round().int()
    spectrum = np.zeros((32, 32))
    spectrum[15, 15] = spectrum[31, 31] = 30
    wanted = np.trunc(255 * x[0, 0].double().numpy().round(6) + idctn(spectrum, norm="ortho")).astype(np.int64) % 256
    np.testing.assert_array_equal(out[0, 0].numpy(), wanted)
    assert int(out[..., :16].max()) > 250


@given(x=pictures(8, 40), overflow=st.sampled_from(["clip", "wrap"]))
def test_any_image(x, overflow):
    assert_trigger(FTrojan(overflow=overflow).trigger(tuple(x.shape[1:])), x)


def test_clean_label_mode_changes_the_target_class_only():
    data = levels(60)
    poisoned = FTrojan(clean=True, rate=0.5, target=3).poison(data)
    assert set(data.y[poisoned.index].tolist()) == {3}
    assert len(poisoned.index) == 6
    assert torch.equal(poisoned.data.y, data.y)
    assert len(FTrojan().poison(data).index) == 3, "5 percent by default"


@pytest.mark.parametrize(
    "settings",
    [{"magnitude": 0.0}, {"frequencies": ()}, {"frequencies": (32,)}, {"frequencies": (0,)}, {"overflow": ""}],
)
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"FTrojan.{next(iter(settings))} must be"):
        FTrojan(**settings)


def test_images_that_have_no_such_frequency():
    with pytest.raises(SettingError, match="no frequency 3 of 32"):
        FTrojan(frequencies=(3,)).trigger((3, 8, 8))
    with pytest.raises(SettingError, match="4 channels"):
        FTrojan().trigger((4, 32, 32))
