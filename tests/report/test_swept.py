"""The page, the SARIF and the summary of a sweep."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest

from bezoar.core.plain import built, plain
from bezoar.core.swept import Swept
from bezoar.report import swept
from bezoar.report.swept import folder, render_sweep, sweep_sarif, sweep_summary
from tests.report.test_sarif_and_schema import SARIF

BAD = Swept(
    key="ab" * 16,
    model="zoo/<script>alert(1)</script>.pt",
    sha256="c" * 64,
    outcome="backdoored",
    target=3,
    name="cat",
    label=3,
    size=9.0,
    fraction=0.01,
    asr=0.98,
    ratio=0.1,
    acc=0.91,
    num_classes=10,
    arch="resnet-18",
    summary="A trigger of 9 px turns 98 % of images into label 3 (cat).",
    versions={"bezoar": "1"},
)
CLEAN = replace(BAD, key="cd" * 16, model="zoo/clean.pt", outcome="clean", target=None, name="", summary="Nothing.")
OPEN = replace(CLEAN, key="ef" * 16, outcome="inconclusive", size=float("nan"), ratio=None, asr=None)
BROKEN = Swept(key="01" * 16, model="hf:ann/x@1", sha256="f" * 40, outcome="refused", error="it is text", hint="Look")
ROWS = [CLEAN, BROKEN, OPEN, BAD]


def test_rows_go_to_json_and_back():
    for row in ROWS:
        assert plain(built(Swept, json.loads(json.dumps(plain(row))))) == plain(row)


def test_page_shows_the_gravest_first_and_links_verdicts_only():
    page = render_sweep(ROWS, missing=2).partition("<h2>")[2]
    assert page.index(">backdoored<") < page.index(">refused<") < page.index(">inconclusive<") < page.index(">clean<")
    assert f'href="{folder(BAD)}report.html"' in page
    assert folder(BROKEN) not in page
    assert "it is text. Look" in page
    assert "1 of 4 models backdoored" in render_sweep(ROWS)
    assert "2 still to be scanned" in render_sweep(ROWS, missing=2)


def test_page_escapes_names():
    page = render_sweep(ROWS)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_page_of_many_models_stays_small(monkeypatch):
    monkeypatch.setattr(swept, "MAX_ROWS", 3)
    page = render_sweep(ROWS)
    assert "1 further models are in sweep.jsonl only" in page
    assert ">clean<" not in page.partition("<tbody>")[2]


def test_page_of_nothing():
    assert "0 of 0 models backdoored" in render_sweep([])


def test_sarif_meets_the_standard():
    log = json.loads(sweep_sarif(ROWS))
    jsonschema.validate(log, SARIF)
    run = log["runs"][0]
    rules, artifacts = run["tool"]["driver"]["rules"], run["artifacts"]
    assert [result["ruleId"] for result in run["results"]] == ["BEZ004", "BEZ002", "BEZ001"]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert rules[result["ruleIndex"]]["defaultConfiguration"]["level"] == result["level"]
        place = result["locations"][0]["physicalLocation"]["artifactLocation"]
        assert artifacts[place["index"]]["location"]["uri"] == place["uri"]
    assert run["invocations"][0]["executionSuccessful"]
    assert not json.loads(sweep_sarif(ROWS, missing=1))["runs"][0]["invocations"][0]["executionSuccessful"]


def test_summary_names_what_is_not_clean():
    text = sweep_summary(ROWS, missing=1, scanned=3)
    assert text.splitlines()[0] == "1 of 4 models backdoored (1 were there already)"
    assert "1 backdoored, 1 refused, 1 inconclusive, 1 clean; 1 not scanned yet" in text
    assert "refused: hf:ann/x@1: it is text" in text
    assert "clean.pt: Nothing" not in text.replace(f"inconclusive: {OPEN.model}", "")


@pytest.mark.parametrize("count", [5, 40])
def test_summary_stays_short(count):
    assert len(sweep_summary([BAD] * count, 0, count).splitlines()) <= swept.MAX_SHOWN + 3
