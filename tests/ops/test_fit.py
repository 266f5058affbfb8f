"""The training loop: recipes, augmentation, schedules, and single steps worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.ops.fit import Recipe, _factor, as_float, augment, fit
from tests.toys import images, net


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("batch", 0), ("lr", -0.1), ("pad", -1)])
def test_recipe_refuses_nonsense(name, value):
    with pytest.raises(ValueError, match=rf"Recipe.{name} must be at least \d, got"):
        Recipe(**{name: value})


def trained(seed: int, **recipe) -> dict[str, torch.Tensor]:
    x, y = images(24, seed=0)
    model = nn.Sequential(net(seed=0), nn.Dropout(0.2))
    fit(model, x, y, Recipe(**{"epochs": 2, "batch": 8, "lr": 0.01, "pad": 1, "flip": True, **recipe}), seed=seed)
    assert not model.training
    return model.state_dict()


def test_same_seed_same_weights():
    first = trained(seed=1)
    torch.manual_seed(5)  # the global generator must not matter, dropout or not
    second, third = trained(seed=1), trained(seed=2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.0.weight"], third["0.0.weight"])


def test_global_generator_comes_back():
    before = torch.get_rng_state()
    trained(seed=1)
    assert torch.equal(torch.get_rng_state(), before)


# Augmentation


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.booleans(), st.integers(0, 1000))
def test_augmentation_is_that_of_a_loop(count, channels, pad, flip, seed):
    source = torch.Generator().manual_seed(seed)
    x = torch.rand(count, channels, 5, 7, generator=source)
    found = augment(x, Recipe(pad=pad, flip=flip), torch.Generator().manual_seed(seed))
    draws = torch.Generator().manual_seed(seed)
    tops, lefts = [0] * count, [0] * count
    if pad:
        tops, lefts = torch.randint(0, 2 * pad + 1, (2, count), generator=draws).tolist()
    mirrored = (torch.rand(count, generator=draws) < 0.5).tolist() if flip else [False] * count
    for n in range(count):
        for row in range(5):
            for column in range(7):
                source_column = 6 - column if mirrored[n] else column
                i, j = row + tops[n] - pad, source_column + lefts[n] - pad
                inside = 0 <= i < 5 and 0 <= j < 7
                expected = x[n, :, i, j] if inside else torch.zeros(channels)
                assert torch.equal(found[n, :, row, column], expected)


def test_without_augmentation_images_are_untouched():
    x = torch.rand(3, 3, 5, 7)
    assert augment(x, Recipe(pad=0, flip=False), torch.Generator()) is x


def test_every_shift_and_both_sides_occur():
    x = torch.zeros(400, 1, 5, 5)
    x[:, 0, 2, 1] = 1
    found = augment(x, Recipe(pad=1, flip=True), torch.Generator().manual_seed(0))
    places = {tuple(place) for place in found[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (1, 2, 3) for column in (0, 1, 2, 3, 4)}


def test_bytes_become_unit_floats():
    assert as_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    x = torch.rand(3)
    assert as_float(x) is x


# Schedules


def test_schedules():
    total = 100
    assert {_factor(Recipe(schedule="constant"), step, total) for step in range(100)} == {1.0}
    cosine = [_factor(Recipe(schedule="cosine"), step, total) for step in range(101)]
    assert [cosine[0], cosine[25], cosine[50], cosine[100]] == pytest.approx([1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0])
    onecycle = [_factor(Recipe(schedule="onecycle"), step, total) for step in range(101)]
    assert onecycle[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert [onecycle[20], onecycle[60], onecycle[100]] == pytest.approx([1, 0.5, 0], abs=1e-6)
    assert onecycle[20:] == sorted(onecycle[20:], reverse=True)


def test_schedule_of_one_step():
    for schedule in ("constant", "cosine", "onecycle"):
        assert _factor(Recipe(schedule=schedule), 0, 1) == 1.0


# Steps


def linear() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1)), torch.arange(count) % 3


def test_one_step_of_sgd_by_hand():
    x, y = batch()
    model, wanted = linear(), linear()
    recipe = Recipe(epochs=1, batch=6, lr=0.3, momentum=0.9, weight_decay=0.01, schedule="constant")
    loss = F.cross_entropy(wanted(x), y)
    loss.backward()
    assert fit(model, x, y, recipe) == pytest.approx([loss.item()])
    for parameter, old in zip(model.parameters(), wanted.parameters(), strict=True):
        gradient = old.grad + 0.01 * old.detach()
        # Nesterov's first step: the gradient and the momentum of the buffer, which is the gradient itself.
        torch.testing.assert_close(parameter, old.detach() - 0.3 * (gradient + 0.9 * gradient), check_dtype=True)


def test_gradient_is_clipped_as_one_vector():
    x, y = batch()
    model, wanted = linear(), linear()
    fit(model, x, y, Recipe(epochs=1, batch=6, lr=1.0, momentum=0, weight_decay=0, schedule="constant", clip=0.01))
    step = torch.cat([(a - b).detach().flatten() for a, b in zip(model.parameters(), wanted.parameters(), strict=True)])
    assert float(step.norm()) == pytest.approx(0.01, rel=1e-3)


def test_no_learning_rate_no_change():
    x, y = images(24, seed=0)
    model = net(seed=0)
    model[1].momentum = model[5].momentum = 0.0  # statistics of evaluation stay as they are
    with torch.no_grad():
        model.eval()
        before, weights = model(x), [p.clone() for p in model.parameters()]
        with torch.enable_grad():
            fit(model, x, y, Recipe(epochs=2, batch=8, lr=0.0, weight_decay=0.1))
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), weights, strict=True))
        assert torch.equal(model(x), before)


def test_fixed_parameters_stay_fixed():
    x, y = images(12, seed=0)
    model = net(seed=0)
    model[0].weight.requires_grad_(False)
    first, last = model[0].weight.clone(), model[-1].weight.detach().clone()
    fit(model, x, y, Recipe(epochs=1, batch=6, lr=0.1))
    assert torch.equal(model[0].weight, first)
    assert not torch.equal(model[-1].weight, last)


def test_every_example_once_an_epoch_and_progress_after_each_step():
    x, y = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 3, 2, 2) / 7, torch.arange(7) % 3
    seen, told = [], []

    def stamp(images: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        seen.append((images[:, 0, 0, 0] * 7).round().int().tolist())
        return images

    fit(linear(), x, y, Recipe(epochs=2, batch=4, lr=0.0), stamp=stamp, progress=lambda *step: told.append(step[:2]))
    assert [len(one) for one in seen] == [4, 3, 4, 3]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(7))
    assert seen[0] + seen[1] != seen[2] + seen[3], "another order in the second epoch"
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_rest_of_one_example_is_left_out():
    """BatchNorm cannot train on a single value per channel."""
    x, y = images(13, seed=0)
    model = nn.Sequential(nn.Conv2d(3, 4, 12), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 6))
    told = []
    fit(model, x, y, Recipe(epochs=1, batch=6, lr=0.01), progress=lambda *step: told.append(step))
    assert len(told) == 2
