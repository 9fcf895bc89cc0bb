r"""Attacks on aligned models side by side, and how often their judge is right: rows for docs/evaluation.md.

    python -m benchmarks.attacks start=runs/attacks/start dpo=runs/attacks/dpo shapo=runs/attacks/shapo \
        --probe runs/judge/probe.safetensors

The folders are those of `shapo attack` with one judge, the same data, prompts and size. Shares are means over seeds,
with two 95 % bootstrap intervals: one draws prompts, the other draws seeds too. Models are compared with the one named
by `--against`, prompt by prompt and seed by seed. The judge's row is its accuracy on the prompts held out when it was
trained. Writes `benchmarks/results/attacks.json`: numbers and names, no text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import rows

SETTINGS = (
    *("steps", "every", "examples", "held_out", "lora", "lr", "batch_size", "max_new_tokens", "seeds"),
    *("max_length", "max_prompt_length", "bf16"),
)
# What is counted from verdict files: their name, and the column that says yes or no.
COUNTED = {"attack_success": ("verdicts", "verdict"), "over_refusal": ("benign", "refusal")}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Attack:
    """A folder of `shapo attack`."""

    name: str
    folder: Path
    values: Row

    @property
    def seeds(self) -> list[int]:
        return [seed["seed"] for seed in self.values["seeds"]]

    @property
    def steps(self) -> list[int]:
        """Those that all seeds were measured at."""
        measured = [{point["step"] for point in seed["curve"]} for seed in self.values["seeds"]]
        return sorted(set.intersection(*measured))

    def points(self) -> list[dict[str, Any]]:
        """A row for each seed and measured step."""
        return [
            {"kind": "point", "model": self.name, "seed": seed["seed"], **point}
            for seed in self.values["seeds"]
            for point in seed["curve"]
        ]

    def cases(self, what: str, seed: int, step: int) -> dict[str, bool | None]:
        """Yes, no or unreadable for each prompt."""
        from shapo.judges.files import read_rows
        from shapo.statistics import unsafe_case

        file, column = COUNTED[what]
        found = read_rows(self.folder / f"seed-{seed}" / f"{file}-{step}.jsonl", (column,))
        return {row["id"]: unsafe_case(row[column]) if column == "verdict" else row[column] for row in found}

    def measures(self, what: str) -> bool:
        return all(what in point for seed in self.values["seeds"] for point in seed["curve"])


def means(attack: Attack) -> list[dict[str, Any]]:
    """Attack success and over-refusal at each step, over all seeds."""
    return [
        {"kind": "mean", "model": attack.name, "step": step, "what": what,
         **_over_prompts([attack.cases(what, seed, step) for seed in attack.seeds])}
        for what in COUNTED if attack.measures(what)
        for step in attack.steps
    ]  # fmt: skip


def differences(base: Attack, attack: Attack) -> list[dict[str, Any]]:
    """`attack` minus `base` at each step, on the same prompts after the same examples."""
    found = []
    seeds = [seed for seed in attack.seeds if seed in base.seeds]
    steps = [step for step in attack.steps if step in base.steps]
    for what in COUNTED:
        for step in steps if attack.measures(what) and base.measures(what) else ():
            pairs = [(base.cases(what, seed, step), attack.cases(what, seed, step)) for seed in seeds]
            changes = [{name: _minus(other[name], own[name]) for name in own} for own, other in pairs]
            by_seed = [sum(change or 0 for change in run.values()) for run in changes]
            where = {"kind": "difference", "model": attack.name, "against": base.name, "step": step, "what": what}
            counts = {"lower": sum(total < 0 for total in by_seed), "higher": sum(total > 0 for total in by_seed)}
            found.append({**where, **_over_prompts(changes), **counts})
    return found


def _minus(one: bool | None, other: bool | None) -> int | None:
    return None if one is None or other is None else int(one) - int(other)


def _over_prompts(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """The mean over seeds and prompts with both intervals; a prompt that one seed cannot read is left out of all."""
    from shapo.study.intervals import clustered, crossed

    read = [name for name in runs[0] if all(run[name] is not None for run in runs)]
    table = [[float(run[name] or 0) for name in read] for run in runs]
    shared = {"seeds": len(runs), "n": len(read), "left_out": len(runs[0]) - len(read)}
    if not read:
        return {"value": None, **shared}
    by_prompt = [sum(column) / len(runs) for column in zip(*table, strict=True)]
    value, low, high = clustered([by_prompt], range(len(read)), lambda mean: mean)
    _, wide_low, wide_high = crossed(table, range(len(read)))
    return {"value": value, "low": low, "high": high, "wide_low": wide_low, "wide_high": wide_high, **shared}


def validated(probe: str) -> dict[str, Any]:
    """How often the probe was right on the answers held out from its own training, of other prompts."""
    from shapo.probe import Probe
    from shapo.statistics import wilson

    made = Probe.load(probe)
    n = int(made.metadata["validation_examples"])
    right = wilson(round(made.accuracy * n), n).as_dict()
    return {"kind": "judge", "answers": "held-out answers", "n": n, "majority": made.majority, "right": right}


def tables(recorded: Sequence[Row]) -> str:
    """The rows as docs/evaluation.md shows them."""
    of = {kind: [row for row in recorded if row["kind"] == kind] for kind in ("point", "mean", "difference", "judge")}
    lines = ["| model | step | seeds | attack success % | refusals % | over-refusal % | harmful loss |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    counted = {(row["model"], row["step"], row["what"]): row for row in of["mean"]}
    for name, step in dict.fromkeys((row["model"], row["step"]) for row in of["mean"]):
        points = [row for row in of["point"] if (row["model"], row["step"]) == (name, step)]
        success, over = (_value(counted.get((name, step, what)), "") for what in COUNTED)
        refusal = _range([100 * row["refusal"]["low"] for row in points], ".0f")
        loss = _range([row["loss"] for row in points], ".2f")
        lines.append(f"| {name} | {step} | {len(points)} | {success} | {refusal} | {over} | {loss} |")
    lines += ["", "| model, its counterpart | step | what | difference, points | seeds lower, higher |"]
    lines.append("|---|---:|---|---:|---:|")
    for row in of["difference"]:
        what = row["what"].replace("attack_success", "attack success").replace("over_refusal", "over-refusal")
        seeds = f"{row['lower']}, {row['higher']} of {row['seeds']}"
        lines.append(f"| {row['model']}, {row['against']} | {row['step']} | {what} | {_value(row, '+')} | {seeds} |")
    lines += ["", "| the judge on | n | more frequent class | right (95 %) |", "|---|---:|---:|---:|"]
    for row in of["judge"]:
        right = row["right"]
        shown = f"{100 * right['value']:.1f} % ({100 * right['low']:.1f} to {100 * right['high']:.1f})"
        lines.append(f"| {row['answers']} | {row['n']} | {100 * row['majority']:.1f} % | {shown} |")
    return "\n".join(lines)


def _value(row: Row | None, sign: str) -> str:
    if row is None or row["value"] is None:
        return "-"
    value, *ends = (f"{100 * row[name]:{sign}.0f}" for name in ("value", "low", "high", "wide_low", "wide_high"))
    return f"{value} ({ends[0]} to {ends[1]}; {ends[2]} to {ends[3]})"


def _range(values: Sequence[float], form: str) -> str:
    mean, low, high = (format(value, form) for value in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--against", default="dpo", help="the name of the model that the others are compared with")
    parser.add_argument("--probe", required=True, help="the judge")
    arguments = parser.parse_args()
    attacks = []
    for entry in arguments.attacks:
        name, _, folder = entry.partition("=")
        attacks.append(Attack(name, Path(folder), json.loads((Path(folder) / "attack.json").read_text())))
    base = next((attack for attack in attacks if attack.name == arguments.against), None)
    if base is None:
        parser.error(f"no attack is named {arguments.against}: give NAME=FOLDER, or another --against")
    first = attacks[0].values
    for key in ("judge_digest", "data", "prompts", "benign"):
        if len({attack.values[key] for attack in attacks}) > 1:
            parser.error(f"the attacks differ in {key}")
    for key in SETTINGS:
        if len({attack.values["arguments"][key] for attack in attacks}) > 1:
            parser.error(f"the attacks differ in --{key.replace('_', '-')}")
    given = {name: first["arguments"][name] for name in SETTINGS}
    found: list[dict[str, Any]] = [{"kind": "settings", "judge": first["judge"], **given}]
    for attack in attacks:
        found += [*attack.points(), *means(attack)]
    for attack in attacks:
        found += differences(base, attack) if attack is not base else []
    found.append(validated(arguments.probe))
    rows.write("attacks", found)
    print(tables(found))


if __name__ == "__main__":
    main()
