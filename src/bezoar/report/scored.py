"""What is said of the evidence of scorers, and of all sources together."""

from __future__ import annotations

from bezoar.core.results import Figure, Report
from bezoar.core.scored import Combination, Evidence
from bezoar.report.wording import label_text, number


def rule_says(one: Evidence) -> str:
    """The verdict of the paper's own rule."""
    return {None: "has none", True: "backdoored", False: "clean"}[one.suspect]


def score(report: Report) -> Figure | None:
    """The score that the verdict rests on, with its bound; None if the rule uses none."""
    return report.rule.figure("score") if report.rule else None


def beside(report: Report) -> list[Evidence]:
    """The evidence that is not shown as a search of its own."""
    searched = {report.method, *(search.method for search in report.searches)}
    return [one for one in report.evidence if one.method not in searched]


def scored(report: Report, one: Evidence) -> str:
    """The evidence in a line."""
    if not one.labels:
        return "no label was looked at"
    first, *others = one.labels
    source = "" if one.source is None else f" from {label_text(report, one.source)}"
    next_ = f", next {number(others[0].score)}" if others else ""
    says = "" if one.suspect is None else f"; its own rule says {rule_says(one)}"
    return f"label {label_text(report, first.label)}{source}, score {number(first.score)}{next_}{says}"


def together(report: Report, whole: Combination) -> str:
    """The p-value of all sources together in a line."""
    agree = sum(source.leader == whole.leader for source in whole.sources)
    return (
        f"p = {number(whole.pvalue)} (backdoored: at most {number(whole.fpr)}); {agree} of {len(whole.sources)} "
        f"sources name label {label_text(report, whole.leader)} first"
    )


def one_in(surprise: float) -> str:
    """A surprise as a share of clean labels: ``1 in 250``."""
    return f"1 in {number(10 ** min(surprise, 9))}" + (" or rarer" if surprise >= 9 else "")
