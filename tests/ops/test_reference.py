"""Label by label as published: what a step is, when it stops, and what it finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bezoar.core.errors import BudgetSpent
from bezoar.core.run import Run
from bezoar.core.surgery import frozen
from bezoar.ops.cost import CostController
from bezoar.ops.reference import invert_label

PLACE = (1, 4)


class OnePixel(nn.Module):
    """A white pixel at PLACE means label 1, whatever else there is; a label that nothing causes is label 2."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        pixel = x[:, 0, PLACE[0], PLACE[1]]
        zero = torch.zeros_like(pixel)
        return torch.stack([zero + 5.0, self.sharpness * pixel, zero - 20.0], 1)


@pytest.fixture(scope="module")
def images():
    x = torch.rand(40, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    x[:, 0, PLACE[0], PLACE[1]] *= 0.2
    return x


def invert(x: Tensor, label: int = 1, run: Run | None = None, progress=lambda step, best: None, **settings):
    settings = {"steps": 60, "batches": 3, "batch": 8, "lr": 0.2, "loss": "ce", "seed": 0} | settings
    controller = settings.pop("controller", CostController(init_cost=0.05))
    with frozen(OnePixel()) as model:
        return invert_label(model, x, label, controller=controller, run=run or Run(), progress=progress, **settings)


@pytest.mark.parametrize("loss", ["ce", "linear"])
def test_finds_the_planted_pixel(loss, images):
    trigger, size, works = invert(images, loss=loss, steps=120)
    assert works
    assert int(trigger.mask.argmax()) == PLACE[0] * 6 + PLACE[1]
    assert float(trigger.pattern[0, *PLACE]) > 0.8
    assert size < 1.5
    with torch.no_grad():
        assert float((OnePixel()(trigger(images)).argmax(1) == 1).float().mean()) > 0.95


def test_a_step_is_many_updates_and_one_decision(images):
    run, told = Run(), []
    invert(images, run=run, steps=4, batches=5, batch=6, progress=lambda step, best: told.append(step))
    assert told == [1, 2, 3, 4]
    assert run.image_gradients == 4 * 5 * 6


def test_decides_on_averages_over_the_step(images, monkeypatch):
    """Success and norm that the controller hears are the means over the updates of the step."""
    heard = []
    decide = CostController.decide

    def listening(self, state, success, size):
        heard.append((float(success), float(size)))
        return decide(self, state, success, size)

    monkeypatch.setattr(CostController, "decide", listening)
    controller = CostController(patience=100)  # the weight stays zero: the same updates, however they are grouped
    invert(images, steps=6, batches=1, controller=controller)
    single, heard[:] = list(heard), []
    invert(images, steps=2, batches=3, controller=controller)
    for step, (success, size) in enumerate(heard):
        group = single[3 * step : 3 * step + 3]
        assert success == pytest.approx(sum(s for s, _ in group) / 3)
        assert size == pytest.approx(sum(n for _, n in group) / 3)
    assert len(heard) == 2


def test_stops_early(images):
    told = []
    controller = CostController(init_cost=0.05, patience=2, stall_patience=6)
    invert(images, steps=1000, controller=controller, progress=lambda step, best: told.append((step, best)))
    assert 10 < len(told) < 1000
    bests = [best for _, best in told]
    assert bests == sorted(bests, reverse=True)
    assert len(set(bests[-7:])) == 1, "the last six decisions found nothing smaller"


def test_label_that_nothing_causes(images):
    trigger, size, works = invert(images, label=2, steps=5)
    assert not works
    assert size > 0
    assert trigger.mask.shape == (1, 5, 6)


def test_same_seed_same_trigger(images):
    first, again, other = (invert(images, steps=8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first[0].mask, again[0].mask)
    assert first[1:] == again[1:]
    assert not torch.equal(first[0].mask, other[0].mask)


def test_budget_ends_it(images):
    with pytest.raises(BudgetSpent):
        invert(images, run=Run(budget=0.0))
