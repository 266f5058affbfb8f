"""Adaptive Patch: one faint patch at training time, all of them at test time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.attacks.adaptive_patch import AdaptivePatch
from bezoar.core.errors import SettingError
from tests.attacks.sample_data import SHAPE, assert_trigger, floats, levels, pictures

CORNERS = [(25, 25), (25, 1), (1, 25), (1, 1)]


def test_defaults_are_those_of_the_toolbox():
    attack = AdaptivePatch()
    assert (attack.rate, attack.cover_rate, attack.alphas) == (0.003, 0.006, (0.5, 0.2, 0.5, 0.3))


def test_training_images_carry_one_patch_at_its_own_opacity():
    x = levels(400).x / 255
    trigger = AdaptivePatch().train_trigger(SHAPE)
    moved = trigger(x) - x
    seen = torch.zeros(4)
    for one, image in zip(moved, x, strict=True):
        patches = [bool(one[:, top : top + 6, left : left + 6].any()) for top, left in CORNERS]
        assert sum(patches) == 1
        number = patches.index(True)
        top, left = CORNERS[number]
        rest = one.clone()
        rest[:, top : top + 6, left : left + 6] = 0
        assert not bool(rest.any())
        alpha = (0.5, 0.2, 0.5, 0.3)[number]
        wanted = alpha * (trigger.patterns[number] - image)[:, top : top + 6, left : left + 6]
        torch.testing.assert_close(one[:, top : top + 6, left : left + 6], wanted, rtol=0, atol=1e-6)
        seen[number] += 1
    assert float((seen - 100).abs().max()) < 40, "each patch about as often"


def test_all_patches_are_opaque_at_test_time():
    attack = AdaptivePatch()
    trigger = attack.trigger(SHAPE)
    assert trigger.size == 144
    for number, (top, left) in enumerate(CORNERS):
        block = (slice(None), slice(top, top + 6), slice(left, left + 6))
        assert bool((trigger.mask[block] == 1).all())
        assert torch.equal(trigger.pattern[block], attack.train_trigger(SHAPE).patterns[number][block])


def test_two_patches_at_test_time_as_in_the_toolbox():
    trigger = AdaptivePatch(test_patches=(0, 2), test_alpha=0.5).trigger(SHAPE)
    assert trigger.size == pytest.approx(36)
    assert float(trigger.mask[0, 1:7, 1:7].max()) == 0


def test_cover_examples_keep_their_label_and_come_from_every_class():
    data = floats(400)
    attack = AdaptivePatch(rate=0.1, cover_rate=0.2, target=1)
    poisoned = attack.poison(data)
    both = torch.cat([poisoned.index, poisoned.cover])
    assert (len(poisoned.index), len(poisoned.cover), len(both.unique())) == (40, 80, 120)
    assert torch.equal(poisoned.data.x[both], attack.train_trigger(SHAPE)(data.x[both]))
    assert set(poisoned.data.y[poisoned.index].tolist()) == {1}
    assert torch.equal(poisoned.data.y[poisoned.cover], data.y[poisoned.cover])
    assert set(data.y[poisoned.cover].tolist()) == set(range(5))


@given(x=pictures(14), count=st.integers(1, 4))
def test_any_image(x, count):
    attack = AdaptivePatch(alphas=(0.5, 0.2, 0.5, 0.3)[:count])
    shape = tuple(x.shape[1:])
    assert_trigger(attack.trigger(shape), x)
    assert_trigger(attack.train_trigger(shape), x)


@pytest.mark.parametrize(
    "settings",
    [
        {"alphas": ()},
        {"alphas": (0.5,) * 5},
        {"alphas": (0.0,)},
        {"test_alpha": 0.0},
        {"test_patches": (4,)},
        {"size": 0},
        {"margin": -1},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"AdaptivePatch.{next(iter(settings))} must be"):
        AdaptivePatch(**settings)


def test_patch_that_does_not_fit():
    with pytest.raises(SettingError, match="leaves a 6x6 image"):
        AdaptivePatch().trigger((3, 6, 6))
