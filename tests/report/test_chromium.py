"""The report in a real browser: no error, no request, readable in light, dark, on a phone and on paper."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bezoar.report.html import render
from tests.report import samples
from tests.report.browser import Browser, find

pytestmark = pytest.mark.timeout(180)

# Text whose contrast with what is behind it is under the 4.5 (3 for large text) of WCAG AA.
CONTRAST = """(() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const linear = (v) => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => [r, g, b].map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    if (!e.checkVisibility() || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    if (e.closest("title, script, style")) continue;
    const style = getComputedStyle(e), size = parseFloat(style.fontSize);
    const front = light(parse(e.namespaceURI.endsWith("svg") ? style.fill : style.color)), back = light(behind(e));
    const ratio = (Math.max(front, back) + .05) / (Math.min(front, back) + .05);
    if (ratio < (size >= 24 || (size >= 18.6 && style.fontWeight >= 700) ? 3 : 4.5))
      bad.push(`${e.tagName}.${e.className.baseVal ?? e.className}: ${ratio.toFixed(2)} ${e.textContent.slice(0, 30)}`);
  }
  return bad;
})()"""


@dataclass
class Viewer:
    """Opens HTML text in the browser."""

    browser: Browser
    folder: Path

    def show(self, html: str, width: int = 1000, scheme: str = "light") -> Browser:
        page = self.folder / "page.html"
        page.write_text(html, encoding="utf-8")
        self.browser.open(page, width=width, scheme=scheme)
        return self.browser


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewer]:
    executable = find()
    if executable is None:
        pytest.skip("no Chromium: install Debian's chromium, or set CHROMIUM to its path")
    with Browser(executable, tmp_path_factory.mktemp("profile")) as browser:
        yield Viewer(browser, tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("name", samples.ALL)
def test_no_error_no_request_and_pictures_shown(viewer: Viewer, name: str) -> None:
    page = viewer.show(render(samples.ALL[name]()))
    assert page.errors == [] and page.requests == []
    assert page.evaluate("document.querySelector('h1').getBoundingClientRect().height") > 20
    assert page.evaluate("[...document.images].filter(i => !i.naturalWidth).length") == 0


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ("<script>console.error('deliberate')</script>", "errors"),
        ("<script>throw new Error('deliberate')</script>", "errors"),
        ("<img src='http://192.0.2.1/beacon.png' alt=''>", "requests"),
        ("<link rel=stylesheet href='https://example.org/font.css'>", "requests"),
        ("<script>fetch('http://example.org/').catch(() => 0)</script>", "requests"),
    ],
)
def test_the_check_can_fail(viewer: Viewer, change: str, seen: str) -> None:
    html = render(samples.clean())
    start, end = html.index("<meta http-equiv"), html.index('<meta name="viewport"')
    without_policy = html[:start] + html[end:]
    page = viewer.show(without_policy.replace("</body>", f"{change}</body>"))
    assert getattr(page, seen)


def test_the_policy_stops_scripts_and_requests_that_were_slipped_in(viewer: Viewer) -> None:
    added = (
        "<script>document.title = 'owned'</script><img src='http://192.0.2.1/x.png' alt=''><p style='color:red'>x</p>"
    )
    page = viewer.show(render(samples.clean()).replace("</body>", f"{added}</body>"))
    assert page.evaluate("document.title").startswith("Clean")
    assert len(page.errors) >= 3 and all("Content Security Policy" in e for e in page.errors)


@pytest.mark.parametrize("name", samples.ALL)
@pytest.mark.parametrize("width", [360, 820])
def test_no_sideways_scrolling(viewer: Viewer, name: str, width: int) -> None:
    page = viewer.show(render(samples.ALL[name]()), width=width)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert page.evaluate("getComputedStyle(document.querySelector('.narrow') ?? document.body).display") in (
        ("block",) if width == 360 else ("none", "block")
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["backdoored", "clean", "inconclusive", "purify_only"])
def test_contrast(viewer: Viewer, name: str, scheme: str) -> None:
    page = viewer.show(render(samples.ALL[name]()), scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(CONTRAST) == []


def test_the_contrast_check_can_fail(viewer: Viewer) -> None:
    page = viewer.show("<!doctype html><p style='color:#999;background:#fff'>too pale</p>")
    assert len(page.evaluate(CONTRAST)) == 1


def shade(picture: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(picture)).convert("L"))[:, :40].mean())


def test_dark_follows_the_system_and_the_button(viewer: Viewer) -> None:
    html = render(samples.clean())
    assert shade(viewer.show(html, scheme="light").screenshot()) > 230
    page = viewer.show(html, scheme="dark")
    assert shade(page.screenshot()) < 40
    page.evaluate("document.querySelector('.theme').click()")
    assert shade(page.screenshot()) > 230


def test_print_is_white_even_from_dark(viewer: Viewer) -> None:
    page = viewer.show(render(samples.backdoored()), scheme="dark")
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 34, 41)"
    assert page.evaluate("getComputedStyle(document.querySelector('.verdict')).backgroundColor") == "rgba(0, 0, 0, 0)"
    # No figure taller than a page of A4 less its margins, so none has to be cut.
    assert (
        page.evaluate("Math.max(...[...document.querySelectorAll('figure')].map(f => f.offsetHeight))")
        < 269 / 25.4 * 96
    )
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 8


def test_tables_sort(viewer: Viewer) -> None:
    page = viewer.show(render(samples.backdoored()))
    read = "[...document.querySelectorAll('table.sortable tbody th')].map(c => +c.textContent)"
    smallest_first = page.evaluate(read)
    assert smallest_first[0] == 5 and smallest_first[-1] == 9
    page.evaluate("document.querySelector('table.sortable thead button').click()")
    assert page.evaluate(read) == list(range(10))
    click_size = "document.querySelectorAll('table.sortable thead button')[2].click()"
    page.evaluate(click_size)
    assert page.evaluate(read) == smallest_first
    page.evaluate(click_size)
    assert page.evaluate(read) == smallest_first[::-1]
    assert page.errors == []


def test_readable_without_script(viewer: Viewer) -> None:
    page = viewer.browser
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page = viewer.show(render(samples.backdoored()))
        tree = page.call("Accessibility.getFullAXTree")["nodes"]
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)
    named = {(n.get("role", {}).get("value"), n.get("name", {}).get("value")) for n in tree if not n.get("ignored")}
    assert ("heading", "Was backdoored: label 5 (dog); cleaned with unlearn") in named
    assert all(name for role, name in named if role in ("image", "img", "heading", "columnheader"))
    assert any(role == "image" and name and name.startswith("Trigger size of 10 labels") for role, name in named)
