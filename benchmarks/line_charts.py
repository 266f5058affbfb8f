"""Line charts as SVG files that stand alone: a line with dots for each series, and bounds as dashed lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from bezoar.core.results import write_atomic
from bezoar.report.svg import Axis, element, nice_step

COLOURS = ("#1f5fa8", "#b5541c", "#2f7d4f", "#7a4a9e", "#7d6608")
STYLE = (
    "text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}.curve{fill:none;stroke-width:2}"
    ".bound{stroke:#999;stroke-dasharray:5 4}"
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 58.0, 16.0, 44.0, 46.0

Points = Sequence[tuple[float, float]]


def line_chart(
    series: Mapping[str, Points], *, title: str, across: str, up: str, bounds: Mapping[str, float] | None = None
) -> Markup:
    """The chart; both axes start at zero.

    Args:
        series: Points of each line by name.
        title: Above the chart.
        across, up: Names of the axes.
        bounds: Levels to draw, by name.
    """
    every = [point for points in series.values() for point in points]
    levels = [*(y for _, y in every), *(bounds or {}).values()]
    x_axis = Axis(max([x for x, _ in every], default=1.0) * 1.03 or 1.0, LEFT, WIDTH - RIGHT)
    y_axis = Axis(max(levels, default=1.0) * 1.08 or 1.0, HEIGHT - BOTTOM, TOP)
    parts = [element("style", Markup(STYLE)), element("rect", width=WIDTH, height=HEIGHT, fill="#fff")]
    parts.append(element("text", title, x=LEFT, y=16, font_weight="bold"))
    parts += _grid(x_axis, y_axis)
    for name, level in (bounds or {}).items():
        y = y_axis(level)
        parts.append(element("line", class_="bound", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(element("text", name, x=WIDTH - RIGHT, y=y - 4, text_anchor="end"))
    at = LEFT
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        placed = [(x_axis(x), y_axis(y)) for x, y in sorted(points)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        parts.append(element("path", class_="curve", d=path, stroke=colour))
        parts += [element("circle", cx=x, cy=y, r=3.5, fill=colour) for x, y in placed]
        parts.append(element("rect", x=at, y=24, width=12, height=4, fill=colour))
        parts.append(element("text", name, x=at + 17, y=31))
        at += 30 + 7 * len(name)
    parts.append(element("text", across, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle"))
    turned = f"rotate(-90 14 {HEIGHT / 2:g})"
    parts.append(element("text", up, x=14, y=HEIGHT / 2, text_anchor="middle", transform=turned))
    box = f"0 0 {WIDTH} {HEIGHT}"
    return element("svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=box, width=WIDTH, height=HEIGHT)


def _grid(x_axis: Axis, y_axis: Axis) -> list[Markup]:
    parts = []
    for tick in x_axis.ticks():
        x = x_axis(tick)
        parts.append(element("line", class_="grid", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM))
        parts.append(element("text", f"{tick:g}", x=x, y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    step = nice_step(y_axis.top, 6)
    for number in range(int(y_axis.top / step + 1e-9) + 1):
        y = y_axis(number * step)
        parts.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(element("text", f"{number * step:g}", x=LEFT - 6, y=y + 4, text_anchor="end"))
    return parts


def draw(path: Path, chart: Markup) -> None:
    """Write a chart."""
    write_atomic(path, str(chart) + "\n")
