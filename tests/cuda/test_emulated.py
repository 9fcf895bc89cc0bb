"""What csrc/cuda computes, without a GPU: its sources compiled for the CPU, threads emulated, checked as on a GPU.

Only launches are rewritten; kernels, launchers and tables are the sources themselves. Emulation shows neither races nor
anything that depends on real hardware.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.binaries import nvcc
from benchmarks.gpu import checks
from shapo_kernels import backends, ops, reference
from shapo_kernels.interop.torch_private import has_kernel

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "emulation"
LAUNCH = re.compile(r"([\w:]+(?:<[\w:, ]+>)?)\s*<<<(.+?),\s*(\w+),\s*0,\s*([\w.()]+)>>>\((.*?)\);", re.DOTALL)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(nvcc.nvcc() is None, reason="CUDA's headers are not here"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """torch.ops.shapo_emulated: the CUDA operators, registered for CPU tensors."""
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "cuda").mkdir()
    for header in (ROOT / "csrc").glob("*.h"):
        (folder / header.name).write_text(header.read_text())
    for source in [*(ROOT / "csrc" / "cuda").iterdir(), *HERE.iterdir()]:  # what stands for CUDA's own comes last
        text, launches = LAUNCH.subn(r"emulation::launch(\2, \3, [&] { \1(\5); });", source.read_text())
        assert "<<<" not in text, f"a launch in {source.name} was not understood"
        assert bool(launches) == (source.suffix == ".cu")
        text = text.replace("IMPL(shapo_kernels, CUDA, m)", "IMPL(shapo_emulated, CPU, m)")
        name = source.name.replace(".cu", ".cpp") if source.suffix == ".cu" else source.name
        (folder / "cuda" / name).write_text(text)
    schemas = (ROOT / "csrc" / "register.cpp").read_text().replace("(shapo_kernels, m)", "(shapo_emulated, m)")
    (folder / "cuda" / "register.cpp").write_text(schemas)
    torch_folder = Path(torch.__file__).parent
    library = folder / "libshapo_emulated.so"
    command = [
        "c++", "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-ffp-contract=off", "-w",
        "-include", folder / "cuda" / "cuda_emulation.h", "-I", folder / "cuda", "-isystem", torch_folder / "include",
        *(f"-isystem{path}" for path in nvcc.headers()), "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *(folder / "cuda").glob("*.cpp"), "-o", library, torch_folder / "lib" / "libtorch_cpu.so",
    ]  # fmt: skip
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-6000:]
    torch.ops.load_library(library)
    return torch.ops.shapo_emulated


@pytest.fixture(autouse=True)
def emulated(operators, monkeypatch):
    """The CPU's operators are the emulated ones."""
    backends.serving("cpu")
    served = dict(backends._functions["reference"])
    served |= {
        name: getattr(operators, name)
        for name in reference.__all__
        if hasattr(operators, name) and has_kernel(f"shapo_emulated::{name}", "CPU")
    }
    monkeypatch.setitem(backends._functions, "reference", served)
    with backends.use("reference"):
        yield


ANYWHERE = [check for check in checks.ANYWHERE if check is not checks.operators_pass_opcheck]


@pytest.mark.parametrize("check", ANYWHERE, ids=lambda check: check.__name__)
def test_the_cuda_kernels_pass_the_gpus_checks(check):
    check(torch.device("cpu"))


@pytest.mark.parametrize("layers", [1, 44, 45, 400])
def test_any_number_of_layers_fits_its_tables(layers):
    torch.manual_seed(0)
    weights = [torch.randn(3, 5).to(checks.DTYPES[i % 4]) for i in range(layers)]
    indices, axes = [torch.tensor([0, 2])] * layers, [i % 2 for i in range(layers)]
    values, squares = ops.gather(weights, indices, axes)
    expected = [w.index_select(a, i) for w, i, a in zip(weights, indices, axes, strict=True)]
    assert all(torch.equal(v, e.to(v.dtype)) for v, e in zip(values, expected, strict=True))
    again, scale = ops.norms_and_scale(values, torch.ones(layers, dtype=torch.float64))
    total = torch.stack([e.double().square().sum() for e in expected])
    torch.testing.assert_close(squares, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(again, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(scale, total.sum().rsqrt().expand(layers), rtol=1e-10, atol=0)
    backups = [torch.full_like(e, torch.nan) for e in expected]
    before = [w.clone() for w in weights]
    realised = ops.perturb_(weights, indices, axes, values, scale, backups)
    assert realised[:, 0].gt(0).all()
    ops.restore_(weights, indices, axes, backups)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


@pytest.mark.parametrize(("shape", "dtype"), [((5, 1040), torch.bfloat16), ((3, 2064), torch.float32)])
def test_rows_of_several_blocks_are_moved_whole(shape, dtype):
    weight, index = torch.randn(shape).to(dtype), torch.tensor([0, shape[0] - 1])
    values, squares = ops.gather([weight], [index], [0])
    assert torch.equal(values[0], weight[index].float())
    torch.testing.assert_close(squares[0], weight[index].double().square().sum(), rtol=1e-12, atol=0)
    backup = torch.full_like(weight[index], torch.nan)
    before = weight.clone()
    ops.perturb_([weight], [index], [0], values, torch.ones(1, dtype=torch.float64), [backup])
    assert torch.equal(weight[index], (2 * before[index].float()).to(dtype))
    ops.restore_([weight], [index], [0], [backup])
    assert torch.equal(weight, before)


@pytest.mark.parametrize("axis", [0, 1])
def test_an_index_outside_its_layer_makes_the_norm_nan_and_is_not_written(axis):
    """The public functions refuse it on the CPU; on a GPU, where nothing waits, this is what is left of it."""
    run = lambda name, *arguments: backends.function(torch.device("cpu"), name)(*arguments)  # noqa: E731
    layer = ([torch.ones(16, 16)], [torch.tensor([3, 16])], [axis])
    values = [torch.zeros((16, 2) if axis == 1 else (2, 16))]
    squares = torch.zeros(1, dtype=torch.float64)
    run("gather_into", *layer, values, squares)
    assert squares.isnan().all()
    backups = [torch.zeros_like(values[0])]
    run("perturb_", *layer, [torch.ones_like(values[0])], torch.ones(1, dtype=torch.float64), backups, None)
    assert layer[0][0].sum() == 16 * 16 + 16
    run("restore_", *layer, backups)
    assert layer[0][0].sum() == 16 * 16
