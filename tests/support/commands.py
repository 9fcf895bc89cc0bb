"""Arguments that many tests of the command line begin with."""

from __future__ import annotations

from pathlib import Path

TOKENS = ["--max-length", "96", "--max-prompt-length", "64"]
DOWN = "model.layers.0.mlp.down_proj.weight"


def train_arguments(files: Path, *more: object) -> list[object]:
    """Two updates of the tiny model in the folder of the fixture `files`, written to `out`."""
    base = ["train", "--model", files / "model", "--data", files / "train.jsonl", "--limit", 12, "--output", "out"]
    return [*base, *TOKENS, "--updates", 2, "--batch-size", 4, "--lr", "1e-3", "--warmup", 1, "--quiet", *more]
