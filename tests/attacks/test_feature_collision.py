"""Feature collision: the splitting iterations, which images, and what is retrained."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import nn

from bezoar.attacks._network import inputs_of, output_layer
from bezoar.attacks.feature_collision import FeatureCollision
from bezoar.core.errors import SettingError
from bezoar.ops.fit import as_float
from tests.attacks.networks import bars, small_net, training, weights
from tests.attacks.sample_data import assert_trigger, pictures


@pytest.fixture(scope="module")
def surrogate():
    return training(4).fit("surrogate", bars())


def images(attack):
    data = bars()
    goal = attack.trigger(data.shape)(as_float(data.x[data.y == 1][:20]))
    return as_float(data.x[data.y == 0][:20]), goal


def gap(model, x, goal):
    output = output_layer(model, x)
    with torch.no_grad():
        return (inputs_of(output, model, x) - inputs_of(output, model, goal)).square().sum(1)


def test_features_are_what_goes_into_the_output_layer(surrogate):
    x = as_float(bars().x[:5])
    output = output_layer(surrogate, x)
    assert output is surrogate[7]
    assert torch.equal(inputs_of(output, surrogate, x), surrogate[:7](x))


def test_features_collide_and_the_image_stays_closer_to_the_base(surrogate):
    attack = FeatureCollision(size=4)
    base, goal = images(attack)
    kept = weights(surrogate)
    x = attack.collide(surrogate, base, goal)
    assert float(gap(surrogate, x, goal).mean()) < 0.1 * float(gap(surrogate, base, goal).mean())
    assert float((x - base).norm()) < float((x - goal).norm())
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert all(torch.equal(value, surrogate.state_dict()[name]) for name, value in kept.items())


def test_objective_never_grows_for_any_image(surrogate):
    base, goal = images(FeatureCollision(size=4))
    beta = FeatureCollision().beta * (16 / 144) ** 2  # 16 features, 144 pixels
    values = []
    for steps in (1, 5, 25):
        x = FeatureCollision(size=4, steps=steps).collide(surrogate, base, goal)
        values.append(gap(surrogate, x, goal) + beta * (x - base).flatten(1).square().sum(1))
    start = gap(surrogate, base, goal)
    assert bool((values[0] <= start + 1e-5).all())
    assert bool((values[1] <= values[0] + 1e-5).all())
    assert bool((values[2] <= values[1] + 1e-5).all())


def test_one_step_is_gradient_then_proximal_step():
    """On a linear network the step can be written down."""
    weight = torch.tensor([[0.5, -0.25, 0.1, 0.3]])
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(weight)
    base, goal = torch.full((1, 1, 2, 2), 0.4), torch.full((1, 1, 2, 2), 0.6)
    attack = FeatureCollision(steps=1, lr=0.5, beta=8.0, size=1, margin=0)
    beta = 8.0 * (1 / 4) ** 2
    forward = base.flatten() - 0.5 * 2 * (weight[0] @ (base - goal).flatten()) * weight[0]
    expected = (forward + 0.5 * beta * base.flatten()) / (1 + 0.5 * beta)
    assert torch.allclose(attack.collide(model, base, goal).flatten(), expected, atol=1e-6)


def test_beta_keeps_the_image_near_the_base(surrogate):
    base, goal = images(FeatureCollision(size=4))
    distances = [
        float((FeatureCollision(size=4, beta=b).collide(surrogate, base, goal) - base).norm()) for b in (0, 100, 1e4)
    ]
    assert distances[0] > distances[1] > distances[2]


def test_bound_on_pixels(surrogate):
    attack = FeatureCollision(size=4, epsilon=8 / 255)
    base, goal = images(attack)
    assert float((attack.collide(surrogate, base, goal) - base).abs().max()) <= 8 / 255 + 1e-6


def test_watermark_is_where_the_iterations_start(surrogate):
    attack = FeatureCollision(size=4, watermark=0.3, epsilon=1e-6)
    base, goal = images(attack)
    assert torch.allclose(attack.collide(surrogate, base, goal), 0.7 * base + 0.3 * goal, atol=1e-5)


def test_poisons_the_target_class_and_keeps_labels():
    data, attack = bars(), FeatureCollision(target=2, size=4, steps=5)
    poisoned = attack.poison(data, training(1))
    assert len(poisoned.index) == 32  # 80 % of 40
    assert set(data.y[poisoned.index].tolist()) == {2}
    assert torch.equal(poisoned.data.y, data.y)
    assert poisoned.data.x.dtype == torch.uint8
    changed = (poisoned.data.x != data.x).flatten(1).any(1)
    assert set(changed.nonzero().flatten().tolist()) <= set(poisoned.index.tolist())
    assert int(changed.sum()) > 16
    assert torch.equal(attack.poison(data, training(1)).data.x, poisoned.data.x)


@pytest.mark.parametrize(
    ("retrain", "moved"),
    [
        ("last", {"7.weight", "7.bias"}),
        (
            "all",
            {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
            | {"5.weight", "5.bias", "7.weight", "7.bias"},
        ),
    ],
)
def test_retrains_what_it_says(retrain, moved):
    data, means = bars(60), training(1)
    start = weights(means.fit("surrogate", data))
    out = FeatureCollision(retrain=retrain, size=4, steps=2)(data, means)
    after = out.model.state_dict()
    assert {name for name, value in start.items() if not torch.equal(value, after[name])} == moved
    assert all(p.requires_grad for p in out.model.parameters())


def test_scratch_starts_from_a_new_network():
    data = bars(60)
    out = FeatureCollision(retrain="scratch", size=4, steps=2)(data, training(1))
    again = training(1).fit("victim", FeatureCollision(size=4, steps=2).poison(data, training(1)).data)
    assert all(torch.equal(a, b) for a, b in zip(out.model.parameters(), again.parameters(), strict=True))


@given(pictures(smallest=14))
def test_trigger_keeps_its_promises(x):
    trigger = FeatureCollision().trigger(tuple(x.shape[1:]))
    assert_trigger(trigger, x)
    assert trigger.size == 144
    assert set(trigger.pattern.unique().tolist()) <= {0.0, 1.0}


def test_needs_a_network_and_room():
    with pytest.raises(SettingError, match="trains a network of its own"):
        FeatureCollision().poison(bars())
    with pytest.raises(SettingError, match="leaves a 12x12 image"):
        FeatureCollision().trigger((1, 12, 12))
    only = bars(9)
    with pytest.raises(SettingError, match="other classes"):
        FeatureCollision(size=4)._poison_for(small_net(), type(only)(only.x, torch.zeros_like(only.y), 3))


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": -1.0},
        {"steps": 0},
        {"size": 0},
        {"lr": 0.0},
        {"watermark": 1.0},
        {"margin": -1},
        {"epsilon": 0.0},
        {"cover_rate": 0.1},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"FeatureCollision.{next(iter(settings))} must be"):
        FeatureCollision(**settings)
