"""The rule that turns evidence into a verdict: every branch, on evidence made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bezoar.core.evidence import LabelScan, Scan, SeedScan
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.verdict import RatioRule, confirm, judge, lead, size_gap, size_ratio

TRIGGER = MaskedTrigger(torch.zeros(1, 10, 10), torch.zeros(3, 10, 10))
NAMES = tuple("abcdefgh")
EVEN = (20.0, 22.0, 18.0, 20.0, 21.0)


def label(size: float, asr: float = 1.0, status: str = "complete", reference: bool = True) -> LabelScan:
    return LabelScan(size, asr, status, reference, TRIGGER)


def seed(*labels: LabelScan | float, number: int = 0, finished: bool = True) -> SeedScan:
    made = {k: one if isinstance(one, LabelScan) else label(one) for k, one in enumerate(labels)}
    return SeedScan(number, made, finished)


def scan(*seeds: SeedScan, num_classes: int = 5, pixels: int = 100) -> Scan:
    return Scan(tuple(replace(s, seed=n) for n, s in enumerate(seeds)), num_classes, pixels)


BACKDOORED = seed(20.0, 22.0, 4.0, 20.0, 21.0)
CLEAN = seed(*EVEN)
WEAK = seed(20.0, 22.0, 9.0, 20.0, 21.0)  # ratio 0.44, between the bounds


def outcome(*seeds: SeedScan, **settings) -> tuple[str, int | None]:
    found = judge(scan(*seeds, **settings), NAMES)
    return found.verdict, found.target


def figures(*seeds: SeedScan) -> dict[str, tuple[float, bool]]:
    return {f.name: (f.value, f.passed) for f in judge(scan(*seeds), NAMES).rule.figures}


def test_backdoored():
    found = judge(scan(BACKDOORED), NAMES)
    assert (found.verdict, found.target, found.leader) == ("backdoored", 2, 2)
    shown = figures(BACKDOORED)
    assert shown["size ratio"] == (pytest.approx(4 / 20.5), True)
    assert shown["held-out ASR"] == (1.0, True)
    assert shown["share of the image"] == (pytest.approx(0.04), True)
    assert shown["seeds that suspect the label"] == (1.0, True)
    assert shown["anomaly index"][0] == pytest.approx(16 / 1.4826, rel=1e-4)


def test_clean():
    found = judge(scan(CLEAN), NAMES)
    assert (found.verdict, found.target, found.leader) == ("clean", None, 2)
    assert figures(CLEAN)["size ratio"] == (pytest.approx(18 / 20.5), False)


def test_weak_ratio_is_inconclusive():
    assert 0.4 < size_ratio(WEAK, 2) < 0.5
    assert outcome(WEAK) == ("inconclusive", None)
    assert judge(scan(WEAK), NAMES).leader == 2


def test_bounds_belong_to_the_verdict():
    assert outcome(seed(10.0, 10.0, 4.0, 10.0, 10.0)) == ("backdoored", 2)
    assert outcome(seed(10.0, 10.0, 5.0, 10.0, 10.0)) == ("clean", None)


@pytest.mark.parametrize("asr", [0.74, 0.0, math.nan])
def test_small_trigger_that_does_not_work_on_held_out_images(asr):
    assert outcome(seed(20.0, 22.0, label(4.0, asr), 20.0, 21.0)) == ("inconclusive", None)


def test_small_trigger_that_covers_much_of_the_image():
    assert outcome(seed(80.0, 82.0, 26.0, 80.0, 81.0)) == ("inconclusive", None)
    assert outcome(seed(80.0, 82.0, 25.0, 80.0, 81.0)) == ("backdoored", 2)


def test_index_alone_decides_nothing():
    """Sizes close together: an index far above 2, and no backdoor."""
    close = seed(20.0, 20.1, 17.0, 19.9, 20.05)
    assert figures(close)["anomaly index"][0] > 2
    assert outcome(close) == ("clean", None)
    far = seed(5.0, 40.0, 2.0, 12.0, 60.0)  # and far apart: an index under 2, and one far smaller than usual
    assert figures(far)["anomaly index"][0] < 2
    assert outcome(far) == ("backdoored", 2)


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ((BACKDOORED, BACKDOORED, CLEAN), ("backdoored", 2)),
        ((BACKDOORED, CLEAN, CLEAN), ("inconclusive", None)),
        ((BACKDOORED, WEAK), ("inconclusive", None)),
        ((BACKDOORED, seed(4.0, 22.0, 20.0, 20.0, 21.0)), ("inconclusive", None)),
        ((CLEAN, CLEAN, WEAK), ("clean", None)),
        ((CLEAN, WEAK), ("inconclusive", None)),
        ((CLEAN, WEAK, WEAK), ("inconclusive", None)),
    ],
)
def test_seeds_vote(seeds, expected):
    found = judge(scan(*seeds), NAMES)
    assert (found.verdict, found.target) == expected
    agreeing = [s.target == found.leader for s in found.seeds]
    assert found.rule.figures[-1].value == pytest.approx(sum(agreeing) / len(agreeing))


@pytest.mark.parametrize(("count", "expected"), [(3, ("inconclusive", None)), (4, ("backdoored", 0))])
def test_few_labels(count, expected):
    labels = [4.0, *EVEN[: count - 1]]
    assert outcome(seed(*labels), num_classes=count) == expected
    assert outcome(seed(*EVEN[:count]), num_classes=count) == ("clean", None)


def test_one_label_of_a_model_with_many():
    """Nothing to compare with: no ratio, no verdict."""
    assert outcome(seed(label(4.0))) == ("inconclusive", None)


def test_unfinished_seed_says_nothing():
    for one in (BACKDOORED, CLEAN):
        assert outcome(replace(one, finished=False)) == ("inconclusive", None)
    found = judge(scan(replace(BACKDOORED, finished=False)), NAMES)
    assert found.leader == 2, "but it shows what it has"


@pytest.mark.parametrize(("first", "expected"), [(BACKDOORED, ("backdoored", 2)), (CLEAN, ("clean", None))])
def test_unfinished_seed_does_not_spoil_a_finished_one(first, expected):
    cut = replace(seed(1.0, 22.0, 20.0, 20.0, 21.0), finished=False)
    assert outcome(first, cut, cut) == expected
    assert len(judge(scan(first, cut), NAMES).seeds) == 2


def test_ratio_uses_only_the_other_reference_labels():
    mixed = seed(4.0, 20.0, 20.0, 22.0, label(1000.0, reference=False), label(1000.0, "eliminated", reference=False))
    assert size_ratio(mixed, 0) == pytest.approx(4 / 20)
    outside = seed(label(4.0, reference=False), 20.0, 20.0, 22.0, 24.0)
    assert size_ratio(outside, 0) == pytest.approx(4 / 21)
    assert outcome(outside) == ("backdoored", 0)


def test_eliminated_labels_do_not_move_the_verdict():
    labels = [label(90.0, status="eliminated", reference=False)] * 3
    assert outcome(seed(20.0, 22.0, 4.0, 20.0, 21.0, *labels), num_classes=8) == ("backdoored", 2)


def test_two_infected_labels():
    two = seed(20.0, 5.0, 4.0, 20.0, 21.0, 22.0, 19.0, 20.0)
    assert outcome(two, num_classes=8) == ("backdoored", 2)
    swapped = seed(20.0, 4.0, 5.0, 20.0, 21.0, 22.0, 19.0, 20.0)
    assert outcome(two, two, swapped, num_classes=8) == ("backdoored", 2)
    assert outcome(two, swapped, num_classes=8) == ("inconclusive", None)


def test_label_that_never_worked_is_no_backdoor():
    never = label(1.0, asr=0.9, status="failed")
    assert outcome(seed(20.0, 22.0, never, 20.0, 21.0)) == ("clean", None)
    assert judge(scan(seed(20.0, 22.0, never, 20.0, 21.0)), NAMES).leader == 0


def test_label_that_never_worked_does_not_hide_a_backdoor():
    labels = (20.0, 22.0, label(1.0, asr=0.1, status="failed"), 20.0, 3.0)
    assert outcome(seed(*labels)) == ("backdoored", 4)


def test_no_label_ever_worked():
    failed = seed(*(label(size, asr=1.0, status="failed") for size in (20.0, 22.0, 4.0, 20.0, 21.0)))
    assert outcome(failed) == ("inconclusive", None)
    assert outcome(seed(*(label(size, status="failed") for size in EVEN))) == ("inconclusive", None)


def test_labels_are_shown_with_medians_over_the_seeds_that_looked():
    second = SeedScan(1, {2: label(6.0, asr=0.8), 0: label(30.0, asr=0.5, status="failed")}, True)
    third = SeedScan(2, {2: label(8.0, asr=0.9)}, True)
    found = judge(scan(BACKDOORED, second, third), NAMES)
    rows = {row.label: row for row in found.labels}
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert (rows[2].size, rows[2].asr, rows[2].fraction) == (6.0, pytest.approx(0.9), pytest.approx(0.06))
    assert rows[2].sizes == (4.0, 6.0, 8.0)
    assert rows[0].sizes == (20.0, None, None), "a failed label has no size to show"
    assert rows[1].sizes == (22.0, None, None)
    assert (rows[0].status, rows[2].name) == ("complete", "c")


def test_label_without_a_name_is_its_number():
    assert [row.name for row in judge(scan(CLEAN), ("a", "b")).labels] == ["a", "b", "2", "3", "4"]


def test_bounds_can_be_set():
    rule = RatioRule(backdoored_ratio=0.1, clean_ratio=0.15)
    assert judge(scan(BACKDOORED), NAMES, rule).verdict == "clean"
    assert "at most 0.1 times as large" in rule.text("px")
    assert judge(scan(BACKDOORED), NAMES, rule).rule.figures[0].bound == 0.1


def test_search_that_was_cut_late_may_find_a_label_suspect_but_never_clean():
    late, early = ({"finished": False, "progress": progress} for progress in (0.7, 0.5))
    assert outcome(replace(BACKDOORED, **late)) == ("backdoored", 2)
    assert outcome(replace(BACKDOORED, **early)) == ("inconclusive", None)
    assert outcome(replace(CLEAN, **late)) == ("inconclusive", None)


def test_bounds_shrink_with_very_many_labels():
    """Of many clean triggers the smallest is small by chance."""
    rule = RatioRule()
    assert rule.for_labels(10) == rule.for_labels(43) == rule
    bounds = [rule.for_labels(count).backdoored_ratio for count in (43, 100, 1000, 10_000)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[2] == pytest.approx(0.4 * math.exp(-0.35 * (3.0902 - 1.9911)), rel=1e-3)
    of_thousand = rule.for_labels(1000)
    assert of_thousand.clean_ratio / of_thousand.backdoored_ratio == pytest.approx(rule.clean_ratio / 0.4)
    assert outcome(seed(10.0, 10.0, 3.5, 10.0, 10.0), num_classes=5) == ("backdoored", 2)
    assert outcome(seed(10.0, 10.0, 3.5, 10.0, 10.0), num_classes=1000) != ("backdoored", 2)


# Faint changes of the whole image, and several searches


def faint(*sizes: float) -> Scan:
    return Scan((seed(*sizes),), 5, 100, unit="rms")


def test_faint_changes_are_judged_by_their_root_mean_square():
    found = judge(faint(0.10, 0.11, 0.03, 0.10, 0.10), NAMES)
    assert (found.verdict, found.target) == ("backdoored", 2)
    shown = {f.name: f for f in found.rule.figures}
    assert shown["change of the image"].value == pytest.approx(0.03)
    assert shown["change of the image"].bound == 0.15
    assert "root mean square of at most 0.15" in found.rule.text
    assert judge(faint(0.60, 0.66, 0.18, 0.60, 0.60), NAMES).verdict == "inconclusive", "no faint change"


def test_the_search_that_tells_most_leads():
    backdoored, clean, weak = (judge(scan(s), NAMES) for s in (BACKDOORED, CLEAN, WEAK))
    assert lead([clean, backdoored]) == 1
    assert lead([weak, backdoored]) == 1
    assert lead([clean, weak]) == 1, "what is not settled counts more than what is"
    assert lead([clean, clean]) == lead([weak, weak]) == 0


def test_of_two_targets_the_one_that_stands_out_further_leads():
    near, far = judge(scan(seed(7.0, 20.0, 20.0, 20.0, 20.0)), NAMES), judge(faint(0.1, 0.1, 0.1, 0.1, 0.01), NAMES)
    assert (lead([near, far]), lead([far, near])) == (1, 0)
    # 0.39 of 0.40 is nearer to the bound than 0.40 of 0.45.
    patch, change = (
        judge(scan(seed(7.8, 20.0, 20.0, 20.0, 20.0)), NAMES),
        judge(faint(0.040, 0.1, 0.1, 0.1, 0.1), NAMES),
    )
    assert (patch.target, change.target) == (0, 0)
    assert lead([patch, change]) == 1


def test_only_a_label_that_was_asked_for_can_be_the_target():
    asked = replace(scan(BACKDOORED), wanted=(3, 4))
    found = judge(asked, NAMES)
    assert (found.verdict, found.target) == ("clean", None)
    assert found.leader in (3, 4)


# Standing apart, and confirmation


def test_smallest_of_widely_spread_sizes_does_not_stand_apart():
    spread = seed(23.7, 32.7, 33.5, 49.8, 66.4, 67.7, 98.0, 100.0, 114.0)
    found = judge(scan(spread, num_classes=9, pixels=784), tuple("abcdefghi"))
    shown = {f.name: f for f in found.rule.figures}
    assert shown["size ratio"].passed, "0.36 of the median"
    assert shown["gap"].value == pytest.approx(23.7 / 33.5)
    assert not shown["gap"].passed
    assert found.verdict == "inconclusive"


def test_several_infected_labels_do_not_hide_each_other():
    many = seed(3.0, 3.2, 3.1, 40.0, 41.0, 42.0, 43.0, 44.0, 45.0)
    found = judge(scan(many, num_classes=9, pixels=784), tuple("abcdefghi"))
    assert (found.verdict, found.target) == ("backdoored", 0)
    assert {f.name: f.bound for f in found.rule.figures}["gap"] == 1.0


def test_gap_needs_three_labels_that_worked():
    two = seed(4.0, 20.0, label(1.0, status="failed"), label(1.0, status="failed"))
    assert math.isnan(size_gap(two, 0))
    assert size_gap(BACKDOORED, 2) == pytest.approx(4 / 20)


def test_faint_change_needs_the_masks_to_confirm_it():
    found = judge(faint(0.10, 0.11, 0.03, 0.10, 0.10), NAMES)
    assert confirm(found, scan(seed(20.0, 22.0, 8.8, 20.0, 21.0))).target == 2, "0.44 of the third smallest"
    for masks in (CLEAN, seed(20.0, 9.0, 18.0, 20.0, 21.0), seed(20.0, 22.0, label(1.0, status="failed"), 20.0, 21.0)):
        held = confirm(found, scan(masks))
        assert (held.verdict, held.target, held.leader) == ("inconclusive", None, 2)
        assert held.rule.figures[-1].name == "confirmed by masks"
        assert not held.rule.figures[-1].passed
    clean = judge(faint(0.10, 0.11, 0.09, 0.10, 0.10), NAMES)
    assert confirm(clean, scan(CLEAN)).verdict == "clean", "it takes nothing from a model that shows nothing"
