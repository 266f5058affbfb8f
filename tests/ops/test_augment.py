"""Augmentation against loops, SciPy and formulas."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from bezoar.core.errors import MissingExtra
from bezoar.ops.augment import as_float, augment, crop, cutout, flip, mixup, rotate
from bezoar.ops.recipe import Recipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.booleans(), st.integers(0, 1000))
def test_crop_and_flip_are_those_of_a_loop(count, channels, pad, flip, seed):
    x = torch.rand(count, channels, 5, 7, generator=seeded(seed))
    found = augment(x, Recipe(pad=pad, flip=flip), seeded(seed))
    draws = seeded(seed)
    tops, lefts = [0] * count, [0] * count
    if pad:
        tops, lefts = torch.randint(0, 2 * pad + 1, (2, count), generator=draws).tolist()
    mirrored = (torch.rand(count, generator=draws) < 0.5).tolist() if flip else [False] * count
    for n in range(count):
        for row in range(5):
            for column in range(7):
                source_column = 6 - column if mirrored[n] else column
                i, j = row + tops[n] - pad, source_column + lefts[n] - pad
                inside = 0 <= i < 5 and 0 <= j < 7
                expected = x[n, :, i, j] if inside else torch.zeros(channels)
                assert torch.equal(found[n, :, row, column], expected)


def test_crop_and_flip_are_those_of_kornia():
    from kornia.augmentation import RandomCrop, RandomHorizontalFlip

    x, pad = torch.rand(16, 3, 8, 8, generator=seeded(0)), 2
    top, left = torch.randint(0, 2 * pad + 1, (2, 16), generator=seeded(1))
    window = torch.stack([left, top, left + 7, top, left + 7, top + 7, left, top + 7], 1).view(16, 4, 2).float()
    params = {
        "batch_prob": torch.ones(16),
        "padding_size": torch.full((16, 4), pad),
        "src": window,
        "dst": (window - window[:, :1]),
        "input_size": torch.full((16, 2), 8),
        "output_size": torch.full((16, 2), 8),
        "forward_input_shape": torch.tensor(x.shape),
    }
    library = RandomCrop((8, 8), padding=pad, p=1.0, cropping_mode="slice")
    assert torch.equal(crop(x, pad, seeded(1)), library(x, params=params))
    both = [RandomHorizontalFlip(p=p)(x) for p in (0.0, 1.0)]
    mirrored = torch.rand(16, generator=seeded(1)) < 0.5
    assert torch.equal(flip(x, seeded(1)), torch.where(mirrored.view(-1, 1, 1, 1), both[1], both[0]))


def test_every_shift_and_both_sides_occur():
    x = torch.zeros(400, 1, 5, 5)
    x[:, 0, 2, 1] = 1
    found = augment(x, Recipe(pad=1, flip=True), seeded(0))
    places = {tuple(place) for place in found[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (1, 2, 3) for column in (0, 1, 2, 3, 4)}


def test_without_augmentation_images_are_untouched():
    x = torch.rand(3, 3, 5, 7)
    assert augment(x, Recipe(), seeded(0)) is x


@pytest.mark.parametrize("size", [(9, 9), (8, 8), (6, 11)])
def test_rotation_is_that_of_scipy(size):
    x = torch.rand(5, 2, *size, generator=seeded(0))
    found = rotate(x, 40.0, seeded(3))
    angles = (torch.rand(5, generator=seeded(3)).double() * 2 - 1) * math.radians(40)
    middle = (np.array(size) - 1) / 2
    for image, turned, angle in zip(x.double(), found, angles.tolist(), strict=True):
        # Anti-clockwise to the eye: rows go down, so a pixel comes from where the opposite turn takes it.
        back = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        for channel, other in zip(image.numpy(), turned.double().numpy(), strict=True):
            shift = middle - back @ middle
            wanted = ndimage.affine_transform(channel, back, shift, order=1, mode="grid-constant")
            np.testing.assert_allclose(other, wanted, atol=1e-5)


def test_rotation_angles_are_uniform():
    """The horizontal bar from the centre shows the angle of each image."""
    angles = (torch.rand(2000, generator=seeded(0)) * 2 - 1) * 30
    assert -30 <= float(angles.min()) < -29 and 29 < float(angles.max()) <= 30
    x = torch.zeros(1, 1, 41, 41)
    x[..., 20, 20:] = 1
    rows, columns = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(41.0) - 20, indexing="ij")
    for seed in range(10):
        found = rotate(x, 30.0, seeded(seed))[0, 0]
        seen = math.degrees(math.atan2(-float((rows * found).sum()), float((columns * found).sum())))
        drawn = float((torch.rand(1, generator=seeded(seed)) * 2 - 1) * 30)
        assert seen == pytest.approx(drawn, abs=0.5)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_cutout_is_that_of_a_loop(side, height, width, seed):
    x = torch.rand(3, 2, height, width, generator=seeded(seed)) + 0.1
    found, draws = cutout(x, side, seeded(seed)), seeded(seed)
    middle_rows = torch.randint(height, (3,), generator=draws).tolist()
    middle_columns = torch.randint(width, (3,), generator=draws).tolist()
    for n in range(3):
        top, left = middle_rows[n] - side // 2, middle_columns[n] - side // 2
        for row in range(height):
            for column in range(width):
                cut = top <= row < top + side and left <= column < left + side
                assert torch.equal(found[n, :, row, column], torch.zeros(2) if cut else x[n, :, row, column])


def test_cutout_reaches_the_corners():
    found = cutout(torch.ones(2000, 1, 6, 6), 3, seeded(0))
    assert set((found == 0).sum((1, 2, 3)).tolist()) == {4, 6, 9}, "in a corner, at a side, whole"
    assert bool((found == 0).any(0).all())


@given(st.integers(1, 6), st.floats(0.05, 5), st.integers(0, 1000))
def test_mixup_is_that_of_a_loop(count, alpha, seed):
    x = torch.rand(count, 1, 2, 2, generator=seeded(seed))
    mixed, pairs, share = mixup(x, alpha, seeded(seed))
    assert 0 <= share <= 1
    assert sorted(pairs.tolist()) == list(range(count))
    for n, other in enumerate(pairs.tolist()):
        torch.testing.assert_close(mixed[n], share * x[n] + (1 - share) * x[other])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_shares_have_the_moments_of_the_beta_distribution(alpha):
    generator, x = seeded(0), torch.zeros(2, 1, 1, 1)
    shares = torch.tensor([mixup(x, alpha, generator)[2] for _ in range(4000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert float(shares.mean()) == pytest.approx(0.5, abs=4 * math.sqrt(variance / 4000))
    assert float(shares.var()) == pytest.approx(variance, rel=0.08)


EVERYTHING = Recipe(pad=1, flip=True, rotate=20, cutout=3)


def test_draws_come_from_the_generator_alone():
    x, before = torch.rand(6, 3, 8, 8, generator=seeded(0)), torch.get_rng_state()
    first, second = (augment(x, EVERYTHING, seeded(1)) for _ in range(2))
    torch.rand(1)
    assert torch.equal(first, second)
    torch.set_rng_state(before)
    generator = seeded(1)
    first, second = (augment(x, EVERYTHING, generator) for _ in range(2))
    assert not torch.equal(first, second), "each call draws anew"
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(4, 9), st.integers(4, 9), st.integers(0, 1000))
def test_shape_type_and_range_stay(count, channels, height, width, seed):
    x = torch.rand(count, channels, height, width, generator=seeded(seed))
    found = augment(x, EVERYTHING, seeded(seed))
    assert found.shape == x.shape and found.dtype == x.dtype
    assert float(found.min()) >= -1e-6 and float(found.max()) <= 1 + 1e-6


def test_gradients_pass():
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    augment(x, EVERYTHING, seeded(0)).sum().backward()
    assert float(x.grad.abs().sum()) > 0


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.geometry.bbox", None)
    with pytest.raises(MissingExtra, match=r"need kornia.*bezoar\[train\]"):
        augment(torch.rand(2, 3, 8, 8), Recipe(cutout=2), seeded(0))
    augment(torch.rand(2, 3, 8, 8), Recipe(pad=2, flip=True, mixup=1.0), seeded(0))


def test_bytes_become_unit_floats():
    assert as_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    x = torch.rand(3)
    assert as_float(x) is x
