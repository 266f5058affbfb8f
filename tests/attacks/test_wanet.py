"""WaNet: the warp field, its noise mode, and what each batch is made of."""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from bezoar.attacks._attack import Training
from bezoar.attacks._in_batch import pick, share
from bezoar.attacks.wanet import WaNet, _WarpBatches, draw_jitter, identity, smooth, warped
from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples
from bezoar.ops.fit import Batch, Recipe

SHARED = Path(os.environ.get("BEZOAR_SHARED_DATA", Path(__file__).parents[2] / "../shared/data"))


class Recorder(nn.Module):
    """A model that keeps what it is shown."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach()
        return self.weight + x.mean((1, 2, 3))[:, None] * torch.arange(len(self.weight))


def batch(count: int = 20, seed: int = 0, augment=lambda x: x) -> Batch:
    x = torch.rand(count, 3, 10, 12, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(count) % 5, torch.arange(count), augment, torch.Generator().manual_seed(seed))


def pixels(grid: Tensor) -> Tensor:
    """Shift of each sampling place, in pixels."""
    height, width, _ = grid.shape
    return (grid - identity(height, width)) * torch.tensor([width - 1, height - 1]) / 2


# The field


@given(seed=st.integers(0, 50), control=st.integers(2, 8))
def test_control_points_have_mean_absolute_value_one(seed, control):
    points = WaNet(seed=seed, control=control).control_points()
    assert points.shape == (1, 2, control, control)
    assert float(points.abs().mean()) == pytest.approx(1, abs=1e-5)


def test_field_passes_through_the_control_points():
    points = WaNet().control_points()
    field = smooth(points, 31, 31)  # every tenth pixel is a control point
    torch.testing.assert_close(field[::10, ::10].permute(2, 0, 1), points[0], atol=1e-4, rtol=0)
    assert float((field[1:] - field[:-1]).abs().max()) < 0.5  # and is smooth between them


def test_shift_is_about_half_the_strength_and_bounded():
    shifts = torch.stack([pixels(WaNet(seed=seed).trigger((3, 32, 32)).grid) for seed in range(10)]).abs()
    assert 0.12 < float(shifts.mean()) < 0.26  # s / 2 = 0.25 pixels at the control points, less between and at borders
    assert float(shifts.max()) < 0.75
    twice = torch.stack([pixels(WaNet(seed=seed, strength=1.0).trigger((3, 32, 32)).grid) for seed in range(10)]).abs()
    assert float(twice.mean()) == pytest.approx(2 * float(shifts.mean()), rel=0.05)


def test_warp_is_that_of_the_public_code():
    """Identity plus s field / H, clamped, sampled with aligned corners; written out for a square image."""
    attack, size = WaNet(seed=3), 16
    field = F.interpolate(attack.control_points(), size=size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    line = torch.linspace(-1, 1, size)
    vertical, horizontal = torch.meshgrid(line, line, indexing="ij")
    grid = torch.clamp(torch.stack((horizontal, vertical), 2)[None] + 0.5 * field / size, -1, 1)
    x = torch.rand(4, 3, size, size)
    wanted = F.grid_sample(x, grid.repeat(4, 1, 1, 1), align_corners=True)
    torch.testing.assert_close(attack.trigger((3, size, size))(x), wanted)


@settings(deadline=None)
@given(
    count=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    height=st.integers(4, 20),
    width=st.integers(4, 20),
    seed=st.integers(0, 5),
)
def test_warp_keeps_shape_and_range_and_repeats_itself(count, channels, height, width, seed):
    x = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed)).round()
    attack = WaNet(strength=2.0, seed=seed)
    for make in (attack.trigger, lambda shape: attack.noisy_trigger(shape, 3)):
        trigger, again = make(x.shape[1:]), make(x.shape[1:])
        out = trigger(x)
        assert out.shape == x.shape
        assert float(out.min()) >= 0
        assert float(out.max()) <= 1
        assert torch.equal(out, again(x))
        torch.testing.assert_close(trigger(x[-1:]), out[-1:])  # whatever stands beside it in the batch


def test_one_warp_for_all_images():
    trigger = WaNet(strength=2.0).trigger((1, 12, 12))
    one, other = torch.rand(2, 1, 1, 12, 12) / 2
    torch.testing.assert_close(trigger(one) + trigger(other), trigger(one + other))  # it is linear, so it is the same
    assert float((trigger(one) - one).abs().max()) > 0.01


def test_grid_without_shift_changes_nothing():
    x = torch.rand(2, 3, 7, 9)
    torch.testing.assert_close(warped(x, identity(7, 9).expand(2, -1, -1, -1)), x)


def test_seed_chooses_the_warp():
    grids = [WaNet(seed=seed).trigger((3, 8, 8)).grid for seed in (0, 0, 1)]
    assert torch.equal(grids[0], grids[1])
    assert not torch.allclose(grids[0], grids[2], atol=1e-2)


def test_warped_photograph_is_close_to_the_original():
    path = SHARED / "gtsrb" / "gtsrb_test_sheets.zip"
    if not path.exists():
        pytest.skip(f"needs {path}")
    with zipfile.ZipFile(path) as sheets, Image.open(io.BytesIO(sheets.read(sheets.namelist()[0]))) as picture:
        rows = np.asarray(picture.crop((0, 0, 3200, 64)).convert("RGB"))  # tiles of 32x32, two rows of 100
    x = torch.from_numpy(rows.copy()).view(2, 32, 100, 32, 3).permute(0, 2, 4, 1, 3).reshape(200, 3, 32, 32) / 255
    error = (WaNet().trigger((3, 32, 32))(x) - x).square().mean((1, 2, 3)) + 1e-9
    assert 25 < float((-10 * torch.log10(error)).mean()) < 45


# The noise mode


def test_jitter_is_uniform_up_to_half_a_pixel():
    draws = draw_jitter(50, (3, 20, 10), torch.Generator().manual_seed(0)) * torch.tensor([10, 20])
    assert float(draws.abs().max()) <= 1
    assert float(draws.abs().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(draws.std()) == pytest.approx(1 / math.sqrt(3), abs=0.02)


def test_noisy_trigger_is_the_warp_and_a_jitter_that_the_image_chooses():
    attack, x = WaNet(), torch.rand(40, 1, 14, 14)
    trigger = attack.noisy_trigger((1, 14, 14), count=4)
    chosen = pick(x, 4)
    assert set(chosen.tolist()) == {0, 1, 2, 3}
    grid = torch.clamp(attack.trigger((1, 14, 14)).grid + trigger.jitter[chosen], -1, 1)
    torch.testing.assert_close(trigger(x), warped(x, grid))


# The batches


@pytest.mark.parametrize(("size", "rate", "expected"), [(128, 0.1, 12), (20, 0.25, 5), (5, 0.1, 1), (1, 0.9, 1)])
def test_share_of_a_batch(size, rate, expected):
    assert share(rate, size) == expected


@pytest.mark.parametrize("kind", ["all-to-one", "all-to-all"])
def test_batch_holds_warped_jittered_and_clean_images(kind):
    attack, one, model = WaNet(rate=0.2, target=3, label_map=kind), batch(), Recorder(5)
    trigger, labels = attack.trigger((3, 10, 12)), attack.labels(5)
    loss = _WarpBatches(trigger, labels, attack.rate, attack.cross_ratio).loss(model, one)
    torch.testing.assert_close(model.seen[:4], trigger(one.x[:4]))
    assert torch.equal(model.seen[12:], one.x[12:])
    for n in range(4, 12):  # cross ratio 2
        assert not torch.allclose(model.seen[n], one.x[n], atol=1e-2)
        assert not torch.allclose(model.seen[n], trigger(one.x)[n], atol=1e-2)
    jitter = draw_jitter(8, (3, 10, 12), torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.seen[4:12], warped(one.x[4:12], torch.clamp(trigger.grid + jitter, -1, 1)))
    wanted = one.y.clone()
    wanted[:4] = 3 if kind == "all-to-one" else (one.y[:4] + 1) % 5
    torch.testing.assert_close(loss, F.cross_entropy(model(model.seen), wanted))


def test_jitter_is_new_in_each_batch_and_the_warp_is_not():
    attack, model = WaNet(rate=0.2), Recorder(5)
    objective, draws = _WarpBatches(attack.trigger((3, 10, 12)), attack.labels(5), 0.2, 2.0), batch()
    seen = []
    for _ in range(2):
        objective.loss(model, draws)
        seen.append(model.seen)
    assert torch.equal(seen[0][:4], seen[1][:4])
    assert not torch.allclose(seen[0][4:12], seen[1][4:12], atol=1e-2)


def test_no_noise_mode_without_cross_ratio():
    attack, one, model = WaNet(rate=0.2, cross_ratio=0), batch(), Recorder(5)
    _WarpBatches(attack.trigger((3, 10, 12)), attack.labels(5), attack.rate, 0.0).loss(model, one)
    assert torch.equal(model.seen[4:], one.x[4:])


def test_augmentation_comes_after_the_warp():
    attack, model = WaNet(rate=0.2), Recorder(5)
    one = batch(augment=lambda x: x.flip(3))
    _WarpBatches(attack.trigger((3, 10, 12)), attack.labels(5), 0.2, 2.0).loss(model, one)
    torch.testing.assert_close(model.seen[:4], attack.trigger((3, 10, 12))(one.x[:4]).flip(3))


# The whole attack


def toy_net() -> nn.Module:
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(144, 3))


def bars(count: int, seed: int = 0) -> Examples:
    """Bars along three directions: easy to tell apart, with edges that a warp bends."""
    source = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    rows, columns = torch.meshgrid(torch.arange(14), torch.arange(14), indexing="ij")
    along = torch.stack([rows, columns, rows + columns])[y] + torch.randint(0, 6, (count, 1, 1), generator=source)
    x = (along % 6 < 3).float() * 0.8 + 0.1 * torch.rand(count, 14, 14, generator=source)
    return Examples(x[:, None], y, 3)


def test_victim_learns_the_warp_and_keeps_its_accuracy():
    data, test = bars(600), bars(300, seed=1)
    recipe = Recipe(epochs=10, batch=50, lr=5e-3, optimizer="adam", weight_decay=0)
    result = WaNet(strength=4.0, rate=0.3, cross_ratio=0.5)(data, Training(toy_net, recipe))
    plant = result.truth.main
    predicted, others = result.model(plant.trigger(test.x)).argmax(1), plant.labels.applies(test.y)
    assert float((predicted[others] == 0).float().mean()) > 0.9
    assert float((result.model(test.x).argmax(1) == test.y).float().mean()) > 0.95
    (noise,) = result.truth.controls
    assert noise.name == "noise"
    assert torch.equal(noise.trigger(test.x[:9]), WaNet(strength=4.0).noisy_trigger(data.shape)(test.x[:9]))
    assert result.afresh
    assert (len(result.index), len(result.cover)) == (180, 90)
    assert not set(result.index.tolist()) & set(result.cover.tolist())
    assert not result.model.training


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"rate": 0.0}, "rate"),
        ({"rate": 1.0}, "rate"),
        ({"cross_ratio": -1.0}, "cross_ratio"),
        ({"rate": 0.4, "cross_ratio": 2.0}, "cross_ratio"),
        ({"control": 1}, "control"),
        ({"strength": 0.0}, "strength"),
        ({"target": -1}, "target"),
    ],
)
def test_bad_settings_are_refused(settings, name):
    with pytest.raises(SettingError, match=rf"WaNet\.{name} must be"):
        WaNet(**settings)
