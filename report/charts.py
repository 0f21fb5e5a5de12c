"""Charts as SVG: pure functions from numbers to markup without styles.

Colours and fonts are classes of the page's style sheet, so that the same picture serves light and dark. Every label is
escaped. Coordinates are those of the `viewBox`, which the page scales.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from report.text import count, short

WIDTH = 380  # of charts with rows
ROW = 30
CURVE_WIDTH, CURVE_HEIGHT = 300, 150
MAX_POINTS = 240
MAX_LABEL = 15


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values in [low, high] to coordinates in [start, end]. A logarithmic scale takes only positive values."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class Interval:
    """A dot with its error bar. With `half_width` None there is only the dot."""

    label: str
    value: float
    half_width: float | None
    text: str  # beside it


@dataclass(frozen=True, slots=True)
class BarGroup:
    """A label with one value for each of the chart's names, or None."""

    label: str
    values: tuple[float | None, ...]


def nice_ticks(low: float, high: float, num: int = 4) -> list[float]:
    """About `num` round numbers that enclose [low, high]. Their distance is 1, 2 or 5 times a power of ten."""
    if not high > low:
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(1, num - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def decade_ticks(low: float, high: float) -> list[float]:
    """At most five powers of ten that enclose the positive [low, high]."""
    first = math.floor(math.log10(low) + 1e-9)
    last = max(first + 1, math.ceil(math.log10(high) - 1e-9))
    stride = math.ceil((last - first) / 4)
    return [10.0**e for e in range(first, last + stride, stride)]


def thin_out(steps: Sequence[float], values: Sequence[float], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of equally many neighbours."""
    size = math.ceil(len(steps) / limit) if steps else 1
    starts = range(0, len(steps), size)
    return [(_mean(steps[i : i + size]), _mean(values[i : i + size])) for i in starts]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value with up to `window // 2` neighbours on either side, fewer at the ends."""
    half = window // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def line_chart(
    steps: Sequence[float],
    values: Sequence[float],
    *,
    label: str,
    domain: tuple[float, float] | None = None,
    log: bool = False,
    window: int = 1,
    layout: Callable[[float], str] = short,
) -> Markup:
    """A metric over steps: each step as a thin line, the moving mean over `window` steps as a thick one. `domain` fixes the
    y axis.

    A logarithmic axis leaves out values that aren't positive. `layout` formats a value. `data-points` is for the page's
    script: an [x, y, step, value] for each point, coordinates and texts.
    """
    points = thin_out(steps, values)
    if log:
        points = [(x, y) for x, y in points if y > 0]
    if not points:
        return Markup("")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = domain or (min(ys), max(ys))
    ticks = decade_ticks(low, high) if log else nice_ticks(low, high, 3)
    left, right, top, bottom = 42.0, CURVE_WIDTH - 10.0, 10.0, CURVE_HEIGHT - 24.0
    x = Scale(xs[0], xs[-1], left, right)
    y = Scale(ticks[0], ticks[-1], bottom, top, log)
    parts = []
    for tick in ticks:
        parts.append(_line(left, y(tick), right, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, layout(tick), "tick end"))
    for index, step in enumerate(dict.fromkeys((xs[0], xs[-1]))):
        parts.append(_text(x(step), CURVE_HEIGHT - 7, count(step), "tick end" if index else "tick"))
    parts.append(_text((left + right) / 2, CURVE_HEIGHT - 7, "step", "tick middle"))
    if len(points) > 1:
        smooth = window > 2 and not log
        parts.append(_path([(x(a), y(b)) for a, b in points], "curve raw" if smooth else "curve"))
        if smooth:
            means = moving_mean(ys, max(3, round(window * len(ys) / len(values))))
            parts.append(_path([(x(a), y(b)) for a, b in zip(xs, means, strict=True)], "curve"))
    parts.append(_dot(x(xs[-1]), y(ys[-1]), 3.5, "dot"))
    parts.append(_dot(x(xs[-1]), y(ys[-1]), 4.5, "cursor"))
    data = [[round(x(a), 1), round(y(b), 1), count(a), layout(b)] for a, b in points]
    return Markup(
        '<svg class="chart line" viewBox="0 0 {} {}" role="img" tabindex="0" aria-label="{}" data-points="{}">{}</svg>'
    ).format(CURVE_WIDTH, CURVE_HEIGHT, label, json.dumps(data), Markup("").join(parts))


def interval_chart(rows: Sequence[Interval], *, label: str, domain: tuple[float, float] | None = None) -> Markup:
    """Dots with error bars, one row each. Bars are cut at a fixed `domain`; without one, the axis includes them."""
    finite = [row for row in rows if math.isfinite(row.value)]
    if not finite:
        return Markup("")
    ends = [row.value + sign * (row.half_width or 0.0) for row in finite for sign in (-1, 1)]
    ticks = nice_ticks(*(domain or (min(0.0, *ends), max(ends))))
    left, right, height = 104.0, WIDTH - 78.0, ROW * len(finite)
    x = Scale(ticks[0], ticks[-1], left, right)
    parts = _columns(ticks, x, height)
    for index, row in enumerate(finite):
        middle = ROW * index + ROW / 2 + 4
        parts.append(_label(left - 10, middle, row.label))
        if row.half_width:
            low, high = x(row.value - row.half_width), x(row.value + row.half_width)
            parts.append(_line(low, middle, high, middle, "error"))
            parts.extend(_line(end, middle - 5, end, middle + 5, "error") for end in (low, high))
        parts.append(_dot(x(row.value), middle, 5, "dot"))
        parts.append(_text(right + 12, middle + 4, row.text, "value"))
    return _svg(WIDTH, height + 26, label, parts)


def stacked_chart(rows: Sequence[BarGroup], classes: Sequence[str], *, label: str) -> Markup:
    """One bar for each row, made of its values: positive ones to the right of zero, negative ones to the left."""
    lows = [sum(min(0.0, v or 0.0) for v in row.values) for row in rows]
    highs = [sum(max(0.0, v or 0.0) for v in row.values) for row in rows]
    if not rows or min(lows) == max(highs):
        return Markup("")
    ticks = nice_ticks(min(lows), max(highs), 6)
    left, right, height = 104.0, WIDTH - 12.0, ROW * len(rows)
    x = Scale(ticks[0], ticks[-1], left, right)
    parts = _columns(ticks, x, height)
    for index, row in enumerate(rows):
        top = ROW * index + 10.0
        parts.append(_label(left - 10, top + 9, row.label))
        below = above = 0.0
        for value, name in zip(row.values, classes, strict=True):
            if value and value > 0:
                parts.append(_bar(x(above), x(above + value), top, name))
                above += value
            elif value:
                parts.append(_bar(x(below + value), x(below), top, name))
                below += value
    parts.append(_line(x(0.0), 2, x(0.0), height + 4, "zero"))
    return _svg(WIDTH, height + 26, label, parts)


def bar_chart(rows: Sequence[tuple[str, int]], *, label: str) -> Markup:
    """Counts as bars, one row each, with the number beside the bar."""
    highest = max((n for _, n in rows), default=0)
    if highest <= 0:
        return Markup("")
    left, right = 158.0, WIDTH - 52.0
    x = Scale(0, highest, left, right)
    parts: list[Markup] = []
    for index, (name, n) in enumerate(rows):
        top = ROW * index + 8.0
        parts.append(_label(left - 10, top + 9, name, 21))
        parts.append(_bar(left, max(left + 1, x(n)), top, "bar"))
        parts.append(_text(x(n) + 8, top + 13, count(n), "value"))
    return _svg(WIDTH, ROW * len(rows) + 4, label, parts)


def dot_chart(rows: Sequence[BarGroup], classes: Sequence[str], *, label: str, domain: tuple[float, float]) -> Markup:
    """Dots on a common axis, one row each. A line joins the first two: before and after."""
    if not rows:
        return Markup("")
    ticks = nice_ticks(*domain)
    left, right, height = 112.0, WIDTH - 16.0, ROW * len(rows)
    x = Scale(ticks[0], ticks[-1], left, right)
    parts = _columns(ticks, x, height)
    for index, row in enumerate(rows):
        middle = ROW * index + ROW / 2 + 4
        parts.append(_label(left - 14, middle, row.label))
        joined = [v for v in row.values[:2] if v is not None]
        if len(joined) == 2:
            parts.append(_line(x(joined[0]), middle, x(joined[1]), middle, "join"))
        # The last is drawn first, so that the change stays visible where dots coincide.
        for value, name in reversed(list(zip(row.values, classes, strict=True))):
            if value is not None and math.isfinite(value):
                parts.append(_dot(x(value), middle, 5.5, name))
    return _svg(WIDTH, height + 26, label, parts)


def _columns(ticks: Sequence[float], x: Scale, height: float) -> list[Markup]:
    lines = [_line(x(tick), 4, x(tick), height + 4, "grid") for tick in ticks]
    return lines + [_text(x(tick), height + 20, short(tick), "tick middle") for tick in ticks]


def _svg(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, label, Markup("").join(parts)
    )


def _label(x: float, y: float, text: str, limit: int = MAX_LABEL) -> Markup:
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return Markup('<text x="{}" y="{}" class="label end"><title>{}</title>{}</text>').format(x, y + 4, text, shown)


def _text(x: float, y: float, text: str, classes: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>').format(x, y, classes, text)


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, name)


def _dot(x: float, y: float, radius: float, name: str) -> Markup:
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" class="{}"/>').format(x, y, radius, name)


def _bar(x1: float, x2: float, top: float, name: str) -> Markup:
    # A gap of 1.5 between neighbours separates them even without colours.
    width = max(0.5, x2 - x1 - 1.5)
    return Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="18" rx="2" class="{}"/>').format(
        x1, top, width, name
    )


def _path(points: Sequence[tuple[float, float]], name: str) -> Markup:
    moves = " ".join(f"{'L' if i else 'M'}{px:.1f} {py:.1f}" for i, (px, py) in enumerate(points))
    return Markup('<path d="{}" class="{}"/>').format(moves, name)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
