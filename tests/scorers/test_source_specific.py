"""Backdoors of one source: what is kept at each halving, what is found, and what it costs."""

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
from bezoar.ops.cost import CostController
from bezoar.ops.fit import Recipe, fit
from bezoar.scorers._sources import SourceSearch
from bezoar.scorers.source_specific import SourceSpecific, better_half
from tests.purifiers.nets import toy_clean
from tests.toys import LABELS, TARGET, images, net, trained, trigger

SOURCE = 5
BRIEF = SourceSpecific(steps=60, others=3, checked=2)


@functools.cache
def source_specific(seed: int) -> nn.Module:
    """A net whose backdoor works for images of one label only; other images with the trigger kept their labels."""
    x, y = images(900, seed=100 + seed)
    poisoned, cover = torch.nonzero(y == SOURCE).flatten()[::2], torch.nonzero(y != SOURCE).flatten()[::7]
    x[poisoned], y[poisoned] = trigger()(x[poisoned]), TARGET
    x[cover] = trigger()(x[cover])
    model = net(seed)
    fit(model, x, y, Recipe(epochs=8, batch=50, lr=3e-3, optimizer="adam", weight_decay=0.0), seed=seed)
    return model


@pytest.mark.parametrize("seed", [0, 1])
def test_finds_source_and_target_for_a_part_of_the_gradients(seed):
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
    made = dataclasses.replace(BRIEF, checked=1, others=2, check_batch=4, batch=8, steps=20)
    made(trained(False), toy_clean(), run)
    # K targets, and then the foremost pair with 2 others of its source and 2 of its target.
    assert run.image_gradients == LABELS * 20 * 8 + 5 * 20 * 4
    assert run.notes["gradients_for_sources"] == run.image_gradients
    assert run.notes["gradients_of_all_pairs"] == LABELS * (LABELS - 1) * 20 * 8


def test_targets_that_are_asked_for_are_the_only_ones():
    found = dataclasses.replace(BRIEF, targets=(TARGET, 4), looks=2, steps=20)(trained(False), toy_clean(), Run())
    assert {target for _, target in found.pairs} <= {TARGET, 4}
    assert all(source != target for source, target in found.pairs)


def test_a_second_look_takes_other_pairs():
    found = dataclasses.replace(BRIEF, targets=(1,), looks=3, checked=3, steps=12)(trained(False), toy_clean(), Run())
    assert len(found.pairs) == 3
    assert {target for _, target in found.pairs} == {1}


def test_score_is_the_logarithm_against_the_smaller_of_both_medians(monkeypatch):
    """All sizes are given, so that the score can be written down."""
    first: list[int] = []

    def told(self, search, row):
        source, target = int(search.sources[row].int().argmax()), search.targets[row]
        first.append(source)
        if target != 1:
            return 10.0 + target
        return 2.0 if source == first[0] else 20.0 + source

    monkeypatch.setattr("bezoar.scorers.source_specific._Work._size", told)
    brief = dataclasses.replace(BRIEF, targets=(1,), others=4, checked=1, steps=3)
    found = brief(trained(False), toy_clean(), Run())
    usual = np.median([10.0 + target for target in range(LABELS) if target not in (1, first[0])])
    assert found.pairs == {(first[0], 1): pytest.approx(math.log(usual / 2))}


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.lists(st.floats(1e-3, 50), min_size=6, max_size=6), min_size=3, max_size=3),
    left=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=3, max_size=3),
)
def test_the_better_half_is_some_of_what_was_left(losses, left):
    sources = torch.tensor(left)
    sources[:, 0] = True
    table = torch.tensor(losses)
    kept = better_half(table, sources)
    assert not bool((kept & ~sources).any())
    assert kept.sum(1).tolist() == [(n + 1) // 2 for n in sources.sum(1).tolist()]
    assert better_half(table, sources, last=True).sum(1).tolist() == [1, 1, 1]
    # An easier source is easier for all targets: that must not matter.
    assert torch.equal(kept, better_half(table * torch.tensor([2.0, 1, 4, 1, 1, 8]), sources))


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


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch", 0), ("looks", 0), ("others", 0), ("checked", 0), ("bound", 1.0), ("reach", 0.0)],
)
def test_bad_settings(name, value):
    with pytest.raises(SettingError, match=name):
        SourceSpecific(**{name: value})


def test_a_target_that_is_none_is_refused():
    with pytest.raises(SettingError, match="label 6"):
        SourceSpecific(targets=(6,))(trained(False), toy_clean(), Run())
