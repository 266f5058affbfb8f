"""Input-Aware: the generators, the losses worked out by hand, the cross trigger, and runs that were killed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bezoar.attacks._generator import Generator
from bezoar.attacks._in_batch import Companion, frozen
from bezoar.attacks.input_aware import (
    CrossTrigger,
    InputAware,
    InputAwareTrigger,
    _OwnTriggers,
    falling,
    mask_of,
    pattern_of,
    ratio,
    spread,
)
from bezoar.core.errors import SettingError
from bezoar.ops.fit import Batch
from tests.attacks.sample_data import blobs, training


def generator(channels: int = 1, out: int = 1, seed: int = 0, **kwargs) -> Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Generator(channels, out, **{"width": 4, "levels": 2, **kwargs})


def trigger(channels: int = 1) -> InputAwareTrigger:
    pattern, mask = generator(channels, channels), generator(channels, 1, seed=1)
    for network in (pattern, mask):
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0  # take the statistics of one batch, or the output would be flat
        network(torch.rand(8, channels, 12, 12, generator=torch.Generator().manual_seed(4)))
    return InputAwareTrigger(frozen(pattern), frozen(mask))


def images(count: int = 20, channels: int = 1, size: int = 12) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(2))


# The generator


@settings(deadline=None, max_examples=25)
@given(
    channels=st.sampled_from([1, 3]),
    out=st.sampled_from([1, 3]),
    height=st.integers(3, 33),
    width=st.integers(3, 33),
    levels=st.integers(1, 3),
    skips=st.booleans(),
)
def test_generator_takes_any_size(channels, out, height, width, levels, skips):
    network = generator(channels, out, levels=levels, skips=skips).eval()
    assert network(torch.rand(2, channels, height, width)).shape == (2, out, height, width)


def test_generator_has_the_layers_of_the_public_code():
    found = [(m.in_channels, m.out_channels) for m in generator(width=16).modules() if isinstance(m, nn.Conv2d)]
    assert found == [(1, 16), (16, 16), (16, 32), (32, 32), (32, 32), (32, 32), (32, 16), (16, 16), (16, 1)]
    wide = [
        (m.in_channels, m.out_channels)
        for m in generator(3, 3, width=32, levels=3).modules()
        if isinstance(m, nn.Conv2d)
    ]
    down = [(3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    up = [(128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (32, 3)]
    assert wide == [*down, (128, 128), *up]
    assert sum(isinstance(m, nn.ReLU) for m in generator(width=16).modules()) == 8  # none after the last convolution


def test_skips_reach_the_output():
    network = generator(skips=True).eval()
    for layer in network.middle:  # cut the way through the deepest level
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.zeros_(layer.weight)
    a, b = network(images(2))
    assert not torch.allclose(a, b, atol=1e-3)


def test_generator_is_built_again_from_its_config():
    network = generator(3, 1, skips=True).eval()
    again = Generator(**network.config).eval()
    again.load_state_dict(network.state_dict())
    assert torch.equal(network(images(2, 3)), again(images(2, 3)))


# The triggers


@settings(deadline=None, max_examples=10)
@given(count=st.integers(1, 4), channels=st.sampled_from([1, 3]), height=st.integers(4, 15), width=st.integers(4, 15))
def test_trigger_keeps_shape_and_range_and_repeats_itself(count, channels, height, width):
    x = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0)).round()
    bank = torch.rand(5, channels, height, width, generator=torch.Generator().manual_seed(1))
    own = trigger(channels)
    for stamp in (own, own.cross(bank)):
        out = stamp(x)
        assert out.shape == x.shape
        assert float(out.min()) >= 0
        assert float(out.max()) <= 1
        assert torch.equal(out, stamp(x))
        # Whatever stands beside it in the batch; the steep mask makes much of rounding.
        torch.testing.assert_close(stamp(x[-1:]), out[-1:], atol=1e-3, rtol=0)
        assert not out.requires_grad


def test_trigger_is_the_blend_of_the_image_and_its_own_pattern():
    own, x = trigger(3), images(4, 3)
    pattern, mask = pattern_of(own.pattern, x), mask_of(own.mask, x)
    assert mask.shape == (4, 1, 12, 12)
    torch.testing.assert_close(own(x), (1 - mask) * x + mask * pattern)
    assert not torch.allclose(pattern[0], pattern[1], atol=1e-3)


def test_squashing_is_that_of_the_public_code():
    network, raw = nn.Identity(), torch.tensor([-2.0, -0.1, 0.0, 0.1, 2.0]).view(5, 1, 1, 1)
    unit = torch.tanh(raw) / 2 + 0.5
    torch.testing.assert_close(pattern_of(network, raw), unit)
    torch.testing.assert_close(mask_of(network, raw), torch.tanh(unit * 20 - 10) / 2 + 0.5)
    assert mask_of(network, raw).flatten().tolist() == pytest.approx([0.0, 0.120, 0.5, 0.880, 1.0], abs=1e-3)


def test_cross_trigger_is_that_of_another_image():
    own, bank = trigger(3), images(6, 3)
    patterns, masks = pattern_of(own.pattern, bank), mask_of(own.mask, bank)
    x = bank  # each of them is in the bank itself
    out, used = own.cross(bank)(x), []
    for n in range(6):
        candidates = [torch.allclose(out[n], x[n] + (patterns[b] - x[n]) * masks[b], atol=1e-5) for b in range(6)]
        used.append(candidates.index(True))
        assert used[-1] != n
    assert len(set(used)) > 1


def test_cross_trigger_takes_a_bank_of_bytes():
    own, x = trigger(), images(4)
    bank = (images(5) * 255).round().to(torch.uint8)
    torch.testing.assert_close(own.cross(bank)(x), CrossTrigger(own.pattern, own.mask, bank.float() / 255)(x))


# The losses


def test_diversity_is_the_mean_ratio_of_distances():
    x, other = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    other[0], other[1] = 0.6, 0.3
    out, other_out = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    other_out[0], other_out[1, 0, 0, 0] = 0.2, 1.0  # root mean square 0.2 and 0.5
    assert float(ratio(x, other, out, other_out)) == pytest.approx((0.6 / 0.2 + 0.3 / 0.5) / 2, rel=1e-4)


def test_diversity_of_equal_masks_has_a_finite_gradient():
    masks = torch.ones(2, 1, 2, 2, requires_grad=True)
    ratio(images(2), images(2).flip(0), masks, masks.roll(1, 0)).backward()
    assert bool(masks.grad.isfinite().all())


def test_learning_rate_falls_where_the_paper_lets_it():
    factors = {epoch: falling(epoch, 600) for epoch in (0, 199, 200, 299, 300, 400, 499, 500, 599)}
    wanted = {0: 1, 199: 1, 200: 0.1, 299: 0.1, 300: 0.01, 400: 1e-3, 499: 1e-3, 500: 1e-4, 599: 1e-4}
    assert factors == pytest.approx(wanted)


def test_spread_is_the_standard_deviation_of_each_colour():
    x = torch.randn(500, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 0.3]).view(
        1, 2, 1, 1
    )
    assert spread(x).flatten().tolist() == pytest.approx([0.1, 0.3], rel=0.02)
    assert float(spread(torch.zeros(3, 1, 2, 2))) > 0


class Linear(nn.Module):
    """A linear model that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5 * 144).view(5, 144))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x.flatten(1) @ self.weight.T


def batch(count: int = 20, augment=lambda x: x) -> Batch:
    y = torch.arange(count) % 5
    return Batch(images(count), y, torch.arange(count), augment, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["all-to-one", "all-to-all"])
def test_batch_holds_own_triggers_cross_triggers_and_clean_images(kind):
    attack, model, one, networks = (
        InputAware(rate=0.2, cross_rate=0.1, target=3, label_map=kind),
        Linear(),
        batch(),
        trigger(),
    )
    learner = Companion(copy.deepcopy(networks.pattern).requires_grad_(True), 0.01)
    learner.network.eval()  # so that the patterns do not depend on the rest of the batch
    loss = _OwnTriggers(attack, attack.labels(5), learner, networks.mask).loss(model, one)
    torch.testing.assert_close(model.seen[:4], networks(one.x[:4]))
    patterns, masks = pattern_of(networks.pattern, one.x), mask_of(networks.mask, one.x)
    torch.testing.assert_close(model.seen[4:6], one.x[4:6] + (patterns[6:8] - one.x[4:6]) * masks[6:8])
    assert torch.equal(model.seen[6:], one.x[6:])
    wanted = one.y.clone()
    wanted[:4] = 3 if kind == "all-to-one" else (one.y[:4] + 1) % 5
    diversity = ratio(one.x[:2], one.x[6:8], patterns[:2], patterns[6:8])
    torch.testing.assert_close(loss, F.cross_entropy(model(model.seen), wanted) + diversity)


def test_augmentation_comes_after_the_trigger():
    attack, model, networks = InputAware(rate=0.2), Linear(), trigger()
    learner = Companion(copy.deepcopy(networks.pattern).requires_grad_(True), 0.01)
    learner.network.eval()
    one = batch(augment=lambda x: x.flip(3))
    _OwnTriggers(attack, attack.labels(5), learner, networks.mask).loss(model, one)
    torch.testing.assert_close(model.seen[:4], networks(one.x[:4]).flip(3))


# A network that learns beside the model


def test_companion_steps_once_on_the_gradient_that_waits():
    network, wanted = nn.Linear(3, 1), nn.Linear(3, 1)
    wanted.load_state_dict(network.state_dict())
    optimizer, companion = torch.optim.Adam(wanted.parameters(), lr=0.1, betas=(0.5, 0.9)), None
    companion = Companion(network, 0.1, (0.5, 0.9), lambda step: 0.5**step)
    x = torch.rand(4, 3)
    for step in range(3):
        for one in (network, wanted):
            one(x).square().mean().backward()
        before = network.weight.detach().clone()
        if step == 1:
            companion.state_dict()  # taking the state settles as well
        companion.settle()
        companion.settle()  # nothing waits any more
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5**step
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(before, network.weight)
        torch.testing.assert_close(network.weight, wanted.weight)


def test_companion_does_not_step_on_an_overflow():
    network = nn.Linear(3, 1)
    companion, before = Companion(network, 0.1), network.weight.detach().clone()
    (network(torch.rand(4, 3)).mean() * float("inf")).backward()
    companion.settle()
    assert torch.equal(network.weight, before)
    assert network.weight.grad is None


# The whole attack


def test_mask_settles_at_its_density_and_differs_between_images():
    attack, data = InputAware(width=4, mask_share=6.0), blobs(800)
    network = attack.train_mask(generator(1, 1, seed=3), data, training(epochs=2))
    masks = mask_of(network, data.x)
    assert 0.016 < float(masks.mean()) < 0.064  # within a factor of two of 0.032
    assert float(masks.std(0).max()) > 0.2
    assert not any(p.requires_grad for p in network.parameters())


def test_killed_run_goes_on_to_the_same_victim_and_trigger(tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CHECKPOINT_SECONDS", "0")
    attack, data = InputAware(width=4), blobs(160)
    whole = attack(data, training())
    (cross,) = whole.truth.controls
    assert cross.name == "cross"
    assert not torch.equal(cross.trigger(data.x[:4]), whole.truth.main.trigger(data.x[:4]))

    def kill(phase, done, total, note):
        if phase == "train victim" and done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack(data, training(tmp_path, report=kill))
    for _ in range(2):  # going on, then reading back what is finished
        again = attack(data, training(tmp_path))
        pairs = (
            (whole.model, again.model),
            (whole.truth.main.trigger.pattern, again.truth.main.trigger.pattern),
            (whole.truth.main.trigger.mask, again.truth.main.trigger.mask),
        )
        for one, other in pairs:
            assert all(
                torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
            )


def test_trigger_is_finished_and_sample_specific():
    data = blobs(160)
    result = InputAware(width=4)(data, training())
    plant = result.truth.main
    for network in (plant.trigger.pattern, plant.trigger.mask):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
    assert result.afresh
    assert (len(result.index), len(result.cover)) == (16, 16)
    assert plant.labels.target == 0
    change = plant.trigger(data.x) - data.x
    assert not torch.allclose(change[0], change[4], atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"rate": 0.0}, "rate"),
        ({"cross_rate": 1.0}, "cross_rate"),
        ({"rate": 0.6, "cross_rate": 0.5}, "cross_rate"),
        ({"density": 0.0}, "density"),
        ({"diversity": -1.0}, "diversity"),
        ({"mask_norm": -1.0}, "mask_norm"),
        ({"mask_share": 0.0}, "mask_share"),
        ({"generator_lr": 0.0}, "generator_lr"),
        ({"width": 0}, "width"),
        ({"levels": 0}, "levels"),
    ],
)
def test_bad_settings_are_refused(settings, name):
    with pytest.raises(SettingError, match=rf"InputAware\.{name} must be"):
        InputAware(**settings)
