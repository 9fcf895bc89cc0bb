"""The C++ column cosine against float64 truth, in every memory layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shapo_kernels import native

pytestmark = pytest.mark.skipif(
    not native.has_cpu, reason=f"the CPU library is not loaded: {native.problems.get('cpu')}"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
column_cosine = torch.ops.shapo_kernels.column_cosine


def truth(weight, direction, axis):
    w, v = weight.double(), direction.double()
    if axis == 1:
        w = w.t()
    norms = w.norm(dim=1) * v.norm()
    return torch.where(norms == 0, 0.0, (w @ v) / norms)


def layouts(x):
    return {
        "contiguous": x,
        "rows apart": torch.cat([x, x], 1)[:, : x.shape[1]],
        "transposed": x.t().contiguous().t(),
        "columns apart": x.repeat_interleave(2, 1)[:, ::2],
    }


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 1, 2, 9, 130, 300]),
    st.sampled_from([0, 1, 3, 8, 61, 2049]),
    st.sampled_from(["contiguous", "rows apart", "transposed", "columns apart"]),
    st.integers(0, 1),
)
def test_cosines_equal_the_truth_in_every_layout(seed, dtype, rows, columns, layout, axis):
    generator = torch.Generator().manual_seed(seed)
    weight = layouts(torch.randn(rows, columns, generator=generator).to(dtype))[layout]
    direction = torch.randn(2 * weight.shape[1 - axis], generator=generator)[::2]
    cosine = column_cosine(weight, direction, axis)
    expected = truth(weight, direction, axis)
    assert cosine.dtype == torch.float32
    torch.testing.assert_close(cosine.double(), expected, rtol=6e-8, atol=1e-14)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_not_above_that_of_eager(axis, dtype):
    torch.manual_seed(0)
    weight, direction = torch.randn(512, 384).to(dtype), torch.randn(512 if axis == 1 else 384).to(dtype)
    eager = (direction @ weight if axis == 1 else weight @ direction) / (weight.norm(dim=1 - axis) * direction.norm())
    expected = truth(weight, direction, axis)
    error = (column_cosine(weight, direction.float(), axis).double() - expected).abs().max()
    assert error <= (eager.double() - expected).abs().max()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_neuron_of_zeros_has_cosine_zero_and_a_nan_stays_in_its_neuron(axis):
    weight = torch.randn(40, 40)
    zero, broken = (weight[:, 3], weight[:, 7]) if axis == 1 else (weight[3], weight[7])
    zero.zero_()
    broken[5] = torch.nan
    cosine = column_cosine(weight, torch.randn(40), axis)
    assert cosine[3] == 0
    assert cosine.isnan().nonzero().flatten().tolist() == [7]
    assert not column_cosine(torch.randn(40, 40), torch.zeros(40), axis).any()


@pytest.mark.parametrize("axis", [0, 1])
def test_the_number_of_threads_changes_no_bit(axis):
    torch.manual_seed(0)
    weight, direction = torch.randn(1100, 900), torch.randn(1100 if axis == 1 else 900)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(column_cosine(weight, direction, axis))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_opcheck():
    torch.library.opcheck(column_cosine.default, (torch.randn(6, 9), torch.randn(6), 1))
    torch.library.opcheck(column_cosine.default, (torch.randn(6, 9).bfloat16(), torch.randn(9), 0))


@pytest.mark.parametrize(
    ("weight", "direction", "axis", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3), 2, "axis is 2: expected 0"),
        (torch.zeros(3, 4), torch.zeros(4), 1, r"direction is Float \[4\]: expected float32 \[3\]"),
        (torch.zeros(3, 4), torch.zeros(3).double(), 1, r"direction is Double \[3\]: expected float32 \[3\]"),
        (
            torch.zeros(3, 4).double(),
            torch.zeros(3),
            1,
            r"weight is Double \[3, 4\]: expected two dimensions of float32",
        ),
        (torch.zeros(3), torch.zeros(3), 0, r"weight is Float \[3\]: expected two dimensions"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3), 1, "weight is Long"),
    ],
)
def test_what_does_not_fit_is_refused(weight, direction, axis, message):
    with pytest.raises(RuntimeError, match=message):
        column_cosine(weight, direction, axis)
