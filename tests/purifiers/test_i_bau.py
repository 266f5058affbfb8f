"""I-BAU: the worst change, what is unlearned, and what becomes of the backdoor."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from bezoar.core.errors import SettingError
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.purifiers import i_bau
from bezoar.purifiers.i_bau import IBAU
from tests.purifiers.nets import CLASSES, NAMES, examples, make
from tests.toys import LABELS, acc, asr, images, trained


def clean(count: int) -> Clean:
    x, y = images(count, seed=7)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


def suspect() -> torch.nn.Module:
    return copy.deepcopy(trained(backdoored=True))


def test_backdoor_goes():
    run, held_out = Run(), images(240, seed=8)
    model = IBAU(batch=30)(suspect(), clean(180), run)
    assert asr(model, *held_out) < 0.2
    assert acc(model, *held_out) > 0.9
    assert run.notes["change_leads_share"] > 0.5


def test_worst_change_fools_the_model_within_its_bound():
    model, (x, y) = trained(backdoored=True), images(120, seed=8)
    for bound in (0.02, 0.1, 1000.0):
        change = IBAU(bound=bound).worst_change(model, [(x, y)])
        assert change.shape == x[:1].shape
        assert float(change.square().mean().sqrt()) <= bound * (1 + 1e-5)
        assert not change.requires_grad
        with torch.no_grad():
            assert F.cross_entropy(model(x + change), y) > F.cross_entropy(model(x), y)
    free, bounded = (IBAU(bound=b).worst_change(model, [(x, y)]) for b in (0.0, 0.02))
    torch.testing.assert_close(bounded, 0.02 * free / free.square().mean().sqrt())


def test_first_step_of_the_change_is_the_slope_at_no_change():
    model, (x, y) = trained(backdoored=True), images(60, seed=8)
    change = torch.zeros_like(x[:1], requires_grad=True)
    wanted = torch.autograd.grad(F.cross_entropy(model(x + change), model(x).argmax(1)), change)[0]
    found = IBAU(inner_steps=1, inner_lr=3.0, bound=0.0).worst_change(model, [(x, y)])
    torch.testing.assert_close(found, 3.0 * wanted)


def test_share_of_the_batch_carries_the_change(monkeypatch):
    seen = []

    def watch(inner, outer, solution, variables, *, step, terms):
        seen.append((solution, step, terms))
        moved = []
        forward = model.forward
        model.forward = lambda x: moved.append(x.detach().clone()) or forward(x)
        try:
            outer(torch.full_like(solution, 100.0))
        finally:
            model.forward = forward
        carried.append(int((moved[0] > 50).flatten(1).all(1).sum()))
        return [torch.zeros_like(v) for v in variables]

    monkeypatch.setattr(i_bau, "hypergradient", watch)
    for share, wanted in ((0.01, 1), (0.5, 30), (1.0, 60)):
        model, carried = suspect(), []
        IBAU(rounds=1, batch=60, share=share, terms=3, step=0.2)(model, clean(120), Run())
        assert carried == [wanted, wanted]
    assert seen[0][1:] == (0.2, 3)
    assert torch.equal(seen[0][0], seen[1][0]), "one change for the round"


def test_nothing_to_learn_changes_nothing():
    model = IBAU(lr=0.0, rounds=2)(suspect(), clean(60), Run())
    before = trained(backdoored=True).state_dict()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_training_that_diverges_says_so():
    with pytest.raises(SettingError, match="diverged at step 2"):
        IBAU(lr=1e30, rounds=5)(suspect(), clean(60), Run())


def test_statistics_stay():
    model, before = IBAU(rounds=1)(suspect(), clean(60), Run()), trained(backdoored=True).state_dict()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("count", [1, 6, 101])
def test_small_sets(count):
    run = Run()
    model = IBAU(rounds=2)(suspect(), clean(count), run)
    assert bool(run.warnings) == (count < 100)
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_every_net(name):
    x, y = examples(12)
    data = Clean(x=x, y=y, held_x=x, held_y=y, num_classes=CLASSES)
    before = make(name)
    model = IBAU(rounds=1, batch=6)(make(name), data, Run())
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("rounds", 0), ("batch", 0), ("lr", -1.0), ("share", 0.0), ("share", 2.0), ("step", 0.0), ("terms", -1)],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"IBAU.{name} must be"):
        IBAU(**{name: value})
