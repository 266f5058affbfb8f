"""Charts as hand-written SVG: text in, markup out, no colours (the style sheet gives them by class).

Every chart takes its width in CSS pixels, so that text keeps its size: the page carries one for wide screens and paper
and one for phones. Scales are linear from zero, as bars need and as the MAD, a distance, is defined.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from bezoar.core.results import Cleaning, LabelEvidence, LayerChange
from bezoar.core.trained import CurvePoint
from bezoar.report.wording import Band, has_size, number, percent, pixels, printable

ROW = 24
ALL_ROWS = 30  # Above this many labels only the smallest get a row, and all of them a distribution.
FEW_ROWS = 15
VALUES = 62  # Room for the values, right-aligned in a column of their own.
_CHARACTER = 7.0  # Width of a character at 12 px in the widest of the usual system fonts.


def element(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """One element; text and attribute values are escaped, ``Markup`` children are not; ``_`` becomes ``-``."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), _value(value))
        for key, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(escape(child if isinstance(child, Markup) else printable(child)) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), pairs, inner)


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else printable(str(value))


@dataclass(frozen=True)
class Axis:
    """A linear scale from 0 to ``top`` over the pixels ``left`` to ``right``."""

    top: float
    left: float
    right: float

    def __call__(self, value: float) -> float:
        """Position of a value; values past the end stay at the end."""
        return self.left + (self.right - self.left) * min(max(value / self.top, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round values, few enough for their labels not to touch."""
        step = nice_step(self.top, max(3, int((self.right - self.left) / 75)))
        return [i * step for i in range(int(self.top / step + 1e-9) + 1)]


def nice_step(top: float, count: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides 0 to ``top`` into at most ``count`` steps."""
    raw = top / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


def shorten(text: str, width: float) -> str:
    """Text that fits into ``width`` pixels at 12 px, with an ellipsis where it was cut."""
    text, room = printable(text), width / _CHARACTER
    wide = [2.0 if unicodedata.east_asian_width(c) in "WF" else 1.0 for c in text]
    if sum(wide) <= room:
        return text
    used, kept = 1.0, 0
    while kept < len(text) and used + wide[kept] <= room:
        used += wide[kept]
        kept += 1
    return text[:kept].rstrip() + "…"


@dataclass(frozen=True)
class Bar:
    """One row: a name, a value (None for no bar), the value as text, a class, and small marks along the bar."""

    name: str
    value: float | None
    text: str
    kind: str = "plain"
    marks: tuple[float, ...] = ()
    hint: str = ""


def bar_chart(
    bars: Sequence[Bar], *, width: int, title: str, top: float | None = None, row: int = ROW, share: float = 0.32
) -> Markup:
    """Horizontal bars, one row each in the order given; names take at most ``share`` of the width."""
    axis = _axis(width, top or _top(b.value for b in bars), _gutter(bars, width, share))
    parts = [_row(bar, axis, width, 4 + row * i, row) for i, bar in enumerate(bars)]
    return _svg(width, row * len(bars) + 8, title, *parts)


def size_chart(
    labels: Sequence[LabelEvidence],
    *,
    suspect: int | None,
    band: Band | None,
    width: int,
    text: Callable[[float], str] = pixels,
) -> Markup:
    """Trigger size per label over the MAD band.

    Args:
        labels: Smallest first; all get a row up to 30 of them, else the 15 smallest do, and a histogram shows all.
        suspect: The label to highlight.
        band: Median and band to draw, or None.
        width: In CSS pixels.
        text: A size with its unit.
    """
    shown = rows(labels)
    bars = [size_bar(e, suspect, text) for e in shown]
    values = [e.size for e in labels if has_size(e)]
    axis = _axis(width, _top([*values, band.median if band else None]), _gutter(bars, width))
    first, end = 26, 26 + ROW * len(bars)
    parts = [_row(bar, axis, width, first + ROW * i) for i, bar in enumerate(bars)]
    if len(shown) < len(labels):
        parts.append(_distribution(labels, axis, end + 14, suspect, text))
        end += 14 + 92
    title = f"Trigger size of {len(labels):,} labels, smallest first"
    if band:
        title += f"; median {text(band.median)}, band from {text(band.low)} to {text(band.high)}"
    back = [_band(band, axis, first - 6, end, text)] if band else []
    return _svg(width, end + 24, title, *back, *parts, _ticks(axis, end))


def rows(labels: Sequence[LabelEvidence]) -> list[LabelEvidence]:
    """The labels that get a row of their own."""
    return list(labels if len(labels) <= ALL_ROWS else labels[:FEW_ROWS])


def size_bar(evidence: LabelEvidence, suspect: int | None, text: Callable[[float], str] = pixels) -> Bar:
    """The row of one label."""
    name = evidence.name.strip()
    name = f"{evidence.label}  {name}" if name and name != str(evidence.label) else str(evidence.label)
    seeds = tuple(s for s in evidence.sizes if s is not None and math.isfinite(s))
    if not has_size(evidence):
        return Bar(name, None, "none", "failed", hint=f"{name}: no trigger reached the success rate asked for")
    kind = "suspect" if evidence.label == suspect else evidence.status
    early = ", stopped early" if evidence.status == "eliminated" else ""
    size = f"{text(evidence.size)}, {percent(evidence.fraction)} of the image"
    hint = f"{name}: {size}, index {number(evidence.index)}{early}"
    return Bar(name, evidence.size, text(evidence.size), kind, seeds if len(seeds) > 1 else (), hint)


def rates_chart(cleaning: Cleaning, width: int) -> Markup:
    """Clean accuracy and trigger success, before and after."""
    rates = [("ACC before", cleaning.acc_before, "acc-before"), ("ACC after", cleaning.acc_after, "acc-after")]
    if cleaning.asr_before is not None and cleaning.asr_after is not None:
        rates += [("ASR before", cleaning.asr_before, "asr-before"), ("ASR after", cleaning.asr_after, "asr-after")]
    bars = [Bar(n, v if math.isfinite(v) else None, percent(v), k) for n, v, k in rates]
    return bar_chart(bars, width=width, top=1.0, title="Clean accuracy and success of the trigger, before and after")


def layers_chart(layers: Sequence[LayerChange], width: int) -> Markup:
    """Relative change of tensors."""
    # Names of tensors differ in the middle and at the end, so they get more room and lose their middle.
    room = int((0.5 * width - 10) / _CHARACTER)
    bars = [
        Bar(
            _middle(c.name, room),
            c.relative if math.isfinite(c.relative) else None,
            percent(c.relative),
            hint=f"{c.name}: {percent(c.relative)}",
        )
        for c in layers
    ]
    return bar_chart(bars, width=width, title="Relative change of the weights, largest first", row=20, share=0.5)


def swatch(kind: str) -> Markup:
    """A sample of a bar, the median line or the band, for the legend."""
    shapes = {
        "median": element("line", class_="median", x1=9, y1=0, x2=9, y2=12),
        "band": element("rect", class_="band", x=0, y=0, width=18, height=12),
        "mark": element("rect", class_="bar complete", x=0, y=2, width=18, height=8)
        + Markup("").join(element("rect", class_="mark", x=x, y=2, width=1.5, height=8) for x in (9, 12, 14)),
    }
    shape = shapes.get(kind) or element("rect", class_=f"bar {kind}", x=0.5, y=1.5, width=17, height=9, rx=2)
    return element("svg", shape, class_="swatch", width=18, height=12, viewBox="0 0 18 12", aria_hidden="true")


def _svg(width: int, height: float, title: str, *children: Markup) -> Markup:
    return element(
        "svg",
        element("title", title),
        *children,
        class_="chart",
        role="img",
        viewBox=f"0 0 {width} {height:g}",
        width=width,
        height=float(height),
        aria_label=title,
    )


def _top(values: Iterable[float | None]) -> float:
    finite = [v for v in values if v is not None and math.isfinite(v) and v > 0]
    return max(finite) * 1.02 if finite else 1.0


def _middle(text: str, most: int) -> str:
    text = printable(text)
    tail = 5 * most // 8
    return text if len(text) <= most else f"{text[: most - tail - 1]}…{text[-tail:]}"


def _gutter(bars: Sequence[Bar], width: int, share: float = 0.32) -> float:
    longest = max((len(b.name) for b in bars), default=0) * _CHARACTER
    return min(max(longest, 24.0), share * width) + 10


def _axis(width: int, top: float, left: float) -> Axis:
    return Axis(top, left, width - VALUES - 6)


def _row(bar: Bar, axis: Axis, width: int, y: float, height: int = ROW) -> Markup:
    middle = y + height / 2
    name = shorten(bar.name, axis.left - 8)
    parts = [element("title", bar.hint or f"{bar.name}: {bar.text}")]
    parts.append(element("text", name, class_=f"name {bar.kind}", x=axis.left - 8, y=middle + 4, text_anchor="end"))
    if bar.value is not None:
        length = max(axis(bar.value) - axis.left, 1.5)
        box = {"x": axis.left, "y": y + 0.2 * height, "width": length, "height": 0.6 * height}
        parts.append(element("rect", class_=f"bar {bar.kind}", rx=2, **box))
    parts += [element("rect", class_="mark", x=axis(m) - 0.75, y=middle - 4, width=1.5, height=8) for m in bar.marks]
    parts.append(element("text", bar.text, class_=f"value {bar.kind}", x=width - 2, y=middle + 4, text_anchor="end"))
    return element("g", *parts)


def _band(band: Band, axis: Axis, y: float, end: float, text: Callable[[float], str]) -> Markup:
    left, right, middle = axis(band.low), axis(band.high), axis(band.median)
    anchor = "middle" if middle < axis.right - 40 else "end"
    return Markup("").join(
        [
            element("rect", class_="band", x=left, y=y, width=right - left, height=end - y),
            element("line", class_="median", x1=middle, x2=middle, y1=y, y2=end),
            element("text", f"median {text(band.median)}", class_="note", x=middle, y=y - 6, text_anchor=anchor),
        ]
    )


def _ticks(axis: Axis, y: float) -> Markup:
    parts = [element("line", class_="axis", x1=axis.left, x2=axis.right, y1=y, y2=y)]
    for tick in axis.ticks():
        x = axis(tick)
        parts.append(element("line", class_="axis", x1=x, x2=x, y1=y, y2=y + 4))
        parts.append(element("text", number(tick), class_="note", x=x, y=y + 17, text_anchor="middle"))
    return Markup("").join(parts)


def _distribution(
    labels: Sequence[LabelEvidence], axis: Axis, y: float, suspect: int | None, text: Callable[[float], str]
) -> Markup:
    """Histogram of all labels over a tick for each, on the axis of the rows above."""
    sized = [e for e in labels if has_size(e)]
    bins = max(1, int((axis.right - axis.left) / 9))
    counts = [0] * bins
    for evidence in sized:
        counts[min(int(evidence.size / axis.top * bins), bins - 1)] += 1
    most, step = max(max(counts), 1), (axis.right - axis.left) / bins
    parts = [
        element("text", "all", class_="name", x=axis.left - 8, y=y + 48, text_anchor="end"),
        element("text", f"{len(sized):,}", class_="name", x=axis.left - 8, y=y + 63, text_anchor="end"),
    ]
    for i, count in enumerate(counts):
        if count:
            tall = max(64 * count / most, 2.0)
            hint = f"{count:,} labels from {number(i * axis.top / bins)} to {text((i + 1) * axis.top / bins)}"
            box = {"x": axis.left + i * step, "y": y + 66 - tall, "width": step - 1, "height": tall}
            parts.append(element("rect", element("title", hint), class_="bar complete", **box))
    rug = "".join(f"M{axis(e.size):.1f} {y + 72:g}v10" for e in sized if e.label != suspect)
    parts.append(element("path", class_="rug", d=rug))
    parts += [_flag(axis(e.size), y) for e in sized if e.label == suspect]
    return element("g", *parts)


def _flag(x: float, y: float) -> Markup:
    return element("path", class_="flag", d=f"M{x:.1f} {y + 68:g}v16M{x - 4:.1f} {y + 60:g}h8l-4 7z")


def trade_off(points: Sequence[tuple[str, float, float]], width: int) -> Markup:
    """Name, ACC loss and ASR of each method as dots; both axes in points from zero.

    Names that would lie on each other move down; on a narrow chart they give way to numbers in the order of the table.
    """
    height, left, bottom = 0.55 * width, 44.0, 40.0
    room = 150.0 if width > 400 else 20.0
    across = Axis(_top([x for _, x, _ in points]), left, width - room)
    up = Axis(_top([y for _, _, y in points]), height - bottom, 14.0)
    parts = [_grid(across, up, height - bottom)]
    taken: list[tuple[float, float]] = []
    for number_, (name, x, y) in sorted(enumerate(points, 1), key=lambda item: -item[1][2]):
        at, level = across(x), up(y)
        beside = level + 4
        while any(abs(beside - other) < 13 and abs(at - place) < 130 for place, other in taken):
            beside += 13
        taken.append((at, beside))
        text = shorten(name, room - 12) if width > 400 else str(number_)
        parts.append(
            element(
                "g",
                element("title", f"{name}: ASR {y:.1f}, ACC loss {x:.1f}"),
                element("circle", class_="plot-dot", cx=at, cy=level, r=4.5),
                element("text", text, class_="plot-name", x=at + 8, y=beside),
            )
        )
    middle = (left + width - room) / 2
    parts.append(element("text", "ACC loss", class_="plot-text", x=middle, y=height - 6, text_anchor="middle"))
    parts.append(element("text", "ASR", class_="plot-text", x=4, y=12))
    return _svg(width, height, "ASR after the purifier over the ACC that it costs", *parts)


def loss_curves(points: Sequence[CurvePoint], width: int) -> Markup:
    """Median loss of the isolated examples and of the rest over the epochs, each with a band from 10 % to 90 %."""
    height, left, bottom = 0.5 * width, 44.0, 40.0
    across = Axis(max(1.0, float(points[-1].epoch)), left, width - 14.0)
    up = Axis(_top([s.high for p in points for s in (p.isolated, p.rest)]), height - bottom, 14.0)
    parts = [_grid(across, up, height - bottom)]
    for name, kind in (("rest", "rest"), ("isolated", "isolated")):
        spreads = [(across(float(p.epoch)), getattr(p, name)) for p in points]
        edge = [(x, up(s.high)) for x, s in spreads] + [(x, up(s.low)) for x, s in reversed(spreads)]
        parts.append(element("polygon", class_=f"curve-band {kind}", points=_path(edge)))
        parts.append(element("polyline", class_=f"curve {kind}", points=_path((x, up(s.median)) for x, s in spreads)))
        for x, one in spreads:
            hint = f"{kind}: median {number(one.median)}, 10 % {number(one.low)}, 90 % {number(one.high)}"
            parts.append(
                element("circle", element("title", hint), class_=f"curve-dot {kind}", cx=x, cy=up(one.median), r=3)
            )
    middle = (left + width) / 2
    parts.append(element("text", "epoch", class_="plot-text", x=middle, y=height - 6, text_anchor="middle"))
    parts.append(element("text", "loss", class_="plot-text", x=4, y=12))
    return _svg(width, height, "Loss of the isolated examples and of the rest over the first epochs", *parts)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _grid(across: Axis, up: Axis, floor: float) -> Markup:
    parts = []
    for tick in across.ticks():
        x = across(tick)
        parts.append(element("line", class_="plot-grid", x1=x, x2=x, y1=up.right, y2=floor))
        parts.append(element("text", number(tick), class_="plot-text", x=x, y=floor + 16, text_anchor="middle"))
    step = nice_step(up.top, 5)
    for i in range(int(up.top / step + 1e-9) + 1):
        y = up(i * step)
        parts.append(element("line", class_="plot-grid", x1=across.left, x2=across.right, y1=y, y2=y))
        parts.append(
            element("text", number(i * step), class_="plot-text", x=across.left - 6, y=y + 4, text_anchor="end")
        )
    return Markup("").join(parts)
