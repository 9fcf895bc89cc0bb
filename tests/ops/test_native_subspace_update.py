"""The C++ subspace update against the plain-PyTorch one: bits where bits are promised, float64 sums where sums are.

Outputs are poisoned with NaN first, so that an element that is never written cannot pass for a correct one.
"""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shapo_kernels import native, reference

pytestmark = pytest.mark.skipif(
    not native.has_cpu, reason=f"the CPU library is not loaded: {native.problems.get('cpu')}"
)

F32, F64 = torch.float32, torch.float64
DTYPES = [F32, torch.bfloat16, torch.float16, F64]
kernels = torch.ops.shapo_kernels


@dataclass
class Case:
    weights: list[Tensor]
    indices: list[Tensor]
    axes: list[int]

    def compact(self, dtypes: list[torch.dtype], fill: float = torch.nan) -> list[Tensor]:
        selected = [w.index_select(a, i) for w, i, a in zip(self.weights, self.indices, self.axes, strict=True)]
        return [torch.full(s.shape, fill, dtype=d) for s, d in zip(selected, dtypes, strict=True)]

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [w.dtype for w in self.weights]

    @property
    def compute_dtypes(self) -> list[torch.dtype]:
        return [F64 if d == F64 else F32 for d in self.dtypes]

    def copy(self) -> "Case":
        """The same values in memory of their own, with the same strides."""
        copies = [torch.empty_strided(w.shape, w.stride(), dtype=w.dtype).copy_(w) for w in self.weights]
        return Case(copies, self.indices, self.axes)


LAYOUTS = [
    lambda x, rows, columns: x[:rows, :columns].contiguous(),
    lambda x, rows, columns: x[:rows, :columns],
    lambda x, rows, columns: x[:rows, :columns].t().contiguous().t(),
    lambda x, rows, columns: x[::2, ::2],
    lambda x, rows, columns: x[rows:, columns:],
]


@st.composite
def cases(draw, special: bool = False) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weights, indices, axes = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        rows, columns = draw(st.sampled_from([0, 1, 2, 7, 33, 70])), draw(st.sampled_from([0, 1, 3, 8, 65, 200]))
        dtype = draw(st.sampled_from(DTYPES))
        spread = torch.randn(2 * rows, 2 * columns, generator=generator)
        if special:
            chance = torch.rand(spread.shape, generator=generator)
            for value, place in ((torch.nan, 0), (torch.inf, 1), (-torch.inf, 2), (-0.0, 3), (1e-42, 4), (6e4, 5)):
                spread[(chance > place / 50) & (chance < (place + 1) / 50)] = value
        weight = draw(st.sampled_from(LAYOUTS))(spread.to(dtype), rows, columns)
        axis = draw(st.integers(0, 1))
        neurons = weight.shape[axis]
        count = draw(st.integers(0, neurons))
        order = draw(st.sampled_from(["sorted", "shuffled", "first"]))
        index = torch.arange(neurons) if order == "first" else torch.randperm(neurons, generator=generator)
        index = index[:count]
        weights.append(weight)
        indices.append(index.sort().values if order == "sorted" else index)
        axes.append(axis)
    return Case(weights, indices, axes)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal with the sign of zero; any NaN equals any other."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    both_nan = a.isnan() & b.isnan()
    return bool(((a.contiguous().view(integers) == b.contiguous().view(integers)) | both_nan).all())


@settings(max_examples=150, deadline=None)
@given(cases(special=True))
def test_gather_copies_what_index_select_copies(case):
    values, expected = case.compact(case.compute_dtypes), case.compact(case.compute_dtypes)
    norms, expected_norms = torch.full((2, len(values)), torch.nan, dtype=F64)
    kernels.gather_into(case.weights, case.indices, case.axes, values, norms)
    reference.gather_into(case.weights, case.indices, case.axes, expected, expected_norms)
    assert all(same_bits(v, e) for v, e in zip(values, expected, strict=True))
    torch.testing.assert_close(norms, expected_norms, rtol=1e-13, atol=0, equal_nan=True)
    assert same_bits(kernels.selected_squared_norms(case.weights, case.indices, case.axes), norms)


@settings(max_examples=60, deadline=None)
@given(cases(special=True))
def test_squared_norms_of_whole_tensors_of_any_stride(case):
    norms = kernels.squared_norms(case.weights)
    torch.testing.assert_close(norms, reference.squared_norms(case.weights), rtol=1e-13, atol=0, equal_nan=True)


@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from([None, *DTYPES]), st.integers(0, 2**31), st.booleans())
def test_perturb_gives_the_bits_of_the_reference_and_restore_gives_the_old_ones_back(case, compute, seed, small):
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(d.shape, generator=generator).to(d.dtype) for d in case.compact(case.compute_dtypes)]
    scale = torch.randn(len(directions), generator=generator, dtype=F64) * (1e-3 if small else 1)
    scale[torch.rand(len(scale), generator=generator) < 0.2] = 0
    untouched, other = case.copy(), case.copy()
    backups, other_backups = case.compact(case.dtypes), case.compact(case.dtypes)

    sums = kernels.perturb_(case.weights, case.indices, case.axes, directions, scale, backups, compute)
    expected = reference.perturb_(other.weights, case.indices, case.axes, directions, scale, other_backups, compute)

    assert all(same_bits(w, o) for w, o in zip(case.weights, other.weights, strict=True))
    assert all(same_bits(b, o) for b, o in zip(backups, other_backups, strict=True))
    torch.testing.assert_close(sums, expected, rtol=1e-11, atol=1e-13)

    kernels.restore_(case.weights, case.indices, case.axes, backups)
    assert all(same_bits(w, u) for w, u in zip(case.weights, untouched.weights, strict=True))


@settings(max_examples=40, deadline=None)
@given(cases(special=True))
def test_scale_zero_writes_nothing_and_still_keeps_the_old_bits(case):
    untouched, backups = case.copy(), case.compact(case.dtypes)
    nans = case.compact(case.compute_dtypes, fill=torch.nan)
    sums = kernels.perturb_(
        case.weights, case.indices, case.axes, nans, torch.zeros(len(nans), dtype=F64), backups, None
    )
    assert all(same_bits(w, u) for w, u in zip(case.weights, untouched.weights, strict=True))
    kept = [w.index_select(a, i) for w, i, a in zip(untouched.weights, case.indices, case.axes, strict=True)]
    assert all(same_bits(b, k) for b, k in zip(backups, kept, strict=True))
    assert not sums[:, :2].any()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-300, 4.0, 1e300, torch.inf, torch.nan]), min_size=1, max_size=5),
    st.sampled_from(["global", "layer", "none"]),
    st.booleans(),
)
def test_scales_are_those_of_the_reference(squares, norm, relative):
    squares = torch.tensor(squares, dtype=F64)
    rho = torch.linspace(0.1, 0.9, len(squares), dtype=F64)
    weights = rho.flip(0) if relative and norm != "none" else None
    expected = reference.perturbation_scale(squares, rho, weights, norm, 1e-12)
    torch.testing.assert_close(
        kernels.perturbation_scale(squares, rho, weights, norm, 1e-12), expected, rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_low_precision_value_and_every_rounding_is_torchs(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1)
    index, values, norms = [torch.tensor([0])], [torch.full((1, 2**16), torch.nan)], torch.zeros(1, dtype=F64)
    kernels.gather_into([every], index, [0], values, norms)
    assert same_bits(values[0], every.float())

    # Steps from zero of every magnitude a float has, and those that lie halfway between neighbours of the dtype.
    generator = torch.Generator().manual_seed(0)
    any_bits = (
        torch.randint(-(2**31), 2**31, (1, 2**18), generator=generator, dtype=torch.int64).to(torch.int32).view(F32)
    )
    low = every.float()
    halfway = (low[:, :-1].double() / 2 + low[:, 1:].double() / 2).float()
    for steps in (any_bits, halfway, torch.nextafter(halfway, low[:, 1:])):
        weight, backup = torch.zeros(steps.shape, dtype=dtype), torch.empty(steps.shape, dtype=dtype)
        kernels.perturb_([weight], index, [0], [steps], torch.ones(1, dtype=F64), [backup], None)
        assert same_bits(weight, (0.0 + steps).to(dtype))


def layers_above_one_block():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(700, 300, generator=generator).to(d) for d in (F32, torch.bfloat16, F64)]
    weights.append(torch.randn(1, 50_000, generator=generator))
    index = torch.randperm(300, generator=generator)[:40].sort().values
    return Case(weights, [index, index, torch.arange(100), torch.tensor([0])], [1, 1, 0, 0])


def all_results():
    case = layers_above_one_block()
    values, norms = case.compact(case.compute_dtypes), torch.empty(len(case.weights), dtype=F64)
    kernels.gather_into(case.weights, case.indices, case.axes, values, norms)
    scale = kernels.perturbation_scale(norms, torch.full_like(norms, 3.0), None, "global", 1e-12)
    backups = case.compact(case.dtypes)
    sums = kernels.perturb_(case.weights, case.indices, case.axes, values, scale, backups, torch.bfloat16)
    return [*case.weights, *values, *backups, norms, scale, sums]


def test_the_number_of_threads_changes_no_bit():
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(all_results())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits(tmp_path):
    code = "import sys, runpy, torch; torch.save(runpy.run_path(sys.argv[1])['all_results'](), sys.argv[2])"
    for capability in ("baseline", "avx2"):
        path = tmp_path / f"{capability}.pt"
        env = {**os.environ, "SHAPO_CPU_CAPABILITY": capability}
        subprocess.run([sys.executable, "-c", code, __file__, str(path)], env=env, check=True)
        results = torch.load(path)
        assert all(same_bits(a, b) for a, b in zip(all_results(), results, strict=True)), capability


def test_unselected_memory_between_strided_rows_and_columns_is_never_written():
    memory = torch.arange(400.0).view(20, 20)
    untouched, weight = memory.clone(), memory[2:12:2, 3:13:3]
    index, direction = [torch.tensor([1, 3])], [torch.ones(5, 2)]
    backup = [torch.empty(5, 2)]
    kernels.perturb_([weight], index, [1], direction, torch.ones(1, dtype=F64), backup, None)
    changed = memory != untouched
    assert changed.sum() == 10
    assert changed[2:12:2, [6, 12]].all()
    kernels.restore_([weight], index, [1], backup)
    assert torch.equal(memory, untouched)


OPERATORS = [
    "gather_into",
    "squared_norms",
    "selected_squared_norms",
    "perturbation_scale",
    "perturb_",
    "restore_",
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator):
    case = Case(
        [torch.randn(6, 9), torch.randn(7, 4).bfloat16()], [torch.tensor([0, 3, 8]), torch.tensor([2, 6])], [1, 0]
    )
    layers = (case.weights, case.indices, case.axes)
    zeros, backups, ones = case.compact(case.compute_dtypes, 0), case.compact(case.dtypes, 0), torch.ones(2, dtype=F64)
    arguments = {
        "gather_into": (*layers, zeros, torch.zeros(2, dtype=F64)),
        "squared_norms": (zeros,),
        "selected_squared_norms": layers,
        "perturbation_scale": (ones, ones, ones, "layer", 1e-12),
        "perturb_": (*layers, zeros, ones, backups, torch.bfloat16),
        "restore_": (*layers, backups),
    }[operator]
    torch.library.opcheck(getattr(kernels, operator).default, arguments)


def call_perturb(**changes):
    arguments = {
        "weights": [torch.zeros(4, 6)],
        "indices": [torch.tensor([0, 5])],
        "axes": [1],
        "directions": [torch.zeros(4, 2)],
        "scale": torch.zeros(1, dtype=F64),
        "backups": [torch.zeros(4, 2)],
        "compute_dtype": None,
    }
    kernels.perturb_(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": [torch.tensor([0, 6])]}, r"indices\[0\] holds 6: expected 0 <= neuron < 6"),
        ({"indices": [torch.tensor([-1, 0])]}, r"indices\[0\] holds -1"),
        ({"indices": [torch.tensor([0, 1], dtype=torch.int32)]}, r"indices\[0\] is Int"),
        ({"axes": [2]}, r"axes\[0\] is 2: expected 0"),
        ({"axes": [0]}, r"directions\[0\] has shape \[4, 2\]: expected a contiguous \[2, 6\]"),
        ({"axes": [0, 1]}, "1 weights, 1 indices and 2 axes"),
        ({"weights": [torch.zeros(24)]}, r"weights\[0\] has shape \[24\]"),
        ({"weights": [torch.zeros(4, 6, dtype=torch.int64)]}, r"weights\[0\] is Long"),
        ({"directions": [torch.zeros(4, 2, dtype=F64)]}, r"directions\[0\] is Double: expected Float"),
        ({"directions": [torch.zeros(2, 4).t()]}, "expected a contiguous"),
        ({"backups": []}, "0 backups for 1 layers"),
        ({"scale": torch.zeros(2, dtype=F64)}, r"scale is Double \[2\]: expected a contiguous float64 \[1\]"),
        ({"compute_dtype": torch.int32}, "compute_dtype is Int"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(changes, message):
    weight = torch.zeros(4, 6)
    with pytest.raises(RuntimeError, match=message):
        call_perturb(
            **({"weights": [weight], "directions": [torch.ones(4, 2)], "scale": torch.ones(1, dtype=F64)} | changes)
        )
    assert not weight.any()
