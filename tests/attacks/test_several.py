"""Several attacks in one data set, and attacks as text."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.attacks._text import parse, written
from bezoar.attacks.badnets import BadNets
from bezoar.attacks.bppa import BPPA
from bezoar.attacks.several import Several
from bezoar.attacks.sig import SIG
from bezoar.attacks.tact import TaCT
from bezoar.core.errors import SettingError
from tests.attacks.sample_data import SHAPE, floats, levels

TWO = ("badnets:target=1,corner=top-left", "badnets:target=3,pattern=noise")


def test_no_example_is_poisoned_twice_and_each_by_its_own_attack():
    data = levels(300)
    poisoned = Several(attacks=TWO).poison(data)
    assert len(poisoned.index) == 60
    assert poisoned.index.tolist() == sorted(set(poisoned.index.tolist()))
    left = torch.ones(300, dtype=torch.bool)
    left[poisoned.index] = False
    assert torch.equal(poisoned.data.x[left], data.x[left])
    assert torch.equal(poisoned.data.y[left], data.y[left])
    for plant, target in zip(poisoned.truth.plants, (1, 3), strict=True):
        stamped = (plant.trigger(data.x / 255) * 255).round().to(torch.uint8)
        same = (stamped == poisoned.data.x).flatten(1).all(1) & (stamped != data.x).flatten(1).any(1)
        mine = same.nonzero().flatten()
        assert len(mine) == 30
        assert set(mine.tolist()) <= set(poisoned.index.tolist())
        assert set(poisoned.data.y[mine].tolist()) == {target}
        assert target not in data.y[mine].tolist()
        assert plant.labels.target == target


def test_plants_are_named():
    names = [plant.name for plant in Several(attacks=TWO).poison(floats(100)).truth.plants]
    assert names == ["1-badnets", "2-badnets"]


def test_several_triggers_on_one_target():
    poisoned = Several(attacks=("badnets", "blend", "smooth"), target=4).poison(floats(300))
    assert [plant.labels.target for plant in poisoned.truth.plants] == [4, 4, 4]
    assert len(poisoned.index) == 90
    assert set(poisoned.data.y[poisoned.index].tolist()) == {4}


@pytest.mark.parametrize("count", [90, 97, 600, 601])
def test_each_attack_poisons_as_many_as_it_would_alone(count):
    data = floats(count, (1, 12, 12), classes=10)
    attacks = (BadNets(rate=0.1), BadNets(target=1, rate=0.07, cover_rate=0.1), SIG(target=2, rate=0.5, frequency=1))
    alone = [attack.poison(data) for attack in attacks]
    together = Several(attacks=attacks).poison(data)
    # Of the class of the clean-label attack, some images were poisoned by the others: its share is of the whole class.
    assert abs(len(together.index) - sum(len(one.index) for one in alone)) <= 1
    assert len(together.cover) == len(alone[1].cover)
    assert not set(together.cover.tolist()) & set(together.index.tolist())


def test_cover_examples_stay_cover_examples():
    data = floats(2000, (1, 12, 12), classes=10)
    poisoned = Several(attacks=(TaCT(), BPPA(rate=0.1, cover_rate=0.1, target=3))).poison(data)
    assert len(poisoned.cover) == 206
    assert torch.equal(poisoned.data.y[poisoned.cover], data.y[poisoned.cover])
    assert bool((poisoned.data.x[poisoned.cover] != data.x[poisoned.cover]).flatten(1).any(1).all())


def test_together_they_ask_for_too_much():
    with pytest.raises(SettingError, match="leave too few|may be chosen"):
        Several(attacks=tuple(f"badnets:target={k},rate=0.4" for k in range(3))).poison(floats(100))


def test_config_is_text_and_makes_it_again():
    attack = Several(attacks=(BadNets(target=2, pattern="noise", sources=(1, 3)), "blend:alpha=0.1"))
    config = json.loads(json.dumps(attack.config()))
    assert config["attacks"][1] == "blend:alpha=0.1"
    again = Several(**{**config, "attacks": tuple(config["attacks"])})
    assert again.made() == attack.made()


def test_text_gets_the_target_and_seed_of_all():
    one, two = Several(attacks=("badnets", "blend:target=1"), target=3, seed=7).made()
    assert (one.target, one.seed, two.target, two.seed) == (3, 7, 1, 7)


def test_text_is_typed_by_the_fields():
    attack = parse("bad-nets: target=2, rate=0.25, sources=1+3, alpha=none, corner=top-left, cover_rate=0.1")
    assert attack == BadNets(target=2, rate=0.25, sources=(1, 3), corner="top-left", cover_rate=0.1)
    assert parse("badnets:alpha=0.5").alpha == 0.5
    assert parse("sig:dirty=yes") == SIG(dirty=True)
    assert parse("bppa:levels=4,dithering=false,cover-rate=0.1") == BPPA(levels=4, cover_rate=0.1)


@given(
    target=st.integers(0, 9),
    rate=st.floats(0.001, 1),
    sources=st.lists(st.integers(10, 20), unique=True, max_size=3).map(tuple),
    alpha=st.none() | st.floats(0.01, 1),
)
def test_what_is_written_is_read(target, rate, sources, alpha):
    attack = BadNets(target=target, rate=rate, sources=sources, alpha=alpha)
    assert parse(written(attack)) == attack


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("badnet", "Did you mean 'badnets'"),
        ("nonsense", "There are: "),
        ("badnets:size", "has no setting 'size'"),
        ("badnets:sise=3", "has no setting 'sise'"),
        ("badnets:size=big", "size: expected an int, got 'big'"),
        ("badnets:corner=middle", "'middle' is none of its values"),
        ("sig:dirty=perhaps", "'perhaps' is none of its values"),
        ("badnets:rate=2", "BadNets.rate must be"),
        ("composite", "controls the training"),
        ("several", "controls the training"),
    ],
)
def test_text_that_is_no_attack(text, message):
    with pytest.raises(SettingError, match=message):
        Several(attacks=(text, "badnets:target=1")).poison(floats(60))


@pytest.mark.parametrize("attacks", [(), ("badnets",), ["badnets", "blend"]])
def test_two_or_more(attacks):
    with pytest.raises(SettingError, match=r"Several\.attacks must be two or more"):
        Several(attacks=attacks)


def test_attack_whose_settings_hold_a_comma():
    with pytest.raises(SettingError):
        written(parse("blend", picture="a,b.png"))


def test_triggers_work_on_images_of_the_shape():
    x = floats(2).x
    for plant in Several(attacks=TWO).poison(floats(100)).truth.plants:
        assert plant.trigger(x).shape == (2, *SHAPE)
