"""The low-cost scan: when the short look ends, who is followed, and what that saves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bezoar.core.errors import SettingError
from bezoar.core.run import Progress, Run
from bezoar.scanners.low_cost_neural_cleanse import Foremost, LowCostNeuralCleanse
from tests.purifiers.nets import toy_clean
from tests.toys import LABELS, TARGET, trained

#: Six labels, of which two are followed besides four others would be all: one is dropped only with fewer of each.
BRIEF = LowCostNeuralCleanse(candidates=1, reference_labels=4, stable=3, iterations=40, batches=5, batch=16)


def first_settled(norms: list[list[float]], count: int, overlap: float, stable: int) -> int | None:
    """The iteration after which the look ends, straight from the words of the paper; None for never."""
    tops = [set(sorted(range(len(row)), key=lambda i: (row[i], i))[:count]) for row in norms]
    for end in range(stable, len(tops)):
        if all(len(tops[i] & tops[i - 1]) > overlap * count for i in range(end - stable + 1, end + 1)):
            return end
    return None


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    labels=st.integers(4, 12),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75]),
    stable=st.integers(1, 4),
)
def test_the_look_ends_when_an_independent_count_says_so(data, labels, overlap, stable):
    row = st.lists(st.floats(0, 100), min_size=labels, max_size=labels)
    norms = data.draw(st.lists(row, min_size=1, max_size=14))
    count = data.draw(st.integers(1, labels))
    rule, ended = Foremost(count, overlap, stable), None
    for at, values in enumerate(norms):
        if rule.settled(list(range(labels)), torch.tensor(values, dtype=torch.float64)):
            ended = at
            break
    assert ended == first_settled(norms, count, overlap, stable)


def test_defaults_are_more_than_50_of_100_ten_times_in_a_row():
    made = LowCostNeuralCleanse()
    rule = Foremost(made.candidates, made.overlap, made.stable)
    labels = list(range(200))
    norms = torch.arange(200.0)
    moved = norms.roll(50)  # 50 of the foremost 100 stay: not enough
    ends = []
    for at in range(12):
        ends.append(rule.settled(labels, norms if at % 2 else moved))
    assert not any(ends)
    moved = norms.roll(49)
    ends = [rule.settled(labels, moved if at % 2 else norms) for at in range(10)]
    # The first of these still differs from the last of those above by nothing: it counts.
    assert ends.index(True) == 9


def test_follows_the_foremost_and_random_others():
    run = Run(seed=3)
    scan = BRIEF(trained(backdoored=True), toy_clean(), run)
    found = scan.seeds[0].labels
    assert found.keys() == set(range(LABELS))
    reference = {label for label, one in found.items() if one.reference}
    assert len(reference) == 4
    assert TARGET not in reference, "it is foremost, so it is none of the others"
    (dropped,) = set(found) - reference - {TARGET}
    assert found[dropped].status in ("eliminated", "failed")
    looks = run.notes["iterations_of_all_labels"]
    assert looks >= BRIEF.stable + 1
    one = BRIEF.batches * BRIEF.batch
    assert run.image_gradients <= (looks * LABELS + BRIEF.iterations * 5) * one
    assert run.image_gradients > looks * LABELS * one
    assert min(found, key=lambda label: found[label].size) == TARGET


def test_sizes_of_the_followed_are_those_of_a_full_run():
    whole = dataclasses.replace(BRIEF, candidates=LABELS)(trained(backdoored=True), toy_clean(), Run(seed=3))
    part = BRIEF(trained(backdoored=True), toy_clean(), Run(seed=3))
    for label, one in part.seeds[0].labels.items():
        if one.reference or label == TARGET:
            assert one.size == pytest.approx(whole.seeds[0].labels[label].size, rel=0.03)  # rounding differs by company


def test_labels_that_are_asked_for_are_followed_without_a_first_look():
    run = Run(seed=3)
    scan = dataclasses.replace(BRIEF, labels=(4,))(trained(backdoored=True), toy_clean(), run)
    assert "iterations_of_all_labels" not in run.notes
    assert len(scan.seeds[0].labels) == 5
    assert not scan.seeds[0].labels[4].reference


def test_a_killed_scan_goes_on(tmp_path):
    expected = BRIEF(trained(backdoored=True), toy_clean(), Run(seed=3)).seeds[0].labels

    class Killed(Exception):
        pass

    def kill(at: int):
        calls = []

        def told(_phase, _done, _total, _note):
            calls.append(1)
            if len(calls) == at:
                raise Killed

        return told

    for at in (4, 20):  # in the look at all labels, and in the full search
        with pytest.raises(Killed):
            BRIEF(
                trained(backdoored=True),
                toy_clean(),
                Run(seed=3, progress=Progress(report=kill(at), folder=tmp_path, every=0.0)),
            )
        assert (tmp_path / "seed-3.pt").exists()
    again = BRIEF(trained(backdoored=True), toy_clean(), Run(seed=3, progress=Progress(folder=tmp_path, every=0.0)))
    for label, one in again.seeds[0].labels.items():
        assert (one.size, one.status) == (expected[label].size, expected[label].status)


def test_a_budget_that_ends_the_first_look_leaves_evidence_of_no_use():
    run = Run(seed=3, budget=0.3)
    scan = dataclasses.replace(BRIEF, iterations=1000, stable=900)(trained(backdoored=True), toy_clean(), run)
    assert run.budget_spent
    assert not scan.seeds[0].finished


@pytest.mark.parametrize(
    ("name", "value"),
    [("candidates", 0), ("reference_labels", 3), ("overlap", 1.0), ("stable", 0), ("iterations", 0), ("lr", 0.0)],
)
def test_bad_settings(name, value):
    with pytest.raises(SettingError, match=name):
        LowCostNeuralCleanse(**{name: value})


def test_a_label_that_is_none_is_refused():
    with pytest.raises(SettingError, match="label 6"):
        LowCostNeuralCleanse(labels=(6,))(trained(backdoored=True), toy_clean(), Run())
