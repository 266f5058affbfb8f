"""What is said of the searches beside the one that leads a report."""

from __future__ import annotations

from bezoar.core.results import Report, Search
from bezoar.report.wording import label_text, number


def of_pairs(search: Search) -> bool:
    """Whether its triggers are made for images of one label each."""
    return bool(search.triggers) and search.triggers[0].source is not None


def name(search: Search) -> str:
    """Its name in a line of the terminal."""
    return "One source" if of_pairs(search) else "As a patch" if search.unit == "px" else "Faint changes"


def title(search: Search) -> str:
    """Heading of its section."""
    if of_pairs(search):
        return "Small patches on images of one label"
    return "Small patches" if search.unit == "px" else "Faint changes of the whole image"


def looked_for(search: Search) -> str:
    """What was searched, and on which images."""
    if of_pairs(search):
        return "the smallest patch that turns images of one label into another one, and which counts most for each"
    what = "the smallest patch" if search.unit == "px" else "the faintest change of all pixels (root mean square)"
    return f"{what} that turns images of other labels into this one"


def line(report: Report, search: Search) -> str:
    """Its verdict and its leading label in a line."""
    if not search.triggers:
        return search.verdict
    first = search.triggers[0]
    if first.source is not None:
        pair = f"label {label_text(report, first.source)} to {label_text(report, first.label)}"
        return f"{search.verdict}; foremost {pair}, {_figure(search, 'score', 'score', 'above')}"
    size = _figure(search, "size ratio", "of the median", "at most")
    return f"{search.verdict}; smallest leads to label {label_text(report, first.label)}, {size}"


def _figure(search: Search, figure: str, what: str, suspect: str) -> str:
    found = search.rule.figure(figure)
    if found is None:
        return f"no {figure}"
    value = f"{what} {number(found.value)}" if what == figure else f"{number(found.value)} {what}"
    return f"{value} (suspect: {suspect} {number(found.bound)})"
