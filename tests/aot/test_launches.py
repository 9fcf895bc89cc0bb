"""What the Triton launchers would compile on a GPU is what was compiled ahead of time: nothing is launched by surprise.

The launchers run on CPU tensors up to the point where a kernel would be compiled, and that is written down instead.
"""

import importlib
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.binaries import aot

F64 = torch.float64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, F64)
subspace = importlib.import_module("shapo_kernels.triton.subspace_update")
logps = importlib.import_module("shapo_kernels.triton.sequence_logps")
tiles = importlib.import_module("shapo_kernels.triton.linear_tile")


class NoDriver:
    """As much of a GPU's driver as comes before a compilation."""

    def get_current_target(self):
        return aot.TARGETS["sm_90"]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def launches(monkeypatch):
    """(kernel, types, constants, aligned arguments, options) of every launch."""
    found = []

    def note(self, key, signature, device, constexprs, options, attrs, warmup):
        names = self.arg_names
        found.append(
            (
                self.__name__,
                {name: kind for name, kind in signature.items() if kind != "constexpr"},
                {names[path[0]]: value for path, value in constexprs.items()},
                {names[path[0]] for path, attributes in attrs.items() if attributes},
                options,
            )
        )

    monkeypatch.setattr(JITFunction, "_do_compile", note)
    monkeypatch.setattr(
        JITFunction, "__getitem__", lambda self, grid: lambda *a, **k: self.run(*a, grid=grid, warmup=True, **k)
    )
    monkeypatch.setattr(driver, "_active", NoDriver())
    forget_devices()
    yield found
    forget_devices()


def forget_devices():
    for kernel in [*vars(aot.subspace_kernels).values(), *vars(logps).values(), *vars(tiles).values()]:
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()


def assert_all_known(launches):
    """Types and constants are a specialisation's, which presupposed no alignment that the launch does not have."""
    known = list(aot.specialisations())
    assert launches
    for kernel, types, constants, aligned, options in launches:
        matching = [
            spec
            for spec in known
            if spec.kernel.__name__ == kernel
            and spec.types == types
            and spec.constants == constants
            and aot.divisible(spec) <= aligned
        ]
        assert matching, f"{kernel} {types} {constants} {sorted(aligned)}"
        assert all(getattr(options, name) == value for name, value in matching[0].options.items())


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:2], DTYPES[2:3], DTYPES[3:], DTYPES])
def test_the_subspace_update(launches, dtypes, rows):
    weights = [torch.randn(32, 48).to(dtype) for dtype in dtypes]
    indices, axes = [torch.tensor([1, 5, 8])] * len(weights), [0 if rows else 1] * len(weights)
    compact = [w[:3] if rows else w[:, :3].contiguous() for w in weights]
    values = [c.to(torch.float64 if c.dtype == F64 else torch.float32) for c in compact]
    rho, sums = torch.ones(len(weights), dtype=F64), torch.empty(len(weights), dtype=F64)
    subspace.gather_into(weights, indices, axes, values, sums)
    subspace.selected_squared_norms(weights, indices, axes)
    subspace.squared_norms(weights)
    for norm, relative in (("global", None), ("layer", rho[:]), ("none", None)):
        subspace.perturbation_scale(sums, rho, relative, norm, 1e-12)
    for compute in (None, *DTYPES):
        subspace.perturb_(weights, indices, axes, values, rho, compact, compute)
    subspace.restore_(weights, indices, axes, compact)
    assert_all_known(launches)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_log_probabilities(launches, dtype):
    labels, wide = torch.zeros(2, 3, dtype=torch.int64), F64 if dtype == F64 else torch.float32
    numbers = torch.zeros(2, 3, dtype=wide), torch.zeros(2, 2, 3, dtype=wide), torch.zeros(2, 3, dtype=wide)
    rest = (labels, *numbers, -100, 1, 0)
    for logits in (torch.randn(2, 3, 64).to(dtype), torch.randn(2, 3, 126).to(dtype)[..., ::2]):
        for entropy in (False, True):
            logps.token_logps(logits, labels, -100, 1, 0, 64, entropy)
        if logits.is_contiguous():  # a gradient that is made is contiguous, whatever the logits are
            logps.token_logps_gradient(logits, *rest)
        logps.token_logps_gradient_(logits, *rest)
    for launch in launches:  # on the CPU the kernels are told that they are interpreted; on a GPU they are not
        launch[2].update(EMULATE=False, PTX=True)
    assert_all_known(launches)


@pytest.mark.parametrize("columns", [2048, 8192])
def test_a_tile_of_the_head(launches, columns):
    tile, targets, per_token = torch.randn(2, columns), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 2)
    state, sums, half = torch.zeros(7, 2, dtype=F64), torch.zeros(2, 64), torch.empty(2, columns, dtype=torch.bfloat16)
    common = targets, None, 16, 1.0, None, per_token
    tiles.linear_tile(tile, half, *common, state, sums)
    tiles.linear_tile(tile, half, *common, state, sums, last=columns == 8192, statistics=False)
    if columns == 2048:
        tiles.linear_tile(tile, tile, *common, state, sums, last=True)
        tiles.linear_tile(tile, tile, *common)
        tiles.linear_tile(tile, half, targets, half[0], 16, 0.5, 3.0, per_token, state, sums)
        tiles.linear_tile(tile, half, targets, half[0], 16, 0.5, 3.0, per_token)
        tiles.linear_tile(tile, half, *common, state, sums, last=True, statistics=True)
    else:
        tiles.linear_tile(tile, half, *common)
    for launch in launches:
        launch[2].update(EMULATE=False, PTX=True)
    assert_all_known(launches)
