"""What each kernel could reach on an H200, from its binary: bytes, instructions an element, occupancy, a time.

A predicted time is the larger of two: the bytes at the rate of a copy, and the instructions at one a clock and
scheduler, or for the products of a library their operations at the rate of a large product. Neither latency nor
launches are in it, so it is a bound from below. A measured time stands beside it where
`python -m benchmarks.gpu` has recorded one for the same case.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from benchmarks.binaries import aot, nvcc, sass
from benchmarks.rows import RESULTS

# An H200: 132 multiprocessors of four schedulers; its clock, and rates of a copy and of a large bf16 product.
COPY, PRODUCT, CLOCK, SCHEDULERS, LANES = 4.3e12, 788e12, 1.98e9, 132 * 4, 32
TARGET = "sm_90"
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 228 * 1024, 64, 32


@dataclass(frozen=True)
class Binary:
    """A kernel's resources and code on the target."""

    name: str
    registers: int
    shared: int
    threads: int
    code: list[sass.Instruction]

    def occupancy(self) -> int:
        """Warps that a multiprocessor can hold."""
        warps = self.threads // 32
        by_registers = REGISTERS // (_up(self.registers * 32, 256) * warps)
        by_shared = SHARED // (self.shared + 1024)
        return warps * min(by_registers, by_shared, WARPS // warps, BLOCKS)


@dataclass(frozen=True)
class Part:
    """A launch: its kernel, the elements it works on, by loads of how many bytes, and the bytes it must move.

    `row`: the elements of a program that does much once for all of them, in `loops` over them; 0 if only loops count.
    """

    binary: Callable[[], Binary]
    elements: int
    itemsize: int
    width: int
    moved: tuple[int, int]  # by sectors of 32 and of 64 bytes
    row: int = 0
    loops: int = 1

    def instructions(self) -> float:
        """An element."""
        binary = self.binary()
        if not self.row:
            return sass.count(binary.code, self.width).per_element(self.itemsize)
        step = sass.row(binary.code, self.width, self.loops, 1).loaded // self.itemsize * binary.threads
        counted = sass.row(binary.code, self.width, self.loops, -(-self.row // step))
        return counted.instructions * binary.threads / self.row

    def issue_seconds(self) -> float:
        return self.instructions() * self.elements / LANES / SCHEDULERS / CLOCK


@dataclass(frozen=True)
class Work:
    """What one measured variant does: launches of ours, or of a baseline the bytes that its passes move.

    `apart`: those passes are other launches than the products, and take their time beside them.
    """

    title: str
    suite: str
    case: str
    variant: str
    parts: Sequence[Part] = ()
    moved: tuple[int, int] | None = None
    operations: int = 0
    apart: bool = False

    def bytes(self) -> tuple[int, int]:
        return self.moved or tuple(sum(part.moved[n] for part in self.parts) for n in (0, 1))  # type: ignore[return-value]

    def predicted(self) -> tuple[float, float]:
        """Seconds, by sectors of 32 and of 64 bytes."""
        if self.moved is not None:
            both = sum if self.apart else max
            low, high = (both((moved / COPY, self.operations / PRODUCT)) for moved in self.moved)
            return low, high
        times = [sum(max(part.moved[n] / COPY, part.issue_seconds()) for part in self.parts) for n in (0, 1)]
        products = self.operations / PRODUCT
        return times[0] + products, times[1] + products


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


# -- binaries


@cache
def _library() -> dict[str, tuple[nvcc.Kernel, list[sass.Instruction]]]:
    """The CUDA kernels of the target by the beginning of their names."""
    found: dict[str, tuple[nvcc.Kernel, list[sass.Instruction]]] = {}
    for source in nvcc.SOURCES:
        kernels, texts = nvcc.disassemble(source, TARGET)
        found |= {kernel.name: (kernel, sass.instructions(texts[kernel.name])) for kernel in kernels}
    return found


def _cuda(name: str) -> Callable[[], Binary]:
    def binary() -> Binary:
        kernel, code = _library()[name]
        header = "".join(path.read_text() for path in (nvcc.ROOT / "csrc" / "cuda").glob("*.h"))
        threads = int(re.findall(r"\bTHREADS = (\d+)", header)[0])
        return Binary(f"CUDA `{name}`", kernel.registers, kernel.shared, threads, code)

    return binary


def _triton(name: str) -> Callable[[], Binary]:
    @cache
    def binary() -> Binary:
        spec = next(s for s in aot.specialisations() if s.name == name)
        found = aot.compiled(spec, TARGET, widest=False)
        code = sass.instructions(aot.disassembled(aot.compile_for(spec, TARGET)))
        threads = 32 * spec.options.get("num_warps", 4)
        return Binary(f"Triton `{name}`", found.registers, found.shared, threads, code)

    return binary


# -- works: the cases of benchmarks.gpu

LAYERS, HIDDEN, INTERMEDIATE, SELECTED = 28, 3072, 8192, 82
TOKENS, VOCABULARY = 8 * 512, 32000


def _touched(sector: int, itemsize: int) -> int:
    """Bytes of the sectors that hold the selected columns of all layers, as many as are expected to be touched."""
    return round(LAYERS * HIDDEN * _sectors(INTERMEDIATE, SELECTED, sector, itemsize)) * sector


def _sectors(columns: int, selected: int, sector: int, itemsize: int) -> float:
    """Sectors of a row that random columns are expected to touch."""
    each = sector // itemsize
    missed = math.comb(columns - each, selected) / math.comb(columns, selected)
    return columns // each * (1 - missed)


def works() -> list[Work]:
    return [*_subspace(), *_neurons(), *_logps(), *_head()]


def _subspace() -> list[Work]:
    suite, case = "gpu_subspace_update", f"{LAYERS} x {HIDDEN} x {INTERMEDIATE} bfloat16, 1 % of columns"
    chosen = LAYERS * HIDDEN * SELECTED
    there = (_touched(32, 2), _touched(64, 2))
    plus = lambda times, compact: tuple(times * t + compact * chosen for t in there)  # noqa: E731

    def parts(gather: Callable[[], Binary], perturb: Callable[[], Binary], restore: Callable[[], Binary]) -> list[Part]:
        return [
            Part(gather, chosen, 2, 2, plus(1, 4)),  # fp32 values are written
            Part(perturb, chosen, 2, 2, plus(2, 4 + 2)),  # and read, old weights kept
            Part(restore, chosen, 2, 2, plus(2, 2)),
        ]

    cuda = parts(*(_cuda(f"{name}_kernel<44>") for name in ("gather", "perturb", "restore")))
    triton = parts(*(_triton(f"{name}_kernel[bf16, any layout]") for name in ("gather", "perturb", "restore")))
    # Gradient and weight selected, the values cast, their norm, scaled and added, cast and copied in, copied back.
    indexed = plus(6, (2 + 2 + 4 + 4) + 2 + (4 + 4) + (2 + 4 + 4) + (4 + 2) + 2 + 2)
    dense = LAYERS * HIDDEN * INTERMEDIATE * 2
    return [
        Work("norm, perturb, restore, CUDA C++", suite, case, "shapo_kernels", cuda),
        Work("the same, Triton", suite, case, "shapo_kernels, triton", triton),
        Work("the same by index_select", suite, case, "index_select", moved=indexed),
        # Mask, norm, scale, add, subtract: 2 + 1 + 2 + 3 + 3 passes.
        Work("the same on whole tensors, foreach", suite, case, "dense, foreach", moved=(11 * dense, 11 * dense)),
    ]


def _neurons() -> list[Work]:
    """Products of the library on features that are gathered and padded before: nothing here has a kernel of ours."""
    suite, tokens, neurons, padded = "gpu_neurons", 4096, 81, 96
    shape = f"{tokens} tokens, {HIDDEN} x {neurons} of {INTERMEDIATE}, bfloat16"
    output, features = 2 * tokens * HIDDEN, 2 * tokens * padded
    gathered = [round(_sectors(INTERMEDIATE, neurons, s, 2) * s * tokens) + features for s in (32, 64)]
    product, layer = 2 * tokens * HIDDEN * padded, 2 * tokens * HIDDEN * INTERMEDIATE
    update, gradient = 2 * output + features, output + features + 4 * HIDDEN * padded
    both = lambda moved: (gathered[0] + moved, gathered[1] + moved)  # noqa: E731
    whole = 2 * tokens * INTERMEDIATE + 2 * HIDDEN * INTERMEDIATE + output
    base = "cuBLAS on gathered inputs"
    return [
        Work("delta of a layer", suite, f"update, {shape}", "shapo_kernels, in place", (), both(update), product),
        Work("its product alone", suite, f"update, {shape}", base, (), (update, update), product),
        Work("the layer itself", suite, f"update, {shape}", "the layer itself", (), (whole, whole), layer),
        Work(
            "gradient of a layer's neurons", suite, f"gradient, {shape}", "shapo_kernels", (), both(gradient), product
        ),
        Work("its product alone, gradient", suite, f"gradient, {shape}", base, (), (gradient, gradient), product),
    ]


def _logps() -> list[Work]:
    suite, case = "gpu_sequence_logps", f"8 x 512 x {VOCABULARY} bfloat16"
    logits = TOKENS * VOCABULARY
    passes = lambda itemsize: (itemsize * logits,) * 2  # noqa: E731
    ours = [
        Part(_triton("normalize_kernel[bf16]"), logits, 2, 16, passes(2)),
        Part(_triton("slope_kernel[bf16]"), logits, 2, 16, passes(2 + 2)),
    ]
    return [
        Work("log-probabilities, Triton", suite, case, "shapo_kernels", ours),
        # log_softmax into fp32; its backward pass fills a gradient, reads it and the result, and writes its own.
        Work("the same by log_softmax and gather", suite, case, "eager", moved=passes(2 + 4 + 4 + 4 + 4 + 2)),
    ]


def _head() -> list[Work]:
    """Products of the library into float32 tiles; a kernel between them reads a tile and makes it factors."""
    suite, width, vocabulary, tokens = "gpu_linear_sequence_logps", 2048, 128256, 8 * 384  # a quarter is prompt
    name = lambda frozen: f"8 x 512 x {vocabulary}, width {width}{frozen}, bfloat16"  # noqa: E731
    logits = tokens * vocabulary
    product = 2 * logits * width

    def walked(label: str, tiles: int) -> Part:
        # A token's sum is scaled where its maximum rises, in the k-th tile with probability 1/k, and in the last one.
        sums = round(8 * tokens * width * sum(1 / k for k in range(1, tiles + 1)))
        return _tile(f"walked{label}", logits, 4 + 2, vocabulary // tiles, sums)

    tiles = -(-logits // (2**27 // 4))  # half of 256 MiB each; the last is kept
    again = 1 - 1 / tiles
    trained = [walked(", long", tiles), _tile("again, long", round(logits * again), 4 + 2, vocabulary // tiles)]
    # All columns of a part's tokens in one tile: a row is too long for a cache and is read twice.
    pairs = [_tile("last, long", logits, 4 + 4 + 2, vocabulary)]
    frozen = [walked("", -(-logits // (2**25 // 4)))]
    base = "shapo_kernels"
    # Logits of all tokens, prompts too: written, and what log_softmax takes as from logits (see _logps).
    everything = 8 * 512 * vocabulary
    eager = ((2 + 20) * everything,) * 2
    by_eager = Work("the head, eager", suite, name(""), "eager", (), eager, 3 * 2 * everything * width, apart=True)
    return [
        Work("the head", suite, name(""), base, trained, operations=round((3 + again) * product)),
        Work("the head, by pairs", suite, name(""), f"{base}, by pairs", pairs, operations=3 * product),
        Work("the head, frozen", suite, name(", head frozen"), base, frozen, operations=2 * product),
        by_eager,
    ]


def _tile(label: str, elements: int, moved: int, row: int, more: int = 0) -> Part:
    binary = _triton(f"tile_kernel[fp32 into bf16, {label}]")
    total = moved * elements + more
    return Part(binary, elements, 4, 16, (total, total), row, loops=1 if label.startswith("again") else 2)


# -- the table


def table() -> str:
    lines = [
        "| work | kernel | registers | warps an SM | instructions an element | GB by 32-byte sectors (64) | "
        "time by bytes, ms | by instructions, ms | predicted, ms | measured, ms |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for work in works():
        for part in work.parts:
            binary = part.binary()
            lines.append(
                f"| {work.title} | {binary.name} | {binary.registers} | {binary.occupancy()} | "
                f"{part.instructions():.1f} | "
                f"{_gb(part.moved)} | {1e3 * part.moved[0] / COPY:.3f} | {1e3 * part.issue_seconds():.3f} | | |"
            )
        name = "together" if work.parts else "passes over memory"
        if work.parts and work.operations:
            name = f"together, and {work.operations / 1e12:.1f} TFLOP of products"
        low, high = (1e3 * seconds for seconds in work.predicted())
        said = f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} ({high:.3f})"
        lines.append(f"| {work.title} | {name} | | | | {_gb(work.bytes())} | | | {said} | {measured(work)} |")
    return "\n".join(lines)


def _gb(moved: tuple[int, int]) -> str:
    low, high = (f"{value / 1e9:.2f}" for value in moved)
    return low if low == high else f"{low} ({high})"


def measured(work: Work) -> str:
    path = RESULTS / f"{work.suite}.json"
    if not path.exists():
        return "not yet"
    run = json.loads(path.read_text())
    for row in run["rows"]:
        if (row["case"], row["variant"]) == (work.case, work.variant):
            return f"{row['p50_ms']:.3f}, {run['environment']['date']}"
    return "not yet"
