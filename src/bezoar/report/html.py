"""The report as one HTML file that needs nothing else: no network, no fonts, and no script to be readable."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from bezoar.core.results import LabelEvidence, Report, Search, SeedResult, TriggerFacts
from bezoar.report import cleaned, searches, svg, wording
from bezoar.report._page import hashed, pages, part
from bezoar.report.limits import limits
from bezoar.report.scored import beside, one_in, rule_says, score

WIDE, NARROW = 720, 320  # Chart widths: screens and paper, phones.
MAX_TABLE = 2000
MAX_LAYERS = 15
MAX_RUNNERS_UP = 6
MAX_EXAMPLES = 12


def render(report: Report) -> str:
    """The report as HTML.

    Names, paths and messages are escaped and stripped of control characters; the content security policy of the page
    allows its own style and script, pictures that are part of it, and nothing else.
    """
    return _environment().get_template("page").render(_context(report)).strip() + "\n"


@cache
def _environment() -> Environment:
    environment = pages("report.html.j2")
    helpers: tuple[Callable[..., Any], ...] = (
        wording.number,
        wording.pixels,
        wording.levels,
        wording.percent,
        wording.duration,
        wording.moment,
        wording.margin,
        wording.condition,
        wording.has_size,
    )
    environment.filters.update({helper.__name__: helper for helper in helpers})
    environment.filters.update(
        {name: _unbroken(environment.filters[name]) for name in ("pixels", "levels", "percent", "duration")}
    )
    environment.filters["sort_key"] = _sort_key
    environment.filters["png_uri"] = _png_uri
    environment.globals["swatch"] = svg.swatch
    return environment


def _context(report: Report) -> dict[str, Any]:
    style, script = part("report.css"), part("report.js")
    suspect = wording.suspect(report)
    triggers = _triggers(report, suspect)
    return {
        "report": report,
        "style": Markup(style),
        "script": Markup(script),
        "style_hash": hashed(style),
        "script_hash": hashed(script),
        "title": wording.title(report),
        "sentence": re.sub(r"(?<=\d) (?=(%|px)(\W|$))", "\N{NO-BREAK SPACE}", wording.sentence(report)),
        "suspect": suspect,
        "sized": wording.sized,
        "searches_say": searches,
        "whose": wording.whose(report),
        "pixel_count": report.model.height * report.model.width,
        "size_ratio": wording.size_ratio(report),
        "score": score(report),
        "evidence": beside(report),
        "band": wording.band(report),
        "seeds": wording.votes(report),
        "seconds": wording.total_seconds(report),
        "limits": limits(report),
        "next": wording.next_steps(report).partition(": bezoar "),
        "label_text": lambda label: wording.label_text(report, label),
        "charts": _charts(report, suspect),
        "shown": len(svg.rows(report.labels)),
        "stopped": sum(e.status == "eliminated" for e in report.labels),
        "states": {e.status for e in svg.rows(wording.ranked(report))},
        "ranked": wording.ranked(report)[:MAX_TABLE],
        "figure_names": _figure_names,
        "crisp": max(report.model.height, report.model.width) <= 96,
        "per_label": _span(report.data.per_class),
        "settings": _settings,
        "phases": [(f"Time: {name}", wording.duration(value)) for name, value in report.run.seconds.items()],
        "rule_says": rule_says,
        "one_in": one_in,
        "number": wording.number,
        "searches": [_search(search) for search in report.searches],
        "max_layers": MAX_LAYERS,
        "max_examples": MAX_EXAMPLES,
        **triggers,
        **_notes(report),
    }


def _notes(report: Report) -> dict[str, Any]:
    """What a purifier found out on the way: its trials as a table, the rest as it is."""
    notes = {} if report.cleaning is None else report.cleaning.notes
    trials = notes.get("tried", [])
    whole = all(isinstance(one, dict) and {"method", "acc", "response", "seconds"} <= one.keys() for one in trials)
    rest = {k: v for k, v in notes.items() if k not in ("tried", "kept") and v not in ([], "", None)}
    done = report.cleaning
    care = [] if done is None or done.aftercare is None else cleaned.aftercare(report, done.aftercare)
    return {
        "care": [(name.capitalize(), text) for name, text in care],
        "trials": trials if whole else [],
        "done_notes": [(name.replace("_", " ").capitalize(), _plainly(value)) for name, value in rest.items()],
        "trained_on": any("none is held out" in warning for warning in report.warnings),
    }


def _plainly(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plainly, value))
    return wording.number(value) if isinstance(value, float) else str(value)


def _triggers(report: Report, suspect: LabelEvidence | None) -> dict[str, Any]:
    """The suspected label's trigger, the one with examples first, and the smallest of each other label."""
    own = [t for t in report.triggers if suspect is not None and t.label == suspect.label]
    own.sort(key=lambda t: not t.examples)
    others: dict[int, TriggerFacts] = {}
    for trigger in sorted(report.triggers, key=lambda t: t.size if math.isfinite(t.size) else math.inf):
        if trigger not in own:
            others.setdefault(trigger.label, trigger)
    return {
        "trigger": own[0] if own else None,
        "same_label": own[1:],
        "runners_up": list(others.values())[:MAX_RUNNERS_UP],
    }


def _charts(report: Report, suspect: LabelEvidence | None) -> dict[str, Markup]:
    """Each chart twice, for wide screens and for phones; the style sheet shows one of them."""
    label = suspect.label if suspect else None
    band, order = wording.band(report), wording.ranked(report)
    done = report.cleaning
    charts: dict[str, Markup] = dict.fromkeys(("sizes", "rates", "layers"), Markup(""))
    if order:
        charts["sizes"] = _size_chart(order, label, band, report.unit)
    if done is not None:
        charts["rates"] = _both(lambda width: svg.rates_chart(done, width))
        layers = done.layers[:MAX_LAYERS]
        if layers:
            charts["layers"] = _both(lambda width: svg.layers_chart(layers, width))
    return charts


def _search(search: Search) -> dict[str, Any]:
    """A further search and its chart."""
    rows = sorted(search.labels, key=lambda e: (not wording.has_size(e), e.size, e.label))
    label = search.triggers[0].label if search.triggers else None
    return {
        "found": search,
        "trigger": next(iter(search.triggers), None),
        "chart": _size_chart(rows, label, None, search.unit) if rows else Markup(""),
    }


def _size_chart(rows: list[LabelEvidence], label: int | None, band: wording.Band | None, unit: str) -> Markup:
    """Trigger sizes in pixels or, of faint changes, in grey levels."""
    if unit == "rms":
        rows = [
            dataclasses.replace(e, size=255 * e.size, sizes=tuple(None if s is None else 255 * s for s in e.sizes))
            for e in rows
        ]
        band = None if band is None else dataclasses.replace(band, median=255 * band.median, mad=255 * band.mad)

    def text(value: float) -> str:
        return wording.pixels(value) if unit == "px" else wording.number(round(value, 1))

    return _both(lambda width: svg.size_chart(rows, suspect=label, band=band, width=width, text=text))


def _both(chart: Callable[[int], Markup]) -> Markup:
    return svg.element("div", chart(WIDE), class_="wide") + svg.element("div", chart(NARROW), class_="narrow")


def _figure_names(seeds: Sequence[SeedResult]) -> list[str]:
    """Names of the figures of all seeds, in the order in which they first come up."""
    return list(dict.fromkeys(f.name for s in seeds for f in s.figures))


def _unbroken(helper: Callable[..., str]) -> Callable[..., str]:
    """The same with no-break spaces, so that a figure keeps its unit."""
    return lambda *values: helper(*values).replace(" ", "\N{NO-BREAK SPACE}")


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    return [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in sorted(config.items())]


def _sort_key(value: float | None) -> str:
    """A number to sort by; what is missing comes last."""
    return "1e999" if value is None or not math.isfinite(value) else repr(float(value))


def _png_uri(text: str) -> Markup | None:
    """A picture as data URI, or None for anything that is not base64 of a PNG."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    return Markup("data:image/png;base64,") + base64.b64encode(data).decode()
