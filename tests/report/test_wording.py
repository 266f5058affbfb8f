"""Figures and verdicts in words, and the terminal summary."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bezoar.core.results import Figure, Report
from bezoar.report import cleaned, wording
from bezoar.report.limits import limits
from bezoar.report.text import MAX_LINES, summary
from tests.report import samples


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1024, "1,024"),
        (12.345, "12.3"),
        (0.01234, "0.0123"),
        (0.9, "0.9"),
        (0, "0"),
        (float("nan"), "n/a"),
        (None, "n/a"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (72, "1 min 12 s"),
        (7500, "2 h 5 min"),
        (float("nan"), "n/a"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


def test_moment_converts_to_utc_and_keeps_what_it_cannot_read() -> None:
    assert wording.moment("2026-01-31T14:00:00+02:00") == "2026-01-31 12:00 UTC"
    assert wording.moment("yesterday") == "yesterday"


def test_margin_is_the_wilson_interval() -> None:
    # 95 % Wilson interval of 42 of 50: 0.7149 to 0.9166.
    assert float(wording.margin(0.84, 50)) == pytest.approx(100 * (0.9166 - 0.7149) / 2, abs=0.06)
    assert wording.margin(1.0, 0) == "n/a"


def test_band_matches_numpy() -> None:
    report = samples.backdoored()
    sizes = np.array([e.size for e in report.labels if e.status != "failed"])
    median = np.median(sizes)
    band = wording.band(report)
    assert band is not None
    assert (band.median, band.mad) == pytest.approx((median, 1.4826 * np.median(np.abs(sizes - median))))
    assert band.k == 2.0
    assert band.low == pytest.approx(median - 2 * band.mad)


def test_band_follows_the_bound_of_the_rule() -> None:
    report = samples.backdoored()
    assert report.rule is not None
    figures = (replace(report.rule.figures[0], bound=3.5), *report.rule.figures[1:])
    band = wording.band(replace(report, rule=replace(report.rule, figures=figures)))
    assert band is not None and band.k == 3.5


def test_band_needs_three_sizes() -> None:
    report = samples.backdoored()
    assert wording.band(replace(report, labels=report.labels[:2])) is None


def test_suspect_is_the_target_else_the_smallest_complete_label() -> None:
    found = wording.suspect(samples.backdoored())
    assert found is not None and found.label == 5
    report = samples.clean()
    early = tuple(replace(e, status="eliminated") if e.label == 0 else e for e in report.labels)
    smallest = wording.suspect(replace(report, labels=early))
    assert smallest is not None and smallest.label == 2
    assert wording.suspect(replace(report, labels=())) is None


@pytest.mark.parametrize(
    ("value", "bound", "passed", "text"),
    [(3.0, 2.0, True, ">= 2"), (1.0, 2.0, False, ">= 2"), (1.0, 2.0, True, "<= 2"), (3.0, 2.0, False, "<= 2"),
     (2.0, 2.0, True, "2"), (float("nan"), 2.0, False, "2")],
)  # fmt: skip
def test_condition_tells_the_direction(value: float, bound: float, passed: bool, text: str) -> None:
    assert wording.condition(Figure(name="x", value=value, bound=bound, passed=passed, meaning="")) == text


def test_votes() -> None:
    assert wording.votes(samples.backdoored()) == ("5 of 5", "agree with the verdict")
    assert wording.votes(samples.inconclusive()) == ("1 of 2", "found a backdoor alone, label 2 (bird)")


@given(st.text())
def test_printable_leaves_no_control_characters(text: str) -> None:
    clean = wording.printable(text)
    clean.encode()
    assert not re.search("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", clean)
    assert len(clean) == len(text)


def test_printable_keeps_foreign_names() -> None:
    assert wording.printable("日本 Straße ñ") == "日本 Straße ñ"


def test_limits_say_what_matters() -> None:
    assert any("not that the model is safe" in line for line in limits(samples.clean()))
    assert any("scan the cleaned model again" in line for line in limits(samples.backdoored()))
    assert any("time budget" in line for line in limits(samples.inconclusive()))
    assert limits(samples.purify_only())[0].startswith("No scan was part")
    part = samples.clean()
    part = replace(part, labels=part.labels[:4])
    assert any("4 of the model's 10 labels" in line for line in limits(part))


@pytest.mark.parametrize("name", samples.ALL)
@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_summary_is_short_and_fits(name: str, width: int) -> None:
    text = summary(samples.ALL[name](), width, saved="out/report.html")
    lines = text.splitlines()
    assert len(lines) <= MAX_LINES
    assert "out/report.html" in text
    assert "\x1b" not in text and text.endswith("\n")
    kept_whole = ("Report", "written to", "bezoar ")
    assert all(len(line) <= max(width, 40) for line in lines[1:] if not line.strip().startswith(kept_whole))


def test_summary_of_a_backdoor() -> None:
    text = summary(samples.backdoored(), 100)
    for part in (
        "Was backdoored: label 5 (dog); cleaned with unlearn",
        "9.4 px of 1,024 (0.9 %)",
        "5 of 5 agree",
        "3.85 (decides nothing)",
        "84.2 % on 500 images",
        "99.6 % -> 1.8 %",
        "cleaned/wrn-16-1.pth.tar",
        "1 min 17 s",
    ):
        assert part in text
    assert summary(samples.backdoored(), 100, color=True).startswith("\x1b[1;36mWas backdoored")


def test_summary_of_other_verdicts() -> None:
    assert "No trigger stands out: the smallest one" in summary(samples.clean(), 100)
    assert "Smallest trigger label 0 (airplane)" in summary(samples.clean(), 100)
    assert "Scan again with more clean images" in summary(samples.inconclusive(), 100)
    assert "Trigger size" not in summary(samples.purify_only(), 100)


def test_summary_quotes_paths_for_the_shell() -> None:
    report = samples.backdoored()
    report = replace(report, cleaning=None, model=replace(report.model, path="my models/a;b.pth"))
    assert "bezoar purify 'my models/a;b.pth' --data clean-500" in summary(report, 100)


def test_many_warnings_are_counted() -> None:
    report: Report = replace(samples.clean(), warnings=tuple(f"warning {i}" for i in range(40)))
    text = summary(report, 80)
    assert "39 more in the report" in text and len(text.splitlines()) <= MAX_LINES


def test_own_summary_of_the_run_is_preferred() -> None:
    assert wording.sentence(replace(samples.clean(), summary="All is well. ")) == "All is well."


def test_outcome_of_a_cleaning_is_said_first():
    report = samples.backdoored()
    assert wording.title(replace(report, cleaning=None)).word == "Backdoored: label 5 (dog)"
    assert wording.title(report).kind == "cleaned"
    failed = replace(report, cleaning=replace(report.cleaning, asr_after=0.97))
    assert wording.title(failed) == wording.Title("backdoored", "Still backdoored: label 5 (dog)")
    care = replace(report.cleaning.aftercare, rescan_verdict="backdoored", rescan_target=5, reactivation=0)
    again = replace(report, cleaning=replace(report.cleaning, aftercare=care))
    assert wording.title(again).word.startswith("Still backdoored")
    rows = dict(cleaned.aftercare(again, care))
    assert rows["backdoor back"] == "it is still there"
    assert rows["scanned again"] == "backdoored, label 5 (dog)"
    assert "clean accuracy went from" in wording.sentence(report)


def test_what_auto_kept_is_said_plainly():
    report = samples.backdoored()

    def told(**notes: object) -> dict[str, str]:
        return dict(cleaned.trials(replace(report, cleaning=replace(report.cleaning, notes=notes))))

    tried = [{"method": "none", "response": 0.98}, {"method": "clp", "response": 0.13}]
    assert told(kept="clp", tried=tried, skipped=[]) == {
        "kept": "clp",
        "response": "98.0 % -> 13.0 %, mean over triggers of all labels",
    }
    assert told(kept="none", tried=tried, skipped=[])["kept"] == "the model as it was: nothing was better"
    assert "NOT cleaned: clp: no time" in told(kept="none", tried=tried[:1], skipped=["clp: no time left"])["kept"]
    assert told() == {}
