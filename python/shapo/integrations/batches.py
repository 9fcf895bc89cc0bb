"""Cutting a trainer's micro-batches: which rows of its tensors belong to some pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shapo.libraries.trl import OF_PAIRS

_OF_ROWS = ("SFTTrainer", "Trainer", "Seq2SeqTrainer")


class Cutter:
    """Takes some pairs, or rows, out of the micro-batches of a trainer.

    Args:
        trainer: its class says how its micro-batches are laid out.

    Raises:
        ValueError: a trl trainer whose layout is not known.
    """

    def __init__(self, trainer: object) -> None:
        kinds = [kind for kind in type(trainer).__mro__ if kind.__module__.split(".")[0] in ("trl", "transformers")]
        kind = next((k.__name__ for k in kinds if not k.__name__.startswith("_")), "Trainer")
        if kind not in (*OF_PAIRS, *_OF_ROWS):
            raise ValueError(
                f"how {kind} lays out its batches is not known, so no part of one can be taken: "
                "leave out ascent_fraction and ascent_pairs"
            )
        self._of_pairs = kind in OF_PAIRS

    def count(self, inputs: dict[str, Any]) -> int:
        """Pairs of a micro-batch, or rows where it has no pairs."""
        rows = max((value.shape[0] for value in _tensors(inputs).values()), default=0)
        return rows // 2 if self._of_pairs else rows

    def rows(self, inputs: dict[str, Any], pairs: Sequence[int]) -> Tensor:
        """Which rows of a micro-batch some of its pairs are, int64."""
        chosen = torch.tensor(pairs, dtype=torch.int64)
        return torch.cat([chosen, chosen + self.count(inputs)]) if self._of_pairs else chosen

    def take(self, inputs: dict[str, Any], pairs: Sequence[int]) -> dict[str, Any]:
        """A micro-batch with some of its pairs, given by their positions; of a pair, both rows.

        Raises:
            ValueError: tensors of other lengths than the number of rows or of pairs.
        """
        count = self.count(inputs)
        if len(pairs) == count:
            return dict(inputs)
        tensors = _tensors(inputs)
        rows = 2 * count if self._of_pairs else count
        lengths = {value.shape[0] for value in tensors.values()}
        if not lengths <= {rows, count}:
            raise ValueError(
                f"a batch of tensors with {sorted(lengths)} rows cannot be cut: let the ascent look at whole "
                "micro-batches, or leave out ascent_fraction and ascent_pairs"
            )
        chosen, both = torch.tensor(pairs), self.rows(inputs, pairs)
        return {
            name: value[(both if value.shape[0] == rows else chosen).to(value.device)] if name in tensors else value
            for name, value in inputs.items()
        }


def _tensors(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
