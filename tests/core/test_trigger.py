"""Concrete triggers."""

from __future__ import annotations

import pytest
import torch

from bezoar.core.trigger import AdditiveTrigger, MaskedTrigger


def images() -> torch.Tensor:
    return torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))


def test_mask_mixes_image_and_pattern():
    mask = torch.zeros(1, 5, 6)
    mask[0, 1, 2], mask[0, 4, 5] = 1.0, 0.25
    pattern = torch.full((3, 5, 6), 0.8)
    pattern[1] = 0.1
    x = images()
    stamped = MaskedTrigger(mask, pattern)(x)
    assert torch.equal(stamped[:, :, 1, 2], torch.tensor([0.8, 0.1, 0.8]).expand(4, 3))
    torch.testing.assert_close(stamped[:, 1, 4, 5], 0.75 * x[:, 1, 4, 5] + 0.025)
    untouched = (mask[0] == 0).expand_as(x)
    assert torch.equal(stamped[untouched], x[untouched])


def test_mask_counts_each_pixel_once():
    assert MaskedTrigger(torch.full((1, 5, 6), 0.5), torch.ones(3, 5, 6)).size == 15


def test_addition_is_clipped():
    delta = torch.zeros(3, 5, 6)
    delta[0, 0, 0], delta[1, 0, 0], delta[2, 0, 0] = 1.0, -1.0, 0.0
    x = images()
    stamped = AdditiveTrigger(delta)(x)
    assert torch.equal(stamped[:, :2, 0, 0], torch.tensor([1.0, 0.0]).expand(4, 2))
    assert torch.equal(stamped[:, 2], x[:, 2])
    assert torch.equal(stamped[:, :, 1:], x[:, :, 1:])


def test_addition_is_measured_by_its_root_mean_square():
    delta = torch.zeros(3, 5, 6)
    delta[0, 0, 0], delta[2, 4, 5] = 0.3, -0.4
    assert AdditiveTrigger(delta).size == pytest.approx((0.25 / delta.numel()) ** 0.5)


@pytest.mark.parametrize(
    "trigger", [MaskedTrigger(torch.ones(1, 5, 6), torch.ones(3, 5, 6)), AdditiveTrigger(torch.ones(3, 5, 6))]
)
def test_images_are_not_changed_in_place_and_keep_their_type(trigger):
    x = images()
    before = x.clone()
    assert torch.equal(trigger(x), torch.ones_like(x))
    assert torch.equal(x, before)
    assert trigger(x.double()).dtype == torch.float64
