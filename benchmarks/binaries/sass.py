"""Reads the disassembly of a kernel: what a thread executes for each element that it loads.

Counting is static. A kernel with a loop around its loads is judged by that loop's body. One without is judged by the
path from its entry to an exit that loads the most elements of the width asked for, then makes the most accesses, then
has the fewest instructions: in a kernel that branches on a dtype, the path of a dtype with that width.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Instruction:
    address: int
    guarded: bool
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = _TARGET.search(self.operands) if self.name.split(".")[0] == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def accessed(self) -> int:
        """Bytes of a global load or store of one thread."""
        if self.name.split(".")[0] not in ("LDG", "STG"):
            return 0
        width = re.search(r"\.(U8|S8|U16|S16|64|128)\b", self.name)
        return {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[width[1]] if width else 4

    @property
    def loaded(self) -> int:
        return self.accessed if self.name.startswith("LDG") else 0


@dataclass(frozen=True)
class Count:
    """Instructions that a thread issues, and the bytes that it loads by accesses of the width asked for."""

    instructions: int
    loaded: int

    def per_element(self, itemsize: int) -> float:
        return self.instructions * itemsize / self.loaded


def instructions(text: str) -> list[Instruction]:
    """Of one function in cuobjdump's `-sass` output."""
    return [
        Instruction(int(address, 16), bool(guard), name, operands.strip())
        for address, guard, name, operands in _LINE.findall(text)
    ]


def count(code: list[Instruction], width: int) -> Count:
    """Of the work that loads by accesses of `width` bytes.

    Raises:
        ValueError: nothing loads so.
    """
    found = _in_loop(code, width) or _on_path(code, width)
    if found is None:
        raise ValueError(f"no global load of {width} bytes among {len(code)} instructions")
    return found


def row(code: list[Instruction], width: int, loops: int, steps: int) -> Count:
    """Of a program that takes `steps` in each of the largest `loops` of its loops, and all else once.

    Raises:
        ValueError: it has fewer loops that load by accesses of `width` bytes.
    """
    found = sorted(_loops(code, width), key=lambda c: c.instructions)
    if len(found) < loops:
        raise ValueError(f"{len(found)} loops load {width} bytes at a time, {loops} expected")
    within = sum(c.instructions for c in found[-loops:])
    return Count(len(code) - sum(c.instructions for c in found) + steps * within, steps * found[-1].loaded)


def _in_loop(code: list[Instruction], width: int) -> Count | None:
    """The smallest loop that loads."""
    return min(_loops(code, width), key=lambda c: c.instructions, default=None)


def _loops(code: list[Instruction], width: int) -> list[Count]:
    bodies = [
        [i for i in code if branch.target <= i.address <= branch.address]
        for branch in code
        if branch.target is not None and branch.target < branch.address
    ]
    counts = [Count(len(body), sum(i.loaded for i in body if i.loaded == width)) for body in bodies]
    return [c for c in counts if c.loaded]


def _on_path(code: list[Instruction], width: int) -> Count | None:
    # From the last instruction to the first: branches backwards are loops of a few steps and are passed once.
    best: dict[int, tuple[int, int, int]] = {}  # address -> bytes loaded, accesses, -instructions
    following = {one.address: other.address for one, other in itertools.pairwise(code)}
    for one in reversed(code):
        kind = one.name.split(".")[0]
        after = [one.target] if one.target is not None and one.target > one.address else []
        # A branch asks a guard before it, or a predicate among its operands.
        if kind not in ("BRA", "EXIT", "RET") or one.guarded or "," in one.operands:
            after += [following[one.address]] if one.address in following else []
        ways = [best[address] for address in after if address in best]
        loaded, accesses, fewest = max(ways, default=(0, 0, 0))
        best[one.address] = (
            loaded + (one.loaded if one.loaded == width else 0), accesses + bool(one.accessed), fewest - 1,
        )  # fmt: skip
    loaded, _, fewest = best[code[0].address] if code else (0, 0, 0)
    return Count(-fewest, loaded) if loaded else None
