"""What a training on untrusted data found: one HTML file, and a summary for the terminal."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment
from markupsafe import Markup

from bezoar.core.trained import LabelShare, TrainReport
from bezoar.report import svg, wording
from bezoar.report._page import hashed, pages, part
from bezoar.report.wording import percent, printable

_MOST_LABELS = 30


@dataclass(frozen=True)
class Picture:
    """An isolated example: place and name in the data, label, loss or score it was ranked by, and PNG as base64."""

    position: int
    name: str
    label: str
    value: float
    png: str


def render_training(report: TrainReport, pictures: Sequence[Picture], model: str) -> str:
    """The page; it needs no network and no script.

    Args:
        report: What the training found.
        pictures: The first isolated examples, most suspicious first.
        model: Path of the trained model, for the commands that it shows.
    """
    style = part("report.css") + part("board.css") + part("contact_sheet.css") + part("trained.css")
    page = (
        _environment()
        .get_template("page")
        .render(
            report=report,
            pictures=pictures,
            style=Markup(style),
            style_hash=hashed(style),
            sentence=sentence(report),
            findings=finding_lines(report),
            labels=[one for one in report.labels if one.suspects or one.flagged][:_MOST_LABELS],
            judged=[one for one in report.labels if one.statistic is not None][:_MOST_LABELS],
            plots=[svg.loss_curves(report.curve, width) for width in (720, 320)] if len(report.curve) > 1 else [],
            crisp=max(report.shape[1:]) <= 96,
            scan=f"bezoar scan {shlex.quote(model)} --arch {shlex.quote(report.arch)} --data CLEAN --out scan/",
            purify=f"bezoar purify {shlex.quote(model)} --arch {shlex.quote(report.arch)} --data CLEAN --out cleaned/",
        )
    )
    return page.strip() + "\n"


def sentence(report: TrainReport) -> str:
    """The outcome in a few sentences."""
    trained = f"{report.arch} was trained with {report.method} on {report.data.count:,} examples."
    if report.acc is not None:
        trained += f" Accuracy on {report.acc.count:,} test images: {_rate(report.acc.value)}."
    if not report.suspects:
        if report.rule is not None:
            return f"{trained} The filter finds nothing suspect, so nothing was taken out."
        return f"{trained} {report.method} isolates no example."
    first = report.labels[0]
    why = "isolated since they were learned fastest"
    if report.rule is not None:
        why = "taken out before the final training"
    share = first.suspects / report.suspects
    return f"{trained} {report.suspects:,} were {why}, {_rate(share)} of them under the label {label_text(first)}."


def finding_lines(report: TrainReport) -> list[tuple[str, tuple[str, ...]]]:
    """What is odd about the data: a sentence and some examples for each finding."""
    found = report.findings
    lines: list[tuple[str, tuple[str, ...]]] = []
    if found.unreadable:
        lines.append((f"{found.unreadable:,} images could not be read and were left out.", found.unreadable_examples))
    if found.duplicates:
        lines.append(
            (f"{found.duplicates:,} images are exact copies of one that came before.", found.duplicate_examples)
        )
    if found.conflicts:
        lines.append(
            (
                f"{found.conflicts:,} images also stand under another label: at most one is right.",
                found.conflict_examples,
            )
        )
    if found.empty:
        shown = tuple(report.data.names[label] for label in found.empty[:10])
        lines.append((f"{len(found.empty):,} labels have no example.", shown))
    return lines + [(note, ()) for note in found.notes]


def label_text(one: LabelShare) -> str:
    """The label, with its name where it has one."""
    return printable(str(one.label) if one.name == str(one.label) else f"{one.label} ({one.name})")


def summary(report: TrainReport, width: int, saved: str) -> str:
    """The outcome for the terminal, ending in a newline.

    Args:
        report: What was found.
        width: Columns of the terminal; at least 40 are used.
        saved: Where the page was written.
    """
    width = max(width, 40)
    lines = textwrap.wrap(printable(sentence(report)), width)
    if report.acc is None:
        lines += textwrap.wrap(
            f"{_rate(report.kept_acc.value)} of the other training examples get their label; "
            "give --test-data for an accuracy on images that the model has not seen.",
            width,
        )
    if report.rule is not None:
        flagged = ", ".join(label_text(one) for one in report.labels if one.flagged)
        lines += textwrap.wrap(printable(f"Suspect: {report.rule}. Flagged labels: {flagged or 'none'}."), width)
    for text, examples in finding_lines(report):
        more = f" ({'; '.join(examples[:3])})" if examples else ""
        lines += textwrap.wrap(f"Data: {printable(text + more)}", width)
    for warning in report.warnings:
        lines += textwrap.wrap(f"Note: {printable(warning)}", width)
    return "\n".join([*lines, "", f"Report: {saved}"]) + "\n"


def _rate(value: float) -> str:
    return percent(value).replace(" ", "\N{NO-BREAK SPACE}")


@cache
def _environment() -> Environment:
    environment = pages("trained.html.j2")
    environment.filters |= {"percent": percent, "label_text": label_text, "number": wording.number}
    return environment
