"""What a training command reads, in one folder: a model with its tokenizer, and pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_training_folder(folder: Path, model: Any, tokenizer: Any, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes `model/` and `train.jsonl` into `folder`, and returns it."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
