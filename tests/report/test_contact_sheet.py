"""The contact sheet and the summary of a filter: structure, escaping, and what is said."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace

import pytest
import torch

from bezoar.core.errors import DataError
from bezoar.core.filtered import FilterReport, LabelFindings
from bezoar.core.pictures import png
from bezoar.core.results import DataFacts, ModelFacts, RunFacts
from bezoar.report.contact_sheet import SheetRow, Thumbnail, render_sheet
from bezoar.report.filtered import sentence, summary
from tests.report.test_html import Page

EVIL = '<script>alert(1)</script>"\x1b[2J'


def label(number: int, suspects: int = 0, statistic: float | None = 1.0, flagged: bool = False) -> LabelFindings:
    return LabelFindings(
        label=number, name=f"kind {number}", count=100, suspects=suspects, statistic=statistic, flagged=flagged
    )


MODEL = ModelFacts(
    path="m", format="safetensors", sha256="0", arch="a", parameters=1, num_classes=3, channels=3, height=8, width=8
)
DATA = DataFacts(path="train/", format="folder", sha256="1", count=300, per_class=(100, 100, 100), names=tuple("abc"))
RUN = RunFacts(
    created="2024-01-01T00:00:00+00:00",
    seconds={},
    image_gradients=0,
    versions={},
    device="cpu",
    threads=1,
    budget=None,
    budget_spent=False,
)


def sample(**more: object) -> FilterReport:
    made = FilterReport(
        verdict="backdoored",
        method="scan",
        config={"threshold": 7.4},
        rule="the smaller group",
        model=MODEL,
        data=DATA,
        clean=None,
        acc=0.93,
        count=300,
        suspects=12,
        labels=(label(2, 12, 40.0, flagged=True), label(0, statistic=0.5), label(1, statistic=None)),
        run=RUN,
    )
    return replace(made, **more)


def rows(name: str = "2/7.png") -> list[SheetRow]:
    shown = Thumbnail(position=7, name=name, score=3.25, png=png(torch.rand(3, 8, 8)), suspect=True)
    first, second = sample().labels[:2]
    return [SheetRow(first, (shown,), ()), SheetRow(second, (replace(shown, suspect=False),), (shown,))]


def test_structure():
    html = render_sheet(sample(), rows())
    page = Page(html)
    assert [one["src"][:22] for one in page.find("img")] == ["data:image/png;base64,"] * 3
    assert all(one["alt"] for one in page.find("img"))
    assert page.find("script") == page.find("link") == []
    assert "POISONED" in page.text
    assert "label 2 (kind 2)" in page.text
    assert "none of them taken out" in page.text
    assert "There are none." in page.text
    assert "1 further labels" in page.text
    assert not re.search(r"https?://", html)


def test_policy_names_the_style_that_is_there():
    html = render_sheet(sample(), rows())
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in html
    assert "default-src 'none'" in html


def test_names_and_warnings_are_escaped():
    report = sample(warnings=(EVIL,), rule=EVIL, labels=(replace(label(2), name=EVIL),))
    html = render_sheet(report, [replace(rows(EVIL)[0], label=report.labels[0])])
    assert "<script" not in html
    assert "\x1b" not in html
    assert "\x1b" not in summary(report, 80)


def test_report_survives_json():
    report = sample(notes={"components": {"2": 16}}, warnings=("a note",))
    assert FilterReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "bezoar.report/1"}', '{"schema": "bezoar.filter/1"}'])
def test_other_json_is_refused(text):
    with pytest.raises(DataError, match="not a report of a filter"):
        FilterReport.from_json(text)


def test_what_is_said():
    assert "12 of 300 examples are suspect; the suspects of label 2 (kind 2) stand out" in sentence(sample())
    calm = sample(verdict="clean", suspects=0, labels=(label(0), label(1), label(2)))
    assert "flags no label" in sentence(calm)
    unsure = sample(verdict="inconclusive", labels=(label(2, 5, 9.0), label(0, 5, 3.0)))
    assert "Label 2 (kind 2) stands out most, 3.0 times the next" in sentence(unsure)
    assert "Label" not in sentence(sample(verdict="inconclusive", labels=(label(2, 5, None),)))


@pytest.mark.parametrize("width", [20, 60, 100])
def test_summary_fits_the_terminal(width):
    text = summary(sample(warnings=("word " * 40,)), width, saved="out/contact-sheet.html")
    assert max(map(len, text.splitlines())) <= max(width, 66)
    assert text.endswith("Report: out/contact-sheet.html\n")
    assert text.startswith("POISONED\n")
    assert summary(sample(), width, color=True).startswith("\x1b[1;31mPOISONED")
