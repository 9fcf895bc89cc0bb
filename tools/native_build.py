"""Finds torch, a compiler and CMake, and builds csrc/ as a step of setuptools' build. Imports neither torch nor shapo.

Environment: `SHAPO_CUDA` = auto (default) | 0 | 1; `SHAPO_CUDA_ARCHS` as CMAKE_CUDA_ARCHITECTURES; `MAX_JOBS`;
`SHAPO_TORCH` = folder of the torch package to build against; `CXX`, `CUDACXX`, `CUDA_HOME`.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import SetupError

MINIMUM_TORCH = "2.10"
PACKAGE = "shapo_kernels"
ROOT = Path(__file__).resolve().parent.parent


def find_torch() -> Path | None:
    """The folder of an installed torch that is new enough to build against, or None."""
    wanted = tuple(map(int, MINIMUM_TORCH.split(".")))
    return next((folder for folder in _torch_folders() if _version(folder) >= wanted), None)


def _torch_folders() -> Iterator[Path]:
    given = os.environ.get("SHAPO_TORCH")
    if given:
        yield Path(given)
        return
    yield from _importable_torch()
    # pip hides the target environment from an isolated build, yet runs the target's own interpreter.
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # Other front ends build in an environment of their own; the target is then known if it is activated.
    active = os.environ.get("VIRTUAL_ENV")
    if active:
        folders.append(sysconfig.get_path("purelib", vars={"base": active, "platbase": active}))
    if _sees_system_packages():
        system = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        folders += [
            site.getusersitepackages(),
            sysconfig.get_path("purelib", vars=system),
            f"{sys.base_prefix}/lib/python3/dist-packages",  # Debian
        ]
    for folder in folders:
        yield Path(folder) / "torch"


def _importable_torch() -> Iterator[Path]:
    """What this process could import, which is not done: without isolation that is the target environment's torch, with
    it one that the front end fetched because get_requires_for_build_wheel asked for it."""
    spec = importlib.machinery.PathFinder.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent


def _sees_system_packages() -> bool:
    if sys.prefix == sys.base_prefix:
        return True
    try:
        settings = Path(sys.prefix, "pyvenv.cfg").read_text()
    except OSError:
        return False
    return re.search(r"^include-system-site-packages\s*=\s*true", settings, re.MULTILINE | re.IGNORECASE) is not None


def _version(torch: Path) -> tuple[int, ...]:
    """(major, minor) from torch/version.py, which is read and not run; () where there is none."""
    try:
        text = (torch / "version.py").read_text()
    except OSError:
        return ()
    found = re.search(r"^__version__[^=]*=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else ()


def find_compiler() -> str | None:
    """The C++ compiler that CMake will take, or None."""
    given = shlex.split(os.environ.get("CXX", ""))
    return next(filter(None, map(shutil.which, given[:1] or ["c++", "g++", "clang++"])), None)


class BuildNative(Command):
    """Builds the compiled libraries and puts them into the package: in the build folder, or in place when editable."""

    description = "build the C++ and CUDA libraries with CMake"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        build_libraries(ROOT / PACKAGE if self.editable_mode else Path(str(self.build_lib), PACKAGE))

    def get_source_files(self) -> list[str]:
        files = [ROOT / "CMakeLists.txt", *ROOT.glob("cmake/*"), *ROOT.glob("csrc/**/*.*")]
        return [str(file.relative_to(ROOT)) for file in files]

    def get_outputs(self) -> list[str]:
        return [str(file) for pattern in _PRODUCTS for file in Path(str(self.build_lib), PACKAGE).glob(pattern)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


_PRODUCTS = ("libshapo_*.so", "cuda_architectures.txt")


def build_libraries(destination: Path) -> None:
    """Compile csrc/ into a folder; without a C++ compiler leave it empty and say so.

    Raises:
        SetupError: CUDA was asked for and cannot be built, torch or CMake is missing, or the compilation failed.
    """
    cuda = os.environ.get("SHAPO_CUDA", "auto")
    if cuda not in ("auto", "0", "1"):
        raise SetupError(f"SHAPO_CUDA is {cuda!r}: expected auto, 0 or 1")
    nvcc = find_nvcc()
    if cuda == "1" and nvcc is None:
        raise SetupError(
            "SHAPO_CUDA=1, but nvcc is neither on PATH nor in CUDACXX or CUDA_HOME: install it or set another"
        )
    for old in [path for pattern in _PRODUCTS for path in destination.glob(pattern)]:
        old.unlink()
    if find_compiler() is None:
        print(
            f"{PACKAGE}: no C++ compiler found: installing without compiled kernels (plain PyTorch and Triton serve)",
            file=sys.stderr,
        )
        return
    torch = find_torch()
    if torch is None:
        raise SetupError(f"torch >= {MINIMUM_TORCH} is needed to build against: pip install torch")
    cmake = _tool("cmake")
    if cmake is None:
        raise SetupError("CMake is needed to build: pip install cmake ninja, or build with isolation")

    folder = ROOT / "build" / "native"
    # A cache from another build environment names tools that are gone; the objects stay, ninja knows what they hold.
    shutil.rmtree(folder / "CMakeFiles" / "CMakeScratch", ignore_errors=True)
    (folder / "CMakeCache.txt").unlink(missing_ok=True)
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DSHAPO_TORCH={torch}", f"-DSHAPO_CUDA={cuda}"]
    configure.append(f"-DSHAPO_CUDA_ARCHS={os.environ.get('SHAPO_CUDA_ARCHS', '')}")
    ninja = _tool("ninja")
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if nvcc is not None:
        configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    _run(configure)
    _run([cmake, "--build", str(folder), "--parallel", jobs])
    _run([cmake, "--install", str(folder), "--prefix", str(destination), "--strip"])


def find_nvcc() -> str | None:
    """The CUDA compiler, or None: CUDACXX, nvcc on PATH, or CUDA_HOME's (by default that of /usr/local/cuda)."""
    given = os.environ.get("CUDACXX")
    if given:
        return shutil.which(given)
    return shutil.which("nvcc") or shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc")


def _tool(name: str) -> str | None:
    """A build tool on PATH, or beside the interpreter, where pip puts the packages cmake and ninja."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def _run(command: list[str]) -> None:
    print(f"{PACKAGE}: {shlex.join(command)}", flush=True)
    if subprocess.run(command, check=False).returncode != 0:
        raise SetupError(f"{PACKAGE}: the build of csrc/ failed, see the output above (command: {shlex.join(command)})")


class PlatformWheel(bdist_wheel):
    """The libraries use LibTorch's stable ABI and no Python C API: one wheel for every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    """A distribution with compiled parts, though none that setuptools would build itself."""

    def has_ext_modules(self) -> bool:
        return True


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


COMMANDS = {"build": Build, "build_native": BuildNative, "bdist_wheel": PlatformWheel}
