"""Fine-Pruning: the order, the stop, and that what was shut stays shut."""

from __future__ import annotations

import copy

import pytest
import torch

from bezoar.core.errors import SettingError
from bezoar.core.run import Run
from bezoar.ops.units import last_channels
from bezoar.purifiers.fine_pruning import FinePruning
from tests.purifiers.nets import LARGE, NAMES, few, form, hooks, make, toy_clean
from tests.toys import acc, asr, images, trained


def suspect() -> torch.nn.Module:
    return copy.deepcopy(trained(backdoored=True))


def test_quiet_channels_are_shut_and_stay_at_zero_through_the_training():
    """Verify: what a pruned channel gives is exactly 0 before and after."""
    model, run, x = suspect(), Run(), toy_clean().x
    with torch.no_grad():
        quiet = model[:8](x).mean((0, 2, 3)).argsort()[:8]
    FinePruning(share=0.25, epochs=3)(model, toy_clean(), run)
    weight = model[9].weight.detach().view(6, 32, 9)
    assert bool((weight[:, quiet] == 0).all())
    open_ = [channel for channel in range(32) if channel not in quiet.tolist()]
    assert bool((weight[:, open_] != 0).any(2).all())
    assert not torch.equal(model[0].weight, trained(backdoored=True)[0].weight), "the rest is trained"
    assert (run.notes["pruned"], run.notes["channels"]) == (8, 32)


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.6])
def test_last_acceptable_number_is_kept(tolerance):
    """Neither one channel fewer than reported, nor the model after the violation."""
    run, (x, y) = Run(), (toy_clean().x, toy_clean().y)
    FinePruning(tolerance=tolerance, epochs=1, lr=0.0)(suspect(), toy_clean(), run)
    original = trained(backdoored=True)
    units = last_channels(original, x[:1])
    order, floor = units.activations(original, x).argsort(stable=True), (1 - tolerance) * acc(original, x, y)
    kept = run.notes["pruned"]
    with units.shut(order[:kept]):
        assert acc(original, x, y) >= floor
    with units.shut(order[: kept + 1]):
        assert acc(original, x, y) < floor


def test_backdoor_goes():
    model, held_out = suspect(), images(300, seed=8)
    FinePruning()(model, toy_clean(), Run(seed=3))
    assert asr(model, *held_out) < 0.2
    assert acc(model, *held_out) > 0.95


def test_nothing_pruned_is_fine_tuning():
    from bezoar.purifiers.finetune import Finetune

    pruned = FinePruning(share=0.0, epochs=2)(suspect(), toy_clean(), Run(seed=3)).state_dict()
    tuned = Finetune(epochs=2)(suspect(), toy_clean(), Run(seed=3)).state_dict()
    assert all(torch.equal(value, tuned[name]) for name, value in pruned.items())


@pytest.mark.parametrize("count", [100, 10, 1])
def test_few_images(count):
    model, run = suspect(), Run()
    FinePruning(epochs=2)(model, toy_clean(count), run)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert bool(run.warnings) == (count < 50)
    assert (run.notes["pruned"] == 0) == (count == 1)


@pytest.mark.parametrize("name", [*NAMES, *LARGE])
def test_architectures(name):
    model, run = make(name), Run()
    before = form(model)
    out = FinePruning(share=0.5, epochs=1, batch=8)(model, few(24), run)
    assert form(out) == before
    assert bool(torch.isfinite(out(few(8).x)).all())
    assert run.notes["pruned"] == run.notes["channels"] // 2 > 0
    assert hooks(out) == 0


@pytest.mark.parametrize(("name", "value"), [("tolerance", 1.1), ("share", 1.0), ("share", -0.1), ("epochs", 0)])
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"FinePruning.{name} must be"):
        FinePruning(**{name: value})
