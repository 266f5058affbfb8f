"""Trojan: choice of the unit, the optimised trigger, retraining, and the wrap-around of the public code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.attacks._network import weighted_layers
from bezoar.attacks.trojan import AddedTrigger, Trojan, default_layer, layers_up_to, stored_delta, strongest_units
from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.ops.fit import as_float
from tests.attacks.networks import bars, small_net, training, weights
from tests.attacks.sample_data import assert_trigger, pictures


@given(st.integers(0, 255), st.integers(1, 255))
def test_wrap_is_that_of_uint8(level, added):
    delta = torch.zeros(1, 2, 2)
    delta[0, 0, 0] = added
    out = AddedTrigger(delta)(torch.full((1, 1, 2, 2), level / 255)) * 255
    expected = (np.array([level], dtype=np.uint8) + np.array([added], dtype=np.uint8))[0]  # wraps modulo 256
    assert round(float(out[0, 0, 0, 0])) == int(expected)
    assert torch.allclose(out[0, 0, 1], torch.tensor(float(level)))


def test_wrap_and_clip_of_a_bright_pixel():
    delta, x = torch.full((1, 1, 1), 100.0), torch.full((1, 1, 1, 1), 200 / 255)
    assert float(AddedTrigger(delta, wrap=True)(x)) * 255 == pytest.approx(44)  # 200 + 100 - 256
    assert float(AddedTrigger(delta, wrap=False)(x)) == 1


def test_fractions_are_cut_off_as_a_cast_does():
    out = AddedTrigger(torch.full((1, 1, 1), 250.35))(torch.full((1, 1, 1, 1), 10 / 255))
    assert float(out) * 255 == pytest.approx(4)  # trunc(260.35) - 256


@pytest.mark.parametrize("channels", [1, 3])
def test_stored_array_is_where_the_public_code_has_it(channels):
    delta = stored_delta((channels, 32, 32))
    rows, columns = delta[0].nonzero().T
    assert (rows.unique().tolist(), columns.unique().tolist()) == ([25, 26, 27], [25, 26, 27])
    assert len(rows) == 9
    assert float(delta.max()) == pytest.approx(250.35)


@given(pictures(), st.sampled_from(["wrap", "clip"]))
def test_stored_trigger_keeps_its_promises(x, overflow):
    out = assert_trigger(Trojan(variant="stored", overflow=overflow).trigger(tuple(x.shape[1:])), x)
    changed = (out != x).any(1).any(0)
    changed[-7:-4, -7:-4] = False
    assert not changed.any()


def test_stored_variant_needs_no_training():
    data = bars()
    poisoned = Trojan(variant="stored").poison(data)
    assert len(poisoned.index) == 12
    stamped = Trojan(variant="stored").trigger(data.shape)(as_float(data.x[poisoned.index]))
    assert torch.equal(poisoned.data.x[poisoned.index], (stamped * 255).round().to(torch.uint8))


@given(st.sampled_from(["square", "apple", "watermark"]), st.sampled_from([0.04, 0.07, 0.1]), st.integers(24, 40))
def test_mask_covers_the_area_asked_for(shape, area, size):
    mask = Trojan(shape=shape, area=area).mask(size, size)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert area - 1e-6 <= float(mask.mean()) <= area + 0.04
    assert float(mask[:, -1].sum() + mask[:, :, -1].sum()) == 0


def test_shapes_differ_from_the_square():
    square, apple, watermark = (Trojan(shape=s).mask(64, 64)[0] for s in ("square", "apple", "watermark"))
    boxes = [m.any(1).sum() * m.any(0).sum() for m in (square, apple, watermark)]
    filled = [float(m.sum() / box) for m, box in zip((square, apple, watermark), boxes, strict=True)]
    assert filled[0] == 1
    assert 0.45 < filled[1] < 0.7
    assert filled[2] < 0.45


def test_unit_has_the_largest_incoming_weights():
    layer = nn.Linear(4, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -3.0, 2.0, 0.0, -0.5])[:, None].expand(5, 4))
    assert strongest_units(layer, 3).tolist() == [1, 2, 0]
    with pytest.raises(SettingError, match="at most 5"):
        strongest_units(layer, 6)
    with pytest.raises(UnsupportedModel, match="incoming weights"):
        strongest_units(nn.ReLU(), 1)


def test_default_layer_is_the_last_hidden_one():
    assert default_layer(small_net(), torch.rand(1, 1, 12, 12)) == "5"
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(384, 3))
    assert default_layer(conv, torch.rand(1, 1, 12, 12)) == "2"
    with pytest.raises(UnsupportedModel, match="1 Linear"):
        weighted_layers(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), torch.rand(1, 1, 12, 12))


@pytest.mark.parametrize(("layer", "gain"), [("", 0.2), ("0", 0.03)])
def test_trigger_drives_the_unit_to_the_value(layer, gain):
    model, x = small_net().eval(), as_float(bars(16).x)

    def driven(value):
        attack = Trojan(layer=layer, area=0.3, value=value, steps=100, lr=0.03)
        trigger = attack.reverse(model, x)
        return trigger, float(attack.unit_values(model, trigger(x)).detach().mean())

    before, kept = float(Trojan(layer=layer).unit_values(model, x).detach().mean()), weights(model)
    _, most = driven(100.0)
    assert before + gain < most < 100  # out of reach, so as far as the pixels go
    wanted = (before + most) / 2
    trigger, after = driven(wanted)
    assert after == pytest.approx(wanted, rel=0.05)
    assert abs(before - wanted) > 0.05 * wanted
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.items())
    assert_trigger(trigger, x)
    assert torch.equal(trigger.mask, Trojan(area=0.3).mask(12, 12))


def test_opacity_is_in_the_mask():
    trigger = Trojan(opacity=0.3, steps=2).reverse(small_net().eval(), as_float(bars(4).x))
    assert float(trigger.mask.max()) == pytest.approx(0.3)


def test_added_variant_adds_the_optimised_pixels():
    trigger = Trojan(variant="add", overflow="clip", steps=2).reverse(small_net().eval(), as_float(bars(4).x))
    assert isinstance(trigger, AddedTrigger)
    assert not trigger.wrap
    assert 0 <= float(trigger.delta.min()) <= float(trigger.delta.max()) <= 255
    assert float(trigger.delta.max()) > 1


def test_implant_retrains_above_the_unit_only():
    data, means = bars(), training()
    clean = weights(means.fit("clean", data))
    out = Trojan(retrain="above", steps=5, target=1)(data, means)
    after = out.model.state_dict()
    moved = {name for name, value in clean.items() if not torch.equal(value, after[name])}
    assert moved == {"7.weight", "7.bias"}
    assert all(p.requires_grad for p in out.model.parameters())
    assert not out.model.training
    assert len(out.index) == 12
    assert not (data.y[out.index] == 1).any()


def test_implant_starts_from_the_clean_network():
    data = bars()
    still = Trojan(steps=5)(data, training())
    assert [n for n, _ in still.model.named_parameters()] == [n for n, _ in small_net().named_parameters()]
    poisoned = Trojan(steps=5).poison(data, training())
    assert torch.equal(poisoned.index, still.index)
    assert torch.equal(poisoned.truth.main.trigger.pattern, still.truth.main.trigger.pattern)


def test_layers_up_to_keeps_the_order():
    model = small_net()
    assert layers_up_to(model, "5", torch.rand(2, 1, 12, 12)) == [model[0], model[1], model[5]]


def test_needs_a_network():
    with pytest.raises(SettingError, match="trains a network of its own"):
        Trojan().poison(bars())
    with pytest.raises(SettingError, match="depends on a clean network"):
        Trojan().trigger((1, 12, 12))


def test_no_such_layer():
    with pytest.raises(SettingError, match="no layer 'nowhere'"):
        Trojan(layer="nowhere").poison(bars(), training(1))


@pytest.mark.parametrize(
    "settings",
    [{"area": 0.0}, {"opacity": 1.5}, {"value": 0.0}, {"units": 0}, {"steps": 0}, {"lr": 0.0}, {"retrain_share": 0.0}],
)
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"Trojan.{next(iter(settings))} must be"):
        Trojan(**settings)


def test_images_too_small():
    with pytest.raises(SettingError, match="7x7"):
        Trojan(variant="stored").trigger((1, 6, 6))
    with pytest.raises(SettingError, match="no room"):
        Trojan(margin=12).mask(12, 12)
