"""Visibility of triggers."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import conv2d

from bezoar.core.errors import MissingExtra, SettingError
from bezoar.core.trigger import AdditiveTrigger, MaskedTrigger
from bezoar.evaluation.stealth import stealth


def grey(count: int = 3, size: int = 16, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(40, 200, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def test_constant_shift_by_hand():
    found = stealth(grey(), AdditiveTrigger(torch.full((3, 16, 16), 8 / 255)))
    assert found.linf == pytest.approx(8)
    assert found.psnr == pytest.approx(20 * math.log10(255 / 8), abs=1e-3)
    assert (found.changed, found.count) == (1, 3)
    assert 0.9 < found.ssim < 1


def test_no_change():
    found = stealth(grey(), AdditiveTrigger(torch.zeros(3, 16, 16)))
    assert (found.linf, found.psnr, found.changed) == (0, math.inf, 0)
    assert found.ssim == pytest.approx(1)


def test_images_that_stay_as_they_are_do_not_hide_the_others():
    x = torch.cat([grey(1), torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)])
    white = torch.zeros(1, 16, 16)
    white[:, :4, :4] = 1
    trigger = MaskedTrigger(white, torch.ones(3, 16, 16))
    found = stealth(x, trigger)
    assert found.changed == 0.5
    assert found.psnr == pytest.approx(stealth(x[:1], trigger).psnr)


def test_less_than_half_a_grey_level_is_lost_in_a_file():
    faint = AdditiveTrigger(torch.full((3, 16, 16), 0.4 / 255))
    assert stealth(grey(), faint).changed == 0
    assert stealth(grey().float() / 255, faint).linf == pytest.approx(0.4, abs=1e-3)


def test_ssim_is_that_of_the_paper():
    x = grey(1).float() / 255
    other = (x + 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    steps = torch.arange(11.0) - 5
    line = torch.exp(-(steps**2) / (2 * 1.5**2))
    window = (line[:, None] * line[None] / line.sum() ** 2).expand(3, 1, 11, 11)

    def mean(z: torch.Tensor) -> torch.Tensor:
        return conv2d(z, window, groups=3)

    a, b = mean(x), mean(other)
    covariance = mean(x * other) - a * b
    variances = mean(x * x) - a * a + mean(other * other) - b * b
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * a * b + c1) * (2 * covariance + c2) / ((a * a + b * b + c1) * (variances + c2))
    assert stealth(x, AdditiveTrigger((other - x)[0])).ssim == pytest.approx(float(expected.mean()), abs=1e-4)


@given(st.integers(1, 13), st.sampled_from([1, 3]), st.floats(0, 1))
def test_any_size(size, channels, share):
    trigger = MaskedTrigger(torch.full((1, size, size), share), torch.ones(channels, size, size))
    found = stealth(grey(2, size, channels), trigger)
    assert 0 <= found.linf <= 255
    assert found.psnr > 0
    assert -1 <= found.ssim <= 1 + 1e-4


def test_batches_do_not_matter():
    trigger = AdditiveTrigger(torch.full((3, 16, 16), 0.1))
    assert stealth(grey(5), trigger, batch=2) == stealth(grey(5), trigger)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.metrics", None)
    with pytest.raises(MissingExtra, match="kornia"):
        stealth(grey(), AdditiveTrigger(torch.zeros(3, 16, 16)))


def test_no_images():
    with pytest.raises(SettingError, match="no images"):
        stealth(grey(0), AdditiveTrigger(torch.zeros(3, 16, 16)))
