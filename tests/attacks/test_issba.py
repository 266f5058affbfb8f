"""ISSBA: bits that can be read on unseen images, changes that differ between images, and the trigger on disk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bezoar.attacks._attack import GroundTruth, Plant, Training
from bezoar.attacks._labels import LabelMap
from bezoar.attacks._store import load_truth, save_truth
from bezoar.attacks.issba import ISSBA, MessageTrigger
from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples
from bezoar.core.run import Progress, Run
from bezoar.ops.fit import as_float
from tests.attacks.networks import bars, small_net, training
from tests.attacks.sample_data import assert_trigger, pictures

ATTACK = ISSBA(bits=4, epochs=10, hidden=16)


@pytest.fixture(scope="module")
def messenger():
    return ATTACK.train(bars(640), training())


@pytest.fixture(scope="module")
def unseen():
    return as_float(bars(200, seed=5).x)


@torch.no_grad()
def share_read(messenger, x, secret):
    return float(((messenger(x, secret)[1] > 0) == (secret > 0.5)).float().mean())


def test_bits_are_read_on_unseen_images(messenger, unseen):
    secret = torch.randint(0, 2, (200, 4), generator=torch.Generator().manual_seed(1)).float()
    assert share_read(messenger, unseen, secret) >= 0.95
    untrained = ATTACK.messenger((1, 12, 12)).eval()
    assert share_read(untrained, unseen, secret) < 0.7
    with torch.no_grad():
        empty = ((messenger.decoder(unseen) > 0) == (secret > 0.5)).float().mean()
    assert float(empty) < 0.7  # it is the image that carries them


@torch.no_grad()
def test_attacks_message_survives_a_saved_file(messenger, unseen):
    trigger = ATTACK.message_trigger(messenger)
    saved = (trigger(unseen) * 255).round() / 255
    assert float(((messenger.decoder(saved) > 0) == (trigger.secret > 0.5)).float().mean()) >= 0.95


def test_changes_differ_between_images(messenger, unseen):
    change = (ATTACK.message_trigger(messenger)(unseen) - unseen).flatten(1)
    correlation = torch.corrcoef(change)[~torch.eye(200, dtype=torch.bool)]
    assert float(correlation.mean()) < 0.5
    assert float((correlation < 0.5).float().mean()) > 0.6


def test_change_is_bounded_by_the_strength(messenger, unseen):
    change = (ATTACK.message_trigger(messenger)(unseen) - unseen).abs().max()
    assert 0.01 < float(change) <= ATTACK.strength + 1e-6


def test_trigger_keeps_its_promises(messenger, unseen):
    assert_trigger(ATTACK.message_trigger(messenger), unseen[:5])


@settings(max_examples=15)
@given(pictures(), st.integers(0, 9))
def test_any_size_and_colour(x, seed):
    attack = ISSBA(hidden=4, seed=seed)
    made = attack.messenger(tuple(x.shape[1:])).eval()
    out = assert_trigger(attack.message_trigger(made), x)
    assert made.decoder(out).shape == (len(x), attack.message_length(tuple(x.shape[1:])))


def test_length_of_the_message():
    assert [ISSBA().message_length((3, n, n)) for n in (28, 32, 64, 224)] == [19, 25, 100, 100]
    assert ISSBA(bits=7).message_length((3, 32, 32)) == 7


def test_message_is_that_of_the_seed():
    made = [ISSBA(bits=64, seed=s).message_trigger(ISSBA(bits=64).messenger((1, 12, 12))).secret for s in (0, 0, 1)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_trigger_goes_to_disk(messenger, unseen, tmp_path):
    trigger = ATTACK.message_trigger(messenger)
    save_truth(GroundTruth((Plant(trigger, LabelMap(3)),)), tmp_path)
    read = load_truth(tmp_path).main.trigger
    assert isinstance(read, MessageTrigger)
    assert torch.equal(read(unseen[:5]), trigger(unseen[:5]))


def test_poison_stamps_and_relabels():
    data, attack = bars(), ISSBA(bits=4, epochs=1, hidden=4, target=1)
    poisoned = attack.poison(data, training(1))
    assert len(poisoned.index) == 12
    assert not (data.y[poisoned.index] == 1).any()
    assert set(poisoned.data.y[poisoned.index].tolist()) == {1}
    stamped = poisoned.truth.main.trigger(as_float(data.x[poisoned.index]))
    assert torch.equal(poisoned.data.x[poisoned.index], (stamped * 255).round().to(torch.uint8))
    assert torch.equal(attack.poison(data, training(1)).data.x, poisoned.data.x)


class Stop(Exception):
    """Stands for a kill."""


def killed_at(step: int):
    def report(phase, done, _total, _note):
        if phase == "train messenger" and done == step:
            raise Stop

    return Progress(report=report, every=0.0)


def test_training_of_the_encoder_goes_on_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CHECKPOINT_SECONDS", "0")
    attack, data, means = ISSBA(bits=4, epochs=3, hidden=4), bars(200), training(1)
    wanted = attack.train(data, means).state_dict()
    stopped = Training(means.build, means.recipe, run=Run(progress=killed_at(7)), folder=tmp_path)
    with pytest.raises(Stop):
        attack.train(data, stopped)
    assert list(tmp_path.iterdir())
    made = attack.train(data, Training(means.build, means.recipe, folder=tmp_path)).state_dict()
    assert all(torch.equal(value, made[name]) for name, value in wanted.items())


def test_victim_is_the_network_that_was_asked_for():
    out = ISSBA(bits=4, epochs=1, hidden=4)(bars(), training(1))
    assert 0 <= out.truth.figures["bit accuracy"] <= 1
    assert type(out.model) is type(small_net())
    assert not any(p.requires_grad for p in out.truth.main.trigger.encoder.parameters())


def test_needs_a_network():
    with pytest.raises(SettingError, match="trains a network of its own"):
        ISSBA().poison(bars())
    with pytest.raises(SettingError, match="encoder network"):
        ISSBA().trigger((1, 12, 12))


@pytest.mark.parametrize(
    "fields", [{"bits": -1}, {"strength": 0.0}, {"hidden": 0}, {"epochs": 0}, {"lr": 0.0}, {"diversity": -1.0}]
)
def test_settings_out_of_range(fields):
    with pytest.raises(SettingError, match=f"ISSBA.{next(iter(fields))} must be"):
        ISSBA(**fields)


def test_single_example_can_be_trained_on():
    data = bars(1)
    ISSBA(bits=2, epochs=1, hidden=4).train(Examples(data.x, data.y, 3), training(1))
