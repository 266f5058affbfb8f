"""A second look at what was inconclusive, with a student of the model."""

import dataclasses
import math

import pytest
import torch

from bezoar.core.evidence import LabelScan, Scan, SeedScan
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.second_look import second_look
from bezoar.ops.verdict import confirm, judge

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
    assert (last.name, last.value, last.bound, last.passed) == ("transfer to a student", 0.0, 1.0, True)


def test_where_all_triggers_are_alike_the_verdict_stays_and_the_figure_is_shown():
    before = judge(CROWDED, NAMES)
    found = look(CROWDED, dict.fromkeys(range(10), 0.3))
    assert found == dataclasses.replace(
        before, rule=dataclasses.replace(before.rule, figures=(*before.rule.figures, found.rule.figures[-1]))
    )
    assert (found.rule.figures[-1].value, found.rule.figures[-1].passed) == (1.0, False)


def test_a_trigger_that_moves_the_student_counts_as_larger():
    moved = {0: 0.02, 1: 0.4, 2: float("nan")}
    found = look(scan(14, 51, 46, 46, 38, 71, 29, 82, 22, 67), {8: 0.3, 6: 0.2} | moved)
    ratio = next(one.value for one in found.rule.figures if one.name == "size ratio")
    larger = [14 * math.exp(0.1), 51 * math.exp(0.5), 46, 46, 38, 71, 29 * math.exp(0.5), 82, 22 * math.exp(0.5), 67]
    assert (found.verdict, ratio) == ("backdoored", pytest.approx(larger[0] / sorted(larger[1:])[4]))


def test_it_never_says_clean():
    found = scan(24, 51, 50, 52, 51, 53, 50, 52, 51, 50)  # at the edge; after the student 0.79 of the median
    assert judge(found, NAMES).verdict == "inconclusive"
    assert look(found, {0: 0.3}).verdict == "inconclusive"


def test_what_was_clean_stays_so():
    clean = scan(48, 51, 50, 52, 51, 53, 50, 52, 51, 50)
    assert look(clean, {label: 0.3 for label in range(1, 10)}).verdict == "clean"


PLANTED = scan(5, 51, 50, 52, 51, 53, 50, 52, 51, 50)


@pytest.mark.parametrize("moved", [{}, {0: 0.09}, {0: 0.3} | dict.fromkeys(range(1, 10), 0.4)])
def test_a_planted_trigger_moves_the_student_less_than_natural_ones(moved):
    found = look(PLANTED, moved)
    assert (found.verdict, found.target) == ("backdoored", 0)
    assert found.rule.text == judge(PLANTED, NAMES).rule.text


@pytest.mark.parametrize("moved", [{0: 0.11}, {0: 0.5} | dict.fromkeys(range(1, 10), 0.4)])
def test_a_natural_trigger_is_no_backdoor(moved):
    assert judge(PLANTED, NAMES).verdict == "backdoored"
    found = look(PLANTED, moved)
    assert (found.verdict, found.target, found.leader) == ("inconclusive", None, 0)
    assert "may be natural" in found.rule.text


@pytest.mark.parametrize("seeds", [1, 3])
def test_seeds_vote_again(seeds):
    found = second_look(
        [dataclasses.replace(CROWDED, seeds=scan(15, 51, 46, 46, 38, 71, 29, 82, 22, 67, seeds=seeds).seeds)],
        [judge(CROWDED, NAMES)],
        NAMES,
        lambda label, _: 0.3 if label in (6, 8) else 0.0,
    )[0]
    assert [one.verdict for one in found.seeds] == ["backdoored"] * seeds


def both(mask: dict[int, float], faint: dict[int, float]):
    """Masks that are weak (they rarely work on other images), and a faint change of label 0 that they would confirm."""
    labels = {
        label: LabelScan(float(size), 0.7, "complete", True, STAMP)
        for label, size in enumerate((15, 51, 46, 46, 38, 71, 29, 82, 22, 67))
    }
    masks = Scan((SeedScan(0, labels, True),), 10, 400)
    changes = {
        label: LabelScan(size, 0.97, "complete", True, STAMP)
        for label, size in enumerate((0.02, 0.1, 0.1, 0.11, 0.09, 0.1, 0.1, 0.12, 0.1, 0.1))
    }
    faints = Scan((SeedScan(0, changes, True),), 10, 400, unit="rms")
    first = [judge(masks, NAMES), confirm(judge(faints, NAMES), masks)]
    assert [one.verdict for one in first] == ["inconclusive", "inconclusive"]
    moved = {id(one): mask.get(label, 0.0) for label, one in labels.items()}
    moved |= {id(one): faint.get(label, 0.0) for label, one in changes.items()}
    found = second_look([masks, faints], first, NAMES, lambda _, one: moved[id(one)])
    return found[1]


CROWD = {8: 0.3, 6: 0.2}


def test_masks_confirm_a_faint_change_once_natural_ones_count_as_larger():
    assert (both(CROWD, {}).verdict, both(CROWD, {}).target) == ("backdoored", 0)


@pytest.mark.parametrize(("mask", "faint"), [(CROWD, {0: 0.6}), (CROWD | {0: 0.6}, {})])
def test_a_natural_trigger_is_never_made_a_backdoor(mask, faint):
    assert both(mask, faint).verdict == "inconclusive"


def test_what_is_unknown_changes_nothing():
    found = look(PLANTED, dict.fromkeys(range(10), float("nan")))
    assert found == judge(PLANTED, NAMES)


def test_seeds_that_were_cut_short_have_no_say():
    cut = {
        label: LabelScan(200.0, 0.9, "complete", True, STAMP) if label == 0 else one
        for label, one in PLANTED.seeds[0].labels.items()
    }
    scan_ = dataclasses.replace(PLANTED, seeds=(*PLANTED.seeds, SeedScan(1, cut, False, 0.1), SeedScan(2, cut, False)))
    moved = {id(cut[0]): 0.5}
    found = second_look([scan_], [judge(scan_, NAMES)], NAMES, lambda _, one: moved.get(id(one), 0.0))[0]
    assert (found.verdict, found.target) == ("backdoored", 0)
