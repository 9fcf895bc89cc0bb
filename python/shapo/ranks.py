"""The processes that share a run: one, or the ranks that torchrun or `accelerate launch` has started.

Rank 0 alone reads caches, writes and prints. What it finds, or the error that it meets, every rank is told. Every
rank has the whole list of what a run goes over and computes with its share of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from shapo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def launched() -> int:
    """The number of ranks that a launcher has started, 1 without one. Costs no import of torch."""
    count = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return int(count) if count.isdecimal() else 1


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run.

    Attributes:
        rank: Its number, counted from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """The ranks of torch's process group; one where there is none."""
        import torch.distributed as dist

        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else cls()

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """All ranks as a process group, None for one process."""
        import torch.distributed as dist

        return dist.group.WORLD if self.count > 1 else None

    def share(self, count: int) -> range:
        """The positions, of `count`, that are this rank's; those of two ranks differ by one in number at most."""
        return range(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def on_main(self, run: Callable[[], T]) -> T:
        """What `run()` returns on rank 0, on every rank (a collective).

        Raises:
            UserError: `run` raised one; on every rank.
        """
        if self.count == 1:
            return run()
        import torch.distributed as dist

        told: list[Any] = [None, None]
        if self.is_main:
            try:
                told[0] = run()
            except UserError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise UserError(told[1])
        return told[0]

    def gathered(self, value: T) -> list[T]:
        """The value of every rank, in their order, on every rank (a collective)."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether some rank says so (a collective)."""
        if self.count == 1:
            return flag
        import torch

        return bool(self.summed(torch.tensor([float(flag)]))[0])

    def summed(self, values: Tensor) -> Tensor:
        """The sum over the ranks (a collective), on the device of `values`."""
        if self.count == 1:
            return values
        import torch.distributed as dist

        moved = values.to(_device_of_collectives(), copy=True)
        dist.all_reduce(moved)
        return moved.to(values.device)

    def spread(self, values: Tensor, positions: Sequence[int], length: int) -> Tensor:
        """A table whose rows the ranks have between them (a collective), `[length, ...]` on the CPU.

        Args:
            values: This rank's rows, `[n, ...]`; any dtype that fp64 holds.
            positions: Their places in the table; no two ranks share one.
            length: Rows of the table. Those that no rank has are 0.
        """
        import torch

        table = torch.zeros(length, *values.shape[1:], dtype=torch.float64)
        table[torch.as_tensor(positions, dtype=torch.int64)] = values.detach().cpu().double()
        return self.summed(table).to(values.dtype)


ALONE = Ranks()


def _device_of_collectives() -> str:
    import torch.distributed as dist

    return "cuda" if "nccl" in str(dist.get_backend()) else "cpu"
