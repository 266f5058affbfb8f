"""What a filter found, in words and for the terminal."""

from __future__ import annotations

import textwrap

from bezoar.core.filtered import FilterReport, LabelFindings
from bezoar.report.wording import percent, printable

_MOST = 5
_WORDS = {"backdoored": "POISONED", "clean": "NO POISON FOUND", "inconclusive": "NO VERDICT"}
_COLOURS = {"backdoored": "1;31", "clean": "1;32", "inconclusive": "1;33"}


def word(report: FilterReport) -> str:
    """The verdict in a word or two."""
    return _WORDS[report.verdict]


def label_text(one: LabelFindings) -> str:
    """The label, with its name where it has one."""
    return printable(str(one.label) if one.name == str(one.label) else f"{one.label} ({one.name})")


def sentence(report: FilterReport) -> str:
    """The outcome in one or two sentences."""
    share = f"{report.suspects:,} of {report.count:,} examples are suspect"
    if report.verdict == "clean":
        return f"{report.method} flags no label. {share}."
    if report.verdict == "backdoored":
        named = [one for one in report.labels if one.flagged]
        shown = ", ".join(label_text(one) for one in named[:_MOST])
        more = f" and {len(named) - _MOST} more" if len(named) > _MOST else ""
        plural = "labels" if len(named) > 1 else "label"
        return f"{share}; the suspects of {plural} {shown}{more} stand out."
    first = report.labels[0]
    ahead = _ahead(report)
    lead = f" Label {label_text(first)} stands out most{ahead}." if first.statistic is not None else ""
    return f"{share}. {report.method} takes examples out of a clean set too, so it gives no verdict.{lead}"


def _ahead(report: FilterReport) -> str:
    values = [one.statistic for one in report.labels if one.statistic is not None]
    if len(values) < 2 or values[1] <= 0:
        return ""
    return f", {values[0] / values[1]:.1f} times the next"


def summary(report: FilterReport, width: int, color: bool = False, saved: str | None = None) -> str:
    """The outcome for the terminal, ending in a newline.

    Args:
        report: What was found.
        width: Columns of the terminal; at least 40 are used.
        color: Whether to use ANSI colours.
        saved: Where the contact sheet was written, if it was.
    """
    width = max(width, 40)
    heading = word(report)
    lines = [f"\x1b[{_COLOURS[report.verdict]}m{heading}\x1b[0m" if color else heading]
    lines += textwrap.wrap(printable(sentence(report)), width)
    lines += ["", f"{'Label':24} {'examples':>9} {'suspect':>9} {'share':>7} {'statistic':>10}"]
    for one in report.labels[:_MOST]:
        mark = " *" if one.flagged else ""
        lines.append(
            f"{textwrap.shorten(label_text(one), 24, placeholder='...'):24} {one.count:>9,} {one.suspects:>9,} "
            f"{percent(one.suspects / one.count if one.count else 0.0):>7} {statistic_text(one):>10}{mark}"
        )
    if len(report.labels) > _MOST:
        lines.append(f"and {len(report.labels) - _MOST} labels more")
    lines += ["", *textwrap.wrap(f"Rule: {printable(report.rule)}", width)]
    for warning in report.warnings:
        lines += textwrap.wrap(f"Note: {printable(warning)}", width)
    if saved:
        lines += ["", f"Report: {saved}"]
    return "\n".join(lines) + "\n"


def statistic_text(one: LabelFindings) -> str:
    """The label's statistic, or a dash."""
    return "-" if one.statistic is None else f"{one.statistic:.3g}"
