"""csrc/cuda compiled by nvcc, linked and registered on a machine that needs neither a GPU nor a CUDA build of torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.binaries import nvcc
from shapo_kernels import native, reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(nvcc.nvcc() is None, reason="nvcc is not on PATH"),
    pytest.mark.timeout(1200),  # nvcc on a busy machine
]
ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent / "lib"

SUBSPACE_UPDATE = {
    "gather_into", "perturb_", "perturbation_scale", "restore_", "selected_squared_norms", "squared_norms"
}  # fmt: skip

# Stands for libtorch_cuda, which a CPU build of torch does not have: only what the operators ask of it.
STUB = """
#include <cstdint>
extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) { *stream = nullptr; return 0; }
int32_t torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return 0;
}
void torch_c10_cuda_free_error_msg(char*) {}
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the kernels take on every architecture, what the compiler warned about, and the library.

    The library that was built is looked at where it is one of these sources as they are: `.ci/run` builds it with
    warnings that are errors. Otherwise they are compiled here.
    """
    library = native.cuda_library
    if is_of_these_sources(library):
        return nvcc.read_library(library), [], library
    folder = tmp_path_factory.mktemp("cuda")
    kernels, warnings = [], []
    for source in nvcc.SOURCES:
        found, said = nvcc.compile_source(source, to=folder / f"{source.stem}.o")
        kernels += found
        warnings += said
    library = folder / "libshapo_cuda.so"
    run(
        nvcc.nvcc(), "-shared", "-cudart=static", *folder.glob("*.o"), "-o", library, TORCH / "libtorch_cpu.so",
        stub(folder), "-Xlinker", "--no-as-needed", "-Xlinker", "--exclude-libs,ALL",
    )  # fmt: skip
    return kernels, warnings, library


def is_of_these_sources(library):
    if library is None or nvcc.cuobjdump() is None:
        return False
    files = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "cmake").iterdir(), ROOT / "CMakeLists.txt"]
    built_for = {f"sm_{name.removesuffix('-real')}" for name in native.cuda_architectures().split()}
    newest = max(file.stat().st_mtime for file in files)
    return library.stat().st_mtime > newest and built_for >= set(nvcc.ARCHITECTURES)


def stub(folder):
    (folder / "stub.cpp").write_text(STUB)
    library = folder / "libtorch_cuda.so"
    run("c++", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", folder / "stub.cpp", "-o", library)
    return library


def run(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def test_no_kernel_spills_on_any_architecture_and_nothing_is_warned_about(compiled):
    kernels, warnings, _ = compiled
    assert not warnings
    names = [sorted(k.name for k in kernels if k.architecture == a) for a in nvcc.ARCHITECTURES]
    assert names[0]
    assert names == names[:1] * len(nvcc.ARCHITECTURES)
    assert [k for k in kernels if k.spills] == []
    assert max(k.registers for k in kernels) <= 255
    assert max(k.shared for k in kernels) <= 48 * 1024


def test_the_library_asks_the_loader_for_both_of_torchs(compiled):
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", compiled[2]))
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert not [name for name in needed if "c10" in name or "cudart" in name]


def test_the_library_uses_nothing_but_the_stable_abi(compiled):
    undefined = run("nm", "-DC", "--undefined-only", compiled[2])
    assert not re.findall(r"\b(?:c10|at|torch)::.*", undefined)
    asked = set(re.findall(r"\b((?:aoti_)?torch_\w+)", undefined))
    given = set(re.findall(r"\b((?:aoti_)?torch_\w+)", run("nm", "-D", "--defined-only", TORCH / "libtorch_cpu.so")))
    assert asked - given <= set(re.findall(r"\w*torch_\w+", STUB))


@pytest.mark.skipif(not native.has_cpu, reason="the schemas are in the CPU library")
def test_the_library_loads_and_registers_the_subspace_update(compiled, tmp_path):
    library = compiled[2]
    code = (
        "import ctypes, torch\n"
        f"ctypes.CDLL({str(stub(tmp_path))!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "import shapo_kernels\n"
        f"torch.ops.load_library({str(library)!r})\n"
        "from shapo_kernels.interop.torch_private import has_kernel\n"
        f"for name in {reference.__all__!r}:\n"
        "    compiled = hasattr(torch.ops.shapo_kernels, name)\n"
        "    if compiled and has_kernel('shapo_kernels::' + name, 'CUDA'): print(name)\n"
    )
    if torch.version.cuda is not None:
        pytest.skip("a CUDA build of torch has the library's own dependencies")
    printed = run(sys.executable, "-c", code).split()
    # The family that is written in CUDA C++; the others are Triton's and the reference's.
    assert set(printed) == SUBSPACE_UPDATE


def test_every_launch_is_checked_and_nothing_adds_floats_atomically():
    for source in nvcc.SOURCES:
        text = source.read_text()
        assert "STD_CUDA_KERNEL_LAUNCH_CHECK" in text
        assert "atomicAdd" not in text
        assert "c10/" not in text
        assert "ATen" not in text
        assert "OnDeviceOf" in text


def test_a_source_that_does_not_compile_says_so(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void kernel() { undeclared(); }\n")
    with pytest.raises(subprocess.CalledProcessError):
        nvcc.compile_source(source, ("sm_90",))


def test_rows_are_moved_16_bytes_at_a_time(compiled):
    if nvcc.cuobjdump() is None:
        pytest.skip("cuobjdump is not here")
    functions = run(nvcc.cuobjdump(), "-sass", "-arch", "sm_90", compiled[2]).split("Function : ")[1:]
    for kernel in (
        "gather_kernel",
        "perturb_kernel",
        "restore_kernel",
    ):
        found = [function for function in functions if kernel in function.partition("\n")[0]]
        assert found, kernel
        assert any("LDG.E.128" in function for function in found), kernel
