"""csrc/cuda compiled by nvcc, linked and registered on a machine that needs neither a GPU nor a CUDA build of torch."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_nvcc
import pytest
import torch

from shapo_kernels import native, reference

pytestmark = [
    pytest.mark.skipif(gpu_nvcc.nvcc() is None, reason="nvcc is not on PATH"),
    pytest.mark.timeout(1200),  # nvcc on a busy machine
]
TORCH = Path(torch.__file__).parent / "lib"

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
    """The objects of all sources for sm_90, what ptxas said, and the library linked from them."""
    folder = tmp_path_factory.mktemp("cuda")
    kernels, warnings = [], []
    for source in gpu_nvcc.SOURCES:
        found, said = gpu_nvcc.compile_source(source, ("sm_90",), folder / f"{source.stem}.o")
        kernels += found
        warnings += said
    (folder / "stub.cpp").write_text(STUB)
    name = "libtorch_cuda.so"
    run("c++", "-shared", "-fPIC", f"-Wl,-soname,{name}", folder / "stub.cpp", "-o", folder / name)
    library = folder / "libshapo_cuda.so"
    run(
        gpu_nvcc.nvcc(), "-shared", "-cudart=static", *folder.glob("*.o"), "-o", library, TORCH / "libtorch_cpu.so",
        folder / "libtorch_cuda.so", "-Xlinker", "--no-as-needed", "-Xlinker", "--exclude-libs,ALL",
    )  # fmt: skip
    return kernels, warnings, library


def run(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def test_no_kernel_spills_and_nothing_is_warned_about(compiled):
    kernels, warnings, _ = compiled
    assert not warnings
    assert kernels
    assert [k for k in kernels if k.spills] == []
    assert max(k.registers for k in kernels) <= 255
    assert max(k.shared for k in kernels) <= 48 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("source", gpu_nvcc.SOURCES, ids=lambda path: path.stem)
def test_the_other_architectures_do_not_spill_either(source):
    others = tuple(a for a in gpu_nvcc.ARCHITECTURES if a != "sm_90")
    kernels, warnings = gpu_nvcc.compile_source(source, others)
    assert not warnings
    assert {k.architecture for k in kernels} == set(others)
    assert [k for k in kernels if k.spills] == []


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
def test_the_library_loads_and_registers_every_operator(compiled):
    library = compiled[2]
    code = (
        "import ctypes, torch\n"
        f"ctypes.CDLL({str(library.parent / 'libtorch_cuda.so')!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "import shapo_kernels\n"
        f"torch.ops.load_library({str(library)!r})\n"
        f"for name in {reference.__all__!r}:\n"
        "    if torch._C._dispatch_has_kernel_for_dispatch_key('shapo_kernels::' + name, 'CUDA'): print(name)\n"
    )
    if torch.version.cuda is not None:
        pytest.skip("a CUDA build of torch has the library's own dependencies")
    printed = run(sys.executable, "-c", code).split()
    assert set(printed) == set(reference.__all__)


def test_every_launch_is_checked_and_nothing_adds_floats_atomically():
    for source in gpu_nvcc.SOURCES:
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
        gpu_nvcc.compile_source(source, ("sm_90",))


def test_rows_are_moved_16_bytes_at_a_time_and_products_run_on_tensor_cores(compiled):
    tool = shutil.which("cuobjdump") or pytest.importorskip("triton").knobs.nvidia.cuobjdump.path
    sass = run(tool, "-sass", compiled[2])
    for kernel in (
        "gather_kernel",
        "perturb_kernel",
        "restore_kernel",
        "strip_kernel",
        "neuron_kernel",
        "update_kernel",
    ):
        bodies = [
            body
            for name, body in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", sass, re.DOTALL)
            if kernel in name
        ]
        assert bodies, kernel
        assert any("LDG.E.128" in body for body in bodies), kernel
    assert "HMMA" in sass
