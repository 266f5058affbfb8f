"""A contact sheet: the most suspicious examples of each label beside others of the same label, as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment
from markupsafe import Markup

from bezoar.core.filtered import FilterReport, LabelFindings
from bezoar.report import filtered, wording
from bezoar.report._page import hashed, pages, part


@dataclass(frozen=True)
class Thumbnail:
    """One example.

    Attributes:
        position: Its place in the data.
        name: Its file, or how to name it.
        score: How suspicious it is.
        png: The picture as base64 PNG.
        suspect: Whether the filter takes it out.
    """

    position: int
    name: str
    score: float
    png: str
    suspect: bool


@dataclass(frozen=True)
class SheetRow:
    """One label: its most suspicious examples, and some that are not suspect, drawn at random."""

    label: LabelFindings
    suspicious: tuple[Thumbnail, ...]
    usual: tuple[Thumbnail, ...]


def render_sheet(report: FilterReport, rows: Sequence[SheetRow]) -> str:
    """The page; it needs no network and no script.

    Args:
        report: What the filter found.
        rows: Labels to show, the most suspicious first.
    """
    style = part("report.css") + part("board.css") + part("contact_sheet.css")
    page = (
        _environment()
        .get_template("page")
        .render(
            report=report,
            rows=rows,
            hidden=len(report.labels) - len(rows),
            style=Markup(style),
            style_hash=hashed(style),
            word=filtered.word(report),
            sentence=filtered.sentence(report),
            crisp=max(report.model.height, report.model.width) <= 96,
        )
    )
    return page.strip() + "\n"


@cache
def _environment() -> Environment:
    environment = pages("contact_sheet.html.j2")
    environment.filters["label_text"] = filtered.label_text
    environment.filters["statistic"] = filtered.statistic_text
    environment.filters["percent"] = wording.percent
    return environment
