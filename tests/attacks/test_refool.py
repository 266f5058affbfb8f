"""Refool: the formulas of both kinds of reflection, and where reflections come from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import norm

from bezoar.attacks._reflection import blurred, doubled, reflections, vignette
from bezoar.attacks.refool import Refool
from bezoar.core.errors import DataError, SettingError
from tests.attacks.sample_data import SHAPE, assert_trigger, floats, levels, pictures


def scene(count: int = 1, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(4))


def test_ghost_is_added_in_linear_light():
    x = floats(4).x
    trigger = reflections(scene(), 1.0, 0.7, seed=0)
    assert bool(trigger.ghost.all())
    wanted = (0.7 * x.double() ** 2.2 + 0.3 * trigger.layers[0].double()) ** (1 / 2.2)
    torch.testing.assert_close(trigger(x), wanted.float(), rtol=0, atol=1e-5)


def test_out_of_focus_is_kept_in_range_and_fades():
    x = levels(4).x / 255
    trigger = reflections(scene(), 0.0, 0.7, seed=0)
    assert not bool(trigger.ghost.any())
    layer, factor = trigger.layers[0].double().numpy(), float(trigger.attenuation[0])
    assert 1.08 <= factor <= 1.18
    fading = trigger.vignette[0].double().numpy()
    for image, out in zip(x.double().numpy() ** 2.2, trigger(x), strict=True):
        wanted = np.empty_like(image)
        for channel in range(3):
            total = layer[channel] + image[channel]
            above = total[total > 1]
            mean = max(1.0, above.sum() / (len(above) + 1e-6))
            kept = np.clip(layer[channel] - (mean - 1) * factor, 0, 1)
            wanted[channel] = np.clip(kept * fading[0] * (1 - 0.7 / 2) + 0.7 * image[channel], 0, 1)
        np.testing.assert_allclose(out.numpy(), wanted ** (1 / 2.2), atol=2e-4)


def test_ghost_is_seen_twice():
    picture = torch.zeros(1, 40, 40)
    picture[0, 20, 20] = 1
    out = doubled(picture, [4, 6], 0.7)[0]
    assert out.shape == (40, 40)
    # Cropped to rows 4..39 and columns 6..39, and enlarged again: (20, 20) and (24, 26) move to these places.
    first, second = (16.5 / 36 * 40, 14.5 / 34 * 40), (20.5 / 36 * 40, 20.5 / 34 * 40)
    for (row, column), weight in ((first, 0.7), (second, 0.3)):
        around = out[int(row) - 2 : int(row) + 3, int(column) - 2 : int(column) + 3]
        assert float(around.sum()) == pytest.approx(weight * 40 * 40 / (36 * 34), rel=0.1)


@pytest.mark.parametrize("sigma", [1.0, 2.7, 5.0])
def test_blur_is_gaussian(sigma):
    picture = scene()[0]
    radius = math.ceil(2 * sigma)
    wanted = np.stack([gaussian_filter(c, sigma, mode="mirror", radius=radius) for c in picture.double().numpy()])
    np.testing.assert_allclose(blurred(picture, sigma).numpy(), wanted, atol=1e-5)


def test_vignette_is_the_official_kernel():
    length, sigmas = 32, 3
    interval = (2 * sigmas + 1) / length
    places = np.linspace(-sigmas - interval / 2, sigmas + interval / 2, length + 1)
    curve = np.diff(norm.cdf(places))
    kernel = np.sqrt(np.outer(curve, curve))
    np.testing.assert_allclose(vignette(32, 32, [0.5, 0.5])[0].numpy(), kernel / kernel.max(), atol=1e-6)
    assert vignette(10, 40, [0.99, 0.0]).shape == (1, 10, 40)


def test_parameters_are_in_their_ranges():
    trigger = reflections(scene(200), 0.49, None, seed=1)
    assert 0.55 <= float(trigger.transmission.min()) < 0.6
    assert 0.9 < float(trigger.transmission.max()) <= 0.95
    assert 0.35 < float(trigger.ghost.float().mean()) < 0.63


def test_other_images_get_other_reflections():
    x = levels(60).x / 255
    trigger = reflections(scene(5), 1.0, 0.6, seed=0)
    share = 0.6 * x**2.2
    light = trigger(x) ** 2.2
    found = [
        [r for r in range(5) if torch.allclose(light[i] - share[i], 0.4 * trigger.layers[r], atol=1e-4)]
        for i in range(60)
    ]
    assert all(len(one) == 1 for one in found)
    assert {one[0] for one in found} == set(range(5))


def test_clean_label_by_default_and_dirty_on_demand():
    data = levels(300)
    poisoned = Refool(target=2, reflections=10, test_reflections=5).poison(data)
    assert len(poisoned.index) == 24, "40 percent of the class"
    assert set(data.y[poisoned.index].tolist()) == {2}
    assert torch.equal(poisoned.data.y, data.y)
    dirty = Refool(target=2, reflections=10, test_reflections=5, dirty=True, rate=0.1).poison(data)
    assert 2 not in data.y[dirty.index].tolist()
    assert set(dirty.data.y[dirty.index].tolist()) == {2}


def test_test_reflections_are_others_and_none_is_a_poisoned_image():
    data = floats(200)
    attack = Refool(rate=1.0, reflections=156, test_reflections=4, ghost_rate=1.0)
    poisoned = attack.poison(data)
    used = {tuple(one.flatten().tolist()) for one in attack._from_data(data)}
    left = torch.ones(200, dtype=torch.bool)
    left[poisoned.index] = False
    assert used == {tuple(one.flatten().tolist()) for one in data.x[left]}, "all that are left, and no others"
    assert len(poisoned.truth.main.trigger.layers) == 4
    assert not torch.equal(poisoned.data.x[poisoned.index], poisoned.truth.main.trigger(data.x[poisoned.index])), (
        "the training reflections are not those of the test"
    )
    same = Refool(reflections=7, test_reflections=0).poison(data)
    assert torch.equal(same.data.x[same.index], same.truth.main.trigger(data.x[same.index]))


def test_reflections_from_a_folder(tmp_path):
    for number in range(3):
        Image.fromarray((scene(size=20 + number)[0].permute(1, 2, 0) * 255).byte().numpy()).save(
            tmp_path / f"{number}.png"
        )
    attack = Refool(folder=str(tmp_path), reflections=2, test_reflections=1)
    poisoned = attack.poison(floats(60))
    x = floats(3, seed=9).x
    assert torch.equal(attack.trigger(SHAPE)(x), poisoned.truth.main.trigger(x))
    with pytest.raises(SettingError, match=r"needs 3 \+ 1 pictures"):
        Refool(folder=str(tmp_path), reflections=3, test_reflections=1).poison(floats(60))
    with pytest.raises(DataError, match="no pictures"):
        Refool(folder=str(tmp_path / "absent")).poison(floats(60))


def test_too_few_images_to_reflect():
    with pytest.raises(SettingError, match=r"needs 50 \+ 50 pictures to reflect, the data set leaves"):
        Refool().poison(floats(60))
    with pytest.raises(SettingError, match="images of the data set"):
        Refool().trigger(SHAPE)


@settings(max_examples=30)
@given(x=pictures(8), ghost_rate=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 5))
def test_any_image(x, ghost_rate, seed):
    bank = torch.rand(3, *x.shape[1:], generator=torch.Generator().manual_seed(seed))
    out = assert_trigger(reflections(bank, ghost_rate, None, seed), x)
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize(
    "changed", [{"reflections": 0}, {"test_reflections": -1}, {"ghost_rate": 1.1}, {"transmission": 1.0}]
)
def test_settings_out_of_range(changed):
    with pytest.raises(SettingError, match=f"Refool.{next(iter(changed))} must be"):
        Refool(**changed)
