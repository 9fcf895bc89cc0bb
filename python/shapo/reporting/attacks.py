"""Attacks of several models on the same prompts by the same judge and of the same size: one set of curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shapo.reporting.contents import (
    UNFINISHED,
    Chart,
    Point,
    Section,
    Series,
    Table,
    bounds,
    number,
    over_seeds,
    short_names,
    word,
)

_SIZE = (
    *("examples", "held_out", "lora", "lr", "batch_size", "max_new_tokens", "bf16"),
    *("max_length", "max_prompt_length", "chat_template"),
)

LIMITS = (
    "Attack success is the judge's word; docs/evaluation.md says of each judge how far it has been tried.",
    "A model that answers nonsense is not attacked successfully, and not safe either: look at its answers.",
    "Other attacks (more steps, another learning rate, other data) may part the models or bring them together.",
)
NO_BENIGN = "Over-refusal was not measured: no benign prompts were given (--benign)."


def sections(attacks: Sequence[tuple[Path, dict[str, Any]]]) -> list[Section]:
    """A section for each set of attacks that may be compared."""
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path, values in attacks:
        arguments = values["arguments"]
        asked = [values["judge"], values.get("judge_digest"), values["data"], values["prompts"], values.get("benign")]
        groups.setdefault(json.dumps([asked, [arguments.get(name) for name in _SIZE]]), []).append((path, values))
    made = [_section(members) for members in groups.values()]
    if len(made) > 1:
        for number, section in enumerate(made, 1):
            section.title += f", set {number}"
        made[0].text.insert(
            0, f"The attacks are of {len(made)} kinds (judge, data, prompts or size), each in a section."
        )
    return made


def _section(attacks: Sequence[tuple[Path, dict[str, Any]]]) -> Section:
    first = attacks[0][1]
    arguments, judge = first["arguments"], first["judge"]
    how = f"LoRA of rank {arguments['lora']}" if arguments.get("lora") else "all weights"
    start = first["seeds"][0]["curve"][0]
    benign = start.get("over_refusal")
    text = [
        f"Plain SFT of {how} on {arguments['examples']} harmful answers, learning rate {arguments['lr']:g}. "
        f"{start['attack_success']['n']} harmful prompts answered greedily, judged by {judge}"
        + (f"; {benign['n']} benign ones beside them." if benign else ".")
    ]
    given, unfinished = {}, set()
    for name, (_, values) in zip(short_names([path for path, _ in attacks]), attacks, strict=True):
        done, planned = len(values["seeds"]), values["arguments"].get("seeds", 0)
        if done < planned:
            text.append(f"Not finished: {name} has {done} of {planned} seeds; its lines are dotted.")
            name += UNFINISHED
            unfinished.add(name)
        given[name] = values["seeds"]
    limits = [*LIMITS, *([] if benign else [NO_BENIGN])]
    return Section("Harmful fine-tuning", text, [_table(given)], _charts(given, judge, unfinished), limits)


def _table(attacks: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    columns = ("model", "seed", "step", "attack success %", "refusals %", "over-refusal %", "harmful loss")
    rows = []
    for name, seeds in attacks.items():
        for seed in seeds:
            for point in (seed["curve"][0], seed["curve"][-1]):
                shares = (bounds(point.get(key) or {}) for key in ("attack_success", "refusal", "over_refusal"))
                where = number(seed["seed"], "d"), number(point["step"], "d")
                rows.append((word(name), *where, *shares, number(point["loss"])))
    return Table("Before and after the attack, by seed (95 % interval)", columns, tuple(rows))


def _charts(attacks: Mapping[str, Sequence[Mapping[str, Any]]], judge: str, unfinished: set[str]) -> list[Chart]:
    kinds = (
        ("attack_success", "Attack success over the attack", f"unsafe answers, by {judge} (%)", True),
        ("refusal", "Refusals over the attack", "answers that refuse, by substring (%)", True),
        ("over_refusal", "Over-refusal over the attack", "benign prompts refused, by substring (%)", True),
        ("loss", "Loss of held-out harmful answers", "nats a token", False),
    )
    charts = []
    for key, title, y, share in kinds:
        # What was not measured has no curve.
        measured = {name: seeds for name, seeds in attacks.items() if all(key in p for s in seeds for p in s["curve"])}
        if not measured:
            continue
        series = tuple(Series(name, _points(seeds, key), dotted=name in unfinished) for name, seeds in measured.items())
        several = any(point.low is not None for s in series for point in s.points)
        charts.append(Chart(title, "steps", y, series, "lowest to highest seed" if several else "", share))
    return charts


def _points(seeds: Sequence[Mapping[str, Any]], key: str) -> tuple[Point, ...]:
    """Means over seeds; a share with unreadable verdicts is drawn at the middle of its bounds."""
    curves = [[(float(point["step"]), _value(point[key])) for point in seed["curve"]] for seed in seeds]
    return over_seeds(curves)


def _value(value: Any) -> float:
    return (value["low"] + value["high"]) / 2 if isinstance(value, Mapping) else float(value)
