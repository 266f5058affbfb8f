"""What is said of the evidence of scorers."""

from __future__ import annotations

from bezoar.core.results import Evidence, Report
from bezoar.report.wording import label_text, number


def rule_says(one: Evidence) -> str:
    """The verdict of the paper's own rule."""
    return {None: "has none", True: "backdoored", False: "clean"}[one.suspect]


def scored(report: Report, one: Evidence) -> str:
    """The evidence in a line."""
    if not one.labels:
        return "no label was looked at"
    first, *others = one.labels
    source = "" if one.source is None else f" from {label_text(report, one.source)}"
    next_ = f", next {number(others[0].score)}" if others else ""
    says = "" if one.suspect is None else f"; its own rule says {rule_says(one)}"
    return f"label {label_text(report, first.label)}{source}, score {number(first.score)}{next_}{says}"
