"""Changed copies of few images."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.ops.enlarge import changed, enlarged


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_strength_changes_nothing():
    x = torch.rand(3, 2, 9, 11)
    torch.testing.assert_close(changed(x, seeded(), strength=0.0), x)


def test_changes_stay_within_their_bounds():
    """A bright dot moves at most as far as the largest turn, shift, scale and shear together allow."""
    size, strength = 41, 0.5
    dots = torch.zeros(200, 1, size, size)
    dots[:, :, 28:31, 28:31] = 1  # eight pixels from the middle, both ways
    moved = changed(dots, seeded(), strength)
    weight = moved.sum((1, 2, 3))
    places = torch.arange(size).float()
    rows, columns = (moved.sum(3) * places).sum((1, 2)) / weight, (moved.sum(2) * places).sum((1, 2)) / weight
    away = torch.hypot(rows - 29, columns - 29)
    radius = math.hypot(9, 9)
    shift = 0.1 * strength * size * math.sqrt(2)
    turned = radius * (math.radians(10) + math.tan(math.radians(8)) + 0.2) * strength
    assert 0.5 < float(away.mean()) < float(away.max()) < shift + turned + 1
    assert float(moved.max()) <= 1
    assert 0.85 < float(moved.amax((1, 2, 3)).median()) <= 1


@given(count=st.integers(0, 40), images=st.integers(1, 9))
def test_each_image_is_copied_equally_often(count, images):
    x, y = torch.rand(images, 1, 6, 6), torch.arange(images)
    more, labels = enlarged(x, y, count, seeded())
    assert len(more) == len(labels) >= max(count, images)
    assert len(more) - max(count, images) < images
    assert torch.equal(more[:images], x)
    assert torch.equal(labels, y.repeat(len(more) // images))


def test_same_seed_same_copies():
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    first, second, other = (enlarged(x, y, 20, seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_type_stays(dtype):
    assert changed(torch.rand(2, 1, 6, 6, dtype=dtype), seeded()).dtype == dtype
