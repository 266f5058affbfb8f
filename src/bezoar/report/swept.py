"""All models of a sweep on one page, as SARIF, and as a few lines for the terminal."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from bezoar.core.swept import FAILURES, Outcome, Swept
from bezoar.report import wording
from bezoar.report._page import hashed, pages, part
from bezoar.report.sarif import SCHEMA_URI, described, plain_values, uri
from bezoar.report.wording import printable

MAX_ROWS = 5000
MAX_SHOWN = 12
#: From the gravest to the least.
_ORDER: tuple[Outcome, ...] = ("backdoored", "crashed", "killed", "lost", "refused", "inconclusive", "clean")
_COLOURS = {"backdoored": "1;31", "inconclusive": "1;33", "clean": "1;32"}
_RULES: dict[str, str] = {
    "backdoored": "BEZ001",
    "inconclusive": "BEZ002",
    **dict.fromkeys(FAILURES, "BEZ004"),
}
_NOT_SCANNED = (
    "ModelNotScanned",
    "warning",
    "The model could not be scanned",
    "It could not be read or does not fit the data, or its scan broke or reached a limit. Nothing is known about it.",
)


def ranked(rows: Sequence[Swept]) -> list[Swept]:
    """The gravest first, in the order of the list otherwise."""
    return sorted(rows, key=lambda row: _ORDER.index(row.outcome))


def counted(rows: Sequence[Swept]) -> str:
    """Number of models of each outcome, in words."""
    counts = Counter(row.outcome for row in rows)
    return ", ".join(f"{counts[one]:,} {one}" for one in _ORDER if counts[one]) or "none scanned"


def headline(rows: Sequence[Swept]) -> str:
    """What matters most, in a few words."""
    found = sum(row.outcome == "backdoored" for row in rows)
    return f"{found:,} of {len(rows):,} model{'' if len(rows) == 1 else 's'} backdoored"


def render_sweep(rows: Sequence[Swept], missing: int = 0) -> str:
    """The page. It is made from the rows alone and needs no network; each verdict links to its own report.

    Args:
        rows: One for each model.
        missing: Models that are not scanned yet.
    """
    style, script = part("report.css") + part("board.css"), part("report.js")
    page = (
        _environment()
        .get_template("page")
        .render(
            style=Markup(style),
            script=Markup(script),
            style_hash=hashed(style),
            script_hash=hashed(script),
            headline=headline(rows),
            counts=f"{len(rows):,} models: {counted(rows)}",
            rows=ranked(rows)[:MAX_ROWS],
            hidden=max(0, len(rows) - MAX_ROWS),
            missing=missing,
            folder=folder,
            rank=lambda row: _ORDER.index(row.outcome),
            tone=lambda row: {"clean": "good", "backdoored": "bad"}.get(row.outcome, ""),
            size=_size,
            note=note,
        )
    )
    return page.strip() + "\n"


@cache
def _environment() -> Environment:
    environment = pages("sweep.html.j2")
    environment.filters["points"] = lambda value: "-" if _missing(value) else f"{100 * value:.1f}"
    environment.filters["number"] = lambda value: "-" if _missing(value) else wording.number(value)
    environment.filters["key"] = lambda value: "1e999" if _missing(value) else repr(float(value))
    return environment


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def folder(row: Swept) -> str:
    """Where its report lies, seen from the page."""
    return f"models/{row.key[:2]}/{row.key}/"


def note(row: Swept) -> str:
    """Why there is no verdict, or how many warnings there are."""
    if not row.judged:
        return f"{row.error}. {row.hint}" if row.hint else row.error
    return f"{row.warnings} warning{'' if row.warnings == 1 else 's'}" if row.warnings else ""


def _size(row: Swept) -> str:
    if row.size is None or not math.isfinite(row.size):
        return "-"
    return wording.pixels(row.size) if row.unit == "px" else f"{wording.levels(row.size)} grey levels"


def sweep_summary(rows: Sequence[Swept], missing: int, scanned: int, color: bool = False) -> str:
    """The outcome in a few lines: all counts, and the gravest models by name."""
    lines = [
        f"{headline(rows)} ({len(rows) - scanned:,} were there already)" if scanned < len(rows) else headline(rows)
    ]
    lines[0] = _coloured(lines[0], "backdoored" if not lines[0].startswith("0 ") else "", color)
    lines.append(f"  {counted(rows)}" + (f"; {missing:,} not scanned yet" if missing else ""))
    grave = [row for row in ranked(rows) if row.outcome != "clean"]
    for row in grave[:MAX_SHOWN]:
        what = row.summary if row.judged else row.error
        lines.append(f"  {_coloured(row.outcome, row.outcome, color)}: {printable(row.model)}: {printable(what)}")
    if len(grave) > MAX_SHOWN:
        lines.append(f"  ... and {len(grave) - MAX_SHOWN:,} more on the page")
    return "\n".join(lines) + "\n"


def _coloured(text: str, kind: str, color: bool) -> str:
    return f"\x1b[{_COLOURS[kind]}m{text}\x1b[0m" if color and kind in _COLOURS else text


def sweep_sarif(rows: Sequence[Swept], missing: int = 0) -> str:
    """SARIF 2.1.0 text: a result for each model that is not clean, also for those that could not be scanned."""
    rules = described({"BEZ004": _NOT_SCANNED})
    places = {rule["id"]: number for number, rule in enumerate(rules)}
    version = next((row.versions["bezoar"] for row in rows if "bezoar" in row.versions), None)
    found = [row for row in rows if row.outcome != "clean"]
    run = {
        "tool": {"driver": {"name": "bezoar", "rules": rules, **({"version": version} if version else {})}},
        "automationDetails": {"id": "bezoar/sweep/"},
        "invocations": [{"executionSuccessful": not missing}],
        "artifacts": [_artifact(row) for row in found],
        "results": [_result(row, number, places) for number, row in enumerate(found)],
        "columnKind": "utf16CodeUnits",
        "properties": {"models": len(rows), "missing": missing} | dict(Counter(str(row.outcome) for row in rows)),
    }
    return json.dumps({"$schema": SCHEMA_URI, "version": "2.1.0", "runs": [run]}, indent=1, allow_nan=False) + "\n"


def _artifact(row: Swept) -> dict[str, Any]:
    made: dict[str, Any] = {"location": {"uri": uri(row.model)}, "roles": ["analysisTarget"]}
    return made | ({"hashes": {"sha-256": row.sha256}} if len(row.sha256) == 64 else {})


def _result(row: Swept, number: int, places: dict[str, int]) -> dict[str, Any]:
    identity = _RULES[row.outcome]
    text = row.summary if row.judged else f"Not scanned, {row.outcome}: {note(row)}"
    values = {"key": row.key, "outcome": row.outcome, "target": row.target, "label": row.label, "asr": row.asr}
    values |= {"acc": row.acc, "sizeRatio": row.ratio, "triggerFraction": row.fraction, "report": folder(row)}
    return {
        "ruleId": identity,
        "ruleIndex": places[identity],
        "level": "error" if row.outcome == "backdoored" else "warning",
        "kind": "fail",
        "message": {"text": printable(text) or row.outcome},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": uri(row.model), "index": number}}}],
        "partialFingerprints": {"modelAndTarget/v1": f"{row.sha256}:{'-' if row.target is None else row.target}"},
        "properties": plain_values(values),
    }
