"""The HTML report: structure, escaping, and the charts; how it looks and behaves is in test_chromium.py."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from bezoar.core.results import Report
from bezoar.report import svg, wording
from bezoar.report.html import render
from bezoar.report.text import summary
from tests.report import samples

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Elements with attributes and text; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())


@pytest.mark.parametrize("name", samples.ALL)
def test_structure(name: str) -> None:
    html = render(samples.ALL[name]())
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert len(page.find("h1")) == 1 and len(page.find("script")) == 1 and len(page.find("style")) == 1
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a.get("aria-labelledby") in ids for a in page.find("section"))
    assert all((a["href"] or "").lstrip("#") in ids for a in page.find("a"))
    assert all(a.get("alt") for a in page.find("img"))
    assert all("scope" in a for a in page.find("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert "What this does not show" in page.text


@pytest.mark.parametrize("name", samples.ALL)
def test_nothing_is_loaded_from_elsewhere(name: str) -> None:
    page = Page(render(samples.ALL[name]()))
    for tag, attributes in page.elements:
        assert not any(key.startswith("on") for key in attributes), tag
        assert "style" not in attributes, tag
        for key in ("src", "href"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:image/png;base64,", "#")) or value == "data:,", value


def test_policy_names_the_hashes_of_style_and_script() -> None:
    html = render(samples.clean())
    policy = next(a["content"] or "" for a in Page(html).find("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag in ("style", "script"):
        found = re.search(f"<{tag}>(.*?)</{tag}>", html, re.S)
        assert found
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_hostile_names_stay_text() -> None:
    html = render(samples.hostile())
    html.encode()
    page = Page(html)
    assert '"><script>alert(1)</script>' in page.text and "{{ 7*7 }}" in page.text
    assert "\u202e" not in html and "\x1b" not in html
    assert not any(
        "alert" in (value or "") for _, a in page.elements for key, value in a.items() if key in ("src", "href")
    )
    assert page.text.count("no picture") >= 2


def test_a_name_in_the_template_language_is_not_run() -> None:
    report = samples.clean()
    report = replace(report, summary="{{ 7*7 }}{% raw %}")
    assert "{{ 7*7 }}{% raw %}" in Page(render(report)).text


def test_a_backdoor_is_told_in_full() -> None:
    text = Page(render(samples.backdoored())).text
    for part in (
        "Was backdoored: label 5 (dog); cleaned with unlearn",
        "A trigger of 9.4 px (0.9 % of the image)",
        "3 (cat) → 5 (dog)",
        "truth: 4 (deer)",
        "not fooled",
        "anomaly index 3.85 ≥ 2 ✓ yes",
        "≤ 0.08",
        "99.6 % → 1.8 %",
        "the 15 largest of 20",
        "suspected label",
        "stopped early",
        "Runner-up labels",
        "median 58.2 px",
        "bezoar scan cleaned/wrn-16-1.pth.tar --data clean-500",
        samples.backdoored().model.sha256,
        "2026-01-31 12:00 UTC",
    ):
        assert part in text, part


def test_other_verdicts_do_not_accuse() -> None:
    for report in (samples.clean(), samples.inconclusive()):
        text = Page(render(report)).text
        assert "suspected" not in text and "smallest trigger" in text and "no proof of a backdoor" in text
    assert "Clean: no trigger stands out" in Page(render(samples.clean())).text
    assert "Inconclusive" in Page(render(samples.inconclusive())).text


def test_purify_only_has_no_scan_parts() -> None:
    text = Page(render(samples.purify_only())).text
    assert "Cleaned without a scan" in text and "No scan was part of this run" in text
    assert "Trigger size per label" not in text and "How the verdict was reached" not in text


def test_a_bare_report_renders() -> None:
    assert "No verdict" in Page(render(samples.base())).text
    empty = replace(samples.base(verdict="inconclusive"), data=replace(samples.base().data, per_class=(), names=()))
    assert "No label gave a trigger that could be judged." in Page(render(empty)).text


def test_all_labels_failed() -> None:
    report = samples.clean()
    failed = tuple(
        replace(
            e,
            status="failed",
            size=float("nan"),
            fraction=float("nan"),
            asr=float("nan"),
            index=float("nan"),
            sizes=(None,) * 5,
        )
        for e in report.labels
    )
    text = Page(render(replace(report, verdict="inconclusive", labels=failed, triggers=()))).text
    assert "No label gave a trigger" in text and "nan" not in text.lower()


def test_report_read_back_from_json_looks_the_same() -> None:
    for build in samples.ALL.values():
        report = build()
        assert render(Report.from_json(report.to_json())) == render(report)


def test_many_labels_get_rows_for_the_smallest_and_a_distribution() -> None:
    report = samples.many()
    chart = svg.size_chart(wording.ranked(report), suspect=report.target, band=wording.band(report), width=720)
    root = ElementTree.fromstring(str(chart))
    names = [t.text for t in root.iter("text") if "name" in t.get("class", "")]
    assert len(names) == svg.FEW_ROWS + 2 and names[-1] == "1,283"
    ticks = next(p for p in root.iter("path") if p.get("class") == "rug").get("d", "")
    assert ticks.count("M") == 1282
    counts = [
        int((t.text or "").split()[0].replace(",", "")) for t in root.iter("title") if " labels from " in (t.text or "")
    ]
    assert sum(counts) == 1283
    assert len(render(report)) < 600_000


def test_a_hundred_thousand_labels_are_still_a_small_file() -> None:
    report = samples.many()
    labels = tuple(replace(e, label=i) for i, e in enumerate(report.labels * 20))
    html = render(replace(report, labels=labels, target=None, triggers=()))
    assert len(html) < 2_000_000
    assert "The other 23,660 labels are in the JSON report" in Page(html).text


@pytest.mark.parametrize("width", [720, 320])
def test_size_chart_positions(width: int) -> None:
    report = samples.backdoored()
    band = wording.band(report)
    assert band is not None
    root = ElementTree.fromstring(str(svg.size_chart(wording.ranked(report), suspect=5, band=band, width=width)))
    bars = {r.get("class"): r for r in root.iter("rect")}
    suspect, early, area = bars["bar suspect"], bars["bar eliminated"], bars["band"]
    line = next(e for e in root.iter("line") if e.get("class") == "median")
    left = float(suspect.get("x", 0))
    scale = float(early.get("width", 0)) / 83.1
    assert float(suspect.get("width", 0)) == pytest.approx(9.4 * scale, abs=0.1)
    assert float(line.get("x1", 0)) == pytest.approx(left + band.median * scale, abs=0.1)
    assert float(area.get("x", 0)) == pytest.approx(left + band.low * scale, abs=0.1)
    assert float(area.get("width", 0)) == pytest.approx((band.high - band.low) * scale, abs=0.1)
    assert [t.text for t in root.iter("text") if t.get("class", "").startswith("name")][0] == "5 dog".replace(" ", "  ")
    for element in root.iter():
        x, wide = float(element.get("x", 0)), element.get("width", "0")
        assert x >= 0 and x + float(wide) <= width + 0.01


@pytest.mark.parametrize(
    ("top", "count", "step"), [(100, 5, 20), (84.8, 6, 20), (0.3, 3, 0.1), (470, 3, 200), (1, 1, 1)]
)
def test_nice_step(top: float, count: int, step: float) -> None:
    assert svg.nice_step(top, count) == pytest.approx(step)


def test_shorten_counts_wide_characters_twice() -> None:
    assert svg.shorten("short", 70) == "short"
    assert svg.shorten("a rather long name", 70) == "a rather…"
    assert len(svg.shorten("日本語日本語日本語", 70)) == 5


def test_charts_do_without_values() -> None:
    assert "<svg" in svg.size_chart([], suspect=None, band=None, width=320)
    done = replace(samples.cleaning(), acc_after=float("nan"), asr_after=float("nan"))
    assert "n/a" in svg.rates_chart(done, 320)


def test_element_escapes_text_and_attributes() -> None:
    made = str(svg.element("text", "<b>&", title='"><i>', class_="x", nothing=None))
    assert made == '<text title="&#34;&gt;&lt;i&gt;" class="x">&lt;b&gt;&amp;</text>'


def test_long_tensor_names_lose_their_middle() -> None:
    root = ElementTree.fromstring(str(svg.layers_chart(samples.cleaning().layers, 320)))
    names = [t.text or "" for t in root.iter("text") if "name" in t.get("class", "")]
    assert names[:3] == ["fc.weight", "fc.bias", "block1.….conv1.weight"]
    assert any(t.text == "block1.layer.0.conv1.weight: 15.5 %" for t in root.iter("title"))


def test_trials_of_auto_are_shown_with_the_one_that_was_kept():
    page = render(samples.backdoored())
    assert "What was tried" in page
    assert "<b>clp + repeated-unlearning epochs=20</b> (kept)" in page
    assert "Pruned" in page
    assert "Skipped" not in page, "an empty list says nothing"
    assert "  kept" in summary(samples.backdoored(), 100, False, None)


def test_damaged_notes_do_not_break_the_page():
    report = samples.backdoored()
    for notes in ({"tried": [1, 2]}, {"tried": [{"method": "x"}]}, {"kept": 3, "odd": {"a": [1.5, None]}}):
        damaged = replace(report, cleaning=replace(report.cleaning, notes=notes))
        assert "What was tried" not in render(damaged)
        assert "Cleaned with" in summary(damaged, 100, False, None)
