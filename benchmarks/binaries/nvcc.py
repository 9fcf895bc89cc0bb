"""Compiles csrc/cuda with nvcc, which needs no GPU, and reads off what each kernel takes: nothing is run or timed.

The same is read from a library that has been built, where cuobjdump is here.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Kernel:
    """What one kernel takes on one architecture. `spills`: bytes of stack frame and of spilled registers."""

    source: str
    name: str
    architecture: str
    registers: int
    shared: int
    spills: int


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def headers() -> list[str]:
    """The folders of CUDA's own headers, as nvcc names them."""
    command = [nvcc() or "nvcc", "--dryrun", "-x", "cu", "-c", "-", "-o", "/dev/null"]
    said = subprocess.run(command, input="", capture_output=True, text=True, check=True).stderr
    return [
        path for line in said.splitlines() if "INCLUDES=" in line for path in re.findall(r'"(?:-I)?(/[^"]+)"', line)
    ]


def compile_source(
    source: Path, architectures: tuple[str, ...] = ARCHITECTURES, to: Path | None = None
) -> tuple[list[Kernel], list[str]]:
    """The kernels of a source file and the compiler's warnings; the object file goes to `to` where that is given.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("nvcc is not on PATH")
    codes = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in architectures]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            compiler, "-std=c++17", "-O3", "-Xptxas=-v", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-isystem", str(Path(torch.__file__).parent / "include"), "-Xcompiler=-Wall,-fPIC", "-Werror=all-warnings",
            *codes, "-c", str(source), "-o", str(to or f"{folder}/object.o"),
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    output = demangled(run.stdout + run.stderr)
    warnings = [line for line in output.splitlines() if "warning" in line.lower()]
    return list(_kernels(source.name, output)), warnings


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that Triton brings with it."""
    found = shutil.which("cuobjdump")
    if found is None and importlib.util.find_spec("triton") is not None:
        from triton import knobs

        found = knobs.nvidia.cuobjdump.path
    return found


def read_library(library: Path) -> list[Kernel]:
    """The kernels of a library, for every architecture that it has binary code for."""
    command = [cuobjdump() or "cuobjdump", "-res-usage", str(library)]
    said = demangled(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = []
    for binary in re.split(r"^arch = ", said, flags=re.MULTILINE)[1:]:
        architecture = binary.split()[0]
        for name, resources in re.findall(r"^ Function (.+):\n(.+)$", binary, re.MULTILINE):
            number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources)}
            spills = number["STACK"] + number["LOCAL"]
            found.append(Kernel(library.name, _short(name), architecture, number["REG"], number["SHARED"], spills))
    return found


def disassemble(source: Path, architecture: str) -> tuple[list[Kernel], dict[str, str]]:
    """The kernels of a source file for one architecture, and the disassembly of each by its name."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "object.o")
        kernels, _ = compile_source(source, (architecture,), to=target)
        command = [cuobjdump() or "cuobjdump", "-sass", str(target)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    texts = {}
    for part in said.split("Function : ")[1:]:
        name, _, text = part.partition("\n")
        texts[_short(demangled(name))] = text
    return kernels, texts


def demangled(text: str) -> str:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    return subprocess.run([tool], input=text, capture_output=True, text=True, check=True).stdout if tool else text


def _kernels(source: str, output: str) -> list[Kernel]:
    found = []
    entries = re.split(r"Compiling entry function '", output)[1:]
    for entry in entries:
        head = re.match(r"(.*)' for '(\w+)'", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        if head is None or registers is None or frame is None:
            raise ValueError(f"ptxas said something unexpected about a kernel of {source}: {entry[:200]!r}")
        shared = re.search(r"(\d+) bytes smem", entry)
        found.append(
            Kernel(
                source,
                _short(head[1]),
                head[2],
                int(registers[1]),
                int(shared[1]) if shared else 0,
                sum(map(int, frame.groups())),
            )
        )
    return found


def _short(name: str) -> str:
    """`void shapo::cuda::(anonymous namespace)::gather_kernel<44>(…)` -> `gather_kernel<44>`."""
    name = name.replace("(anonymous namespace)::", "").replace("<unnamed>::", "").replace("shapo::cuda::", "")
    name = re.sub(r"\((?:int|bool)\)", "", name.removeprefix("void "))
    return name.partition("(")[0]
