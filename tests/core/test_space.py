"""The masked trigger space: values of the parametrisation, and what holds for all of its triggers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.core.space import AdditiveSpace, MaskedSpace

SPACE = MaskedSpace((3, 4, 5))
seeds = st.integers(0, 2**31)


def parameters(seed: int, labels: int = 2, spread: float = 2.0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {
        "mask": spread * torch.randn(labels, 1, 4, 5, generator=source),
        "pattern": spread * torch.randn(labels, 3, 4, 5, generator=source),
    }


def test_parametrisation_is_that_of_the_code():
    raw = torch.tensor([-3.0, -0.5, 0.0, 0.25, 4.0])
    expected = torch.tanh(raw.double()) / (2 - 1e-7) + 0.5
    torch.testing.assert_close(SPACE._forward(raw).double(), expected, rtol=0, atol=1e-6)
    assert float(SPACE._forward(torch.tensor(0.0))) == 0.5


def test_inverse_goes_back():
    values = torch.linspace(0.001, 0.999, 50)
    torch.testing.assert_close(SPACE._forward(SPACE._inverse(values)), values, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        SPACE._inverse(values.double()), torch.arctanh((values.double() - 0.5) * (2 - 1e-7)), rtol=1e-9, atol=1e-9
    )


def test_start_is_uniform_in_pixel_space():
    mask, pattern = MaskedSpace((3, 40, 40)).values(MaskedSpace((3, 40, 40)).start(range(4), seed=0))
    for values in (mask, pattern):
        ordered = values.flatten().sort().values
        assert (ordered - torch.linspace(0, 1, len(ordered))).abs().max() < 0.025  # Kolmogorov-Smirnov
    assert mask.shape == (4, 1, 40, 40)
    assert pattern.shape == (4, 3, 40, 40)


@pytest.mark.parametrize("mean", [0.1, 0.3])
def test_start_mask_sets_the_mean(mean):
    space = MaskedSpace((3, 40, 40), start_mask=mean)
    mask, pattern = space.values(space.start(range(4), seed=0))
    assert float(mask.mean()) == pytest.approx(mean, rel=0.02)
    assert float(mask.max()) <= 1.5 * mean + 1e-4
    assert float(pattern.mean()) == pytest.approx(0.5, abs=0.02)


@given(seeds, st.lists(st.integers(0, 1000), min_size=1, max_size=5, unique=True))
def test_start_depends_on_label_and_seed_alone(seed, labels):
    together = SPACE.start(labels, seed)
    for row, label in enumerate(labels):
        alone = SPACE.start([label], seed)
        for name, value in together.items():  # to rounding: vector units compute arctanh of a tail in another way
            torch.testing.assert_close(value[row], alone[name][0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(together["mask"][:1], SPACE.start([labels[0] + 1], seed)["mask"])
    assert not torch.equal(together["mask"][:1], SPACE.start([labels[0]], seed + 1)["mask"])


def test_start_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    SPACE.start([1, 2], 3)
    assert torch.equal(torch.get_rng_state(), before)


@given(seeds, st.integers(1, 3))
def test_stamped_is_image_where_mask_is_0_and_pattern_where_it_is_1(seed, count):
    values = parameters(seed)
    chosen = values["mask"] > 0
    values["mask"] = torch.where(chosen, 40.0, -40.0)  # far out, tanh is exactly 1 or -1
    x = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    stamped = SPACE.stamp(values, x)
    _, pattern = SPACE.values(values)
    assert stamped.shape == (2, count, 3, 4, 5)
    where = chosen[:, None].expand_as(stamped)
    torch.testing.assert_close(stamped, torch.where(where, pattern[:, None], x[None]), rtol=0, atol=1e-6)


@given(seeds, st.sampled_from([0.1, 1.0, 5.0, 50.0]))
def test_mask_and_pattern_stay_in_range_and_so_does_the_image(seed, spread):
    values = parameters(seed, spread=spread)
    mask, pattern = SPACE.values(values)
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    for tensor in (mask, pattern, SPACE.stamp(values, x)):
        assert 0 <= float(tensor.min()) <= float(tensor.max()) <= 1
    assert torch.equal(SPACE.size(values) <= 20, torch.tensor([True, True]))


@given(seeds)
def test_mask_is_one_for_all_channels_and_counted_once(seed):
    values = parameters(seed)
    mask, _ = SPACE.values(values)
    torch.testing.assert_close(SPACE.size(values), mask.sum((1, 2, 3)))
    changed = SPACE.stamp(values, torch.zeros(1, 3, 4, 5)) - SPACE.stamp(values, torch.ones(1, 3, 4, 5))
    for channel in range(3):  # black minus white is mask - 1 in every channel
        torch.testing.assert_close(changed[:, 0, channel], mask[:, 0] - 1, rtol=0, atol=1e-6)


@given(seeds)
def test_hardened_trigger_stamps_the_same(seed):
    values = parameters(seed)
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    trigger = SPACE.harden({k: v.requires_grad_() for k, v in parameters(seed).items()}, 1)
    assert not trigger.mask.requires_grad
    assert trigger.mask.shape == (1, 4, 5)
    assert trigger.pattern.shape == (3, 4, 5)
    torch.testing.assert_close(trigger(x), SPACE.stamp(values, x)[1])
    assert trigger.size == pytest.approx(float(SPACE.size(values)[1]), rel=1e-5)


def test_gradient_reaches_every_pixel():
    values = {k: v.requires_grad_() for k, v in parameters(0, spread=1.0).items()}
    SPACE.stamp(values, torch.rand(2, 3, 4, 5)).square().sum().backward()
    assert all(bool((v.grad != 0).all()) for v in values.values())


# Additive changes

ADDITIVE = AdditiveSpace((3, 4, 5))


def changes(seed: int, labels: int = 2) -> dict[str, torch.Tensor]:
    return {"delta": torch.randn(labels, 3, 4, 5, generator=torch.Generator().manual_seed(seed))}


def test_additive_size_is_the_root_mean_square():
    raw = changes(3)
    expected = torch.stack([(torch.tanh(row) ** 2).mean().sqrt() for row in raw["delta"].double()])
    torch.testing.assert_close(ADDITIVE.size(raw).double(), expected, rtol=1e-5, atol=1e-6)
    level = {"delta": torch.atanh(torch.full((1, 3, 4, 5), 1 / 255))}
    assert float(ADDITIVE.size(level)) == pytest.approx(1 / 255, rel=1e-4), "one grey level everywhere"


def test_additive_size_of_nothing_has_a_gradient():
    raw = torch.zeros(1, 3, 4, 5, requires_grad=True)
    ADDITIVE.size({"delta": raw}).sum().backward()
    assert raw.grad is not None
    assert bool(torch.isfinite(raw.grad).all())


@given(seeds)
def test_additive_stamp_is_that_of_the_hardened_trigger_and_stays_in_range(seed):
    raw, x = changes(seed), torch.rand(4, 3, 4, 5, generator=torch.Generator().manual_seed(seed + 1))
    stamped = ADDITIVE.stamp(raw, x)
    assert stamped.shape == (2, 4, 3, 4, 5)
    assert 0 <= float(stamped.min()) <= float(stamped.max()) <= 1
    for row in range(2):
        torch.testing.assert_close(ADDITIVE.harden(raw, row)(x), stamped[row])


def test_additive_start_depends_on_label_and_seed_alone():
    several, alone = ADDITIVE.start([4, 9], seed=1)["delta"], ADDITIVE.start([9], seed=1)["delta"]
    assert torch.equal(several[1], alone[0])
    assert not torch.equal(alone, ADDITIVE.start([9], seed=2)["delta"])
    assert float(AdditiveSpace((3, 60, 60)).start([0], 0)["delta"].std()) == pytest.approx(0.1, rel=0.05)
