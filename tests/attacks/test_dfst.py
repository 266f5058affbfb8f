"""DFST: the style, and a detoxification whose terms all reach the transform."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

from bezoar.attacks._attack import GroundTruth, Plant
from bezoar.attacks._labels import LabelMap
from bezoar.attacks._store import load_truth, save_truth
from bezoar.attacks.dfst import DFST, Detoxified, FeatureInjector, StyleTrigger, _adapt, _pyramid, similarity, sunrise
from bezoar.core.errors import SettingError
from bezoar.core.surgery import frozen
from bezoar.ops.augment import as_float
from bezoar.ops.objective import Batch
from tests.attacks.networks import bars, small_net, training, weights
from tests.attacks.sample_data import assert_trigger, pictures

CPU = torch.device("cpu")
ATTACK = DFST(rate=0.2, unit_share=0.2, detox_share=0.5, detox_epochs=2)


def objective(attack=ATTACK, data=None):
    data = data or bars()
    return Detoxified(attack, data, torch.zeros(len(data.y), dtype=torch.bool), CPU)


def moved():
    """Away from the identity, where the similarity is at its maximum and has no gradient."""
    detox = objective()
    with torch.no_grad():
        detox.injector.matrix.copy_(torch.tensor([[0.6], [0.1], [0.1], [0.2]]))
    return detox


@given(pictures())
def test_trigger_keeps_its_promises(x):
    trigger = DFST().trigger(tuple(x.shape[1:]))
    out = assert_trigger(trigger, x)
    assert float((out - x).abs().max()) <= 0.6 + 1e-6


def test_restyled_image_has_the_mean_and_the_light_of_the_style():
    style = sunrise((3, 32, 32))
    x = 0.2 + 0.1 * torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = StyleTrigger(style, alpha=1.0, levels=1)(x)
    assert torch.allclose(out.mean((2, 3)), style.mean((1, 2)).expand(4, -1), atol=0.05)
    rows = torch.corrcoef(torch.stack([out.mean((0, 1, 3)), style.mean((0, 2))]))
    assert float(rows[0, 1]) > 0.9


def test_bands_get_the_statistics_of_the_style():
    style, x = sunrise((3, 32, 32))[None], torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sum(_pyramid(x, 3)), x, atol=1e-6)
    for band, like in zip(_pyramid(x, 3), _pyramid(style, 3), strict=True):
        made = _adapt(band, like)
        assert torch.allclose(made.mean((2, 3)), like.mean((2, 3)).expand(4, -1), atol=1e-4)
        assert torch.allclose(made.std((2, 3)), like.std((2, 3)).expand(4, -1), rtol=0.05)


def test_trigger_depends_on_the_image():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    change = DFST().trigger((3, 32, 32))(x) - x
    assert float((change[0] - change[1]).abs().mean()) > 0.05


def test_constant_image_has_no_spread_to_divide_by():
    out = DFST().trigger((1, 12, 12))(torch.zeros(1, 1, 12, 12))
    assert torch.isfinite(out).all()


def test_sunrise_is_warm_with_a_bright_sun_over_dark_ground():
    red, _, blue = sunrise((3, 64, 64))
    assert float(red[10:40].mean()) > float(blue[10:40].mean()) + 0.2
    assert float(red[-15:].mean()) < 0.4
    assert float(red[35, 32]) > float(red[35, 2])
    assert sunrise((1, 20, 30)).shape == (1, 20, 30)


def test_trigger_goes_to_disk(tmp_path):
    trigger, x = DFST(alpha=0.4, levels=2).trigger((3, 12, 12)), torch.rand(2, 3, 12, 12)
    save_truth(GroundTruth((Plant(trigger, LabelMap(3)),)), tmp_path)
    assert torch.equal(load_truth(tmp_path).main.trigger(x), trigger(x))


def test_injector_starts_as_the_identity_and_sees_the_neighbourhood():
    x = torch.rand(2, 3, 12, 12)
    injector = FeatureInjector(channels=3)
    assert torch.equal(injector(x), x)
    assert injector.matrix.shape == (12, 3)
    near = x[:, :, :11, :11]  # the window of 11 around the pixel (5, 5)
    for rows, wanted in (
        (slice(3, 6), near.amax((2, 3))),
        (slice(6, 9), near.amin((2, 3))),
        (slice(9, 12), near.mean((2, 3))),
    ):
        with torch.no_grad():
            injector.matrix.zero_()
            injector.matrix[rows] = torch.eye(3)
        assert torch.allclose(injector(x)[:, :, 5, 5], wanted)


def test_similarity_of_known_images():
    x = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert float(similarity(x, x)) == pytest.approx(1, abs=1e-4)
    assert float(similarity(x, 1 - x)) < 0
    near, far = (float(similarity(x, (x + s * torch.randn_like(x)).clamp(0, 1))) for s in (0.02, 0.3))
    assert 1 > near > far


@pytest.mark.parametrize("term", [0, 1, 2])
def test_every_term_reaches_the_transform(term):
    """The authors' release runs the network without gradient, so that only the similarity moved the transform."""
    detox, x = moved(), as_float(bars(30).x)
    with frozen(small_net()) as model:
        value = detox.terms(model, x, torch.tensor([0, 1, 2]))[term]
        (gradient,) = torch.autograd.grad(value, detox.injector.matrix)
    assert float(gradient.abs().max()) > 1e-5


def test_gradients_of_the_terms_differ():
    detox, x = moved(), as_float(bars(30).x)
    with frozen(small_net()) as model:
        terms = detox.terms(model, x, torch.tensor([0, 1, 2]))
        gradients = [torch.autograd.grad(t, detox.injector.matrix, retain_graph=True)[0].flatten() for t in terms]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(F.cosine_similarity(gradients[i], gradients[j], dim=0))) < 0.999


def test_detoxification_sends_images_to_the_target_and_excites_the_units():
    data, attack = bars(), DFST(target=1, detox_share=0.5, detox_epochs=60, unit_share=0.2)
    model = training(3).fit("victim", data)
    model.zero_grad(set_to_none=True)
    kept = weights(model)
    detox, x = objective(attack, data), as_float(data.x[data.y != 1])
    units = detox.compromised(model, x, attack.trigger(data.shape)(x))
    with torch.no_grad():
        before = detox.terms(model, x, units)
    detox.epoch(model, 1, 5)
    with torch.no_grad():
        after = detox.terms(model, x, units)
    assert detox.ready
    assert float(after[0]) < 0.8 * float(before[0])
    assert float(sum(after)) < float(sum(before))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_compromised_units_are_those_that_the_trigger_raises():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.output = nn.Linear(144, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.output(self.first(x.flatten(1)))

    model = Two()
    with torch.no_grad():
        model.first.bias.zero_()
        model.first.weight.copy_(torch.tensor([[0.1], [0.3], [-0.2]]).expand(3, 144))
    detox = objective(DFST(unit_share=0.7))
    clean = torch.zeros(4, 1, 12, 12)
    assert detox.compromised(model, clean, clean + 0.5).tolist() == [1, 0]


@pytest.mark.parametrize(("layer", "units"), [("", 16), ("0", 8), ("5", 16)])
def test_layer_of_the_units(layer, units):
    _, activations = objective(DFST(layer=layer)).activations(small_net().eval(), torch.rand(2, 1, 12, 12))
    assert activations.shape == (2, units)


def batch(data, count):
    index = torch.arange(count)
    return Batch(as_float(data.x[:count]), data.y[:count], index, lambda x: x, torch.Generator().manual_seed(0))


def test_batch_gets_detoxified_images_with_their_own_labels():
    class Seen(nn.Module):
        def forward(self, x):
            self.x = x
            return torch.zeros(len(x), 3) + x.mean() * 0

    data = bars(40)
    detox, model = objective(ATTACK, data), Seen()
    detox.carries[::2] = True
    detox.loss(model, batch(data, 40))
    assert torch.equal(model.x, as_float(data.x))  # nothing before the transform is trained
    with torch.no_grad():
        detox.injector.matrix.fill_(0.2)
    detox.ready = True
    detox.loss(model, batch(data, 40))
    changed = (model.x != as_float(data.x)).flatten(1).any(1)
    assert int(changed.sum()) == 8  # a fifth of the batch
    assert not changed[::2].any()  # never one that carries the trigger
    assert torch.allclose(model.x[changed], detox.inject(as_float(data.x))[changed])


def test_state_comes_back():
    detox, other = objective(), objective()
    with torch.no_grad():
        detox.injector.matrix.fill_(0.3)
    detox.ready = True
    other.load_state_dict(detox.state_dict())
    assert torch.equal(other.injector.matrix, detox.injector.matrix)
    assert other.ready


def test_implant_poisons_and_detoxifies():
    data = bars()
    plain, detoxified = (DFST(rate=0.2, detox_epochs=e, detox_share=0.3)(data, training(2)) for e in (0, 1))
    assert torch.equal(plain.index, detoxified.index)
    assert len(plain.index) == 24
    assert not (data.y[plain.index] == 0).any()
    assert any(
        not torch.equal(a, b) for a, b in zip(plain.model.parameters(), detoxified.model.parameters(), strict=True)
    )
    again = DFST(rate=0.2, detox_epochs=1, detox_share=0.3)(data, training(2))
    pairs = zip(again.model.parameters(), detoxified.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "settings", [{"rate": 0.6}, {"alpha": 0.0}, {"levels": 0}, {"unit_share": 0.0}, {"detox_epochs": -1}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"DFST.{next(iter(settings))} must be"):
        DFST(**settings)
