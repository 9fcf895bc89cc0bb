"""Attacks on aligned models side by side, and how often their judge is right: rows for docs/evaluation.md.

    python -m benchmarks.attacks dpo=runs/attacks/dpo shapo=runs/attacks/shapo --probe runs/judge/probe.safetensors

The folders are those of `shapo attack` with one judge, the same data and the same prompts; models are compared with the
one named by `--against`, prompt by prompt. The judge's row is its accuracy on the prompts held out when it was trained.
Writes `benchmarks/results/attacks.json`: numbers and names, no text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import rows

SETTINGS = ("steps", "examples", "lora", "lr", "batch_size", "max_new_tokens", "seeds")
Row = Mapping[str, Any]


def points(name: str, attack: Row) -> list[dict[str, Any]]:
    """A row for each seed and measured step."""
    return [
        {"kind": "point", "model": name, "seed": seed["seed"], **point}
        for seed in attack["seeds"]
        for point in seed["curve"]
    ]


def differences(
    base: str, names: Sequence[str], folders: Sequence[Path], attacks: Sequence[Row]
) -> list[dict[str, Any]]:
    """Each model against the model `base`, at each step of each seed, by the functions behind `shapo evaluate`."""
    from shapo.judges.files import read_rows
    from shapo.safety import safety_summary
    from shapo.statistics import paired_difference

    found = []
    base_folder = folders[names.index(base)]
    for name, folder, attack in zip(names, folders, attacks, strict=True):
        for seed in attack["seeds"] if name != base else ():
            for step in (point["step"] for point in seed["curve"]):
                here, there = (place / f"seed-{seed['seed']}" for place in (folder, base_folder))
                where = {"kind": "difference", "model": name, "against": base, "seed": seed["seed"], "step": step}
                file = f"verdicts-{step}.jsonl"
                unsafe = safety_summary([here / file], against=there / file)["difference"]
                found.append({**where, "what": "attack_success", **unsafe})
                benign = [read_rows(place / f"benign-{step}.jsonl", ("refusal",)) for place in (there, here)]
                refused = [[row["refusal"] for row in part] for part in benign]
                found.append({**where, "what": "over_refusal", **asdict(paired_difference(*refused))})
    return found


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
    of = {
        kind: [row for row in recorded if row["kind"] == kind] for kind in ("point", "difference", "judge", "settings")
    }
    lines = ["| model | step | attack success % (95 %) | refusals % | over-refusal % (95 %) | harmful loss |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in of["point"]:
        shares = [
            _share(row[name], interval=name != "refusal") for name in ("attack_success", "refusal", "over_refusal")
        ]
        lines.append(f"| {row['model']} | {row['step']} | {' | '.join(shares)} | {row['loss']:.2f} |")
    lines += [
        "",
        "| model, its counterpart | step | what | difference, points (95 %) | only one of the two | McNemar's p |",
    ]
    lines.append("|---|---:|---|---:|---:|---:|")
    for row in of["difference"]:
        value, low, high = (f"{100 * row[name]:+.0f}" for name in ("difference", "low", "high"))
        only = f"{row['only_second']} and {row['only_first']} of {row['n']}"
        what = row["what"].replace("attack_success", "attack success").replace("over_refusal", "over-refusal")
        compared = f"{row['model']}, {row['against']}"
        lines.append(
            f"| {compared} | {row['step']} | {what} | {value} ({low} to {high}) | {only} | {row['p_value']:.2g} |"
        )
    lines += ["", "| the judge on | n | more frequent class | right (95 %) |", "|---|---:|---:|---:|"]
    for row in of["judge"]:
        right = row["right"]
        shown = f"{100 * right['value']:.1f} % ({100 * right['low']:.1f} to {100 * right['high']:.1f})"
        lines.append(f"| {row['answers']} | {row['n']} | {100 * row['majority']:.1f} % | {shown} |")
    return "\n".join(lines)


def _share(share: Row, *, interval: bool) -> str:
    low, high = (f"{100 * share[name]:.0f}" for name in ("low", "high"))
    value = low if low == high else f"{low} to {high}"
    return f"{value} ({100 * share['interval_low']:.0f} to {100 * share['interval_high']:.0f})" if interval else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--against", default="dpo", help="the name of the model that the others are compared with")
    parser.add_argument("--probe", required=True, help="the judge")
    arguments = parser.parse_args()
    named = [entry.partition("=") for entry in arguments.attacks]
    names, folders = [name for name, _, _ in named], [Path(folder) for _, _, folder in named]
    attacks = [json.loads((folder / "attack.json").read_text()) for folder in folders]
    for key in ("judge_digest", "data", "prompts", "benign"):
        if len({attack[key] for attack in attacks}) > 1:
            parser.error(f"the attacks differ in {key}")
    given = {name: attacks[0]["arguments"][name] for name in SETTINGS}
    found: list[dict[str, Any]] = [{"kind": "settings", "judge": attacks[0]["judge"], **given}]
    found += [row for name, attack in zip(names, attacks, strict=True) for row in points(name, attack)]
    found += differences(arguments.against, names, folders, attacks)
    found.append(validated(arguments.probe))
    rows.write("attacks", found)
    print(tables(found))


if __name__ == "__main__":
    main()
