"""From paths to a page: what each folder is, which runs belong together, and what cannot be shown.

A folder is known by the file it ends with: run.json (train, sft), attack.json, sharpness.json, report.json (demo,
study), or a JSON file of `shapo evaluate`. Whatever is none of these, or was not finished, is named with the reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapo.errors import UserError
from shapo.reporting import attacks, studies, training, verdicts
from shapo.reporting.contents import Page, Section
from shapo.reporting.svg import drawing

Runs = list[tuple[Path, dict[str, Any]]]


@dataclass(frozen=True)
class Found:
    """A path and the JSON object that says what was measured there."""

    path: Path
    kind: str
    values: dict[str, Any]


_FILES = {"attack.json": "attack", "sharpness.json": "sharpness", "report.json": "report", "run.json": "run"}


def collect(paths: Sequence[str | os.PathLike[str]]) -> Page:
    """Reads every path and makes the page.

    Raises:
        UserError: None of the paths holds anything to show.
    """
    page, found = Page(), []
    for path in dict.fromkeys(Path(path) for path in paths):
        try:
            found.append(_identify(path))
        except (UserError, OSError, ValueError, RecursionError) as error:
            page.left_out.append((str(path), str(error)))
    readers = (
        ("demo", studies.demo),
        ("study", studies.study),
        ("train", training.sections),
        ("attack", attacks.sections),
        ("verdicts", verdicts.sections),
        ("sharpness", studies.sharpness),
    )
    for kind, reader in readers:
        given = _readable([(item.path, item.values) for item in found if item.kind == kind], reader, page.left_out)
        if kind == "train":
            given, repeated = training.distinct(given)
            page.left_out += repeated
        page.sections += reader(given) if given else []
    if not page.sections:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in page.left_out[:3])
        raise UserError(f"there is nothing to report on ({reasons or 'no paths were given'})")
    page.versions = sorted({_versions(item.values) for item in found} - {""})
    return page


def _readable(given: Runs, reader: Callable[[Runs], list[Section]], left_out: list[tuple[str, str]]) -> Runs:
    """What `reader` can make a section of by itself: one odd folder does not take the others with it."""
    readable = []
    for path, values in given:
        try:
            made = reader([(path, values)])
            for chart in (chart for section in made for chart in section.charts):
                drawing(chart)
            if not made:
                raise UserError("it holds no numbers to show")
        except UserError as error:
            left_out.append((str(path), str(error)))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, OSError) as error:
            left_out.append((str(path), f"written by another version, or damaged: {type(error).__name__}: {error}"))
        else:
            readable.append((path, values))
    return readable


def _identify(path: Path) -> Found:
    if not path.exists():
        raise UserError("there is no such file or folder")
    if path.is_file():
        if path.suffix == ".jsonl":
            raise UserError(
                "lines of answers or verdicts; `shapo evaluate --verdicts` counts verdicts into a JSON file"
            )
        values = _load(path)
        if not {"attack_success", "preferences", "win_rate", "lm_eval"} & set(values):
            raise UserError("it holds no numbers: neither preferences, verdicts, comparisons nor lm-eval")
        return Found(path, "verdicts", values)
    for name, kind in _FILES.items():
        if (path / name).is_file():
            return _of_kind(path, kind, _load(path / name))
    if (path / "settings.json").is_file() and (path / "rows").is_dir():
        raise UserError("an unfinished study; `shapo study --report` writes what it has")
    if (path / "metrics.jsonl").is_file():
        return _unfinished(path)
    if list(path.glob("seed-*/metrics.jsonl")):
        raise UserError("an unfinished attack: none of its seeds has ended, so it has no results yet")
    if (path / "methods").is_dir():
        raise UserError("an unfinished demo: it writes its results when all methods are trained")
    if (path / "probe.json").is_file():
        raise UserError("a run of `shapo probe`: it measures no method")
    inside = sum(child.is_dir() for child in path.iterdir()) if path.is_dir() else 0
    hint = f"; it holds {inside} folders, which {path}/* names" if inside else ""
    raise UserError(f"no run: none of run.json, report.json, attack.json, sharpness.json is there{hint}")


def _of_kind(path: Path, kind: str, values: dict[str, Any]) -> Found:
    if kind == "report":
        return Found(path, "demo" if "size" in values else "study", values)
    if kind == "run" and "final" not in values:
        raise UserError("a run of `shapo sft`: it is no method to compare; its folder can be given to `shapo train`")
    return Found(path, "train" if kind == "run" else kind, values)


def _unfinished(path: Path) -> Found:
    if (start := training.start_of(path)) is None:
        raise UserError("an unfinished run that does not say of what; finish it with --resume, then report again")
    return Found(path, "train", start)


def _load(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path.name} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path.name} is no JSON object")
    return values


def _versions(values: dict[str, Any]) -> str:
    found = values.get("versions")
    return ", ".join(f"{name} {value}" for name, value in found.items()) if isinstance(found, dict) else ""
