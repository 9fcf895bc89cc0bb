"""Numbers and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from shapo.study.intervals import Interval

__all__ = ["interval", "markdown", "percent"]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def interval(found: Interval | None, form: str, scale: float = 1.0) -> str:
    if found is None:
        return "-"
    value, low, high = (format(scale * number, form) for number in found)
    return f"{value} ({low} to {high})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, align, *rows))
