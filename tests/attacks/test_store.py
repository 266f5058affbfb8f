"""Ground truth on disk."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.attacks._attack import GroundTruth, Plant, Training
from bezoar.attacks._generator import Generator
from bezoar.attacks._labels import LabelMap
from bezoar.attacks._store import NUMBERS, TEXT, load_truth, save_truth
from bezoar.core.errors import DataError
from bezoar.core.examples import Examples
from bezoar.core.registry import methods
from bezoar.core.trigger import AdditiveTrigger, MaskedTrigger
from bezoar.ops.fit import Recipe


def same(one: object, other: object) -> bool:
    """Equality of anything that is stored."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, nn.Module):
        return same(one.config, other.config) and same(dict(one.state_dict()), dict(other.state_dict()))
    if isinstance(one, float):
        return repr(one) == repr(other)
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
    return one == other


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def truth_of(value: object, label_map: LabelMap | None = None) -> GroundTruth:
    return GroundTruth((Plant(value, label_map or LabelMap(3, 1)),))


tensors = st.builds(
    lambda shape, kind, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50).to(kind),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]),
    st.integers(0, 9),
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | st.builds(MaskedTrigger, inner, inner)
        | st.builds(AdditiveTrigger, inner)
    ),
    max_leaves=8,
)
label_maps = st.builds(
    LabelMap, st.just(9), st.integers(0, 3), st.sampled_from(["all-to-one", "all-to-all"]), st.tuples(st.integers(4, 8))
)


@given(st.lists(st.builds(Plant, values, label_maps, st.text()), min_size=1, max_size=3))
def test_comes_back_as_it_was(tmp_path_factory, plants):
    folder = tmp_path_factory.mktemp("truth")
    truth = GroundTruth(tuple(plants))
    save_truth(truth, folder)
    assert same(load_truth(folder), truth)


def test_modules_come_back(tmp_path):
    made = Generator(3, 1, width=4, levels=1, skips=True)
    made(torch.rand(4, 3, 8, 8))  # running statistics
    state = torch.get_rng_state()
    save_truth(truth_of((made,)), tmp_path)
    again = load_truth(tmp_path).main.trigger[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert same(again, made)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again(torch.ones(2, 3, 8, 8)), made.eval()(torch.ones(2, 3, 8, 8)))


def test_views_are_stored_as_what_they_show(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    save_truth(truth_of((whole[:, 1], whole.t(), whole.expand(2, 3, 4))), tmp_path)
    assert same(load_truth(tmp_path).main.trigger, (whole[:, 1], whole.t(), whole.expand(2, 3, 4)))


@pytest.mark.parametrize("name", ["badnets", "blend", "sig"])
def test_stored_trigger_stamps_the_same(name, tmp_path):
    trigger = methods("attacks")[name]().trigger((3, 16, 16))
    x = torch.rand(2, 3, 16, 16)
    save_truth(truth_of(trigger), tmp_path)
    assert torch.equal(load_truth(tmp_path).main.trigger(x), trigger(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", methods("attacks"))
def test_truth_of_every_attack_comes_back(name, tmp_path):
    x = torch.randint(0, 256, (120, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = methods("attacks")[name]()(Examples(x, torch.arange(120) % 6, 6), Training(net, Recipe(epochs=1, batch=30)))
    save_truth(made.truth, tmp_path)
    for plant, again in zip(made.truth.plants, load_truth(tmp_path).plants, strict=True):
        assert same(plant.labels, again.labels)
        assert torch.equal(plant.trigger(x[:8] / 255), again.trigger(x[:8] / 255))


def net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4)),
        *(nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 6)),
    )


class Foreign:
    pass


@pytest.mark.parametrize(
    "value",
    [lambda x: x, Foreign(), nn.Linear(2, 2), (1, {2: 3}), nn.Sequential, MaskedTrigger],
    ids=["function", "foreign", "module", "number as a key", "foreign class", "class"],
)
def test_what_cannot_be_stored_is_refused_and_nothing_is_written(value, tmp_path):
    with pytest.raises(DataError, match=r"truth\.plants\.0\.trigger"):
        save_truth(truth_of(value), tmp_path)
    assert list(tmp_path.iterdir()) == []


def damaged(text: str, change) -> str:
    raw = json.loads(text)
    change(raw)
    return json.dumps(raw)


def set_class(name: str):
    return lambda raw: raw["truth"]["fields"]["plants"]["tuple"][0]["fields"]["trigger"].update({"class": name})


def set_field(name: str, value: object):
    return lambda raw: raw["truth"]["fields"]["plants"]["tuple"][0]["fields"]["trigger"]["fields"].update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(schema="bezoar.truth/2"),
        lambda raw: raw.pop("truth"),
        lambda raw: raw.update(truth=3),
        lambda raw: raw.update(truth=[1]),
        lambda raw: raw.update(truth={"strange": 1}),
        lambda raw: raw["truth"]["fields"].update(plants={"tuple": []}),
        set_class("os:system"),
        set_class("subprocess:Popen"),
        set_class("bezoar.core.trigger:torch"),
        set_class("bezoar.core.trigger:Nothing"),
        set_class("bezoar.core.nothing:Nothing"),
        set_class("bezoar.core.trigger:Tensor"),
        set_class("bezoar.attacks._generator:Generator"),
        set_class("bezoar.core.errors:BezoarError"),
        set_field("mask", {"tensor": "elsewhere"}),
        set_field("mask", {"module": "bezoar.core.trigger:MaskedTrigger", "config": {"dict": {}}, "state": {}}),
        set_field("unknown", 1),
    ],
)
def test_damaged_text_is_one_clear_error(change, tmp_path):
    save_truth(truth_of(MaskedTrigger(torch.zeros(1, 2, 2), torch.zeros(3, 2, 2))), tmp_path)
    (tmp_path / TEXT).write_text(damaged((tmp_path / TEXT).read_text(), change))
    with pytest.raises(DataError, match="damaged") as caught:
        load_truth(tmp_path)
    assert "bezoar attack" in caught.value.hint
    assert len(str(caught.value)) < 600


@given(st.integers(0, 10_000), st.sampled_from([TEXT, NUMBERS]))
def test_cut_and_changed_files_are_found(tmp_path_factory, place, name):
    folder = tmp_path_factory.mktemp("truth")
    save_truth(truth_of(MaskedTrigger(torch.rand(1, 3, 3), torch.rand(3, 3, 3))), folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: place % len(content)])
    if content[: place % len(content)] != content[:-1] or name == NUMBERS:  # only the last line break may go
        with pytest.raises(DataError):
            load_truth(folder)


def test_files_of_two_truths_do_not_mix(tmp_path):
    for name, value in (("a", 0.0), ("b", 1.0)):
        save_truth(truth_of(AdditiveTrigger(torch.full((1, 2, 2), value))), tmp_path / name)
    (tmp_path / "a" / NUMBERS).write_bytes((tmp_path / "b" / NUMBERS).read_bytes())
    with pytest.raises(DataError, match="not the one"):
        load_truth(tmp_path / "a")


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="no ground truth"):
        load_truth(tmp_path)


def test_numbers_that_json_has_not(tmp_path):
    save_truth(truth_of((math.inf, -math.inf, math.nan)), tmp_path)
    assert "Infinity" not in (tmp_path / TEXT).read_text()
    assert repr(load_truth(tmp_path).main.trigger) == "(inf, -inf, nan)"
