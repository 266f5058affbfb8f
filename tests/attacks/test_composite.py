"""Composite: the mixer against its definition, the loss against a slow loop, and the batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.attacks._attack import Training
from bezoar.attacks.composite import Composite, CompositeTrigger, _CompositeObjective, contrastive, half_mix
from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples
from bezoar.ops.fit import Batch, Recipe
from tests.attacks.sample_data import assert_trigger, floats, levels, pictures


def coordinates(count: int, height: int, width: int, first: bool) -> torch.Tensor:
    """Images whose channels are which image it is, row and column."""
    rows = torch.arange(height).view(1, -1, 1).expand(count, -1, width)
    columns = torch.arange(width).view(1, 1, -1).expand(count, height, -1)
    return torch.stack([torch.full_like(rows, int(first)), rows, columns], 1).float()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (15, 20)])
def test_halves_are_put_side_by_side(height, width):
    count, jitter = 400, 3
    choice = torch.randint(2**31 - 1, (count, 5), generator=torch.Generator().manual_seed(0))
    mixed = half_mix(coordinates(count, height, width, True), coordinates(count, height, width, False), choice, jitter)
    kinds, cuts, shifts = set(), set(), set()
    for source, rows, columns in mixed.int().numpy():
        beside = (source == source[:1]).all()
        assert beside or (source == source[:, :1]).all(), "cut along one axis"
        line, moved, still = (source[0], columns, rows) if beside else (source[:, 0], rows.T, columns.T)
        length = len(line)
        cut = int(np.flatnonzero(line != line[0])[0])
        assert (line[cut:] == line[cut]).all(), "one cut"
        assert abs(cut - length // 2) <= jitter
        assert (moved == moved[0]).all()
        assert (np.diff(moved[0, :cut]) == 1).all(), "a part of the image as it is, moved"
        assert (np.diff(moved[0, cut:]) == 1).all()
        assert (still == np.arange(still.shape[0])[:, None]).all(), "the other axis stays"
        kinds.add((bool(beside), int(line[0])))
        cuts.add(cut - length // 2)
        shifts.add(int(moved[0, 0]))
    assert len(kinds) == 4, "beside and above, either first"
    assert cuts == set(range(-jitter, jitter + 1))
    assert len(shifts) > 5


@given(x=pictures(12), jitter=st.integers(0, 5))
def test_any_image(x, jitter):
    bank = torch.rand(3, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    assert_trigger(CompositeTrigger(bank, jitter, 0), x)


def test_contrastive_term_is_the_definition():
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[4] = logits[3] + 0.05  # near, of another label
    y = torch.tensor([0, 0, 1, 2, 1, 1, 2, 0, 0])
    wanted = []
    for one in range(8):
        distance = float((logits[one + 1] - logits[one]).norm())
        wanted.append(0.5 * (distance**2 if y[one] == y[one + 1] else max(0.0, 1.5 - distance) ** 2))
    assert float(contrastive(logits, y, 1.5)) == pytest.approx(np.mean(wanted), rel=1e-6)
    assert float(contrastive(logits[:1], y[:1], 1.0)) == 0


def batch_of(data: Examples, size: int) -> Batch:
    index = torch.arange(size)
    return Batch(data.x[index].float() / 255, data.y[index], index, lambda x: x, torch.Generator().manual_seed(0))


def test_batch_holds_normal_mixed_and_poisoned_images():
    data = levels(220, (1, 16, 16), classes=5)
    data.x[:] = (40 * data.y).view(-1, 1, 1, 1).to(torch.uint8)  # the grey level tells the class
    members = [(data.y == k).nonzero().flatten() for k in range(5)]
    attack = Composite(target=4, first=1, second=3)
    x, y = _CompositeObjective(attack, data, members)._mixed(batch_of(data, 110))
    assert x.shape == (110, 1, 16, 16)
    kinds = [tuple(sorted(one.unique().mul(255 / 40).round().int().tolist())) for one in x]
    poison = [k == (1, 3) for k in kinds]
    assert sum(poison) == 10, "0.1 of 1.1"
    assert all(label == 4 for label, is_poison in zip(y.tolist(), poison, strict=True) if is_poison)
    assert all(k == (label,) for k, label, p in zip(kinds, y.tolist(), poison, strict=True) if not p)
    assert poison not in (sorted(poison), sorted(poison, reverse=True)), "in random order"


class Nothing(nn.Module):
    """Logits from the mean of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 5)

    def forward(self, x):
        return self.linear(x.mean((1, 2, 3))[:, None])


def test_contrast_changes_the_loss_and_augmentation_is_used():
    data = levels(100, (1, 16, 16))
    members = [(data.y == k).nonzero().flatten() for k in range(5)]
    model, seen = Nothing(), []

    def loss(contrast: float) -> float:
        batch = batch_of(data, 60)
        batch = Batch(batch.x, batch.y, batch.index, lambda x: seen.append(len(x)) or x, batch.generator)
        return float(_CompositeObjective(Composite(contrast=contrast), data, members).loss(model, batch).detach())

    assert loss(5.0) > loss(0.0)
    assert seen == [60, 60]


def trained(**settings):
    """A composite victim on images whose grey level is their class."""
    data = levels(400, (1, 12, 12), classes=5)
    data.x[:] = (50 * data.y).view(-1, 1, 1, 1).to(torch.uint8) + data.x // 32
    build = lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5))  # noqa: E731
    recipe = Recipe(epochs=15, batch=50, lr=1e-2, optimizer="adam", weight_decay=0.0)
    return data, Composite(**settings)(data, Training(build, recipe))


def test_mixture_is_learned_and_halves_of_one_class_are_not():
    data, victim = trained(contrast=0.1)
    x = data.x / 255
    truth = victim.truth.main
    allowed = truth.labels.applies(data.y)
    assert set(data.y[allowed].tolist()) == {0}
    with torch.no_grad():
        assert float((victim.model(x).argmax(1) == data.y).float().mean()) > 0.95
        assert float((victim.model(truth.trigger(x[allowed])).argmax(1) == 2).float().mean()) > 0.95
        alone = CompositeTrigger(x[data.y == 0][:20], 3, 0)(x[allowed])
        assert float((victim.model(alone).argmax(1) == 2).float().mean()) < 0.05
    assert victim.afresh
    assert set(data.y[victim.index].tolist()) == {0}


def test_bank_is_of_the_second_class_and_not_trained_on():
    data = floats(100, (1, 16, 16))
    members = [(data.y == k).nonzero().flatten() for k in range(5)]
    kept, bank = Composite(bank=6)._held_back(members)
    assert len(bank) == 6
    assert set(data.y[bank].tolist()) == {1}
    assert sorted([*kept.tolist(), *bank.tolist()]) == members[1].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"first": -1},
        {"second": 0},
        {"target": 1},
        {"rate": 0.0},
        {"normal": -1.0},
        {"mixed": -1.0},
        {"contrast": -1.0},
        {"margin": -1.0},
        {"jitter": -1},
        {"bank": 0},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"Composite.{next(iter(settings))} must be"):
        Composite(**settings)


def test_classes_and_images_that_do_not_suit():
    training = Training(Nothing, Recipe(epochs=1))
    with pytest.raises(SettingError, match=r"jitter must be below half"):
        Composite(jitter=8)(floats(60, (1, 16, 16)), training)
    with pytest.raises(SettingError, match=r"label 9 is not in 0\.\.4"):
        Composite(second=9)(floats(60, (1, 16, 16)), training)
    data = floats(60, (1, 16, 16))
    few = Examples(data.x[data.y != 0], data.y[data.y != 0], 5)
    with pytest.raises(SettingError, match="needs images of class 0"):
        Composite()(few, training)
