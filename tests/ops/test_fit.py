"""The training loop: recipes, schedules, and single steps worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bezoar.core.errors import SettingError
from bezoar.ops import _optim
from bezoar.ops._optim import factor
from bezoar.ops.augment import mixup
from bezoar.ops.fit import Batch, Recipe, fit
from tests.toys import images, net

NONSENSE = {
    "epochs": [0],
    "batch": [0],
    "lr": [-0.1, float("nan")],
    "optimizer": ["adamw"],
    "schedule": ["linear"],
    "milestones": [(0.5, 0.5), (0.7, 0.3), (0.0,), (1.0,), (30, 60)],
    "gamma": [0.0, 1.5],
    "pad": [-1],
    "rotate": [-1.0, 181.0],
    "cutout": [-1],
    "mixup": [-0.1],
    "label_smoothing": [-0.1, 1.0],
    "clip": [-1.0],
    "precision": ["fp16"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NONSENSE.items() for value in values])
def test_recipe_refuses_nonsense(name, value):
    with pytest.raises(ValueError, match=rf"Recipe.{name} must be .*, got "):
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


# Schedules


def test_schedules():
    total = 100
    assert {factor(Recipe(schedule="constant"), step, total) for step in range(100)} == {1.0}
    cosine = [factor(Recipe(schedule="cosine"), step, total) for step in range(101)]
    assert [cosine[0], cosine[25], cosine[50], cosine[100]] == pytest.approx([1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0])
    onecycle = [factor(Recipe(schedule="onecycle"), step, total) for step in range(101)]
    assert onecycle[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert [onecycle[20], onecycle[60], onecycle[100]] == pytest.approx([1, 0.5, 0], abs=1e-6)
    assert onecycle[20:] == sorted(onecycle[20:], reverse=True)


def test_schedule_of_one_step():
    for schedule in ("constant", "cosine", "onecycle", "step"):
        assert factor(Recipe(schedule=schedule), 0, 1) == 1.0


@pytest.mark.parametrize("total", [1, 7, 10, 100, 1000])
@pytest.mark.parametrize("milestones", [(0.5, 0.75), (0.3, 0.6, 0.8), (0.29, 0.57), ()])
def test_steps_of_the_step_schedule(total, milestones):
    recipe = Recipe(schedule="step", milestones=milestones, gamma=0.2)
    places = [math.ceil(round(m * total, 9)) for m in milestones]
    bounds = [0, *places, total]
    expected = [0.2**i for i in range(len(bounds) - 1) for _ in range(bounds[i + 1] - bounds[i])]
    assert [factor(recipe, step, total) for step in range(total)] == pytest.approx(expected)


class Sum:
    """A loss whose gradient is 1 for each weight: a step of plain SGD then moves it by the learning rate."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.epochs: list[tuple[int, int]] = []

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        weights = torch.cat([p.flatten() for p in model.parameters()])
        self.seen.append(float(weights.detach().double().mean()))
        return weights.sum()

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        self.epochs.append((number, epochs))

    def state_dict(self):
        return {}

    def load_state_dict(self, state) -> None:
        pass


@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle", "step"])
def test_optimiser_follows_the_schedule(schedule):
    x, y = batch(8)
    model, objective = linear(), Sum()
    recipe = Recipe(epochs=5, batch=2, lr=0.5, momentum=0, weight_decay=0, schedule=schedule)
    fit(model, x, y, recipe, objective=objective)
    weights = [*objective.seen, float(torch.cat([p.detach().flatten() for p in model.parameters()]).double().mean())]
    moved = [before - after for before, after in zip(weights, weights[1:], strict=False)]
    assert moved == pytest.approx([0.5 * factor(recipe, step, 20) for step in range(20)], abs=1e-5)
    assert objective.epochs == [(number, 5) for number in range(5)]


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


# Losses


def one_step(**recipe) -> Recipe:
    return Recipe(**{"epochs": 1, "batch": 6, "lr": 0.0, "momentum": 0, "weight_decay": 0, **recipe})


def test_mixup_loss_is_the_weighted_cross_entropy():
    x, y = batch()
    draws = torch.Generator().manual_seed(4)
    order = torch.randperm(6, generator=draws)
    mixed, pairs, share = mixup(x[order], 0.7, draws)
    assert 0.01 < share < 0.99
    log = linear()(mixed).detach().log_softmax(1)
    own = -log[torch.arange(6), y[order]].mean()
    other = -log[torch.arange(6), y[order][pairs]].mean()
    assert float(own) != pytest.approx(float(other))
    found = fit(linear(), x, y, one_step(mixup=0.7), seed=4)
    assert found == pytest.approx([share * float(own) + (1 - share) * float(other)])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_smoothed_labels(smoothing):
    x, y = batch()
    log = linear()(x).detach().log_softmax(1)
    target = (1 - smoothing) * F.one_hot(y, 3) + smoothing / 3
    expected = float(-(target * log).sum(1).mean())
    assert fit(linear(), x, y, one_step(label_smoothing=smoothing)) == pytest.approx([expected])


def test_mixup_and_an_objective_do_not_go_together():
    with pytest.raises(SettingError, match="Set mixup to 0"):
        fit(linear(), *batch(), one_step(mixup=0.5), objective=Sum())


class Looks(Sum):
    """Keeps what it is given."""

    def loss(self, model, batch):
        self.batch = batch
        self.views = [batch.augment(batch.x), batch.augment(batch.x), batch.augment(torch.rand(2, 1, 5, 9))]
        return F.cross_entropy(model(batch.x), batch.y)


def test_what_an_objective_gets():
    x, y = batch()
    objective = Looks()
    fit(linear(), (x * 255).byte(), y, one_step(pad=1, flip=True, rotate=30), objective=objective, seed=2)
    index = objective.batch.index
    assert sorted(index.tolist()) == list(range(6)) != index.tolist()
    assert torch.equal(objective.batch.x, (x * 255).byte().float()[index] / 255)
    assert torch.equal(objective.batch.y, y[index])
    first, second, other = objective.views
    assert first.shape == second.shape == x.shape and other.shape == (2, 1, 5, 9)
    assert not torch.equal(first, second)


# Precision


def test_half_precision_is_for_gpus_only(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for wide, half in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, wide=wide: wide)
        assert _optim.half_type(Recipe(precision="auto"), gpu) is half
        assert _optim.half_type(Recipe(precision="auto"), cpu) is None
        assert _optim.half_type(Recipe(), gpu) is None


class Types(Sum):
    """Plain cross-entropy that keeps the type of the logits; infinite in one step."""

    def __init__(self, overflow: int | None = None) -> None:
        super().__init__()
        self.types, self.overflow = [], overflow

    def loss(self, model, batch):
        logits = model(batch.x)
        self.types.append(logits.dtype)
        loss = F.cross_entropy(logits, batch.y)
        return loss * float("inf") if len(self.types) - 1 == self.overflow else loss


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_comes_close_to_single(monkeypatch, half):
    x, y = batch(24)
    single, model, objective = linear(), linear(), Types()
    recipe = Recipe(epochs=3, batch=6, lr=0.1, clip=1.0)
    fit(single, x, y, recipe)
    monkeypatch.setattr(_optim, "half_type", lambda recipe, device: half)
    fit(model, x, y, recipe, objective=objective)
    assert set(objective.types) == {half}
    for parameter, other in zip(model.parameters(), single.parameters(), strict=True):
        assert parameter.dtype is torch.float32
        torch.testing.assert_close(parameter, other, atol=5e-3, rtol=0)
        assert not torch.equal(parameter, other)


def test_step_that_overflows_is_left_out(monkeypatch):
    x, y = batch(24)
    monkeypatch.setattr(_optim, "half_type", lambda recipe, device: torch.float16)
    model = linear()
    fit(model, x, y, Recipe(epochs=1, batch=6, lr=0.1), objective=Types(overflow=0))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
