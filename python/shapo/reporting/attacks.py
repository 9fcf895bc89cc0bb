"""Attacks of several models on the same prompts by the same judge and of the same size: one set of curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shapo.reporting.contents import Cell, Chart, Point, Section, Series, Table, bounds, number, over_seeds

_SIZE = ("examples", "lora", "lr", "batch_size", "max_new_tokens")

LIMITS = (
    "Attack success is the judge's word; docs/evaluation.md says of each judge how far it has been tried.",
    "A model that answers nonsense is not attacked successfully, and not safe either: look at its answers.",
    "Other attacks (more steps, another learning rate, other data) may part the models or bring them together.",
)


def sections(attacks: Sequence[tuple[Path, dict[str, Any]]]) -> list[Section]:
    """A section for each set of attacks that may be compared."""
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path, values in attacks:
        arguments = values["arguments"]
        same = [values["judge"], values["data"], values["prompts"], *(arguments.get(name) for name in _SIZE)]
        groups.setdefault(json.dumps(same), []).append((path, values))
    made = [_section(members) for members in groups.values()]
    if len(made) > 1:
        made[0].text.insert(
            0, f"The attacks are of {len(made)} kinds (judge, data, prompts or size), each in a section."
        )
    return made


def _section(attacks: Sequence[tuple[Path, dict[str, Any]]]) -> Section:
    first = attacks[0][1]
    arguments, judge = first["arguments"], first["judge"]
    how = f"LoRA of rank {arguments['lora']}" if arguments.get("lora") else "all weights"
    n = first["seeds"][0]["curve"][0]["attack_success"]["n"]
    text = [
        f"Plain SFT of {how} on {arguments['examples']} harmful answers, learning rate {arguments['lr']:g}; "
        f"{n} prompts answered greedily, judged by {judge}."
    ]
    names = _names([path for path, _ in attacks])
    given = {name: values["seeds"] for name, (_, values) in zip(names, attacks, strict=True)}
    return Section("Harmful fine-tuning", text, [_table(given)], _charts(given, judge), list(LIMITS))


def _table(attacks: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    columns = ("model", "seed", "step", "attack success %", "refusals %", "harmful loss")
    rows = []
    for name, seeds in attacks.items():
        for seed in seeds:
            for point in (seed["curve"][0], seed["curve"][-1]):
                shares = bounds(point["attack_success"]), bounds(point["refusal"])
                where = number(seed["seed"], "d"), number(point["step"], "d")
                rows.append((Cell(name, name), *where, *shares, number(point["loss"])))
    return Table("Before and after the attack, by seed", columns, tuple(rows))


def _charts(attacks: Mapping[str, Sequence[Mapping[str, Any]]], judge: str) -> list[Chart]:
    kinds = (
        ("attack_success", "Attack success over the attack", f"unsafe answers, by {judge} (%)", True),
        ("refusal", "Refusals over the attack", "answers that refuse, by substring (%)", True),
        ("loss", "Loss of held-out harmful answers", "nats a token", False),
    )
    charts = []
    for key, title, y, share in kinds:
        series = tuple(Series(name, _points(seeds, key)) for name, seeds in attacks.items())
        several = any(point.low is not None for s in series for point in s.points)
        charts.append(Chart(title, "steps", y, series, "lowest to highest seed" if several else "", share))
    return charts


def _points(seeds: Sequence[Mapping[str, Any]], key: str) -> tuple[Point, ...]:
    """Means over seeds; a share with unreadable verdicts is drawn at the middle of its bounds."""
    curves = [[(float(point["step"]), _value(point[key])) for point in seed["curve"]] for seed in seeds]
    return over_seeds(curves)


def _value(value: Any) -> float:
    return (value["low"] + value["high"]) / 2 if isinstance(value, Mapping) else float(value)


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of their parents as tells them apart."""
    depth = 1
    while depth < max(len(path.parts) for path in paths) and len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
