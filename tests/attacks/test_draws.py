"""Random numbers that depend on an image alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.attacks._draws import draws
from tests.attacks.sample_data import levels, pictures


@given(x=pictures(1), count=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_depends_on_the_image_and_nothing_else(x, count, seed):
    found = draws(x, count, seed)
    assert found.shape == (len(x), count)
    assert found.dtype == torch.int64
    assert 0 <= int(found.min()) <= int(found.max()) < 2**31 - 1
    assert torch.equal(found, torch.cat([draws(one, count, seed) for one in x.split(1)]))
    whole = (x * 255).round() / 255
    assert torch.equal(found, draws(whole, count, seed)), "an image that was saved is the same image"


def test_is_spread_evenly_and_changes_with_one_grey_level():
    x = levels(2000, (1, 8, 8)).x / 255
    found = draws(x, 4, 0)
    for column in range(4):
        counts = torch.bincount(found[:, column] % 10, minlength=10).float()
        assert float(((counts - 200) ** 2 / 200).sum()) < 35  # chi-square with 9 degrees, 1 in 10,000 is 33.7
    assert float(torch.corrcoef(found.double().T).abs().fill_diagonal_(0).max()) < 0.1
    nudged = x.clone()
    nudged[:, 0, 0, 0] = (nudged[:, 0, 0, 0] * 255 + 1).fmod(256) / 255
    assert float((draws(nudged, 1, 0) == found[:, :1]).double().mean()) < 0.01
    assert float((draws(x, 1, 1) == found[:, :1]).double().mean()) < 0.01


def test_images_of_one_grey_level_differ():
    x = torch.arange(256).view(256, 1, 1, 1).expand(-1, 3, 16, 16) / 255
    assert len(draws(x, 1, 0).unique()) > 250
