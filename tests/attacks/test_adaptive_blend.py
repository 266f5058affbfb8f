"""Adaptive Blend: pieces at training time, everything at test time, cover examples of all classes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.attacks.adaptive_blend import AdaptiveBlend
from bezoar.core.errors import SettingError
from tests.attacks.sample_data import SHAPE, assert_trigger, floats, levels, pictures


def test_defaults_are_those_of_the_toolbox():
    attack = AdaptiveBlend()
    assert (attack.rate, attack.cover_rate, attack.alpha, attack.test_alpha) == (0.003, 0.003, 0.15, 0.2)
    assert (attack.side**2, attack.mask_rate) == (16, 0.5)


def test_half_of_the_pieces_are_blended_in():
    x = levels(50).x / 255
    trigger = AdaptiveBlend().train_trigger(SHAPE)
    masks = trigger.masks(x)
    assert masks.shape == (50, 1, 32, 32)
    pieces = masks.float().view(50, 4, 8, 4, 8)
    assert bool((pieces.amax((2, 4)) == pieces.amin((2, 4))).all()), "a piece is blended in as a whole, or not"
    assert torch.equal(pieces[:, :, 0, :, 0].sum((1, 2)), torch.full((50,), 8.0))
    assert len({tuple(one.flatten().tolist()) for one in masks}) > 45, "others in other images"
    moved = trigger(x) - x
    torch.testing.assert_close(moved, 0.15 * masks.float() * (trigger.pattern - x), rtol=0, atol=1e-6)


def test_every_piece_is_used_equally_often():
    x = levels(800, (1, 16, 16)).x / 255
    counts = AdaptiveBlend().train_trigger((1, 16, 16)).masks(x).float()[:, 0, ::4, ::4].mean(0)
    assert float((counts - 0.5).abs().max()) < 0.08  # 4.5 standard deviations


def test_all_pieces_at_test_time():
    x = floats(3).x
    attack = AdaptiveBlend(test_alpha=0.25)
    trigger = attack.trigger(SHAPE)
    assert torch.equal(trigger.pattern, attack.train_trigger(SHAPE).pattern)
    torch.testing.assert_close(trigger(x) - x, 0.25 * (trigger.pattern - x), rtol=0, atol=1e-6)


def test_poisoned_and_cover_examples_carry_parts_and_cover_comes_from_every_class():
    data = floats(400)
    attack = AdaptiveBlend(rate=0.1, cover_rate=0.2, target=2)
    poisoned = attack.poison(data)
    both = torch.cat([poisoned.index, poisoned.cover])
    assert (len(poisoned.index), len(poisoned.cover), len(both.unique())) == (40, 80, 120)
    assert torch.equal(poisoned.data.x[both], attack.train_trigger(SHAPE)(data.x[both]))
    assert set(poisoned.data.y[poisoned.index].tolist()) == {2}
    assert torch.equal(poisoned.data.y[poisoned.cover], data.y[poisoned.cover])
    assert set(data.y[poisoned.cover].tolist()) == set(range(5))
    x = floats(2, seed=5).x
    assert torch.equal(poisoned.truth.main.trigger(x), attack.trigger(SHAPE)(x))


def test_cover_classes_narrow_it_down():
    data = floats(400)
    poisoned = AdaptiveBlend(rate=0.1, cover_rate=0.1, cover_classes=(3,)).poison(data)
    assert set(data.y[poisoned.cover].tolist()) == {3}


@given(x=pictures(), side=st.integers(2, 6), mask_rate=st.floats(0, 0.99))
def test_any_image(x, side, mask_rate):
    attack = AdaptiveBlend(side=side, mask_rate=mask_rate)
    shape = tuple(x.shape[1:])
    assert_trigger(attack.trigger(shape), x)
    out = assert_trigger(attack.train_trigger(shape), x)
    assert float((out - x).abs().max()) > 0, "some piece is always there"


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.0}, {"test_alpha": 1.1}, {"side": 1}, {"mask_rate": 1.0}, {"noise": "pink"}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"AdaptiveBlend.{next(iter(settings))} must be"):
        AdaptiveBlend(**settings)
