"""One self-contained HTML page of what runs have measured: methods side by side, curves over training, Figure 1,
attacks, evaluations, and what the numbers do not show.

Takes folders of `shapo train`, `attack`, `sharpness`, `demo` and `study`, and JSON files of `shapo evaluate`. Runs of
different data are shown apart; a folder that is no run and a run that is not finished are named at the end. The page
fetches nothing and quotes no prompt and no answer.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from shapo.options import Group, option

SUMMARY = "one HTML page of what runs have measured"


@dataclass(frozen=True)
class ReportOptions:
    """What is read and written."""

    runs: list[str] = option(
        "folders of runs, JSON files of evaluations", positional=True, repeated=True, metavar="RUN", reads=True
    )
    output: str = option("the page", "report.html", metavar="FILE", writes=True)
    title: str = option("of the page", "ShaPO: what was measured")


REMADE = "*.html"
OPTIONS = (Group(ReportOptions),)


def run(arguments: argparse.Namespace) -> None:
    from shapo.reporting.collect import collect
    from shapo.reporting.page import render
    from shapo.storage.files import require_writable, write_text
    from shapo.storage.outputs import is_same

    require_writable(arguments.output)
    # `runs/*` holds an earlier page and recipes too.
    runs = [path for path in arguments.runs if not path.endswith(".recipe.yaml")]
    page = collect([path for path in runs if Path(path).is_dir() or not is_same(Path(path), Path(arguments.output))])
    write_text(arguments.output, render(page, title=arguments.title))
    for name, reason in page.left_out:
        print(f"left out: {name}: {reason}")
    print(f"written: {arguments.output}, {len(page.sections)} sections")
