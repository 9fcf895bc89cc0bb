"""The wheel: built from the sdist as a user's pip would, then looked into, installed elsewhere and used."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shapo_kernels import native

ROOT = Path(__file__).parents[2]

built = pytest.mark.skipif(not native.has_cpu, reason=f"the CPU library is not loaded: {native.problems.get('cpu')}")
needs_binutils = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="no binutils")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """sdist -> wheel without isolation, CUDA left out for speed, from a copy: the tree is not written to."""
    if not shutil.which("cmake"):
        pytest.skip("CMake is not on PATH")
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "runs", "dist", "*.so", "*.egg-info", "__pycache__", ".*cache"
    )
    shutil.copytree(ROOT, tree, ignore=ignored)
    hook = "import sys; sys.path.insert(0, 'tools'); import build_backend as b; print(b.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", hook, str(folder), cwd=tree)
    (sdist,) = folder.glob("*.tar.gz")
    pip = ["-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    run(sys.executable, *pip, "-w", str(folder), str(sdist), cwd=folder, SHAPO_CUDA="0")
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_one_wheel_serves_every_python_of_a_platform(wheel):
    assert re.fullmatch(r"shapo_kernels-[\d.]+-py3-none-\w+\.whl", wheel.name)


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_the_library_and_nothing_else(installed):
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {
        "shapo",
        "shapo_kernels",
    }
    for name in ("shapo_kernels/py.typed", "shapo/py.typed", "shapo_kernels/libshapo_cpu.so", "shapo/cli.py"):
        assert (installed / name).exists(), name
    sources = {p.relative_to(ROOT / "shapo_kernels") for p in (ROOT / "shapo_kernels").rglob("*.py")}
    assert {p.relative_to(installed / "shapo_kernels") for p in (installed / "shapo_kernels").rglob("*.py")} == sources
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "shapo = shapo.cli:main" in entry_points.read_text()


@pytest.mark.slow
def test_the_installed_wheel_loads_and_serves_the_cpu(installed, tmp_path):
    code = "import shapo_kernels as sk; print(sk.__file__); print(sk.backends.serving('cpu'))"
    file, backend = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert Path(file).is_relative_to(installed)
    assert backend == "cpu"


def check_library(library: Path, needed: set[str]) -> None:
    symbols = run("nm", "-D", "-C", str(library), cwd=library.parent)
    assert not re.search(r"\b(c10|at|caffe2)::|\bPy[A-Z_]", symbols), "symbols outside the stable ABI"
    # A weak or unique definition would be merged with that of another library in the process.
    assert not re.search(r" [VuW] .*torch::", symbols)
    dynamic = run("readelf", "-d", str(library), cwd=library.parent)
    found = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    assert needed <= found
    assert not {name for name in found if "torch_python" in name or "c10" in name or "cudart" in name}
    assert not re.search("RPATH|RUNPATH", dynamic), "a path of the build machine"


@pytest.mark.slow
@needs_binutils
def test_the_wheels_library_asks_for_the_stable_abi_alone(installed):
    library = installed / "shapo_kernels" / "libshapo_cpu.so"
    check_library(library, {"libtorch_cpu.so"})
    assert str(ROOT).encode() not in library.read_bytes(), "a path of the build machine"


@built
@needs_binutils
def test_the_cpu_library_asks_for_the_stable_abi_alone():
    check_library(native.cpu_library, {"libtorch_cpu.so"})


@needs_binutils
@pytest.mark.skipif(native.cuda_library is None, reason="the CUDA library was not built")
def test_the_cuda_library_asks_for_torchs_cuda_library_and_no_runtime():
    check_library(native.cuda_library, {"libtorch_cpu.so", "libtorch_cuda.so"})
    assert native.cuda_architectures()


def test_a_library_that_cannot_be_loaded_is_reported_once_and_replaced_by_the_reference(tmp_path):
    copy = tmp_path / "shapo_kernels"
    shutil.copytree(ROOT / "shapo_kernels", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (copy / "libshapo_cpu.so").write_bytes(b"not a library")
    code = (
        "import warnings; warnings.simplefilter('always')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    import shapo_kernels as sk\n"
        "print(sk.backends.serving('cpu'), len([w for w in caught if 'shapo_kernels' in str(w.message)]))\n"
        "print(sk.native.problems['cpu'])"
    )
    served, problem = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).splitlines()
    assert served == "reference 1"
    assert "libshapo_cpu.so cannot be loaded" in problem
