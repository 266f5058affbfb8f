"""Attacks, pixel by pixel, against the published patterns; and who is poisoned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bezoar.attacks.badnets import BadNets
from bezoar.attacks.blend import Blend
from bezoar.attacks.sig import SIG
from bezoar.core.errors import SettingError
from bezoar.core.trigger import MaskedTrigger

SHAPE = (3, 32, 32)


def images(count: int = 60, size: int = 32) -> tuple[Tensor, Tensor]:
    x = 0.3 + 0.4 * torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(count) % 5


# BadNets


def test_grid_is_that_of_the_public_code():
    """With negative indices: row -1 has 1, 0, 1 in columns -1, -2, -3; row -2 has 0, 1, 0; row -3 has 1, 0, 0."""
    x, _ = images(2)
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
    with pytest.raises(ValueError, match="leaves a 8x32 image"):
        BadNets(size=8, margin=1).trigger((3, 8, 32))
    with pytest.raises(ValueError, match="grid pattern has size 3"):
        BadNets(pattern="grid", size=4).trigger(SHAPE)


# Blend


def test_blend_moves_every_pixel_by_a_share_of_the_way():
    x, _ = images(3)
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
    x, _ = images(2)
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
def test_dirty_label_poisons_a_share_of_all_and_leaves_the_target_class_out(attack):
    x, y = images()
    before = x.clone(), y.clone()
    poisoned = attack.poison(x, y)
    assert len(poisoned.index) == 6
    assert poisoned.index.tolist() == sorted(set(poisoned.index.tolist()))
    assert not bool((y[poisoned.index] == 2).any())
    assert bool((poisoned.y[poisoned.index] == 2).all())
    assert torch.equal(poisoned.x[poisoned.index], attack.trigger(SHAPE)(x[poisoned.index]))
    left = torch.ones(60, dtype=torch.bool)
    left[poisoned.index] = False
    assert torch.equal(poisoned.x[left], x[left])
    assert torch.equal(poisoned.y[left], y[left])
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_clean_label_poisons_the_target_class_and_keeps_the_labels():
    x, y = images()
    poisoned = SIG(target=3, rate=0.5).poison(x, y)
    assert len(poisoned.index) == 6, "half of the twelve"
    assert bool((y[poisoned.index] == 3).all())
    assert torch.equal(poisoned.y, y)
    assert not torch.equal(poisoned.x[poisoned.index], x[poisoned.index])


@pytest.mark.parametrize("attack", DIRTY, ids=names)
def test_seed_chooses_the_examples(attack):
    x, y = images()
    same = type(attack)(**{**vars(attack)}).poison(x, y)
    other = type(attack)(**{**vars(attack), "seed": 9}).poison(x, y)
    assert torch.equal(attack.poison(x, y).index, same.index)
    assert not torch.equal(attack.poison(x, y).index, other.index)


def test_at_least_one_and_no_more_than_there_are():
    x, y = images()
    assert len(BadNets(rate=0.001).poison(x, y).index) == 1
    with pytest.raises(ValueError, match="asks for 60 poisoned examples, only 48 may be poisoned"):
        BadNets(rate=1.0).poison(x, y)


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": 1.5}, {"target": -1}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        BadNets(**settings)


def test_trigger_at_test_time_is_the_one_that_was_trained_on():
    x, y = images()
    poisoned = BadNets(pattern="noise", seed=4).poison(x, y)
    assert isinstance(poisoned.trigger, MaskedTrigger)
    assert torch.equal(poisoned.trigger(x)[poisoned.index], poisoned.x[poisoned.index])
