"""BadNets: patterns, places and opacity that test_patterns.py does not look at."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.attacks.badnets import BadNets
from bezoar.core.errors import SettingError
from tests.attacks.sample_data import SHAPE, assert_trigger, floats, pictures

PATTERNS = ["square", "noise", "grid", "checkerboard", "triangle", "l-shape", "random-pixels", "random-image"]


def drawn(pattern: str, size: int) -> list[str]:
    """The patch in the bottom right corner of an image: # white, . black, space left as it is."""
    trigger = BadNets(pattern=pattern, size=size, margin=0).trigger((1, 12, 12))
    text = []
    for mask, values in zip(trigger.mask[0, -size:, -size:], trigger.pattern[0, -size:, -size:], strict=True):
        text.append("".join(" " if not m else "#" if v else "." for m, v in zip(mask, values, strict=True)))
    return text


def test_patterns_look_as_they_should():
    assert drawn("grid", 3) == ["..#", ".#.", "#.#"]  # [[0,0,255],[0,255,0],[255,0,255]] of the ANP and NFT code
    assert drawn("checkerboard", 3) == ["#.#", ".#.", "#.#"]
    assert drawn("checkerboard", 4) == ["#.#.", ".#.#", "#.#.", ".#.#"]
    assert drawn("triangle", 4) == ["   #", "  ##", " ###", "####"]
    assert drawn("l-shape", 4) == ["#   ", "#   ", "#   ", "####"]


def test_width_makes_a_block():
    trigger = BadNets(size=2, width=5).trigger((1, 12, 12))
    rows, columns = trigger.mask[0].nonzero().T
    assert (rows.unique().tolist(), columns.unique().tolist()) == ([9, 10], [6, 7, 8, 9, 10])


def test_all_four_corners():
    trigger = BadNets(pattern="grid", size=3, margin=1, corner="all").trigger(SHAPE)
    assert trigger.size == 36
    patch = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    for top in (1, 28):
        for left in (1, 28):
            assert torch.equal(trigger.pattern[1, top : top + 3, left : left + 3], patch)


@given(row=st.integers(0, 12), column=st.integers(0, 12), size=st.integers(1, 12))
def test_any_row_and_column(row, column, size):
    attack = BadNets(size=size, row=row, column=column)
    if row + size > 12 or column + size > 12:
        with pytest.raises(SettingError, match="leaves a 12x12 image"):
            attack.trigger((3, 12, 12))
        return
    mask = attack.trigger((3, 12, 12)).mask[0]
    assert float(mask.sum()) == size**2
    assert bool((mask[row : row + size, column : column + size] == 1).all())


def test_row_alone_keeps_the_column_of_the_corner():
    rows, columns = BadNets(size=1, row=5, corner="top-left", margin=2).trigger((1, 12, 12)).mask[0].nonzero().T
    assert (rows.tolist(), columns.tolist()) == ([5], [2])


@pytest.mark.parametrize("pattern", ["square", "grid", "triangle"])
def test_alpha_blends_in(pattern):
    x = floats(2).x
    size = 3
    opaque = BadNets(pattern=pattern, size=size).trigger(SHAPE)(x)
    faint = BadNets(pattern=pattern, size=size, alpha=0.6).trigger(SHAPE)(x)
    torch.testing.assert_close(faint, 0.4 * x + 0.6 * opaque, rtol=0, atol=1e-6)


def test_random_pixels_are_single_pixels_anywhere():
    trigger = BadNets(pattern="random-pixels", size=3, seed=1).trigger(SHAPE)
    assert trigger.size == 9
    places = trigger.mask[0].nonzero()
    assert len({tuple(p) for p in places.tolist()}) == 9
    assert int(places.max() - places.min()) > 10, "not in one corner"
    assert not torch.equal(trigger.mask, BadNets(pattern="random-pixels", size=3, seed=2).trigger(SHAPE).mask)


def test_random_image_is_blended_at_a_fifth():
    x = floats(3).x
    trigger = BadNets(pattern="random-image").trigger(SHAPE)
    torch.testing.assert_close(trigger(x) - x, 0.2 * (trigger.pattern - x), rtol=0, atol=1e-6)
    assert len(trigger.pattern.unique()) > 3000


@given(x=pictures(), pattern=st.sampled_from(PATTERNS), corner=st.sampled_from(["all", "top-right"]))
def test_any_image(x, pattern, corner):
    size = 3 if pattern == "grid" else 4
    assert_trigger(BadNets(pattern=pattern, size=size, corner=corner).trigger(tuple(x.shape[1:])), x)


@pytest.mark.parametrize(
    "settings",
    [{"size": 0}, {"width": -1}, {"margin": -1}, {"row": -2}, {"column": -2}, {"alpha": 0.0}, {"alpha": 1.5}],
)
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"BadNets.{next(iter(settings))} must be"):
        BadNets(**settings)


def test_random_image_that_would_hide_every_image():
    with pytest.raises(SettingError, match="below 1 for random-image"):
        BadNets(pattern="random-image", alpha=1.0)


def test_more_random_pixels_than_there_are():
    with pytest.raises(SettingError, match="400 random pixels do not fit in a 12x12 image"):
        BadNets(pattern="random-pixels", size=20).trigger((3, 12, 12))
