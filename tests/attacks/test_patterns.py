"""Attacks, pixel by pixel, against the published patterns; and who is poisoned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bezoar.attacks.badnets import BadNets
from bezoar.attacks.blend import Blend
from bezoar.attacks.sig import SIG
from bezoar.core.errors import SettingError
from bezoar.core.trigger import MaskedTrigger
from tests.attacks.sample_data import SHAPE, floats, levels

# BadNets


def test_grid_is_that_of_the_public_code():
    """With negative indices: row -1 has 1, 0, 1 in columns -1, -2, -3; row -2 has 0, 1, 0; row -3 has 1, 0, 0."""
    x = floats(2).x
    wanted = x.clone()
    for row, values in ((-1, (1, 0, 1)), (-2, (0, 1, 0)), (-3, (1, 0, 0))):
        for column, value in zip((-1, -2, -3), values, strict=True):
            wanted[:, :, row, column] = value
    assert torch.equal(BadNets(pattern="grid", size=3, margin=0).trigger(SHAPE)(x), wanted)


@pytest.mark.parametrize("pattern", ["square", "noise"])
@pytest.mark.parametrize("margin", [0, 1, 5])
@pytest.mark.parametrize(
    ("corner", "top", "left"),
    [("bottom-right", -1, -1), ("bottom-left", -1, 0), ("top-right", 0, -1), ("top-left", 0, 0)],
)
def test_patch_sits_where_it_should(pattern, margin, corner, top, left):
    attack = BadNets(pattern=pattern, size=4, margin=margin, corner=corner, seed=3)
    trigger = attack.trigger((3, 20, 32))
    rows = range(20 - margin - 4, 20 - margin) if top else range(margin, margin + 4)
    columns = range(32 - margin - 4, 32 - margin) if left else range(margin, margin + 4)
    expected = torch.zeros(1, 20, 32)
    for row in rows:
        for column in columns:
            expected[0, row, column] = 1
    assert torch.equal(trigger.mask, expected)
    assert trigger.size == 16
    x = torch.rand(2, 3, 20, 32)
    stamped, patch = trigger(x), expected.bool().expand(2, 3, 20, 32)
    assert torch.equal(stamped[~patch], x[~patch])
    if pattern == "square":
        assert bool((stamped[patch] == 1).all())
    else:
        assert torch.equal(stamped[0][patch[0]], stamped[1][patch[0]]), "the same noise on every image"
        assert len(stamped[0][patch[0]].unique()) == 48, "and another value in every pixel and channel"


def test_noise_depends_on_the_seed():
    one, same, other = (BadNets(pattern="noise", seed=seed).trigger(SHAPE) for seed in (1, 1, 2))
    assert torch.equal(one.pattern, same.pattern)
    assert not torch.equal(one.pattern, other.pattern)


def test_patch_that_does_not_fit():
    with pytest.raises(SettingError, match="leaves a 8x32 image"):
        BadNets(size=8, margin=1).trigger((3, 8, 32))
    with pytest.raises(SettingError, match="grid pattern has size 3"):
        BadNets(pattern="grid", size=4).trigger(SHAPE)


# Blend


def test_blend_moves_every_pixel_by_a_share_of_the_way():
    x = floats(3).x
    trigger = Blend(alpha=0.15, seed=2).trigger(SHAPE)
    torch.testing.assert_close(trigger(x) - x, 0.15 * (trigger.pattern - x), rtol=0, atol=1e-6)
    assert float((trigger(x) - x).abs().max()) <= 0.15
    assert float(trigger.pattern.std()) > 0.2
    assert float(trigger.pattern.mean()) == pytest.approx(0.5, abs=0.02)


# SIG


@pytest.mark.parametrize(("amplitude", "frequency"), [(40 / 255, 6), (30 / 255, 6), (20 / 255, 3)])
def test_sinusoid_is_the_formula(amplitude, frequency):
    delta = SIG(amplitude=amplitude, frequency=frequency).trigger(SHAPE).delta
    for column in range(32):
        expected = amplitude * math.sin(2 * math.pi * column * frequency / 32)
        np.testing.assert_allclose(delta[:, :, column].numpy(), expected, atol=1e-6)


def test_sinusoid_has_the_published_strength():
    delta = SIG().trigger(SHAPE).delta
    assert 255 * float(delta.square().mean().sqrt()) == pytest.approx(28.28, abs=0.01)


def test_sinusoid_is_added_and_clipped():
    trigger = SIG(amplitude=0.6).trigger(SHAPE)
    x = floats(2).x
    assert torch.equal(trigger(x), torch.clamp(x + trigger.delta, 0, 1))
    assert float(trigger(x).min()) == 0
    assert float(trigger(x).max()) == 1


@pytest.mark.parametrize(("width", "frequency", "amplitude"), [(12, 6, 0.1), (6, 6, 0.1), (32, 32, 0.1), (32, 6, 0.0)])
def test_wave_that_is_zero_everywhere_is_refused(width, frequency, amplitude):
    with pytest.raises(SettingError, match=rf"zero in every column of images {width} pixels wide") as caught:
        SIG(frequency=frequency, amplitude=amplitude).trigger((3, 32, width))
    assert "frequency" in caught.value.hint


def test_wave_that_is_zero_in_some_columns_is_not():
    assert float(SIG(frequency=6).trigger((3, 12, 24)).delta.abs().max()) == pytest.approx(40 / 255)


# Who is poisoned

DIRTY = [BadNets(target=2, rate=0.1), Blend(target=2, rate=0.1), SIG(target=2, rate=0.1, dirty=True)]
names = [type(a).__name__ for a in DIRTY]


@pytest.mark.parametrize("attack", DIRTY, ids=names)
@pytest.mark.parametrize("make", [floats, levels])
def test_dirty_label_poisons_a_share_of_all_and_leaves_the_target_class_out(attack, make):
    data = make()
    x, y = data.x.clone(), data.y.clone()
    poisoned = attack.poison(data)
    index, after = poisoned.index, poisoned.data
    assert len(index) == 6
    assert index.tolist() == sorted(set(index.tolist()))
    assert len(poisoned.cover) == 0
    assert not bool((y[index] == 2).any())
    assert bool((after.y[index] == 2).all())
    stamped = attack.trigger(SHAPE)(x[index] / 255 if x.dtype == torch.uint8 else x[index])
    if x.dtype == torch.uint8:
        stamped = (stamped * 255).round().to(torch.uint8)
    assert torch.equal(after.x[index], stamped)
    left = torch.ones(60, dtype=torch.bool)
    left[index] = False
    assert torch.equal(after.x[left], x[left])
    assert torch.equal(after.y[left], y[left])
    assert torch.equal(data.x, x), "a copy is poisoned"
    assert torch.equal(data.y, y)


def test_clean_label_poisons_the_target_class_and_keeps_the_labels():
    data = floats()
    poisoned = SIG(target=3, rate=0.5).poison(data)
    assert len(poisoned.index) == 6, "half of the twelve"
    assert bool((data.y[poisoned.index] == 3).all())
    assert torch.equal(poisoned.data.y, data.y)
    assert not torch.equal(poisoned.data.x[poisoned.index], data.x[poisoned.index])


def test_all_to_all_adds_one_and_poisons_every_class():
    data = floats(count=200)
    poisoned = BadNets(label_map="all-to-all", rate=0.5).poison(data)
    assert torch.equal(poisoned.data.y[poisoned.index], (data.y[poisoned.index] + 1) % 5)
    assert set(data.y[poisoned.index].tolist()) == set(range(5))


def test_sources_and_cover_classes_are_kept_apart():
    data = floats(count=200)
    attack = BadNets(target=0, sources=(1, 2), cover_classes=(4,), rate=0.1, cover_rate=0.05)
    poisoned = attack.poison(data)
    assert (len(poisoned.index), len(poisoned.cover)) == (20, 10)
    assert set(data.y[poisoned.index].tolist()) <= {1, 2}
    assert set(data.y[poisoned.cover].tolist()) == {4}
    assert torch.equal(poisoned.data.y[poisoned.cover], data.y[poisoned.cover])
    assert torch.equal(poisoned.data.x[poisoned.cover], attack.trigger(SHAPE)(data.x[poisoned.cover]))


@pytest.mark.parametrize("attack", DIRTY, ids=names)
def test_seed_chooses_the_examples(attack):
    data = floats()
    same = type(attack)(**{**vars(attack)}).poison(data)
    other = type(attack)(**{**vars(attack), "seed": 9}).poison(data)
    assert torch.equal(attack.poison(data).index, same.index)
    assert not torch.equal(attack.poison(data).index, other.index)


def test_at_least_one_and_no_more_than_there_are():
    data = floats()
    assert len(BadNets(rate=0.001).poison(data).index) == 1
    with pytest.raises(SettingError, match="asks for 60 examples, only 48 may be chosen"):
        BadNets(rate=1.0).poison(data)


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": 1.5}, {"target": -1}])
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        BadNets(**settings)


def test_target_that_the_data_does_not_have():
    with pytest.raises(SettingError, match=r"label 5 is not in 0\.\.4"):
        BadNets(target=5).poison(floats())


def test_trigger_at_test_time_is_the_one_that_was_trained_on():
    data = floats()
    poisoned = BadNets(pattern="noise", seed=4).poison(data)
    trigger = poisoned.truth.main.trigger
    assert isinstance(trigger, MaskedTrigger)
    assert torch.equal(trigger(data.x)[poisoned.index], poisoned.data.x[poisoned.index])
