"""Compiles the Triton kernels ahead of time, for GPUs that need not be there, and reads off what each one takes.

A specialisation is a kernel with its compile-time constants and the alignments that a launch would find. For each the
registers, shared memory, spills and the widest global access are read from the binary. Nothing is run and nothing is
timed. table.py makes the table of docs/gpu_kernels.md from it.
"""

from __future__ import annotations

import importlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shapo_kernels.triton import subspace_kernels, tables

# By path: the package's attributes of these names are the functions.
sequence_logps = importlib.import_module("shapo_kernels.triton.sequence_logps")
linear_tile = importlib.import_module("shapo_kernels.triton.linear_tile")
subspace_update = importlib.import_module("shapo_kernels.triton.subspace_update")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_DTYPES = [*(_NAMES[dtype] for dtype in tables.DTYPES), "mixed"]
_PATHS = {tables.SCATTERED: "any layout", tables.ROWS: "rows", tables.WHOLE: "whole"}


@dataclass(frozen=True)
class Specialisation:
    """One kernel as one kind of launch would compile it."""

    kernel: Any
    label: str
    types: dict[str, str]  # of the run-time arguments, in Triton's words
    constants: dict[str, Any]
    divisible: frozenset[str] = frozenset()  # arguments known to be multiples of 16
    options: dict[str, Any] = field(default_factory=dict)
    wide: bool = False  # whether its layout lets it move 16 bytes at once
    core: bool = False  # whether it is compiled for every target in the quick tests
    registers: int = 128  # what it may take at most on NVIDIA

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__}[{self.label}]"


@dataclass(frozen=True)
class Resources:
    """What a binary takes. `widest`: bytes of a thread's widest global load or store, where it was looked for."""

    registers: int
    shared: int
    spills: int
    widest: int | None


def specialisations() -> Iterator[Specialisation]:
    yield from _subspace()
    yield from _logps()
    yield from _tiles()


_SUBSPACE_TYPES = {
    "table": "*i64",
    "layers": "i32",
    "blocks": "i32",
    "partials": "*fp64",
    "squares": "*fp64",
    "rho": "*fp64",
    "weight_squares": "*fp64",
    "scales": "*fp64",
    "sums": "*fp64",
    **dict.fromkeys(("rounding", "norm", "relative"), "i32"),
    "eta_high": "fp32",
    "eta_low": "fp32",
}
_OWN_MEMORY = frozenset({"table", "partials", "squares", "scales"})


def _of_subspace(kernel: Any, label: str, constants: dict[str, Any], **more: Any) -> Specialisation:
    types = {name: _SUBSPACE_TYPES[name] for name in kernel.arg_names if name not in constants}
    return Specialisation(
        kernel, label, types, constants, _OWN_MEMORY & set(types), dict(subspace_update.OPTIONS), **more
    )


def _subspace() -> Iterator[Specialisation]:
    kernels = subspace_kernels
    for path, dtype in itertools.product(_PATHS, (0, 1, tables.MIXED)):
        label = f"{_DTYPES[dtype]}, {_PATHS[path]}"
        constants = {"PATH": path, "DTYPE": dtype, "BLOCK": tables.BLOCK}
        wide = path != tables.SCATTERED
        core = dtype == (tables.MIXED if wide else 1)
        yield _of_subspace(kernels.gather_kernel, label, constants, wide=wide, core=core)
        if path != tables.WHOLE:
            yield _of_subspace(kernels.perturb_kernel, label, constants, wide=wide, core=core)
            yield _of_subspace(kernels.restore_kernel, label, constants, wide=wide, core=core)
    chunk = {"CHUNK": subspace_update.CHUNK}
    for columns in (1, 3):
        yield _of_subspace(kernels.add_kernel, f"{columns}", {"COLUMNS": columns, **chunk}, core=columns == 3)
    yield _of_subspace(kernels.scale_kernel, "any norm", chunk, core=True)


def _logps() -> Iterator[Specialisation]:
    for dtype, aligned in itertools.product(_NAMES, (True, False)):
        name, wide = _NAMES[dtype], dtype == torch.float64
        per_token = dict.fromkeys(("logps", "normalizers", "entropies", "grad"), "*fp64" if wide else "*fp32")
        rows = (
            "logits",
            "slopes",
            "vocabulary",
            "row_stride",
            "token_stride",
            "slope_row_stride",
            "slope_token_stride",
        )
        types = {**dict.fromkeys(("logits", "slopes"), f"*{name}"), "labels": "*i64", **per_token}
        constants = {
            **sequence_logps.configuration(wide),
            "STEPS": sequence_logps.STEPS,
            "TOGETHER": sequence_logps.together(dtype),
            "EMULATE": False,
            "PTX": True,
        }
        if aligned:  # every token's logits lie side by side and begin on 16 bytes
            constants |= {"stride": 1, "slope_stride": 1}
        for kernel, entropy in (
            (sequence_logps.normalize_kernel, False),
            (sequence_logps.normalize_kernel, True),
            (sequence_logps.slope_kernel, False),
        ):
            fixed = {key: value for key, value in {**constants, "ENTROPY": entropy}.items() if key in kernel.arg_names}
            own = {key: types.get(key, "i32") for key in kernel.arg_names if key not in fixed}
            yield Specialisation(
                kernel,
                f"{name}{', entropy' if entropy else ''}{'' if aligned else ', any stride'}",
                own,
                fixed,
                frozenset(own) & {*per_token, *(rows if aligned else ())},
                dict(sequence_logps.OPTIONS),
                wide=aligned,
                registers=128 if aligned else 255,
                core=aligned and dtype == torch.bfloat16 and not entropy,
            )


def _tiles() -> Iterator[Specialisation]:
    """The head's tiles: one among several, the last, and one that is computed again; then further options."""
    kernel = linear_tile.tile_kernel
    walked, last = {"SEE": True}, {"SEE": True, "LAST": True}
    again: dict[str, bool] = {}
    capped = {"BIASED": True, "SCALED": True, "CAPPED": True}
    for half, label, asked, columns, options in (
        ("bf16", "walked", walked, 2048, {}),
        ("bf16", "walked, long", walked, 8192, {}),
        ("bf16", "last, long", last, 8192, {}),
        ("bf16", "again, long", again, 8192, {}),
        ("fp16", "walked", walked, 2048, {}),
        ("fp32", "last", last, 2048, {}),
        ("fp32", "again", again, 2048, {}),
        ("bf16", "walked, bias, scaled, capped", walked, 2048, capped),
        ("bf16", "last, bias, scaled, capped", last, 2048, capped),
        ("bf16", "again, bias, scaled, capped", again, 2048, capped),
        ("bf16", "last, statistics", last, 2048, {"STATISTICS": True}),
        ("fp32", "last, bias, scaled, capped, statistics", last, 2048, {**capped, "STATISTICS": True}),
    ):
        config = linear_tile.configuration(columns)
        names = ("SEE", "LAST", "WRITE", "SCALE_SUMS", "STATISTICS", "BIASED", "SCALED", "CAPPED", "EMULATE")
        constants = {
            **dict.fromkeys(names, False),
            "WRITE": True,
            "SCALE_SUMS": asked != again,
            "PTX": True,
            "LANES": config.pop("LANES"),
            "TOGETHER": sequence_logps.together(torch.float32),
            **asked,
            **options,
        }
        types = {
            "tile": "*fp32",
            "factors": f"*{half}",
            "targets": "*i64",
            "bias": "*fp32" if half == "fp32" or "bias" not in label else f"*{half}",
            "state": "*fp64" if asked != again else "*fp32",
            "per_token": "*fp32",
            "sums": "*fp32",
            **dict.fromkeys(("scale", "softcap"), "fp32"),
        }
        own = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
        aligned = frozenset({"tile", "factors", "bias", "state", "sums", "columns", "width"})
        yield Specialisation(
            kernel,
            f"fp32 into {half}, {label}",
            own,
            constants,
            aligned,
            config,
            wide=True,
            core=half == "bf16" and label in ("walked", "last, long", "again, bias, scaled, capped"),
        )


def violations(specialisation: Specialisation, target: str, found: Resources) -> list[str]:
    """What a binary does not keep to; empty where all is well."""
    spec, problems = specialisation, []
    # A thread of AMD's twice as wide waves has half as many elements, 8 bytes of a 16-bit dtype.
    width = 8 if target.startswith("gfx") else 16
    if found.spills:
        problems.append(f"{found.spills} bytes spilled")
    if found.registers > spec.registers:
        problems.append(f"{found.registers} registers, {spec.registers} allowed")
    if spec.wide and (found.widest is None or found.widest < width):
        problems.append(f"accesses of {found.widest} bytes, {width} expected")
    return [f"{target} {spec.name}: {problem}" for problem in problems]


def compiled(specialisation: Specialisation, target: str, *, widest: bool = True) -> Resources:
    """Compile for a target that need not be there, from Triton's cache where it is, and read the resources.

    Args:
        widest: look for the widest access too, for which an NVIDIA binary is disassembled: half a second.
    """
    binary = compile_for(specialisation, target)
    shared = int(binary.metadata.shared)
    if "amdgcn" in binary.asm:
        return _amd_resources(binary.asm["amdgcn"], shared)
    return _nvidia_resources(binary.asm["cubin"], shared, widest)


def compile_for(specialisation: Specialisation, target: str) -> Any:
    """Triton's own compiled kernel."""
    spec = specialisation
    arguments = spec.kernel.arg_names
    signature = {name: spec.types.get(name, "constexpr") for name in arguments}
    missing = [name for name in arguments if name not in spec.types and name not in spec.constants]
    if missing:
        raise ValueError(f"{spec.name} says nothing about {missing}")
    # In one order: the cache's key depends on it.
    attributes = {(arguments.index(name),): [["tt.divisibility", 16]] for name in sorted(divisible(spec))}
    constants = dict(spec.constants)
    if "PTX" in constants:
        constants["PTX"] = TARGETS[target].backend == "cuda"
    source = ASTSource(spec.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=dict(spec.options))


def divisible(specialisation: Specialisation) -> set[str]:
    """The arguments whose alignment a launch would tell the compiler."""
    kernel = specialisation.kernel
    silent = {param.name for param in kernel.params if param.do_not_specialize_on_alignment}
    return set(specialisation.divisible) - silent


def _nvidia_resources(cubin: bytes, shared: int, look_for_widest: bool) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _said(knobs.nvidia.cuobjdump, "-res-usage", path)))
        spilled, stack = int(found["LOCAL"]), int(found["STACK"])
        sass = _said(knobs.nvidia.nvdisasm, "-c", "-ndf", path) if look_for_widest or stack else ""
    # A stack that no load or store goes to is the frame of a division subroutine and no spill.
    if re.search(r"\b(LDL|STL)\b", sass):
        spilled += stack
    widths = [int(bits) // 8 for bits in re.findall(r"\b(?:LDG|STG|LDGSTS)(?:\.[A-Z0-9]+)*?\.(64|128)\b", sass)]
    return Resources(int(found["REG"]), shared, spilled, max(widths, default=4) if look_for_widest else None)


def disassembled(binary: Any) -> str:
    """An NVIDIA binary of Triton's, as cuobjdump prints it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.asm["cubin"])
        return _said(knobs.nvidia.cuobjdump, "-sass", path)


def _said(tool: Any, *arguments: str | Path) -> str:
    run = subprocess.run([tool.path, *arguments], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def _amd_resources(text: str, shared: int) -> Resources:
    number = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
    words = [int(n) for n in re.findall(r"(?:global|buffer)_(?:load|store)_dwordx(\d)", text)]
    # Spilled scalar registers go to lanes of vector registers, not to memory.
    return Resources(number["vgpr_count"], shared, number["vgpr_spill_count"], 4 * max(words, default=1))
