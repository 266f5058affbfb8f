"""A scan that also looks at pairs of labels: when these decide, and what the reader is told."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

import bezoar
from bezoar.core.evidence import Scores
from bezoar.core.method import Clean
from bezoar.core.results import Report
from bezoar.core.run import Run
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.combined import Combined
from bezoar.ops.pair_look import found_pairs, judged_pairs, leading_sources
from bezoar.report import searches, wording
from bezoar.report.html import render
from bezoar.report.limits import limits
from bezoar.report.scored import beside
from bezoar.report.text import summary
from bezoar.scanners.neural_cleanse import NeuralCleanse
from bezoar.scorers.source_specific import SourceSpecific
from tests.toys import LABELS, SIZE, SOURCE, TARGET, images, source_specific, trained, trigger

QUICK = {"seeds": 1, "additive": False, "resume": False}


@functools.cache
def scan(kind: str, pairs: bool) -> bezoar.Scanned:
    model = source_specific(0) if kind == "source" else trained(kind == "all")
    evidence = ("source-specific",) if pairs else ()
    return bezoar.scan(model, images(240, seed=7), evidence=evidence, **QUICK)


def test_a_backdoor_of_one_source_decides_the_verdict():
    assert scan("source", pairs=False).report.verdict != "backdoored"
    found = scan("source", pairs=True)
    report = found.report
    assert (report.verdict, report.target, report.method) == ("backdoored", TARGET, "source-specific")
    assert report.triggers[0].source == SOURCE
    assert {one.true for one in report.triggers[0].examples} == {SOURCE}
    assert sum(one.after == TARGET for one in report.triggers[0].examples) >= 6
    assert [one.method for one in report.searches] == ["neural-cleanse"]
    assert report.rule is not None
    assert report.rule.calibration == SourceSpecific.calibration
    x, y = images(120, seed=9)
    with torch.no_grad():
        answers = source_specific(0)(found.triggers[TARGET](x[y == SOURCE])).argmax(1)
    assert float((answers == TARGET).float().mean()) > 0.8


def test_the_reader_is_told_of_the_source():
    report = scan("source", pairs=True).report
    assert wording.title(report).word == "Backdoored: label 2 on images of label 5"
    assert "of held-out images of label 5 into label 2" in report.summary
    text = summary(report, 100)
    assert "of held-out images of label 5" in text
    assert "As a patch" in text
    assert "(suspect: above" in text
    assert "Anomaly index" not in text
    page = render(report)
    assert "of held-out images of label 5" in page
    assert "Two searches are judged" in page
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


@pytest.mark.parametrize("kind", ["clean", "all"])
def test_other_models_keep_their_verdict_with_a_search_more(kind):
    bare, report = scan(kind, pairs=False).report, scan(kind, pairs=True).report
    assert (report.verdict, report.target, report.method) == (bare.verdict, bare.target, bare.method)
    extra = report.searches[-1]
    assert extra.method == "source-specific"
    assert searches.of_pairs(extra)
    assert searches.title(extra) == "Small patches on images of one label"
    assert "One source" in summary(report, 100)
    assert searches.line(report, extra).startswith(f"{extra.verdict}; foremost label ")
    assert "Small patches on images of one label" in render(report)


def given(score: float) -> Scores:
    pairs = {(SOURCE, TARGET): score, (0, TARGET): 0.1, (3, 1): 0.2, (2, 0): -1.0}
    triggers = {label: MaskedTrigger((label + 1.0) * trigger().mask / 4, trigger().pattern) for label in (0, 1, TARGET)}
    labels = {TARGET: score, 1: 0.2, 0: -1.0}
    return Scores(
        labels, score, "so much", suspect=score > 0.5, bound=0.5, triggers=triggers, pairs=pairs
    )  # fmt: skip


def test_evidence_and_rule_of_pairs():
    scores = given(1.25)
    assert leading_sources(scores.pairs) == {TARGET: SOURCE, 1: 3, 0: 2}
    assert leading_sources({(4, 1): 0.0, (2, 1): 0.0, (0, 1): -1.0, (3, 0): 0.5}) == {0: 3, 1: 4}, "the first of equals"
    x, y = images(60, seed=3)
    clean = Clean(x=x, y=y, held_x=x[y != 3], held_y=y[y != 3], num_classes=LABELS)
    found = found_pairs(scores, source_specific(0), clean, Run(seed=4))
    assert {label: one.size for label, one in found.seeds[0].labels.items()} == {0: 1.0, 1: 2.0, TARGET: 3.0}
    assert math.isnan(found.seeds[0].labels[1].asr), "there are no held-out images of label 3"
    assert found.whole == SIZE * SIZE
    judged = judged_pairs(found, scores, "source-specific", "on some nets", ())
    assert (judged.verdict, judged.target, judged.leader) == ("backdoored", TARGET, TARGET)
    assert [(one.name, one.value, one.bound, one.passed) for one in judged.rule.figures] == [("score", 1.25, 0.5, True)]
    assert judged.rule.calibration == "on some nets"
    assert [(one.seed, one.verdict, one.target) for one in judged.seeds] == [(4, "backdoored", TARGET)]
    unsure = dataclasses.replace(scores, suspect=None)
    assert judged_pairs(found, unsure, "source-specific", "", ()).verdict == "inconclusive"
    calm = dataclasses.replace(scores, suspect=False, model=0.3)
    judged = judged_pairs(found, calm, "source-specific", "", ())
    assert (judged.verdict, judged.target, judged.leader) == ("clean", None, TARGET)


@pytest.mark.parametrize(
    ("pvalue", "verdict", "method"),
    [
        (0.4, "inconclusive", "neural-cleanse"),
        (0.05, "inconclusive", "neural-cleanse"),
        (0.001, "backdoored", "source-specific"),
    ],
)
def test_with_a_false_positive_rate_pairs_are_one_source_of_all(monkeypatch, pvalue, verdict, method):
    labels = dict.fromkeys(range(LABELS), 0.5)
    surprises = {"neural-cleanse": labels, "source-specific": labels | {TARGET: 4.0}}
    whole = Combined(labels | {TARGET: 4.5}, surprises, TARGET, pvalue, 50)
    seen: list[set[str]] = []
    monkeypatch.setattr("bezoar.evidence.combine", lambda found, **_: seen.append(set(found)) or whole)
    monkeypatch.setattr("bezoar.evidence.clean_sources", lambda: frozenset(surprises))
    monkeypatch.setattr(SourceSpecific, "scores", lambda *_: given(1.25))
    report = bezoar.scan(trained(False), images(120, seed=7), evidence=("source-specific",), fpr=0.01, **QUICK).report
    assert seen == [set(surprises)]
    assert (report.verdict, report.method) == (verdict, method)
    if verdict == "backdoored":
        assert (report.target, report.triggers[0].source) == (TARGET, SOURCE)
    else:
        assert any("source-specific finds another backdoor" in warning for warning in report.warnings)


def test_labels_that_alone_can_be_the_target_are_those_of_the_pairs():
    method = NeuralCleanse(seeds=1, labels=(1, 4))
    asked = {"evidence": ("source-specific",), "additive": False, "resume": False}
    report = bezoar.scan(trained(False), images(240, seed=7), method=method, **asked).report
    assert {one.label for one in report.searches[-1].labels} == {1, 4}


def test_what_pairs_change_in_what_is_said():
    report = scan("source", pairs=True).report
    assert wording.next_steps(report).endswith("--source-specific --out cleaned")
    assert not any("some source labels only" in line for line in limits(report))
    assert any("some source labels only" in line for line in limits(scan("source", pairs=False).report))
    assert beside(report) == []
    page = render(report)
    assert "Further evidence" not in page
    assert "images of one other label, that which counts most," in page


def test_purify_takes_the_trigger_of_a_pair():
    x, y = images(240, seed=7)
    cleaned, report = bezoar.purify(
        source_specific(0), (x, y), method="unlearn", found=scan("source", pairs=True), **QUICK
    )
    assert report.target == TARGET
    done = report.cleaning
    assert done is not None
    assert done.asr_before > 0.9 > done.asr_after + 0.2, "measured on images of the source"
    assert done.aftercare is not None
    x, y = images(120, seed=9)
    stamped = trigger()(x[y == SOURCE])
    with torch.no_grad():
        before, after = (
            float((one(stamped).argmax(1) == TARGET).float().mean()) for one in (source_specific(0), cleaned)
        )
    assert before > 0.9
    assert after < 0.6
