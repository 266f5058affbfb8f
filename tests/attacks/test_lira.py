"""LIRA: the bound of the noise, the two stages, the virtual copy, and runs that were killed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bezoar.attacks._attack import Training
from bezoar.attacks._generator import Generator
from bezoar.attacks._in_batch import frozen
from bezoar.attacks.lira import LIRA, LiraTrigger, _Injection, _Joint, both, noise
from bezoar.core.errors import SettingError
from bezoar.ops.fit import Batch
from tests.attacks.sample_data import blobs, training


def generator(channels: int = 1, seed: int = 0) -> Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Generator(channels, channels, width=4, levels=2, skips=True)


def weights(network: nn.Module) -> list[Tensor]:
    return [value.clone() for value in network.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Linear(nn.Module):
    """A linear model that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4 * 144).view(4, 144))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return x.flatten(1) @ self.weight.T


def batch(count: int = 8, augment=lambda x: x) -> Batch:
    x = torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(count) % 4, torch.arange(count), augment, torch.Generator().manual_seed(0))


# The trigger


@settings(deadline=None, max_examples=15)
@given(
    count=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    height=st.integers(4, 15),
    width=st.integers(4, 15),
    eps=st.sampled_from([0.01, 0.1, 1.0]),
)
def test_change_is_bounded_and_repeats_itself(count, channels, height, width, eps):
    trigger = LiraTrigger(frozen(generator(channels)), eps)
    x = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0)).round()
    added, out = noise(trigger.generator, x, eps), trigger(x)
    assert float(added.abs().max()) <= eps
    assert float(added.abs().max()) > 0
    torch.testing.assert_close(out, torch.clamp(x + added, 0, 1))
    assert out.shape == x.shape
    assert torch.equal(out, trigger(x))
    torch.testing.assert_close(trigger(x[-1:]), out[-1:])  # whatever stands beside it in the batch
    assert not out.requires_grad


# The stages


@pytest.mark.parametrize("kind", ["all-to-one", "all-to-all"])
def test_victim_weighs_clean_and_triggered_images(kind):
    model, one, trigger = Linear(), batch(), LiraTrigger(frozen(generator()), 0.1)
    labels = LIRA(target=2, label_map=kind).labels(4)
    loss = _Injection(trigger, labels, alpha=0.3).loss(model, one)
    torch.testing.assert_close(model.seen[0], torch.cat([one.x, trigger(one.x)]))
    wanted = torch.full((8,), 2) if kind == "all-to-one" else (one.y + 1) % 4
    expected = 0.3 * F.cross_entropy(model(one.x), one.y) + 0.7 * F.cross_entropy(model(trigger(one.x)), wanted)
    torch.testing.assert_close(loss, expected)


def test_augmentation_comes_after_the_trigger():
    model, trigger = Linear(), LiraTrigger(frozen(generator()), 0.1)
    one = batch(augment=lambda x: x.flip(3))
    both(model, one, trigger, one.y, 0.5)
    torch.testing.assert_close(model.seen[0], torch.cat([one.x, trigger(one.x)]).flip(3))


def test_virtual_copy_learns_and_the_generator_catches_up():
    attack, model, network = LIRA(catch_up=3, generator_lr=1e-2), Linear(), generator()
    stage, first = _Joint(attack, attack.labels(4), network), weights(network)
    for step in range(1, 7):
        before = weights(stage.virtual.network)
        stage.loss(model, batch())
        assert not same(before, weights(stage.virtual.network))
        assert same(weights(network), weights(stage.virtual.network)) == (step % 3 == 0)
        assert same(weights(network), first) == (step < 3)
    assert not network.training
    assert stage.virtual.network.training


def test_generator_catches_up_before_each_epoch_by_default():
    attack, model, network = LIRA(generator_lr=1e-2), Linear(), generator()
    stage = _Joint(attack, attack.labels(4), network)
    for _ in range(3):
        stage.loss(model, batch())
    assert not same(weights(network), weights(stage.virtual.network))
    stage.epoch(model, 1, 2)
    assert same(weights(network), weights(stage.virtual.network))
    stage.loss(model, batch())
    assert same(weights(stage.learned()), weights(stage.virtual.network))


def test_step_of_the_generator_leaves_no_gradient_in_the_victim():
    attack, model = LIRA(), Linear()
    stage = _Joint(attack, attack.labels(4), generator())
    loss = stage.loss(model, batch())
    assert model.weight.grad is None
    loss.backward()
    assert model.weight.grad is not None
    assert all(p.grad is None for p in stage.virtual.network.parameters())  # the victim's loss does not teach it


def test_generator_learns_to_mislead_a_fixed_victim():
    attack, model = LIRA(generator_lr=1e-2, joint_eps=0.2, target=3), Linear()
    stage, one = _Joint(attack, attack.labels(4), generator()), batch()
    nn.init.normal_(model.weight, std=0.3, generator=torch.Generator().manual_seed(0))

    def loss_of_target() -> float:
        x = one.x + noise(stage.virtual.network, one.x, 0.2)
        return F.cross_entropy(model(x), torch.full((8,), 3)).item()

    before = loss_of_target()
    for _ in range(20):
        stage.loss(model, one)
    assert loss_of_target() < 0.5 * before


# The whole attack


def test_second_stage_freezes_the_generator(monkeypatch):
    kept, plain = {}, Training.fit

    def watched(self, name, data, **kwargs):
        if name == "victim":
            kept["generator"] = weights(kwargs["objective"].trigger.generator)
            kept["victim"] = weights(kwargs["model"])
        model = plain(self, name, data, **kwargs)
        kept.setdefault("names", []).append(name)
        return model

    monkeypatch.setattr(Training, "fit", watched)
    result = LIRA(width=4)(blobs(160), training())
    assert kept["names"] == ["joint", "victim"]
    assert same(kept["generator"], weights(result.truth.main.trigger.generator))
    assert not any(p.requires_grad for p in result.truth.main.trigger.generator.parameters())
    assert not same(kept["victim"], weights(result.model))  # which is trained on
    assert result.truth.main.trigger.eps == 0.01
    assert result.afresh
    assert (len(result.index), len(result.cover)) == (80, 0)


def test_victim_learns_the_noise_and_keeps_its_accuracy():
    data, test = blobs(400), blobs(200, seed=1)
    attack = LIRA(width=4, eps=0.2, joint_eps=0.2, generator_lr=1e-2, catch_up=5, target=1)
    result = attack(data, training(epochs=10))
    plant = result.truth.main
    predicted, others = result.model(plant.trigger(test.x)).argmax(1), plant.labels.applies(test.y)
    assert float((predicted[others] == 1).float().mean()) > 0.95
    assert float((result.model(test.x).argmax(1) == test.y).float().mean()) > 0.95


@pytest.mark.parametrize(("phase", "step"), [("train joint", 2), ("train victim", 6)])
def test_killed_run_goes_on_to_the_same_victim_and_trigger(tmp_path, monkeypatch, phase, step):
    monkeypatch.setenv("BEZOAR_CHECKPOINT_SECONDS", "0")
    attack, data = LIRA(width=4, catch_up=3, generator_lr=1e-3), blobs(160)
    whole = attack(data, training())

    def kill(name, done, total, note):
        if name == phase and done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack(data, training(tmp_path, report=kill))
    for _ in range(2):  # going on, then reading back what is finished
        again = attack(data, training(tmp_path))
        assert same(weights(whole.model), weights(again.model))
        assert same(weights(whole.truth.main.trigger.generator), weights(again.truth.main.trigger.generator))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"eps": 0.0}, "eps"),
        ({"joint_eps": 1.5}, "joint_eps"),
        ({"alpha": 1.0}, "alpha"),
        ({"joint_share": 0.0}, "joint_share"),
        ({"generator_lr": 0.0}, "generator_lr"),
        ({"catch_up": -1}, "catch_up"),
        ({"width": 0}, "width"),
        ({"levels": 0}, "levels"),
    ],
)
def test_bad_settings_are_refused(settings, name):
    with pytest.raises(SettingError, match=rf"LIRA\.{name} must be"):
        LIRA(**settings)
