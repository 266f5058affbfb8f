"""A second look at what was inconclusive, with a student of the model."""

import dataclasses

import pytest
import torch

from bezoar.core.evidence import LabelScan, Scan, SeedScan
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.second_look import second_look
from bezoar.ops.student import NATURAL
from bezoar.ops.verdict import judge

NAMES = tuple("abcdefghij")
STAMP = MaskedTrigger(torch.zeros(1, 20, 20), torch.zeros(1, 20, 20))


def scan(*sizes: float, seeds: int = 1) -> Scan:
    labels = {label: LabelScan(float(size), 0.97, "complete", True, STAMP) for label, size in enumerate(sizes)}
    return Scan(tuple(SeedScan(seed, labels, True) for seed in range(seeds)), len(sizes), 400)


#: Label 0 is planted; 8 and 6 are natural and nearly as small, so it does not stand apart.
CROWDED = scan(15, 51, 46, 46, 38, 71, 29, 82, 22, 67)


def look(found: Scan, moved: dict[int, float]):
    return second_look([found], [judge(found, NAMES)], NAMES, lambda label, _: moved.get(label, 0.0))[0]


def test_a_planted_trigger_stands_apart_once_natural_ones_count_as_larger():
    assert judge(CROWDED, NAMES).verdict == "inconclusive"
    found = look(CROWDED, {8: 0.3, 6: 0.2})
    assert (found.verdict, found.target, found.leader) == ("backdoored", 0, 0)
    assert "student" in found.rule.text
    assert [one.size for one in found.labels] == [one.size for one in judge(CROWDED, NAMES).labels]
    last = found.rule.figures[-1]
    assert (last.name, last.value, last.bound, last.passed) == ("transfer to a student", 0.0, NATURAL, True)


def test_where_all_triggers_are_alike_the_verdict_stays_and_the_figure_is_shown():
    before = judge(CROWDED, NAMES)
    found = look(CROWDED, dict.fromkeys(range(10), 0.3))
    assert found == dataclasses.replace(
        before, rule=dataclasses.replace(before.rule, figures=(*before.rule.figures, found.rule.figures[-1]))
    )
    assert (found.rule.figures[-1].value, found.rule.figures[-1].passed) == (0.3, False)


def test_it_never_says_clean():
    found = scan(24, 51, 50, 52, 51, 53, 50, 52, 51, 50)  # at the edge; after the student 0.79 of the median
    assert judge(found, NAMES).verdict == "inconclusive"
    assert look(found, {0: 0.3}).verdict == "inconclusive"


def test_it_changes_nothing_but_what_was_inconclusive():
    clean = scan(48, 51, 50, 52, 51, 53, 50, 52, 51, 50)
    assert look(clean, {label: 0.3 for label in range(1, 10)}).verdict == "clean"
    planted = scan(5, 51, 50, 52, 51, 53, 50, 52, 51, 50)
    found = look(planted, {0: 0.3})
    assert (found.verdict, found.target) == ("backdoored", 0)
    assert found.rule.text == judge(planted, NAMES).rule.text


@pytest.mark.parametrize("seeds", [1, 3])
def test_seeds_vote_again(seeds):
    found = second_look(
        [dataclasses.replace(CROWDED, seeds=scan(15, 51, 46, 46, 38, 71, 29, 82, 22, 67, seeds=seeds).seeds)],
        [judge(CROWDED, NAMES)],
        NAMES,
        lambda label, _: 0.3 if label in (6, 8) else 0.0,
    )[0]
    assert [one.verdict for one in found.seeds] == ["backdoored"] * seeds
