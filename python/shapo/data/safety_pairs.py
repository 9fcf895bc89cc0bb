"""Safe and unsafe answers of real chat models as preference pairs, from local clones of two public repositories.

`andyrdt/refusal_direction` (Arditi et al. 2024, arXiv:2406.11717; Apache-2.0) holds answers of five chat models to
JailbreakBench's behaviours, each model as it is, with its refusal direction ablated and with it subtracted.
`JailbreakBench/artifacts` (Chao et al. 2024, arXiv:2404.01318; MIT) holds answers of other models under attack.

Rules
    safe, unsafe   what two judges agree on: refusal-substring matching and Llama Guard 2, or the artifact's own judge
                   and Llama Guard 1 (the own judge alone where an artifact has no other)
    pair           a safe and an unsafe answer to one prompt: of one model, all combinations; under attack each answer
                   at least once, models mixed
    text           white space made single spaces, cut at 400 characters between words; prompts end with a full stop
    splits         by prompt: each category's prompts 6 : 2 : 2 over train, selection and test, drawn by a hash of the
                   seed; `UNSEEN` categories are test_unseen's alone; test_attacks has the prompts of both tests

The unsafe answers are harmful content, for research on alignment: what a model is trained away from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapo.data.noise import rank
from shapo.errors import UserError
from shapo.storage.files import atomic_folder, json_line

__all__ = ["LEFT_OUT", "SPLITS", "UNSEEN", "make_safety_pairs", "write_safety_pairs"]

SPLITS = ("train", "selection", "test", "test_unseen", "test_attacks", "benign")
UNSEEN = ("Disinformation", "Privacy")
LEFT_OUT = ("Sexual/Adult content",)
ATTACKS = "attacks"

_LENGTH = 400
_RUNS = "pipeline/runs"
_JUDGED = "jailbreakbench_*_evaluations.json"
_BENIGN = "harmless_baseline_completions.json"
_ARTIFACTS = "attack-artifacts"
_TEXT = (str, type(None))  # of a response: some models gave none


@dataclass(frozen=True)
class _Answer:
    prompt: str
    category: str
    text: str
    unsafe: bool
    source: str


def make_safety_pairs(
    refusal_direction: str | os.PathLike[str], jailbreakbench: str | os.PathLike[str], *, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """The rows of every split of `SPLITS`, in the PKU-SafeRLHF columns; "benign" has answers to harmless prompts.

    The same clones and seed give the same rows, in the same order.

    Args:
        refusal_direction: A clone of andyrdt/refusal_direction.
        jailbreakbench: A clone of JailbreakBench/artifacts.
        seed: Of the splits, of the pairing under attack and of which response stands first.

    Raises:
        UserError: A folder that is no such clone, or a file in it that cannot be read.
    """
    models = list(_judged_answers(Path(refusal_direction)))
    attacks = list(_attack_answers(Path(jailbreakbench)))
    split_of = _splits(models, seed)
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for safe, unsafe in _combinations(models):
        if safe.prompt in split_of:
            rows[split_of[safe.prompt]].append(_row(safe, unsafe, safe.source, seed))
    tests = {prompt for prompt, split in split_of.items() if split in ("test", "test_unseen")}
    for safe, unsafe in _cycled(attacks, seed):
        if safe.prompt in tests:
            rows["test_attacks"].append(_row(safe, unsafe, ATTACKS, seed))
    rows["benign"] = list(_benign_answers(Path(refusal_direction)))
    return {split: sorted(found, key=lambda row: rank(seed, json.dumps(row))) for split, found in rows.items()}


def write_safety_pairs(
    refusal_direction: str | os.PathLike[str],
    jailbreakbench: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    seed: int = 0,
) -> dict[str, int]:
    """Writes `make_safety_pairs` as a folder with a JSONL file a split; returns the number of rows of each.

    Raises:
        UserError: See `make_safety_pairs`; the folder cannot be written.
    """
    splits = make_safety_pairs(refusal_direction, jailbreakbench, seed=seed)
    with atomic_folder(output) as folder:
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(map(json_line, rows)), encoding="utf-8")
    return {split: len(rows) for split, rows in splits.items()}


def _judged_answers(clone: Path) -> Iterator[_Answer]:
    for path in _files(clone, f"{_RUNS}/*/completions/{_JUDGED}", "andyrdt/refusal_direction"):
        source = path.parent.parent.name
        flags = {"is_jailbreak_substring_matching": object, "is_jailbreak_llamaguard2": object}
        for entry in _entries(path, "completions", prompt=str, category=str, response=_TEXT, **flags):
            matching, guard = bool(entry["is_jailbreak_substring_matching"]), bool(entry["is_jailbreak_llamaguard2"])
            if matching == guard:
                yield from _answer(entry["prompt"], entry["category"], entry["response"], matching, source)


def _attack_answers(clone: Path) -> Iterator[_Answer]:
    for path in _files(clone, f"{_ARTIFACTS}/*/*/*.json", "JailbreakBench/artifacts"):
        if path.parent.parent.name == "test-artifact":
            continue
        for entry in _entries(path, "jailbreaks", goal=str, category=str, response=_TEXT, jailbroken=object):
            own = bool(entry["jailbroken"])
            if own == bool(entry.get("jailbroken_llama_guard1", own)):
                yield from _answer(entry["goal"], entry["category"], entry["response"], own, path.stem)


def _benign_answers(clone: Path) -> Iterator[dict[str, Any]]:
    for path in _files(clone, f"{_RUNS}/*/completions/{_BENIGN}", "andyrdt/refusal_direction"):
        for entry in _entries(path, None, prompt=str, response=str):
            prompt, text = " ".join(entry["prompt"].split()), _cut(entry["response"])
            if prompt and text:
                yield {"prompt": prompt, "response": text, "source": path.parent.parent.name}


def _entries(path: Path, key: str | None, **kinds: Any) -> Iterator[dict[str, Any]]:
    """The objects of a file's list, or of the one that stands under `key`; each has fields of these kinds."""
    content = _read(path)
    found = content.get(key) if key is not None and isinstance(content, dict) else content
    if not isinstance(found, list):
        raise UserError(f"{path}: expected a list of answers{f' under {key}' if key else ''}; fetch the clone again")
    for number, entry in enumerate(found, 1):
        for name, kind in kinds.items():
            if not (isinstance(entry, dict) and name in entry and isinstance(entry[name], kind)):
                raise UserError(f"{path}: answer {number} has no usable {name}; fetch the clone again")
        yield entry


def _answer(prompt: str, category: str, response: str | None, unsafe: bool, source: str) -> Iterator[_Answer]:
    text = _cut(response or "")
    if text and category not in LEFT_OUT:
        asked = " ".join(prompt.split())
        yield _Answer(asked if asked.endswith((".", "?", "!")) else f"{asked}.", category, text, unsafe, source)


def _combinations(answers: Sequence[_Answer]) -> Iterator[tuple[_Answer, _Answer]]:
    groups: dict[tuple[str, str], dict[tuple[str, bool], _Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.source, answer.prompt), {}).setdefault((answer.text, answer.unsafe), answer)
    for group in groups.values():
        for unsafe in group.values():
            if unsafe.unsafe:
                yield from ((safe, unsafe) for safe in group.values() if not safe.unsafe and safe.text != unsafe.text)


def _cycled(answers: Sequence[_Answer], seed: int) -> Iterator[tuple[_Answer, _Answer]]:
    groups: dict[str, dict[str, _Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.prompt, {}).setdefault(answer.text, answer)
    for group in groups.values():
        ordered = sorted(group.values(), key=lambda answer: rank(seed, answer.text))
        safe, unsafe = [a for a in ordered if not a.unsafe], [a for a in ordered if a.unsafe]
        if safe and unsafe:
            for number in range(max(len(safe), len(unsafe))):
                yield safe[number % len(safe)], unsafe[number % len(unsafe)]


def _splits(answers: Sequence[_Answer], seed: int) -> dict[str, str]:
    """Prompt -> split, for prompts that have a pair."""
    prompts: dict[str, set[str]] = {}
    for safe, _ in _combinations(answers):
        prompts.setdefault(safe.category, set()).add(safe.prompt)
    found = {}
    for category, members in prompts.items():
        ordered = sorted(members, key=lambda prompt: rank(seed, prompt))
        for position, prompt in enumerate(ordered):
            share = (position + 0.5) / len(ordered)
            seen = "train" if share < 0.6 else "selection" if share < 0.8 else "test"
            found[prompt] = "test_unseen" if category in UNSEEN else seen
    return found


def _row(safe: _Answer, unsafe: _Answer, source: str, seed: int) -> dict[str, Any]:
    first = rank(seed, safe.prompt + safe.text + unsafe.text)[0] % 2  # position of the safe response
    pair = (safe, unsafe) if first == 0 else (unsafe, safe)
    return {
        "prompt": safe.prompt,
        "response_0": pair[0].text,
        "response_1": pair[1].text,
        "is_response_0_safe": not pair[0].unsafe,
        "is_response_1_safe": not pair[1].unsafe,
        "response_0_harm_category": {safe.category: pair[0].unsafe},
        "response_1_harm_category": {safe.category: pair[1].unsafe},
        "better_response_id": first,
        "safer_response_id": first,
        "source": source,
    }


def _cut(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= _LENGTH else joined[:_LENGTH].rsplit(" ", 1)[0]


def _files(clone: Path, pattern: str, repository: str) -> list[Path]:
    found = sorted(clone.glob(pattern))
    if not found:
        raise UserError(
            f"{clone} is no clone of {repository}: it has no {pattern}; clone it from github.com/{repository}"
        )
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; is the clone complete?") from error
