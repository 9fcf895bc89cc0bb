"""Which examples make up which update: a seeded permutation for each epoch, so a position is enough to go on."""

from __future__ import annotations

import math

import torch


class DataOrder:
    """Batches of indices; the same seed gives the same batches on every machine.

    Each epoch is a fresh permutation of all examples; its last batch may be a partial one and is kept.

    Args:
        examples: Number of examples in the data set.
        batch_size: Examples an update.
        seed: Seed of all permutations.
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.updates_per_epoch = math.ceil(examples / batch_size)
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def batch(self, update: int) -> list[int]:
        """Indices of the examples of update number `update`, counted from 0."""
        start = (update % self.updates_per_epoch) * self.batch_size
        return self.permutation(update // self.updates_per_epoch)[start : start + self.batch_size].tolist()

    def permutation(self, epoch: int) -> torch.Tensor:
        """The order of epoch number `epoch`, counted from 0."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._permutation = torch.randperm(self.examples, generator=generator)
            self._epoch = epoch
        return self._permutation


def split(batch: list[int], size: int | None) -> list[list[int]]:
    """`batch` cut into micro-batches of at most `size`."""
    step = size or len(batch)
    return [batch[start : start + step] for start in range(0, len(batch), step)]
