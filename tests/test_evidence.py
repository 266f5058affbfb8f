"""What scorers say beside a scan: gathered, shown, and no part of the verdict."""

from __future__ import annotations

import dataclasses

import pytest

import bezoar
from bezoar.core.errors import BudgetSpent, SettingError, UnsupportedModel
from bezoar.core.evidence import Scores
from bezoar.core.results import Report
from bezoar.core.scored import Evidence, LabelScore
from bezoar.evidence import COMBINED, CONCENTRATION, MASKS, scorers
from bezoar.ops.combined import Combined
from bezoar.report.html import render
from bezoar.report.scored import scored
from bezoar.report.text import summary
from bezoar.scorers.channel_lipschitz import ChannelLipschitz
from bezoar.scorers.unlearned_labels import UnlearnedLabels
from tests.report import samples
from tests.toys import LABELS, images, trained

QUICK = {"seeds": 1, "additive": False, "resume": False}
NO_SURPRISE = {name: {1: 0.1} for name in (MASKS, CONCENTRATION, "additive-inversion", *COMBINED)}
TWO = ("channel-lipschitz", "unlearned-labels")


def scan(**options) -> Report:
    return bezoar.scan(trained(backdoored=True), images(120, seed=7), **QUICK | options).report


def given(**changes) -> Evidence:
    labels = (LabelScore(label=5, name="dog", score=2.5), LabelScore(label=2, name="bird", score=0.25))
    whole = Evidence(
        method="k-arm", config={}, meaning="a logarithm", score=2.5, suspect=True, pvalue=0.0321, labels=labels
    )
    return dataclasses.replace(whole, **changes)


def test_names_and_all():
    assert scorers(()) == {}
    assert list(scorers(TWO)) == list(TWO)
    assert set(scorers(("all",))) > set(TWO)
    with pytest.raises(SettingError, match="no method 'mm'"):
        scorers(("mm",))
    with pytest.raises(SettingError, match="twice"):
        scorers((TWO[0], TWO[0]))


def test_evidence_stands_in_the_report_and_leaves_the_verdict_alone():
    bare, report = scan(), scan(evidence=TWO)
    assert bare.evidence == ()
    assert [one.method for one in report.evidence] == list(TWO)
    assert (report.verdict, report.target, report.rule) == (bare.verdict, bare.target, bare.rule)
    unlearned = report.evidence[1]
    values = [one.score for one in unlearned.labels]
    assert len(values) == LABELS
    assert values == sorted(values, reverse=True)
    assert unlearned.score == values[0]
    assert unlearned.config == UnlearnedLabels().config()
    assert Report.from_json(report.to_json()).evidence == report.evidence


def test_wrong_name_is_told_before_the_model_is_read():
    with pytest.raises(SettingError, match="no method"):
        bezoar.scan("no-such-file.pth", "no-such-data", evidence=("mmbd",))


@pytest.mark.parametrize(
    ("error", "said"),
    [(UnsupportedModel("it has no such layer"), "no evidence of channel-lipschitz: it has no such layer")],
)
def test_scorer_that_cannot_work_leaves_a_warning(monkeypatch, error, said):
    def fail(*_: object) -> Scores:
        raise error

    monkeypatch.setattr(ChannelLipschitz, "scores", fail)
    report = scan(evidence=TWO)
    assert [one.method for one in report.evidence] == [TWO[1]]
    assert said in report.warnings


def test_without_time_left_it_is_said(monkeypatch):
    report = scan(evidence=TWO, budget=0.05)
    assert report.evidence == ()
    assert sum("no time was left" in one for one in report.warnings) == 2


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "label 5 (dog), score 2.5, next 0.25; its own rule says backdoored"),
        ({"suspect": None}, "label 5 (dog), score 2.5, next 0.25"),
        ({"suspect": False, "source": 3, "target": 5}, "label 5 (dog) from 3 (cat), score 2.5"),
        ({"labels": ()}, "no label was looked at"),
    ],
)
def test_one_line(changes, text):
    assert scored(samples.backdoored(), given(**changes)).startswith(text)


def test_shown_in_summary_and_page():
    report = dataclasses.replace(samples.clean(), evidence=(given(pvalue=None), given(method="mm-bd", suspect=False)))
    assert "k-arm" in summary(report, 100)
    page = render(report)
    assert "Further evidence" in page
    assert "0.0321" in page
    assert "Further evidence" not in render(samples.clean())


def test_names_are_escaped_on_the_page():
    bad = given(meaning="<script>x</script>", labels=(LabelScore(label=0, name="<b>", score=1.0),))
    assert "<script>x" not in render(dataclasses.replace(samples.clean(), evidence=(bad,)))


@pytest.fixture(scope="module")
def together() -> Report:
    return bezoar.scan(trained(backdoored=True), images(120, seed=7), seeds=1, resume=False, fpr=0.05).report


def test_combined_verdict_rests_on_all_sources(together):
    whole = together.combination
    assert {one.method for one in whole.sources} == {MASKS, CONCENTRATION, "additive-inversion"}
    assert together.evidence == ()
    assert (together.verdict, together.target) == ("backdoored", whole.leader)
    assert whole.pvalue <= whole.fpr == 0.05
    assert whole.labels[0].label == whole.leader
    assert whole.labels[0].score == pytest.approx(sum(one.surprise for one in whole.sources))
    assert Report.from_json(together.to_json()).combination == whole


def test_combined_verdict_is_shown(together):
    page, text = render(together), summary(together, 100)
    assert "All evidence together: p = " in page
    assert "How the searches alone judge" in page
    assert "All together" in text
    assert "3 sources" in " ".join(text.split())


def test_scorers_that_are_asked_add_to_a_combined_verdict():
    found = bezoar.scan(
        trained(backdoored=True), images(120, seed=7), seeds=1, resume=False, fpr=0.05, evidence=COMBINED[1:2]
    ).report
    assert COMBINED[1] in {one.method for one in found.combination.sources}


def looked(monkeypatch, moved, **options):
    """A scan of the backdoored toy with what its student says, or an error, in place of a student."""

    def student(session, scans):
        if isinstance(moved, Exception):
            raise moved
        target = bezoar.evidence.label_scores(next(iter(scans))).leader
        return lambda label, _: moved if label == target else 0.0

    monkeypatch.setattr("bezoar.evidence.student_transfer", student)
    return bezoar.scan(trained(backdoored=True), images(120, seed=7), seeds=1, resume=False, **options).report


def test_a_scan_takes_a_second_look(monkeypatch):
    planted, natural = looked(monkeypatch, 0.0), looked(monkeypatch, 0.5)
    assert (planted.verdict, natural.verdict, natural.target) == ("backdoored", "inconclusive", None)
    for report, passed in ((planted, True), (natural, False)):
        figure = report.rule.figures[-1]
        assert (figure.name, figure.passed) == ("transfer to a student", passed)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (BudgetSpent("the budget is spent"), "no time was left"),
        (UnsupportedModel("a student agrees on 9%", "Give more"), "9%"),
    ],
)
def test_without_a_student_the_searches_judge_alone(monkeypatch, error, text):
    alone, combined = looked(monkeypatch, error), looked(monkeypatch, error, fpr=0.05)
    assert alone.verdict == combined.verdict == "backdoored"
    assert combined.combination is None
    for report in (alone, combined):
        assert sum(text in one for one in report.warnings) == 1
        assert not report.run.budget_spent


def test_combined_verdict_can_overrule_the_searches(together, monkeypatch):
    """Where all say that no label stands out, a search that found one leaves the model in doubt, not clean."""
    monkeypatch.setattr(bezoar.evidence, "combine", lambda *_, **__: Combined({1: 0.5}, NO_SURPRISE, 1, 0.8, 24))
    report = bezoar.scan(trained(backdoored=True), images(120, seed=7), seeds=1, resume=False, fpr=0.05).report
    assert together.combination.alone == "backdoored"
    assert (report.verdict, report.target) == ("inconclusive", None)


def test_no_combined_verdict_without_a_rate():
    assert scan().combination is None


@pytest.mark.parametrize("fpr", [0.0, -0.1, 0.6, 1.0])
def test_rate_out_of_range(fpr):
    with pytest.raises(SettingError, match="fpr must be in"):
        scan(fpr=fpr)
