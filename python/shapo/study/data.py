"""The pairs and texts of a study, as its plan takes them from the files of `shapo safety-pairs`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from shapo.data.formats import load_pairs
from shapo.data.pairs import PreferencePair
from shapo.errors import UserError
from shapo.study.plan import Plan

__all__ = ["TESTS", "StudyData", "drawn", "groups"]

TESTS = ("test", "test_unseen", "test_attacks")


class StudyData:
    """The splits of one folder.

    Args:
        folder: Of `shapo safety-pairs`; its files are in random order.
        plan: Sizes.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self._plan = folder, plan

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file.

        Raises:
            UserError: A split is missing.
        """
        files = sorted(self.folder.glob("*.jsonl"))
        if missing := {"train", "selection", *TESTS, "benign"} - {path.stem for path in files}:
            raise UserError(f"{self.folder} has no {sorted(missing)[0]}.jsonl; make it by `shapo safety-pairs`")
        return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def read(self, split: str) -> list[PreferencePair]:
        return load_pairs(self.folder / f"{split}.jsonl").pairs

    def first(self, split: str, count: int) -> list[PreferencePair]:
        return self.read(split)[:count]

    def figure_pairs(self) -> list[PreferencePair]:
        return [pair for split in TESTS[:2] for pair in self.first(split, self._plan.figure_pairs)]

    def benign_texts(self, half: str) -> list[tuple[str, str]]:
        """(prompt, answer), one a prompt: the half to select by, `selection`, or that to measure on."""
        lines = (self.folder / "benign.jsonl").read_text(encoding="utf-8").splitlines()
        by_prompt = {row["prompt"]: row for row in map(json.loads, reversed(lines))}
        rows = list(by_prompt.values())[::-1][: self._plan.benign_texts]
        middle = len(rows) // 2
        return [(row["prompt"], row["response"]) for row in (rows[:middle] if half == "selection" else rows[middle:])]

    def prompts(self) -> dict[str, list[str]]:
        """Each once: `harmful`, of the two tests without attacks; `harmless`, those of `benign_texts`."""
        harmful = dict.fromkeys(pair.prompt for split in TESTS[:2] for pair in self.read(split))
        harmless = dict.fromkeys(prompt for half in ("selection", "test") for prompt, _ in self.benign_texts(half))
        return {"harmful": list(harmful), "harmless": list(harmless)}

    def groups(self, loss: str) -> list[int]:
        """What the bootstrap draws together of Figure 1's items for a loss: the pairs of a prompt, or each text."""
        return list(range(len(self.benign_texts("test")))) if loss == "benign" else groups(self.figure_pairs())


def drawn(pairs: Sequence[PreferencePair], count: int, seed: int) -> list[PreferencePair]:
    """Some of the pairs, in their order."""
    ranks = {i: hashlib.sha256(f"{seed}:pair:{i}".encode()).digest() for i in range(len(pairs))}
    return [pairs[i] for i in sorted(sorted(ranks, key=lambda i: ranks[i])[:count])]


def groups(pairs: Sequence[PreferencePair]) -> list[int]:
    """The number of each pair's prompt: pairs of one prompt are drawn together by the bootstrap."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(pair.prompt, len(numbers)) for pair in pairs]
