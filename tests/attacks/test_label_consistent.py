"""Label-consistent: the bound, the loss of the surrogate, which images, and the pattern in the corners."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bezoar.attacks.label_consistent import LabelConsistent
from bezoar.core.errors import SettingError
from bezoar.ops.fit import as_float
from tests.attacks.networks import bars, small_net, training, weights
from tests.attacks.sample_data import assert_trigger, pictures


@pytest.fixture(scope="module")
def surrogate():
    return training(4).fit("surrogate", bars())


def test_perturbation_keeps_the_bound_and_raises_the_loss(surrogate):
    data, attack = bars(), LabelConsistent(target=1, epsilon=16 / 255)
    x, y = as_float(data.x[data.y == 1]), data.y[data.y == 1]
    kept = weights(surrogate)
    changed = attack.perturb(surrogate, x, y)
    assert float((changed - x).abs().max()) <= 16 / 255 + 1e-6
    assert float((changed - x).abs().mean()) > 8 / 255
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    with torch.no_grad():
        before, after = (F.cross_entropy(surrogate(images), y) for images in (x, changed))
    assert float(after) > 2 * float(before)
    assert all(torch.equal(value, surrogate.state_dict()[name]) for name, value in kept.items())
    assert torch.equal(attack.perturb(surrogate, x, y), changed)


def test_more_steps_find_worse_images(surrogate):
    data = bars()
    x, y = as_float(data.x[data.y == 0]), data.y[data.y == 0]
    with torch.no_grad():
        losses = [
            float(F.cross_entropy(surrogate(LabelConsistent(epsilon=e).perturb(surrogate, x, y)), y))
            for e in (0.02, 0.1, 0.3)
        ]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("robust", [True, False])
def test_poisons_a_share_of_the_target_class_and_keeps_labels(robust):
    data, attack = bars(), LabelConsistent(target=1, robust=robust)
    poisoned = attack.poison(data, training(1))
    assert len(poisoned.index) == 32  # 80 % of 40
    assert set(data.y[poisoned.index].tolist()) == {1}
    assert torch.equal(poisoned.data.y, data.y)
    assert poisoned.data.x.dtype == torch.uint8
    untouched = torch.ones(len(data.y), dtype=torch.bool)
    untouched[poisoned.index] = False
    assert torch.equal(poisoned.data.x[untouched], data.x[untouched])
    # Away from the corners only the perturbation is left: at most 16 grey levels, also after rounding.
    change = (poisoned.data.x[poisoned.index].int() - data.x[poisoned.index].int()).abs()
    assert 8 < int(change[..., 3:-3, :].max()) <= 16
    stamped = attack.trigger(data.shape)(as_float(poisoned.data.x[poisoned.index]))
    assert torch.equal((stamped * 255).round().to(torch.uint8), poisoned.data.x[poisoned.index])


def test_robust_training_differs_from_ordinary_training():
    robust, ordinary = (LabelConsistent(robust=r).poison(bars(), training(1)).data.x for r in (True, False))
    assert not torch.equal(robust, ordinary)


def test_without_perturbation_only_the_trigger_is_left():
    data, attack = bars(), LabelConsistent(epsilon=0, target=2)
    poisoned = attack.poison(data)  # needs no network
    stamped = attack.trigger(data.shape)(as_float(data.x[poisoned.index]))
    assert torch.equal(poisoned.data.x[poisoned.index], (stamped * 255).round().to(torch.uint8))


def test_pattern_of_the_bottom_right_corner():
    delta = LabelConsistent(pattern="bottom-right").trigger((3, 12, 12)).delta
    assert delta[1, -3:, -3:].tolist() == [[-1, -1, 1], [-1, 1, -1], [1, -1, 1]]
    assert int((delta != 0).sum()) == 27


def test_margin_moves_the_pattern_inwards():
    delta = LabelConsistent(margin=2).trigger((1, 12, 12)).delta
    assert torch.equal(delta[:, 2:10, 2:10], LabelConsistent().trigger((1, 8, 8)).delta)
    assert int((delta != 0).sum()) == 4 * 9


def test_corners_survive_a_flip():
    delta = LabelConsistent().trigger((3, 12, 12)).delta
    assert torch.equal(delta, delta.flip(2))
    assert torch.equal(delta, delta.flip(1))
    assert int((delta != 0).sum()) == 4 * 27


@given(pictures(), st.floats(0.05, 1), st.sampled_from(["corners", "bottom-right"]))
def test_trigger_keeps_its_promises(x, amplitude, pattern):
    out = assert_trigger(LabelConsistent(amplitude=amplitude, pattern=pattern).trigger(tuple(x.shape[1:])), x)
    assert float((out - x).abs().max()) <= amplitude + 1e-6


def test_full_amplitude_is_black_and_white():
    out = LabelConsistent().trigger((1, 12, 12))(torch.rand(2, 1, 12, 12))
    assert set(out[..., -3:, -3:].unique().tolist()) == {0.0, 1.0}


def test_implant_leaves_an_evaluated_victim():
    out = LabelConsistent()(bars(60), training(1))
    assert not out.model.training
    assert type(out.model) is type(small_net())
    assert len(out.index) == 16


def test_needs_a_network():
    with pytest.raises(SettingError, match="trains a network of its own"):
        LabelConsistent().poison(bars())


@pytest.mark.parametrize(
    "settings", [{"epsilon": 1.5}, {"epsilon": -0.1}, {"steps": 0}, {"margin": -1}, {"amplitude": 0.0}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"LabelConsistent.{next(iter(settings))} must be"):
        LabelConsistent(**settings)


def test_images_too_small():
    with pytest.raises(SettingError, match="at least 6 pixels a side, got 5x9"):
        LabelConsistent().trigger((1, 5, 9))
    with pytest.raises(SettingError, match="at least 10 pixels"):
        LabelConsistent(margin=2).trigger((1, 9, 9))
