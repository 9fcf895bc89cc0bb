"""The subspace update in Triton against the reference: shapes, strides, dtypes, both axes, one weight to many."""

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shapo_kernels import backends, ops

F64 = torch.float64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, F64)
# The interpreter is too slow to look for a smaller failing example.
quick = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def layer(draw):
    """A weight of any layout, some of its neurons (none, one, all), the axis, and a gradient like the weight."""
    dtype, axis = draw(st.sampled_from(DTYPES)), draw(st.sampled_from((0, 1)))
    rows, columns = draw(st.sampled_from((1, 3, 16, 37))), draw(st.sampled_from((1, 5, 32, 70)))
    layout = draw(st.sampled_from(("contiguous", "transposed", "strided", "offset")))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def make():
        if layout == "transposed":
            return torch.randn(columns, rows, generator=generator).to(dtype).t()
        if layout == "strided":
            return torch.randn(rows, 2 * columns, generator=generator).to(dtype)[:, ::2]
        if layout == "offset":
            return torch.randn(rows + 1, columns + 3, generator=generator).to(dtype)[1:, 2:-1]
        return torch.randn(rows, columns, generator=generator).to(dtype)

    neurons = columns if axis == 1 else rows
    count = draw(st.sampled_from((0, 1, neurons // 2, neurons)))
    index = torch.randperm(neurons, generator=generator)[:count].sort().values
    if draw(st.booleans()):
        index = torch.stack([index, index], 1)[:, 0]
    return make(), make(), index, axis


def poisoned(weights, indices, axes, dtypes):
    return [
        torch.full_like(w.index_select(a, i), torch.nan, dtype=d, memory_format=torch.contiguous_format)
        for w, i, a, d in zip(weights, indices, axes, dtypes, strict=True)
    ]


def update(weights, gradients, indices, axes):
    """Everything that the operators give for one update, in the backend that is in use."""
    weights = [torch.empty_strided(w.shape, w.stride(), dtype=w.dtype).copy_(w) for w in weights]
    rho = torch.linspace(0.1, 0.4, len(weights), dtype=F64)
    values, squares = ops.gather(gradients, indices, axes)
    again, scale = ops.norms_and_scale(values, rho, weight_squared_norms=squares + 1, norm="layer", eta=1e-3)
    backups = poisoned(weights, indices, axes, [w.dtype for w in weights])
    # A scale of its own: norms that were added in another order would move the weights by their last bit.
    realised = ops.perturb_(weights, indices, axes, values, rho, backups)
    perturbed = [w.clone() for w in weights]
    ops.restore_(weights, indices, axes, backups)
    sums = [squares, again, ops.selected_squared_norms(gradients, indices, axes), ops.squared_norms(values), scale]
    return values, backups, weights, perturbed, sums, realised


@quick
@given(st.lists(layer(), min_size=1, max_size=4))
def test_an_update_equals_the_references(layers):
    weights, gradients, indices, axes = map(list, zip(*layers, strict=True))
    got = update(weights, gradients, indices, axes)
    with backends.use("reference"):
        expected = update(weights, gradients, indices, axes)
    for mine, theirs in zip(got[:3], expected[:3], strict=True):  # values, backups and what is restored: to the bit
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    for mine, theirs in zip(got[3], expected[3], strict=True):
        # The interpreter cuts bfloat16 off where hardware and PyTorch round it: one unit in the last place.
        rtol = 2**-7 if mine.dtype == torch.bfloat16 else 0
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=0)
    for mine, theirs in zip(got[4], expected[4], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    for number, weight in enumerate(weights):
        if weight.dtype != torch.bfloat16:
            torch.testing.assert_close(got[5][number], expected[5][number], rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("layers", [1, 50])
def test_many_layers_take_the_launches_of_one(layers, monkeypatch):
    launches = count_launches(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 5, generator=generator).to(DTYPES[i % 4]) for i in range(layers)]
    indices, axes = [torch.tensor([0, 2])] * layers, [i % 2 for i in range(layers)]
    values, _ = ops.gather(weights, indices, axes)
    launches.clear()
    _, scale = ops.norms_and_scale(values, torch.ones(layers, dtype=F64))
    backups = poisoned(weights, indices, axes, [w.dtype for w in weights])
    ops.perturb_(weights, indices, axes, values, scale, backups)
    ops.restore_(weights, indices, axes, backups)
    assert len(launches) == 6


def count_launches(monkeypatch):
    import triton.runtime.interpreter as interpreter

    launches, run = [], interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "__call__",
        lambda self, *a, **k: (launches.append(self.fn.__name__), run(self, *a, **k))[1],
    )
    return launches


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 1040), torch.bfloat16), ((3, 2064), torch.float32), ((2, 1024), F64)]
)
def test_rows_of_several_blocks_are_moved_in_wide_accesses_and_whole(shape, dtype):
    from shapo_kernels.triton import tables

    weight = torch.randn(shape).to(dtype)
    index = torch.tensor([0, shape[0] - 1])
    got = update([weight], [weight], [index], [0])
    with backends.use("reference"):
        expected = update([weight], [weight], [index], [0])
    assert torch.equal(got[0][0], expected[0][0])
    assert torch.equal(got[2][0], weight)
    torch.testing.assert_close(got[4][0], expected[4][0], rtol=1e-12, atol=0)
    assert tables.layer_table([weight], [index], [0], got[0], None).path == tables.ROWS


def test_a_layer_of_many_blocks_is_added_up_in_full():
    value = torch.randn(3000, 700)
    torch.testing.assert_close(
        ops.squared_norms([value, value[:0]])[0], value.double().square().sum(), rtol=1e-12, atol=0
    )
    (odd,) = ops.squared_norms([torch.ones(4099)[1:4098]])
    assert odd.item() == 4097


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32, F64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_reaches_the_compute_dtype_is_reported(dtype, compute):
    # Steps of a quarter from whole numbers are exact in every dtype: the sums must be too.
    weight = torch.arange(12.0).reshape(3, 4).to(dtype)
    direction = torch.full((3, 2), 0.25, dtype=F64 if dtype == F64 else torch.float32)
    arguments = ([weight], [torch.tensor([1, 3])], [1], [direction], torch.ones(1, dtype=F64))
    realised = ops.perturb_(*arguments, [torch.empty(3, 2, dtype=dtype)], compute_dtype=compute)
    old = torch.tensor([1.0, 3, 5, 7, 9, 11])
    assert realised.tolist() == [[6 * 0.25**2, 6 * 0.25**2, old.square().sum().item()]]


def test_a_step_below_the_compute_dtypes_spacing_is_reported_as_nothing():
    weight = torch.full((4, 3), 1.0)
    direction = torch.full((4, 1), 1e-4)  # a fortieth of bfloat16's spacing at 1
    realised = ops.perturb_(
        [weight], [torch.tensor([1])], [1], [direction], torch.ones(1, dtype=F64), [torch.empty(4, 1)],
        compute_dtype=torch.bfloat16,
    )  # fmt: skip
    assert realised[0, :2].tolist() == [0, 0]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("direction", [math.nan, math.inf])
def test_scale_zero_writes_nothing_whatever_the_direction_holds(axis, direction):
    weight = torch.full((16, 16), -0.0)
    before = weight.clone().view(torch.int32)
    compact = (16, 2) if axis == 1 else (2, 16)
    backup = torch.ones(compact)
    realised = ops.perturb_(
        [weight], [torch.tensor([3, 8])], [axis], [torch.full(compact, direction)], torch.zeros(1, dtype=F64), [backup]
    )
    assert torch.equal(weight.view(torch.int32), before)
    assert torch.equal(backup.view(torch.int32), before[:, :2].reshape(compact))
    assert realised.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("norm", ["global", "layer", "none"])
def test_the_scale_follows_its_formula(norm, bad):
    rho = torch.tensor([0.5, 1.0, 0.25], dtype=F64)
    squares = torch.tensor([bad, 4.0, 9.0], dtype=F64)
    got = ops.perturbation_scale(squares, rho, norm=norm, eta=1e-3)
    with backends.use("reference"):
        torch.testing.assert_close(got, ops.perturbation_scale(squares, rho, norm=norm, eta=1e-3), rtol=1e-12, atol=0)
    if norm != "none":
        weights = torch.tensor([1.0, math.inf, 2.0], dtype=F64)
        got = ops.perturbation_scale(squares, rho, weight_squared_norms=weights, norm=norm)
        with backends.use("reference"):
            expected = ops.perturbation_scale(squares, rho, weight_squared_norms=weights, norm=norm)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("axis", [0, 1])
def test_an_index_outside_its_layer_makes_the_norm_nan_and_is_not_written(axis):
    """The public functions refuse it on the CPU; on a GPU, where nothing waits, this is what is left of it."""
    run = lambda name, *arguments: backends.function(torch.device("cpu"), name)(*arguments)  # noqa: E731
    layer = ([torch.ones(16, 16)], [torch.tensor([3, 16])], [axis])
    values = [torch.zeros((16, 2) if axis == 1 else (2, 16))]
    squares = torch.zeros(1, dtype=F64)
    run("gather_into", *layer, values, squares)
    assert squares.isnan().all()
    backups = [torch.zeros_like(values[0])]
    run("perturb_", *layer, [torch.ones_like(values[0])], torch.ones(1, dtype=F64), backups, None)
    assert layer[0][0].sum() == 16 * 16 + 16
    run("restore_", *layer, backups)
    assert layer[0][0].sum() == 16 * 16


def test_repeated_runs_give_the_same_bits():
    weights = [torch.randn(300, 64), torch.randn(64, 300).bfloat16()]
    indices, axes = [torch.arange(0, 64, 3), torch.arange(0, 64, 5)], [1, 0]
    first, second = (update(weights, weights, indices, axes) for _ in range(2))
    assert torch.equal(first[5], second[5])
    assert all(torch.equal(a, b) for a, b in zip(first[4], second[4], strict=True))
