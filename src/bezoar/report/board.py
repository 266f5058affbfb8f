"""The leaderboard of a grid as one HTML file: sortable tables and trade-off plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from bezoar.core.cell import CellResult
from bezoar.report import svg
from bezoar.report._page import hashed, pages, part

MAX_CELLS = 5000


@dataclass(frozen=True)
class Line:
    """A purifier over all victims with so many clean images; rates in [0, 1], means over victims and seeds.

    Attributes:
        purifier, images: Which.
        cells, refused, failed: How many were measured; those that failed are in no figure, those that the purifier
            refused count with the model as it was.
        asr, worst_asr, ra, der: Of backdoored victims; None without one.
        acc_loss, worst_acc_loss: Fall of ACC, of all victims.
        clean_loss: Fall of ACC, of victims without a backdoor; None without one.
        cpu_seconds, image_gradients: Without the scan.
        oracle: Whether it chose with the ground truth.
    """

    purifier: str
    images: int
    cells: int
    refused: int
    failed: int
    asr: float | None
    worst_asr: float | None
    ra: float | None
    der: float | None
    acc_loss: float | None
    worst_acc_loss: float | None
    clean_loss: float | None
    cpu_seconds: float | None
    image_gradients: float | None
    oracle: bool


def lines(results: Iterable[CellResult]) -> list[Line]:
    """One line for each purifier and number of images, the best mean DER first."""
    groups: dict[tuple[str, int], list[CellResult]] = {}
    for one in results:
        groups.setdefault((one.purifier, one.images), []).append(one)
    made = [_line(*key, found) for key, found in groups.items()]
    return sorted(made, key=lambda line: (-line.images, -(line.der if line.der is not None else -1.0), line.purifier))


def _line(purifier: str, images: int, found: Sequence[CellResult]) -> Line:
    sound = [one for one in found if one.status != "failed"]
    planted = [one for one in sound if one.asr_after is not None]
    losses = [_loss(one) for one in sound]
    return Line(
        purifier=purifier,
        images=images,
        cells=len(found),
        refused=sum(one.status == "refused" for one in found),
        failed=len(found) - len(sound),
        asr=_mean(one.asr_after for one in planted),
        worst_asr=max((one.asr_after or 0.0 for one in planted), default=None),
        ra=_mean(one.ra_after for one in planted),
        der=_mean(one.der for one in planted),
        acc_loss=_mean(losses),
        worst_acc_loss=max(losses, default=None),
        clean_loss=_mean(_loss(one) for one in sound if one.asr_after is None),
        cpu_seconds=_mean(one.cpu_seconds for one in sound),
        image_gradients=_mean(float(one.image_gradients) for one in sound),
        oracle=any(one.oracle for one in found),
    )


def _loss(one: CellResult) -> float:
    assert one.acc_before is not None
    assert one.acc_after is not None
    return one.acc_before - one.acc_after


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def render_board(results: Sequence[CellResult], missing: int = 0) -> str:
    """The page. It is made from the results alone and needs no network.

    Args:
        results: All cells that are there.
        missing: Cells of the grid that are not.
    """
    style, script = part("report.css") + part("board.css"), part("report.js")
    table = lines(results)
    victims = sorted({one.victim for one in results})
    budgets = sorted({one.images for one in results}, reverse=True)
    page = (
        _environment()
        .get_template("page")
        .render(
            style=Markup(style),
            script=Markup(script),
            style_hash=hashed(style),
            script_hash=hashed(script),
            lines=table,
            results=results[:MAX_CELLS],
            hidden=max(0, len(results) - MAX_CELLS),
            matrices=[_matrix(results, victims, images) for images in budgets],
            plots=[
                (images, [svg.trade_off(_points(table, images), width) for width in (720, 320)])
                for images in budgets
                if _points(table, images)
            ],
            victims=len(victims),
            missing=missing,
            failed=sum(one.status == "failed" for one in results),
            oracle=any(line.oracle for line in table),
        )
    )
    return page.strip() + "\n"


def _points(table: Sequence[Line], images: int) -> list[tuple[str, float, float]]:
    """Name, ACC loss and ASR of each purifier, in points; an accuracy gained counts as none lost."""
    return [  # what refused everything did nothing that could be plotted
        (line.purifier, max(0.0, 100 * line.acc_loss), 100 * line.asr)
        for line in table
        if line.images == images and line.acc_loss is not None and line.asr is not None and line.refused < line.cells
    ]


def _matrix(results: Sequence[CellResult], victims: Sequence[str], images: int) -> dict[str, Any]:
    """ASR and ACC of each purifier on each victim, means over seeds."""
    here = [one for one in results if one.images == images]
    purifiers = [line.purifier for line in lines(here)]
    rows = []
    for victim in (v for v in victims if any(one.victim == v for one in here)):
        own = [one for one in here if one.victim == victim]
        sound = [one for one in own if one.status != "failed"]
        cells = []
        for purifier in purifiers:
            found = [one for one in sound if one.purifier == purifier]
            refused = bool(found) and all(one.status == "refused" for one in found)
            cells.append((_mean(one.asr_after for one in found), _mean(one.acc_after for one in found), refused))
        before = (_mean(one.asr_before for one in sound), _mean(one.acc_before for one in sound))
        rows.append((victim, before, cells))
    return {"images": images, "purifiers": purifiers, "rows": rows}


@cache
def _environment() -> Environment:
    environment = pages("board.html.j2")
    environment.filters["points"] = _points_text
    return environment


def _points_text(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
