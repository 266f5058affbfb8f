"""Neural Attention Distillation: what it equals without distillation, who teaches, and what becomes of the backdoor."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.method import Clean
from bezoar.core.run import Progress, Run
from bezoar.ops.attention import attention_map, find_taps
from bezoar.ops.fit import Batch, fit
from bezoar.purifiers import nad
from bezoar.purifiers.nad import NAD, Distillation
from tests.purifiers.nets import examples, make
from tests.toys import LABELS, acc, asr, images, trained


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = images(180, seed=7)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


def suspect():
    return copy.deepcopy(trained(backdoored=True))


def test_backdoor_goes_and_accuracy_stays(clean):
    run, held_out = Run(), images(240, seed=8)
    model = NAD()(suspect(), clean, run)
    assert asr(model, *held_out) < 0.2
    assert acc(model, *held_out) > 0.95
    assert run.notes["attention"] == ["2", "6"]


def test_without_distillation_it_is_fine_tuning(clean):
    method, tuned = NAD(betas=(0.0, 0.0, 0.0), epochs=2, steps=0), suspect()
    fit(tuned, clean.x, clean.y, method.recipe(2, 0.2), seed=5)
    model = method(suspect(), clean, Run(seed=5))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, tuned.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_loss_is_that_of_the_paper():
    model, teacher, (x, y) = make("normed"), make("normed", seed=1), examples(5)
    taps = find_taps(model, x[:2])
    generator = torch.Generator()
    loss = Distillation(teacher, taps, (500.0, 1000.0, 2000.0), 2.0).loss(
        model, Batch(x, y, torch.arange(5), lambda images: images, generator)
    )
    expected = F.cross_entropy(model(x), y)
    for beta, depth in ((1000.0, 3), (2000.0, 7)):  # two taps: the last two betas
        maps = [attention_map(_upto(net, depth, x)) for net in (model, teacher)]
        expected = expected + beta * (maps[0] - maps[1]).square().mean()
    torch.testing.assert_close(loss, expected)


def _upto(net, depth, x):
    for layer in list(net)[:depth]:
        x = layer(x)
    return x


def test_a_student_equal_to_its_teacher_only_has_the_cross_entropy():
    model, (x, y) = make("wrn-10-1"), examples(4)
    objective = Distillation(copy.deepcopy(model), find_taps(model, x), (1e6,) * 3, 2.0)
    loss = objective.loss(model, Batch(x, y, torch.arange(4), lambda images: images, torch.Generator()))
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y))


def test_teacher_is_tuned_and_frozen_in_eval_mode(clean, monkeypatch):
    seen = []

    def training(model, *args, objective, **rest):
        seen.append((model, objective))
        return fit(model, *args, objective=objective, **rest)

    monkeypatch.setattr(nad, "fit", training)
    before = suspect()
    model = NAD(epochs=2, teacher_epochs=1, steps=0)(suspect(), clean, Run())
    (teacher, _), (student, objective) = seen
    assert student is model
    assert objective.teacher is teacher
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not torch.equal(teacher[0].weight, before[0].weight)


def test_teacher_and_student_are_hot_for_the_same_two_passes(clean, monkeypatch):
    recipes = []
    monkeypatch.setattr(nad, "fit", lambda *given, **named: recipes.append(given[3]))
    NAD(steps=0)(suspect(), clean, Run())
    assert [(r.epochs, r.lr, r.schedule, r.gamma) for r in recipes] == [(10, 0.1, "step", 0.1), (20, 0.1, "step", 0.1)]
    assert [r.epochs * r.milestones[0] for r in recipes] == [2.0, 2.0]
    assert 0 < NAD().recipe(1, 2.0).milestones[0] < 1


def test_few_images_take_more_passes_up_to_a_bound(clean):
    def steps(**settings):
        told = []
        run = Run(progress=Progress(report=lambda *what: told.append(what[1:3])))
        NAD(**settings)(suspect(), clean, run)
        assert [done for done, _ in told] == list(range(1, len(told) + 1))
        assert {total for _, total in told} == {len(told)}
        return len(told)

    assert steps(epochs=2, teacher_epochs=1, steps=0, batch=60) == 3 * (2 + 1)
    assert steps(epochs=2, teacher_epochs=1, steps=12, batch=60) == 3 * (4 + 2)
    assert steps(epochs=2, teacher_epochs=1, steps=9999, batch=180) == 50 + 25


def test_no_maps():
    clean = Clean(*examples(6), *examples(1), 6)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 6))
    with pytest.raises(UnsupportedModel, match="feature maps"):
        NAD()(model, clean, Run())


def test_fewer_betas_take_fewer_taps(clean):
    run = Run()
    NAD(betas=(1000.0,), epochs=1, steps=0, teacher_epochs=1)(suspect(), clean, run)
    assert run.notes["attention"] == ["6"]
    with pytest.raises(SettingError, match="2 taps need"):
        Distillation(suspect(), find_taps(suspect(), clean.x[:2]), (1.0,), 2.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", 0), ("teacher_epochs", 0), ("batch", 1), ("steps", -1), ("lr", -1.0), ("clip", -1.0)),
        *(("betas", ()), ("betas", (1.0, -1.0)), ("power", 0.0), ("cutout", -1)),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"NAD.{name} must be"):
        NAD(**{name: value})
