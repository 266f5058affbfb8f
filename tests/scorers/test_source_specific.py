"""Backdoors of one source: which pairs are searched, what is found, what counts, and what it costs."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bezoar.core.errors import BudgetSpent, SettingError, UnsupportedModel
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.surgery import frozen
from bezoar.nets.convnet import student_net
from bezoar.ops.cost import CostController
from bezoar.ops.student import trusted
from bezoar.scorers._sources import SourceSearch
from bezoar.scorers.source_specific import (
    SourceSpecific,
    _Work,
    can_judge,
    foremost,
    planted,
    smaller_than_usual,
    works,
)
from tests.purifiers.nets import toy_clean
from tests.toys import LABELS, SOURCE, TARGET, images, net, source_specific, trained, trigger

BRIEF = SourceSpecific(steps=60, others=5, foremost=0)


@functools.cache
def student(model: nn.Module) -> nn.Module:
    return trusted(model, functools.partial(student_net, LABELS, 3), toy_clean(), Run())


@pytest.fixture(autouse=True)
def taught_once(monkeypatch):
    """A student is taught in some seconds: once for each model is enough."""
    monkeypatch.setattr("bezoar.scorers.source_specific.trusted", lambda model, *_: student(model))


@pytest.mark.parametrize("seed", [0, 1])
def test_finds_source_and_target(seed):
    run = Run(seed=3)
    found = BRIEF(source_specific(seed), toy_clean(), run)
    assert max(found.pairs, key=found.pairs.__getitem__) == (SOURCE, TARGET)
    assert found.leader == TARGET
    assert found.suspect
    x, y = images(120, seed=9)
    stamped = found.triggers[TARGET](x[y == SOURCE])
    with torch.no_grad():
        assert float((source_specific(seed)(stamped).argmax(1) == TARGET).float().mean()) > 0.8


def test_costs_what_it_says():
    run = Run(seed=3)
    made = dataclasses.replace(BRIEF, batch=4, steps=20, screening=5, others=4, foremost=2)
    found = made(trained(False), toy_clean(), run)
    # 4 pairs of each label, and the foremost that are not among them, which a short search with all images chooses.
    assert 4 * LABELS <= len(found.pairs) <= 5 * LABELS
    assert run.image_gradients == LABELS * 5 * 4 + len(found.pairs) * 20 * 4
    assert run.notes["gradients_for_sources"] == run.image_gradients
    assert run.notes["gradients_of_all_pairs"] == LABELS * (LABELS - 1) * 20 * 4


def test_all_pairs_are_searched_where_there_are_few():
    run = Run()
    found = dataclasses.replace(BRIEF, batch=4, steps=2, others=9, foremost=2)(trained(False), toy_clean(), run)
    assert set(found.pairs) == {(s, t) for s in range(LABELS) for t in range(LABELS) if s != t}
    assert run.image_gradients == run.notes["gradients_of_all_pairs"] == LABELS * (LABELS - 1) * 2 * 4


def test_the_bound_grows_with_the_labels():
    method = SourceSpecific(bound=0.6)
    assert method.bound_for(4) == method.bound_for(10) == 0.6
    assert method.bound_for(43) == pytest.approx(0.6 + 0.13 * math.log(4.3))


def test_chance_gives_each_label_as_many_pairs():
    found = dataclasses.replace(BRIEF, steps=1, others=4)(trained(False), toy_clean(), Run(seed=8))
    assert len(found.pairs) == 4 * LABELS
    for end in (0, 1):
        assert {sum(pair[end] == label for pair in found.pairs) for label in range(LABELS)} == {4}


def test_targets_that_are_asked_for_are_the_only_ones():
    found = dataclasses.replace(BRIEF, targets=(TARGET, 4), steps=20, others=4, foremost=1)(
        trained(False), toy_clean(), Run()
    )
    assert {target for _, target in found.pairs} == set(found.labels) == {TARGET, 4}
    assert all(source != target for source, target in found.pairs)


def test_a_clean_net_is_not_suspect():
    assert not BRIEF(trained(False), toy_clean(), Run()).suspect


def test_what_a_pair_is_held_against_is_the_smaller_of_both_medians():
    sizes = {(s, t): 10.0 + 3 * s + t for s in range(5) for t in range(5) if s != t} | {(1, 3): 2.0}
    found = smaller_than_usual(sizes)
    of_source = np.median([sizes[1, t] for t in (0, 2, 4)])
    of_target = np.median([sizes[s, 3] for s in (0, 2, 4)])
    assert found[1, 3] == pytest.approx(math.log(min(of_source, of_target) / 2))
    assert found[1, 2] == pytest.approx(
        math.log(min(np.median([sizes[1, t] for t in (0, 3, 4)]), np.median([sizes[s, 2] for s in (0, 3, 4)])) / 15)
    )


def test_a_trigger_is_a_pixel_at_least():
    sizes = {(s, 0): 5.0 for s in range(1, 5)} | {(5, 0): 0.01}
    assert smaller_than_usual(sizes)[5, 0] == pytest.approx(math.log(5))
    assert set(smaller_than_usual(dict.fromkeys(sizes, 0.2)).values()) == {0.0}


def test_images_that_have_the_target_already_count_against_a_trigger():
    x, y = images(60, seed=3)
    model = source_specific(0)
    with torch.no_grad():
        given = model(x).argmax(1)
    relabelled = torch.where((y == SOURCE) & (torch.arange(60) < 30), TARGET, y)  # these have the target
    moved = torch.where(given == TARGET, SOURCE, relabelled)
    clean = Clean(x=x, y=y, held_x=x, held_y=moved, num_classes=LABELS)
    with frozen(model):
        work = _Work(BRIEF, model, clean, Run())
        rows = moved == SOURCE
        share = float((given[rows] == TARGET).float().mean())
        assert 0 < share < 1
        with torch.no_grad():
            stamped = float((model(trigger()(x[rows])).argmax(1) == TARGET).float().mean())
        assert work.asr(SOURCE, TARGET, trigger()) == pytest.approx(stamped - share)


def test_a_median_of_few_does_not_count_beside_one_of_enough():
    column = {(s, 0): float(s) for s in range(1, 6)}
    assert smaller_than_usual(column | {(1, 2): 0.1})[1, 0] == pytest.approx(math.log(np.median([2, 3, 4, 5]) / 1))
    assert smaller_than_usual({(1, 0): 2.0, (2, 0): 6.0})[1, 0] == pytest.approx(math.log(3))
    assert smaller_than_usual({(1, 0): 2.0}) == {(1, 0): 0.0}


def test_what_a_trigger_counts_for():
    assert [works(asr) for asr in (1.0, 0.75, 0.5, 0.2, math.nan)] == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert [planted(moved) for moved in (0.0, 0.05, 0.1, 0.9, math.nan)] == pytest.approx([1, 0.5, 0, 0, 0])


def test_score_is_the_product(monkeypatch):
    """Success on held-out images and the student are given, so that the score can be written down."""
    monkeypatch.setattr("bezoar.scorers.source_specific._Work.asr", lambda *_: 0.9)
    monkeypatch.setattr("bezoar.scorers.source_specific.transfer", lambda *_, **__: 0.025)
    kept: dict[tuple[int, int], float] = {}

    def told(sizes):
        kept.update(smaller_than_usual(sizes))
        return kept

    monkeypatch.setattr("bezoar.scorers.source_specific.smaller_than_usual", told)
    found = dataclasses.replace(BRIEF, steps=40)(trained(False), toy_clean(), Run())
    assert sum(score > 0 for score in found.pairs.values()) > 3
    for pair, score in found.pairs.items():
        assert score == pytest.approx(min(kept[pair], 0.8 * 0.75 * kept[pair]))
    assert found.model == max(found.pairs.values())


def test_a_natural_trigger_is_no_sign(monkeypatch):
    monkeypatch.setattr("bezoar.scorers.source_specific.transfer", lambda *_, **__: 0.4)
    found = BRIEF(source_specific(0), toy_clean(), Run(seed=3))
    assert not found.suspect
    assert found.model <= 0


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.lists(st.floats(1e-3, 50), min_size=6, max_size=6), min_size=3, max_size=3),
    left=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=3, max_size=3),
)
def test_the_foremost_sources_are_some_of_those_that_may_be(losses, left):
    sources, table = torch.tensor(left), torch.tensor(losses)
    chosen = foremost(table, sources, 2)
    for row, found in enumerate(chosen):
        assert len(found) == len(set(found)) == min(2, int(sources[row].sum()))
        assert all(sources[row, source] for source in found)
    # An easier source is easier for all targets: that must not matter.
    assert chosen == foremost(table * torch.tensor([2.0, 1, 4, 1, 1, 8]), sources, 2)


def test_each_row_sees_images_of_its_own_sources_only():
    clean = toy_clean()
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x.detach().clone())
            return trained(False)(x)

    members = [torch.nonzero(clean.y == label).flatten() for label in range(LABELS)]
    sources = torch.zeros(2, LABELS, dtype=torch.bool)
    sources[0, 3] = sources[1, 0] = sources[1, 1] = True
    with frozen(trained(False)):
        search = SourceSearch(
            Spy(),
            clean.x,
            members,
            [0, 2],
            sources,
            controller=CostController(from_zero=False),
            batch=12,
            lr=0.0,
            key="test",
            run=Run(),
        )
        search.step()
    mask, pattern = search.space.values(search.parameters)
    rows = seen[0].view(2, 12, *clean.shape)
    for row, allowed in enumerate([{3}, {0, 1}]):
        bare = (rows[row] - mask[row] * pattern[row]) / (1 - mask[row])
        nearest = torch.cdist(bare.flatten(1), clean.x.flatten(1)).argmin(1)
        assert set(clean.y[nearest].tolist()) == allowed


def test_labels_without_images_are_no_sources():
    x, y = images(180, seed=7)
    x, y = x[(y != 1) & (y != 4)], y[(y != 1) & (y != 4)]
    clean = Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)
    found = dataclasses.replace(BRIEF, steps=12)(trained(False), clean, Run())
    assert not {source for source, _ in found.pairs} & {1, 4}


def test_images_of_one_label_only_are_refused():
    x, y = images(60, seed=7)
    clean = Clean(x=x[y == 1], y=y[y == 1], held_x=x[:0], held_y=y[:0], num_classes=LABELS)
    with pytest.raises(UnsupportedModel, match="one label"):
        dataclasses.replace(BRIEF, targets=(1,))(trained(False), clean, Run())


def test_time_that_is_over_is_told():
    with pytest.raises(BudgetSpent):
        BRIEF(trained(False), toy_clean(), Run(budget=0.0))


def test_a_source_with_few_held_out_images_does_not_count():
    clean = toy_clean()
    x, y = images(60, seed=3)
    keep = (y != SOURCE) | (torch.cumsum((y == SOURCE).int(), 0) <= 2)
    run = Run(seed=3)
    found = BRIEF(source_specific(0), dataclasses.replace(clean, held_x=x[keep], held_y=y[keep]), run)
    assert found.pairs[SOURCE, TARGET] <= 0
    assert "1 labels have fewer than 3 held-out images: their pairs do not count" in run.warnings


def test_labels_that_can_be_judged():
    assert [can_judge(count) for count in (2, 3, 4, 10, 20, 21, 43)] == [False, False, True, True, True, False, False]


def test_few_labels_are_never_suspect(monkeypatch):
    monkeypatch.setattr("bezoar.scorers.source_specific.trusted", lambda *_: student_net(3, 3).eval())
    model, clean = net(0), toy_clean()
    rows = clean.y < 3
    few = Clean(x=clean.x[rows], y=clean.y[rows], held_x=clean.x[rows], held_y=clean.y[rows], num_classes=3)
    model[-1] = nn.Linear(model[-1].in_features, 3)
    found = SourceSpecific(steps=2, bound=1e-9)(model.eval(), few, Run())
    assert found.suspect is None


def test_too_many_pairs_for_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr("bezoar.scorers.source_specific._VALUES", 12_000)
    with pytest.raises(UnsupportedModel, match="30 pairs of labels"):
        BRIEF(trained(False), toy_clean(), Run())
    dataclasses.replace(BRIEF, targets=(1,), steps=1)(trained(False), toy_clean(), Run())


def test_foremost_of_one_target_are_those_with_the_smallest_losses():
    losses, sources = torch.tensor([[3.0, 2.0, 0.5, 1.0]]), torch.tensor([[True, True, False, True]])
    assert foremost(losses, sources, 2) == [[3, 1]]


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch", 0), ("screening", 0), ("others", 3), ("foremost", -1), ("bound", 0.0), ("reach", 0.0)],
)
def test_bad_settings(name, value):
    with pytest.raises(SettingError, match=name):
        SourceSpecific(**{name: value})


def test_a_target_that_is_none_is_refused():
    with pytest.raises(SettingError, match="label 6"):
        SourceSpecific(targets=(6,))(trained(False), toy_clean(), Run())
