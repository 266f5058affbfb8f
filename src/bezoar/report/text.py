"""The short summary for the terminal."""

from __future__ import annotations

import textwrap

from bezoar.core.results import LabelEvidence, Report
from bezoar.report import cleaned, searches, wording
from bezoar.report.scored import beside, score, scored, together
from bezoar.report.wording import percent, pixels, printable

MAX_LINES = 25
_COLOURS = {"backdoored": "1;31", "clean": "1;32", "inconclusive": "1;33", "cleaned": "1;36"}
_INDENT = 17


def summary(report: Report, width: int, color: bool = False, saved: str | None = None) -> str:
    """The outcome of a run in at most 25 lines, ending in a newline.

    Args:
        report: What the run found.
        width: Columns of the terminal; at least 40 are used.
        color: Whether to use ANSI colours.
        saved: Where the HTML report was written, if it was.
    """
    width = max(width, 40)
    title = wording.title(report)
    heading = printable(title.word)
    lines = [f"\x1b[{_COLOURS[title.kind]}m{heading}\x1b[0m" if color else heading]
    lines += _wrap(printable(wording.sentence(report)), width, 3)
    lines.append("")
    rows = [*_scan_rows(report), *_run_rows(report)]
    body = [line for name, text in rows for line in _row(name, text, width)]
    tail = [*_row("Report", saved, width, whole=True)] if saved else []
    tail += ["", *_next(wording.next_steps(report), width)]
    room = MAX_LINES - len(lines) - len(tail)
    return "\n".join([*lines, *body[:room], *tail]) + "\n"


def _scan_rows(report: Report) -> list[tuple[str, str]]:
    evidence = wording.suspect(report)
    if report.verdict is None:
        return []
    rows: list[tuple[str, str]] = []
    if evidence is not None:
        if report.target is None:
            rows.append(("Smallest trigger", f"label {wording.label_text(report, evidence.label)}"))
        rows.append(_size_row(report, evidence))
        rows.append(("Success (ASR)", f"{percent(evidence.asr)} of held-out {wording.whose(report)}"))
        ratio = wording.size_ratio(report)
        if ratio is not None:
            value, bound = (wording.number(v) for v in ratio)
            rows.append(("Size ratio", f"{value} of the median of the other labels (suspect: at most {bound})"))
        own = score(report)
        if own is None:
            rows.append(("Anomaly index", f"{wording.number(evidence.index)} (decides nothing)"))
        else:
            value, bound = (wording.number(v) for v in (own.value, own.bound))
            rows.append(("Score", f"{value} (suspect: above {bound})"))
        moved = wording.natural(report)
        if moved is not None:
            rows.append(("Natural", f"{wording.number(moved.value)} (from 1 on, it moves a student of the model too)"))
    if report.combination is not None:
        rows.append(("All together", together(report, report.combination)))
    rows += [(searches.name(one), searches.line(report, one)) for one in report.searches]
    rows += [(one.method, scored(report, one)) for one in beside(report)]
    if report.seeds and evidence is not None:
        rows.append(("Seeds", " ".join(wording.votes(report))))
    return rows


def _size_row(report: Report, evidence: LabelEvidence) -> tuple[str, str]:
    if report.unit == "rms":
        return "Change (RMS)", f"{wording.levels(evidence.size)} grey levels, of all pixels"
    total = report.model.height * report.model.width
    return "Trigger size", f"{pixels(evidence.size)} of {total:,} ({percent(evidence.fraction)})"


def _run_rows(report: Report) -> list[tuple[str, str]]:
    run, check, done = report.run, report.preflight, report.cleaning
    rows = [("Accuracy (ACC)", f"{percent(check.acc)} on {check.count:,} images (guessing: {percent(check.chance)})")]
    if done is not None:
        rows.append(("Cleaned with", done.method))
        rows += [(f"  {name}", text) for name, text in cleaned.trials(report)]
        rows.append(("  ACC", f"{percent(done.acc_before)} -> {percent(done.acc_after)}"))
        if done.asr_before is not None:
            rows.append((f"  ASR, label {done.target}", f"{percent(done.asr_before)} -> {percent(done.asr_after)}"))
        rows += _aftercare_rows(report)
        if done.output:
            rows.append(("  written to", done.output))
    spent = ", stopped by the time budget" if run.budget_spent else ""
    threads = f"{run.threads} thread{'s' if run.threads != 1 else ''}"
    rows.append(("Time", f"{wording.duration(wording.total_seconds(report))} on {run.device}, {threads}{spent}"))
    shown = report.warnings if len(report.warnings) <= 2 else report.warnings[:1]
    rows += [("Warning", text) for text in shown]
    if len(shown) < len(report.warnings):
        rows.append(("Warning", f"{len(report.warnings) - len(shown)} more in the report"))
    return rows


def _aftercare_rows(report: Report) -> list[tuple[str, str]]:
    care = None if report.cleaning is None else report.cleaning.aftercare
    return [] if care is None else [(f"  {name}", text) for name, text in cleaned.aftercare(report, care)]


def _row(name: str, text: str, width: int, whole: bool = False) -> list[str]:
    text = printable(text)
    # A path stays on one line whatever the width, so that it can be copied.
    lines = [text] if whole or name.startswith("  written") else _wrap(text, width - _INDENT - 2, 2)
    first, *rest = lines or [""]
    name = f"{name:<{_INDENT - 1}} "
    return [f"  {name}{first}", *(" " * (_INDENT + 2) + line for line in rest)]


def _next(text: str, width: int) -> list[str]:
    """The advice, with the command that it ends in on a line of its own."""
    advice, colon, command = text.partition(": bezoar ")
    lines = _wrap(advice + (":" if colon else ""), width, 3)
    return [*lines, f"  bezoar {command}"] if colon else lines


def _wrap(text: str, width: int, most: int) -> list[str]:
    # Commands and figures such as "12 px" may break; what matters is that nothing runs over the edge.
    return textwrap.wrap(text, max(width, 20), max_lines=most, placeholder=" ...")
