"""What a page is made of: sections of text, tables and charts. Plain values; no HTML, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UNFINISHED = ", not finished"
"""Ends the name of a line whose run is not finished; such a line is dotted."""


@dataclass(frozen=True)
class Cell:
    """A table's cell; `order` sorts it (a number before a text, nothing last)."""

    text: str
    order: float | str | None = None


@dataclass(frozen=True)
class Table:
    """A sortable table; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def words(self) -> list[bool]:
        """Of each column whether it holds words, which are set from the left; numbers are set from the right."""
        return [any(isinstance(row[n].order, str) for row in self.rows) for n in range(len(self.columns))]

    def without_empty(self) -> Table:
        """Without the columns in which no row has a value."""
        kept = [n for n in range(len(self.columns)) if any(row[n].order is not None for row in self.rows)]
        rows = tuple(tuple(row[n] for n in kept) for row in self.rows)
        return Table(self.caption, tuple(self.columns[n] for n in kept), rows)


@dataclass(frozen=True)
class Point:
    """y at x, and the interval or range around it where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """A line; `dotted` marks one that is not finished."""

    name: str
    points: tuple[Point, ...]
    dotted: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over x. `band` says what low and high are; `percent` shows values of [0, 1] as percentages.

    A logarithmic axis shows values above 0 alone; the others are in the chart's table.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    band: str = ""
    percent: bool = False
    log_x: bool = False
    log_y: bool = False

    def table(self) -> Table:
        """The chart's numbers: a row for each x, a column for each series."""
        places = sorted({point.x for series in self.series for point in series.points})
        rows = []
        for x in places:
            found = [next((p for p in series.points if p.x == x), None) for series in self.series]
            cells = [Cell("", None) if p is None else Cell(self.text(p), p.y) for p in found]
            rows.append((Cell(f"{x:g}", x), *cells))
        return Table(self.title, (self.x, *(series.name for series in self.series)), tuple(rows))

    def text(self, point: Point) -> str:
        """A point's value as it is read out, with its range."""
        text = self.number(point.y)
        if point.low is not None and point.high is not None and (point.low, point.high) != (point.y, point.y):
            text += f" ({self.number(point.low)} to {self.number(point.high)})"
        return text

    def number(self, value: float) -> str:
        return f"{100 * value:.1f}%" if self.percent else f"{value:.4g}"

    def tick(self, value: float) -> str:
        """A round number at an axis."""
        return f"{100 * value:.4g}%" if self.percent else f"{value:.4g}"


@dataclass
class Section:
    """A part of the page: paragraphs, then tables, then charts, then what its numbers do not show."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


@dataclass
class Page:
    """Everything: sections, and what was given and could not be shown, with the reason."""

    sections: list[Section] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)


def number(value: Any, form: str = ".4g") -> Cell:
    """A cell of a number; a dash where there is none."""
    if not isinstance(value, (int, float)) or value != value:
        return Cell("-")
    return Cell(format(value, form), float(value))


def word(text: Any) -> Cell:
    """A cell of words, sorted by them."""
    return Cell(str(text), str(text))


def percent(share: Any) -> Cell:
    """A share in [0, 1], or a mapping of one (value, low, high), as a percentage."""
    if isinstance(share, Mapping):
        if not isinstance(share.get("value"), (int, float)):
            return Cell("-")
        low, high = 100 * share["low"], 100 * share["high"]
        return Cell(f"{100 * share['value']:.1f} ({low:.0f} to {high:.0f})", float(share["value"]))
    return number(100 * share, ".1f") if isinstance(share, (int, float)) else Cell("-")


def bounds(share: Mapping[str, Any]) -> Cell:
    """A `BoundedShare` as a percentage: one number, or both bounds, and the interval."""
    if not share.get("n"):
        return Cell("-")
    low, high = 100 * share["low"], 100 * share["high"]
    value = f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}"
    return Cell(f"{value} ({100 * share['interval_low']:.0f} to {100 * share['interval_high']:.0f})", low / 100)


def over_seeds(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[Point, ...]:
    """The mean over seeds at each x that all of them have, with the lowest and the highest."""
    shared = sorted(set.intersection(*({x for x, _ in curve} for curve in curves)))
    points = []
    for x in shared:
        values = [dict(curve)[x] for curve in curves]
        several = len(values) > 1
        ends = (min(values), max(values)) if several else (None, None)
        points.append(Point(x, sum(values) / len(values), *ends))
    return tuple(points)


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    depth = 1
    while depth < max(len(path.parts) for path in paths) and len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
