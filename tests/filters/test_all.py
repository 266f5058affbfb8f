"""What every filter promises, whatever its statistic; a new filter is held to it without a line of test code."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bezoar.core.errors import BudgetSpent, SettingError, UnsupportedModel
from bezoar.core.examples import Examples
from bezoar.core.registry import methods
from bezoar.core.run import Progress, Run
from bezoar.evaluation.filters import Scores
from tests.filters.planted import CLASSES, WIDTH, clean_of, features, handing, judged, source, toy, toy_judged
from tests.purifiers.nets import CLASSES as NET_CLASSES
from tests.purifiers.nets import NAMES, examples, few, hooks, make, same
from tests.toys import LABELS, TARGET, trained

every_filter = pytest.mark.parametrize("kind", methods("filters").values(), ids=methods("filters").keys())
#: Those that compare the features of a label's examples; the own tests of the others show what they find.
COMPARING = {
    name: kind for name, kind in methods("filters").items() if name not in ("abl-isolation", "feature-consistency")
}
every_comparing_filter = pytest.mark.parametrize("kind", COMPARING.values(), ids=COMPARING.keys())


@every_comparing_filter
def test_planted_features_are_ranked_first(kind):
    x, y, bad = features(600, poison=0.1)
    found = judged(kind(), x, y)
    assert Scores.of(found.score.numpy(), bad.numpy()).auroc > 0.98
    assert float(found.suspect[bad].double().mean()) > 0.9


@every_filter
def test_clean_features_are_not_condemned_wholesale(kind):
    x, y, _ = features(600)
    found = judged(kind(), x, y)
    assert float(found.suspect.double().mean()) <= 0.16
    assert not found.flagged


@every_filter
def test_answer_is_well_formed(kind):
    x, y, _ = features(300, poison=0.1)
    found = judged(kind(), x, y)
    assert found.score.shape == found.suspect.shape == (300,)
    assert found.score.dtype == torch.float64
    assert found.suspect.dtype == torch.bool
    assert bool(torch.isfinite(found.score).all())
    assert found.rule
    assert set(found.statistic) == set(range(CLASSES))
    assert set(found.flagged or ()) <= set(y[found.suspect].tolist())
    assert not found.decides or set(found.flagged) == set(y[found.suspect].tolist())


@every_comparing_filter
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_order_of_the_examples_does_not_matter(kind, seed):
    x, y, _ = features(250, poison=0.12)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    straight, shuffled = judged(kind(), x, y), judged(kind(), x[order], y[order])
    torch.testing.assert_close(shuffled.score, straight.score[order], rtol=1e-5, atol=1e-9)
    assert torch.equal(shuffled.suspect, straight.suspect[order])
    assert shuffled.flagged == straight.flagged


@every_filter
@pytest.mark.parametrize("sizes", [(0, 1, 2, 5, 60), (1, 1, 1, 1, 1), (2, 2, 2, 2, 2), (0, 0, 0, 0, 5)], ids=str)
def test_labels_with_few_examples_or_none_are_no_fault(kind, sizes):
    y = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor(sizes))
    x = torch.rand(len(y), WIDTH, generator=torch.Generator().manual_seed(3))
    found = judged(kind(), x, y)
    assert found.score.shape == (sum(sizes),)
    assert bool(torch.isfinite(found.score).all())


@every_comparing_filter
def test_labels_left_out_are_named(kind):
    x, y, _ = features(200)
    run = Run()
    judged(kind(), x[y != 3], y[y != 3], run=run)
    assert any("fewer than" in warning and "3 (0)" in warning for warning in run.warnings)


@every_filter
def test_constant_features_make_nobody_suspect(kind):
    y = torch.arange(100) % CLASSES
    found = judged(kind(), torch.full((100, WIDTH), 0.5), y)
    assert bool(torch.isfinite(found.score).all())
    assert not found.flagged


@every_filter
def test_features_that_are_not_finite_are_no_fault(kind):
    x, y, _ = features(200)
    x[7] = torch.nan
    assert bool(torch.isfinite(judged(kind(), x, y).score).all())


@every_filter
def test_same_seed_same_answer(kind):
    first, bad = toy_judged(kind(), 40, Run(seed=3))
    torch.manual_seed(99)  # another state of the global generators must not matter
    again, _ = toy_judged(kind(), 40, Run(seed=3))
    assert torch.equal(first.score, again.score)
    assert torch.equal(first.suspect, again.suspect)


@every_filter
def test_model_is_left_as_it_was(kind):
    model = trained(backdoored=True)
    model.train()
    model[0].weight.requires_grad_(False)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    try:
        toy_judged(kind(), 40)
        assert model.training
        assert not model[0].weight.requires_grad
        assert model[4].weight.requires_grad
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert not hooks(model)
    finally:
        model.eval()
        model[0].weight.requires_grad_(True)


@every_filter
def test_reading_a_few_at_a_time_and_keeping_them_on_disk_changes_nothing(kind, tmp_path):
    data, _ = toy(40)
    largest = []

    class Watched(Examples):
        def take(self, rows):
            largest.append(len(rows))
            return super().take(rows)

    x, y = data.x[:60], data.labels[:60]
    clean = clean_of(torch.rand(1, 1), torch.zeros(1, dtype=torch.int64), LABELS)
    clean = dataclasses.replace(clean, x=x, y=y)
    model = trained(backdoored=True)
    found = kind()(model, data, Run(), clean)
    kept = kind()(model, Watched(data.x, data.labels, LABELS), Run(progress=Progress(folder=tmp_path / "kept")), clean)
    assert torch.equal(found.score, kept.score)
    assert max(largest) <= 256


@every_filter
@pytest.mark.parametrize("name", NAMES)
def test_works_on_any_architecture(kind, name):
    x, y = examples(90)
    model = make(name)
    before = make(name)
    try:
        found = kind()(model, Examples(x, y, NET_CLASSES), Run(), few(60))
    except UnsupportedModel as refusal:  # such as a layer whose weights cannot be drawn anew
        assert refusal.hint
        assert not kind.through_model
        assert same(model, before)
        return
    assert bool(torch.isfinite(found.score).all())
    assert same(model, before)
    assert not hooks(model)


@every_filter
def test_stops_when_the_budget_is_spent(kind):
    run = Run(budget=1e-9)
    with pytest.raises(BudgetSpent):
        toy_judged(kind(), 40, run)
    assert run.budget_spent


@every_filter
def test_without_the_clean_examples_that_it_needs_it_says_so(kind):
    x, y, _ = features(100)
    if kind.needs_clean:
        with pytest.raises(SettingError, match="clean examples") as caught:
            kind()(handing(), source(x, y), Run())
        assert "--clean" in caught.value.hint
    else:
        kind()(handing(), source(x, y), Run())


@pytest.mark.parametrize("name", ["scan", "beatrix"])
@pytest.mark.parametrize("every", [7, 40])
def test_backdoor_of_a_trained_net_is_found(name, every):
    """At 7, 107 of the target's 257 examples are poisoned; at 40, 16 of 166."""
    found, bad = toy_judged(methods("filters")[name](), every)
    assert found.flagged == (TARGET,)
    assert float(found.suspect[bad].double().mean()) > 0.95
    assert float(found.suspect[~bad].double().mean()) < 0.02


def test_spectre_finds_a_small_share_in_a_trained_net():
    found, bad = toy_judged(methods("filters")["spectre"](), 40)
    assert max(found.statistic, key=found.statistic.__getitem__) == TARGET
    assert bool(found.suspect[bad].all())


class Failing(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 4:
            raise RuntimeError("the model broke")
        return self.module(x)


@every_filter
def test_model_is_left_as_it_was_after_a_failure(kind):
    x, y, _ = features(600)
    model = Failing(handing()).train()
    with pytest.raises(RuntimeError, match="the model broke"):
        kind()(model, source(x, y), Run(), clean_of(x, y))
    assert model.training
    assert not hooks(model)
