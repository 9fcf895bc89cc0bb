"""The checks of benchmarks/gpu on a CUDA device, for every backend; what holds anywhere on the CPU too."""

import pytest
import torch

from benchmarks.gpu.checks import SkipCheckError
from benchmarks.gpu.families import ANYWHERE, FAMILIES
from shapo_kernels import backends


def run(check, backend, device):
    if backend not in backends.available():
        pytest.skip(f"the {backend} backend is not available")
    torch.manual_seed(0)
    with backends.use(backend):
        try:
            check(torch.device(device))
        except SkipCheckError as reason:
            pytest.skip(str(reason))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(
    "check", [check for family in FAMILIES.values() for check in family], ids=lambda check: check.__name__
)
def test_on_the_gpu(check, backend):
    run(check, backend, "cuda")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("check", ANYWHERE, ids=lambda check: check.__name__)
def test_on_the_cpu(check, backend):
    run(check, backend, "cpu")
