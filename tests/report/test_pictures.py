"""Pictures go to PNG text and back, the same bytes each time."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from bezoar.core.errors import DataError, SettingError
from bezoar.core.pictures import picture, png, stamp_picture


@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_is_exact_on_byte_levels(channels: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (channels, 5, 7)) / 255
    assert np.array_equal(picture(png(levels)), levels.astype(np.float32))
    assert np.array_equal(picture(png(torch.tensor(levels, dtype=torch.float64))), levels.astype(np.float32))


def test_same_pixels_give_same_text_without_a_time() -> None:
    image = np.random.default_rng(1).random((3, 16, 16))
    data = base64.b64decode(png(image))
    assert png(image) == png(image.copy())
    assert b"tIME" not in data and b"tEXt" not in data


def test_values_outside_are_clipped_and_nan_is_black() -> None:
    assert picture(png(np.array([[[-1.0, 2.0, np.nan]]]))).tolist() == [[[0.0, 1.0, 0.0]]]


def test_other_channel_counts_are_shown_as_their_mean() -> None:
    image = np.stack([np.full((2, 2), v) for v in (0.0, 1.0, 0.0, 1.0)])
    assert picture(png(image)).shape == (1, 2, 2)
    assert picture(png(image))[0, 0, 0] == pytest.approx(0.5, abs=0.01)


def test_stamp_is_mask_times_pattern() -> None:
    mask, pattern = torch.zeros(1, 4, 4), torch.rand(3, 4, 4)
    mask[0, 1, 2] = 1
    stamp = picture(stamp_picture(mask, pattern))
    assert np.allclose(stamp[:, 1, 2], pattern[:, 1, 2], atol=1 / 255)
    assert stamp.sum() == pytest.approx(stamp[:, 1, 2].sum())


def test_half_precision_and_gradients_are_accepted() -> None:
    assert png(torch.full((1, 2, 2), 0.5, dtype=torch.bfloat16)) == png(torch.full((1, 2, 2), 0.5, requires_grad=True))


@pytest.mark.parametrize("shape", [(2, 2), (1, 3, 2, 2), (3, 0, 2), (0, 2, 2)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="picture must be"):
        png(np.zeros(shape))


def test_mask_and_pattern_must_fit() -> None:
    with pytest.raises(SettingError, match="expected a mask"):
        stamp_picture(np.zeros((3, 2, 2)), np.zeros((3, 2, 2)))


@pytest.mark.parametrize("text", ["", "###", base64.b64encode(b"GIF89a").decode(), png(np.ones((1, 9, 9)))[:40]])
def test_other_text_is_no_picture(text: str) -> None:
    with pytest.raises(DataError, match="not a PNG"):
        picture(text)
