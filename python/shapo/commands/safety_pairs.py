"""Makes preference pairs of safe and unsafe answers of real chat models, from local clones of two public repositories.

  git clone https://github.com/andyrdt/refusal_direction
  git clone https://github.com/JailbreakBench/artifacts

Writes to --output a JSONL file a split, in the PKU-SafeRLHF columns: train, selection, test, test_unseen (categories
that no other split has), test_attacks (answers under jailbreak attacks); and benign (answers to harmless prompts).
Prompts never cross train, selection and the tests. The same clones and seed give the same files.

The unsafe answers are harmful content, for research on alignment.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from shapo.options import Group, option

SUMMARY = "make pairs of real models' safe and unsafe answers from public repositories"


@dataclass(frozen=True)
class SafetyPairsOptions:
    """Where the clones are."""

    refusal_direction: str = option("of andyrdt/refusal_direction", metavar="CLONE", reads=True)
    jailbreakbench: str = option("of JailbreakBench/artifacts", metavar="CLONE", reads=True)
    output: str = option("where the files are written; replaced whole", metavar="FOLDER", writes=True)
    seed: int = option("of the splits and of the pairing", 0)


OPTIONS = (Group(SafetyPairsOptions),)


def run(arguments: argparse.Namespace) -> None:
    from shapo.data.safety_pairs import write_safety_pairs
    from shapo.storage.files import require_writable
    from shapo.tables import table

    output = require_writable(arguments.output, folder=True)
    counts = write_safety_pairs(arguments.refusal_direction, arguments.jailbreakbench, output, seed=arguments.seed)
    print(table(("split", "rows"), [(split, str(rows)) for split, rows in counts.items()]))
    print(f"written: {output}")
