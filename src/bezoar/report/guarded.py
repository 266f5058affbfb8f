"""What there is to say about a fitted guard, for the terminal."""

from __future__ import annotations

import textwrap

from bezoar.core.guarded import GuardReport
from bezoar.report.wording import percent, printable


def sentence(report: GuardReport) -> str:
    """The guard in a few sentences."""
    made = report.guard
    used = f", from the trigger of label {', '.join(map(str, report.triggers))}" if report.triggers else ""
    then = (
        "A flagged input keeps its answer: whoever reads the flag rejects it."
        if made.safe_label is None
        else f"A flagged input is answered with label {made.safe_label}."
    )
    return f"{made.method} watches the inputs of the model{used}. {then}"


def summary(report: GuardReport, width: int, saved: str = "") -> str:
    """The outcome for the terminal, ending in a newline.

    Args:
        report: What was fitted.
        width: Columns of the terminal; at least 40 are used.
        saved: The folder that it was written to.
    """
    width, made, took = max(width, 40), report.guard, report.latency
    lines = textwrap.wrap(printable(sentence(report)), width)
    lines += [
        "",
        f"{'threshold':12} {made.threshold:.4g}, for {percent(made.fpr)} of clean inputs at most",
        f"{'clean':12} {made.flagged:,} of {made.count:,} held-out images flagged "
        f"(95 % interval {percent(made.low)} to {percent(made.high)})",
        f"{'latency':12} {took.ratio:.1f} times the model alone "
        f"({1000 * took.guarded:.1f} ms against {1000 * took.bare:.1f} ms for one image)",
    ]
    lines += [f"{name:12} differs from PyTorch by {off:.1g} at most" for name, off in report.files.items()]
    for warning in report.warnings:
        lines += textwrap.wrap(f"Note: {printable(warning)}", width)
    if saved:
        lines += ["", f"In {saved}; from Python: bezoar.load_guard({saved!r}, model)"]
    return "\n".join(lines) + "\n"
