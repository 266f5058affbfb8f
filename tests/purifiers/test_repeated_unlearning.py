"""Repeated unlearning: what it minimises, when it inverts anew, and what becomes of the backdoor."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bezoar.core.errors import SettingError
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.ops.fit import Batch
from bezoar.purifiers.auto import Auto
from bezoar.purifiers.repeated_unlearning import RepeatedUnlearning, _Forgetting
from tests.purifiers.nets import NAMES, few, form, hooks, make
from tests.toys import LABELS, acc, asr, images, trained, trigger


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = images(180, seed=7)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


def suspect() -> nn.Module:
    return copy.deepcopy(trained(backdoored=True))


def batch(clean: Clean, count: int = 24) -> Batch:
    rows = torch.arange(count)
    return Batch(clean.x[rows], clean.y[rows], rows, lambda x: x, torch.Generator().manual_seed(0))


def objective(clean: Clean, **settings) -> _Forgetting:
    made = _Forgetting(RepeatedUnlearning(**settings), suspect(), clean, Run())
    made.triggers, made.weights = [trigger()], [1.0]
    return made


def test_backdoor_goes_and_accuracy_stays(clean):
    held_out = images(300, seed=8)
    cleaned = RepeatedUnlearning()(suspect(), clean, Run())
    assert asr(trained(backdoored=True), *held_out) > 0.95
    assert asr(cleaned, *held_out) < 0.2
    assert acc(cleaned, *held_out) > acc(trained(backdoored=True), *held_out) - 0.05


def test_without_stamped_images_the_loss_is_cross_entropy_and_divergence(clean):
    model, made, one = suspect(), objective(clean, share=1e-9, distill=3.0), batch(clean)
    with torch.no_grad():
        model[-1].weight.mul_(0.5)
        out, wanted = model(one.x), trained(backdoored=True)(one.x).softmax(1)
        divergence = (wanted * (wanted.clamp(min=1e-30).log() - out.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(made.loss(model, one), F.cross_entropy(out, one.y) + 3 * divergence)


def test_the_suspect_model_itself_has_no_divergence(clean):
    made, one = objective(clean, share=1e-9), batch(clean)
    model = suspect().eval()
    torch.testing.assert_close(made.loss(model, one), F.cross_entropy(model(one.x), one.y))


def test_all_stamped_images_keep_their_true_label_and_are_not_distilled(clean):
    made, one, model = objective(clean, share=1.0), batch(clean), suspect().eval()
    torch.testing.assert_close(made.loss(model, one), F.cross_entropy(model(trigger()(one.x)), one.y))


@pytest.mark.parametrize(("mask", "additive", "kinds"), [(2, 2, 2), (2, 0, 1), (0, 2, 1)])
def test_triggers_of_all_labels_are_inverted_from_the_model_as_it_is(clean, mask, additive, kinds):
    made = _Forgetting(RepeatedUnlearning(mask_steps=mask, additive_steps=additive, every=3), suspect(), clean, Run())
    model = suspect()
    seen = []
    for epoch in range(6):
        made.epoch(model, epoch, 6)
        seen.append(list(made.triggers))
        with torch.no_grad():
            model[-1].bias.add_(torch.arange(LABELS))
    assert made.inversions == 2
    assert [len(triggers) for triggers in seen] == [kinds * LABELS] * 3 + [2 * kinds * LABELS] * 3
    assert len(made.weights) == len(made.triggers)
    old, new = seen[3][: kinds * LABELS], seen[3][kinds * LABELS :]
    assert all(one is other for one, other in zip(old, seen[0], strict=True)), "what was found is not forgotten"
    assert any(one.size != other.size for one, other in zip(old, new, strict=True))


def test_small_triggers_are_shown_more_often(clean):
    made = _Forgetting(RepeatedUnlearning(mask_steps=4, additive_steps=0, focus=2.0), suspect(), clean, Run())
    made.epoch(suspect(), 0, 4)
    sizes = torch.tensor([one.size for one in made.triggers])
    usual = float(sorted(sizes.tolist())[2] + sorted(sizes.tolist())[3]) / 2
    torch.testing.assert_close(torch.tensor(made.weights), (usual / sizes) ** 2)


def test_model_is_left_in_train_mode_by_the_search(clean):
    made, model = objective(clean), suspect().train()
    made.epoch(model, 0, 4)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("count", [1, 6, 12])
def test_few_images(clean, count):
    few = dataclasses.replace(clean, x=clean.x[:count], y=clean.y[:count])
    run = Run()
    cleaned = RepeatedUnlearning(epochs=2, mask_steps=3, additive_steps=3)(suspect(), few, run)
    assert all(torch.isfinite(value).all() for value in cleaned.state_dict().values())
    assert bool(run.warnings) == (count == 1)


def fast(**settings) -> RepeatedUnlearning:
    return RepeatedUnlearning(epochs=1, mask_steps=2, additive_steps=2, **settings)


def test_small_sets_are_filled_up_and_the_weights_averaged(clean):
    small = dataclasses.replace(clean, x=clean.x[:12], y=clean.y[:12])
    run, plain = Run(), Run()
    half, whole = (fast(fill=30, keep=keep)(suspect(), small, run) for keep in (0.5, 0.0))
    assert run.notes["copies"] == 24
    for name, value in suspect().state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(half.state_dict()[name], (value + whole.state_dict()[name]) / 2)
    fast(fill=12)(suspect(), small, plain)
    assert "copies" not in plain.notes


def test_set_is_not_filled_up_where_the_suspect_answers_the_changes(clean):
    small, run = dataclasses.replace(clean, x=clean.x[:12], y=clean.y[:12]), Run()

    class Jumpy(nn.Module):
        """Gives another label whenever an image differs from those it knows."""

        def __init__(self):
            super().__init__()
            self.net = suspect()

        def forward(self, x):
            known = (x[:, None] == small.x[None]).flatten(2).all(2).any(1)
            other = F.one_hot(torch.full((len(x),), 3), LABELS).float() * 50
            return self.net(x) + torch.where(known[:, None], 0.0, other)

    fast(fill=30)(Jumpy(), small, run)
    assert "copies" not in run.notes


@pytest.mark.parametrize(
    "settings",
    [
        {"fill": -1},
        {"keep": 1.0},
        *(
            {"share": 0.0},
            {"share": 1.1},
            {"every": 0},
            {"mask_steps": -1},
            {"distill": -1.0},
            {"focus": -1.0},
            {"epochs": 0},
        ),
        {"mask_steps": 0, "additive_steps": 0},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(SettingError):
        RepeatedUnlearning(**settings)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, RepeatedUnlearning(epochs=1, mask_steps=2, additive_steps=2)) for name in NAMES),
        *((name, Auto(epochs=1)) for name in ("depthwise", "vit")),
    ],
)
def test_any_architecture(name, method):
    model = make(name)
    before = form(model)
    cleaned = method(model, few(12), Run())
    assert form(cleaned) == before
    assert hooks(cleaned) == 0
    assert all(torch.isfinite(value).all() for value in cleaned.state_dict().values())
