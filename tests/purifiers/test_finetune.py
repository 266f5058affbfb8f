"""Fine-tuning: what the learning rate does."""

from __future__ import annotations

import copy

import pytest
import torch

from bezoar.core.errors import SettingError
from bezoar.core.method import Clean
from bezoar.core.run import Progress, Run
from bezoar.purifiers.finetune import Finetune
from tests.toys import LABELS, asr, images, trained


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = images(180, seed=7)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


def finetuned(clean: Clean, run: Run | None = None, **settings) -> torch.nn.Module:
    return Finetune(**settings)(copy.deepcopy(trained(backdoored=True)), clean, run or Run())


def test_no_learning_rate_no_change(clean):
    model = finetuned(clean, lr=0.0, epochs=1)
    for parameter, old in zip(model.parameters(), trained(backdoored=True).parameters(), strict=True):
        assert torch.equal(parameter, old)


def test_tiny_learning_rate_keeps_the_backdoor(clean):
    assert asr(finetuned(clean, lr=1e-5, epochs=2), *images(120, seed=8)) > 0.9


def test_every_weight_moves(clean):
    model = finetuned(clean, lr=0.01, epochs=1)
    for parameter, old in zip(model.parameters(), trained(backdoored=True).parameters(), strict=True):
        assert not torch.equal(parameter, old)


def test_tells_of_every_step(clean):
    told = []
    run = Run(progress=Progress(report=lambda *what: told.append(what[:3])))
    finetuned(clean, run, epochs=2, batch=100)
    assert told == [("clean", step, 4) for step in (1, 2, 3, 4)]


def test_recipe_has_the_settings():
    recipe = Finetune(epochs=3, lr=0.2, batch=7, weight_decay=0.0, pad=1, flip=True, clip=2.0).recipe()
    assert (recipe.epochs, recipe.lr, recipe.batch, recipe.weight_decay) == (3, 0.2, 7, 0.0)
    assert (recipe.pad, recipe.flip, recipe.clip, recipe.schedule) == (1, True, 2.0, "cosine")


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("batch", 0), ("lr", -1.0)])
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"Finetune.{name} must be at least"):
        Finetune(**{name: value})
