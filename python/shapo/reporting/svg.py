"""Line charts as SVG: every point is reachable by keyboard and pointer and says its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shapo.reporting.contents import Chart, Point, Series

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 46


@dataclass(frozen=True)
class Mark:
    """A drawn point and what it says."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    """A series as drawn: polyline, band, marks.

    `style` is one of eight colours with one of four dashes: lines that coincide show through each other, and are told
    apart without colours. Dotted is not finished.
    """

    style: str
    name: str
    path: str
    band: str
    marks: tuple[Mark, ...]


def drawing(chart: Chart) -> dict[str, Any]:
    """What the template needs to draw `chart`: axes with ticks, and lines in SVG's coordinates."""
    points = [point for series in chart.series for point in series.points if _drawn(chart, point)]
    xs = [_x(chart, point.x) for point in points] or [0.0, 1.0]
    given = [v for point in points for v in (point.y, point.low, point.high) if v is not None]
    values = [_y(chart, v) for v in given if not chart.log_y or v > 0] or [0.0, 1.0]
    x_low, x_high = _widened(min(xs), max(xs), 0.02)
    y_low, y_high = _widened(min(values), max(values), 0.06)
    if chart.percent:
        y_low, y_high = max(0.0, y_low), min(1.0, y_high)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (_x(chart, x) - x_low) / (x_high - x_low)
        height = _y(chart, y) if not chart.log_y or y > 0 else y_low
        up = (min(max(height, y_low), y_high) - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    y_at = _decades(y_low, y_high) or sorted({v for v in given if v > 0}) if chart.log_y else ticks(y_low, y_high)
    x_at = _decades(x_low, x_high) or sorted({p.x for p in points}) if chart.log_x else ticks(x_low, x_high)
    anchor = points[0].x if points else 1.0
    y_ticks = [(place(anchor, v)[1], chart.tick(v)) for v in y_at]
    x_ticks = [(place(v, 1.0)[0], f"{v:g}") for v in x_at]
    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM,
        "x_ticks": x_ticks, "y_ticks": y_ticks,
        "lines": [_line(chart, number, series, place) for number, series in enumerate(chart.series)],
    }  # fmt: skip


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], about five, in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _line(chart: Chart, number: int, series: Series, place: Any) -> Line:
    points = [point for point in series.points if _drawn(chart, point)]
    path = " ".join(_pair(place(point.x, point.y)) for point in points)
    marks = []
    for point in points:
        x, y = place(point.x, point.y)
        marks.append(Mark(x, y, f"{series.name}, {chart.x} {point.x:g}: {chart.text(point)}"))
    style = f"c{number % 8} " + ("dotted" if series.dotted else f"dash{(number + number // 8) % 4}")
    return Line(style, series.name, path, _band(points, place), tuple(marks))


def _band(points: Sequence[Point], place: Any) -> str:
    ranged = [(p.x, p.low, p.high) for p in points if p.low is not None and p.high is not None]
    there = [_pair(place(x, low)) for x, low, _ in ranged]
    back = [_pair(place(x, high)) for x, _, high in reversed(ranged)]
    return " ".join(there + back) if len(ranged) > 1 else ""


def _pair(point: tuple[float, float]) -> str:
    return f"{point[0]:.1f},{point[1]:.1f}"


def _drawn(chart: Chart, point: Point) -> bool:
    return math.isfinite(point.y) and not (chart.log_y and point.y <= 0) and not (chart.log_x and point.x <= 0)


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten between two exponents, every other one where there are many; empty where there is one at most."""
    exponents = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    return [10.0**e for e in exponents][:: 1 + len(exponents) // 7] if len(exponents) > 1 else []


def _y(chart: Chart, y: float) -> float:
    return math.log10(y) if chart.log_y else y


def _x(chart: Chart, x: float) -> float:
    return math.log10(x) if chart.log_x else x


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    if high == low:
        half = abs(low) * 0.1 or 0.5
        return low - half, high + half
    return low - share * (high - low), high + share * (high - low)
