"""The operators' public functions: what they compute in fp64 mathematics, what they refuse, what autograd sees."""

import pytest
import torch

from shapo_kernels import backends, ops

F64 = torch.float64


@pytest.fixture(params=["reference", "default"], autouse=True)
def backend(request):
    if request.param == "reference":
        with backends.use("reference"):
            yield
    else:
        yield


def layers(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(5, 9, generator=generator).to(dtype), torch.randn(7, 4, generator=generator).to(dtype)]
    return weights, [torch.tensor([0, 3, 8]), torch.tensor([2, 6])], [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
def test_gather_takes_the_neurons_and_their_norms(dtype):
    weights, indices, axes = layers(dtype)
    values, squares = ops.gather(weights, indices, axes)
    expected = [weights[0][:, [0, 3, 8]], weights[1][[2, 6]]]
    for value, want, square in zip(values, expected, squares, strict=True):
        assert torch.equal(value, want.to(value.dtype))
        assert value.dtype == (F64 if dtype == F64 else torch.float32)
        assert square.item() == pytest.approx(want.double().square().sum().item(), rel=1e-12)
    assert torch.equal(ops.squared_norms(values), squares)
    assert torch.equal(ops.selected_squared_norms(weights, indices, axes), squares)


def test_gather_writes_to_the_memory_that_it_is_given():
    weights, indices, axes = layers()
    given = [torch.full((5, 3), torch.nan), torch.full((2, 4), torch.nan)]
    values, _ = ops.gather(weights, indices, axes, values=given)
    assert [a is b for a, b in zip(values, given, strict=True)] == [True, True]
    assert torch.equal(given[0], weights[0][:, [0, 3, 8]])
    assert torch.equal(given[1], weights[1][[2, 6]])
    with pytest.raises(ValueError, match=r"values\[0\] has shape \[5, 2\]"):
        ops.gather(weights, indices, axes, values=[torch.empty(5, 2), given[1]])
    with pytest.raises(TypeError, match=r"expected torch\.float32"):
        ops.gather(weights, indices, axes, values=[given[0].double(), given[1]])


def test_scales_follow_their_formula():
    squares, rho = torch.tensor([9.0, 16.0], dtype=F64), torch.tensor([0.5, 1.0], dtype=F64)
    close = lambda a, b: torch.testing.assert_close(a, torch.tensor(b, dtype=F64), rtol=1e-12, atol=0)  # noqa: E731
    close(ops.perturbation_scale(squares, rho, eta=0.0), [0.1, 0.2])
    close(ops.perturbation_scale(squares, rho, norm="layer", eta=1.0), [0.125, 0.2])
    close(ops.perturbation_scale(squares, rho, norm="none"), [0.5, 1.0])
    weights = torch.tensor([4.0, 12.0], dtype=F64)
    close(ops.perturbation_scale(squares, rho, weight_squared_norms=weights, eta=0.0), [0.4, 0.8])
    close(
        ops.perturbation_scale(squares, rho, weight_squared_norms=weights, norm="layer", eta=0.0), [1 / 3, 12**0.5 / 4]
    )


@pytest.mark.parametrize("norm", ["global", "layer", "none"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_gives_scale_zero(norm, bad):
    scale = ops.perturbation_scale(torch.tensor([bad, 4.0], dtype=F64), torch.ones(2, dtype=F64), norm=norm, eta=0.0)
    assert scale.tolist() == ([0.0, 0.5] if norm == "layer" else [0.0, 0.0])


def test_a_zero_norm_gives_scale_zero_even_without_eta():
    zeros, ones = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
    assert ops.perturbation_scale(zeros, ones, eta=0.0).tolist() == [0, 0]
    assert ops.perturbation_scale(zeros, ones, norm="layer", eta=0.0).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
def test_perturb_and_restore_change_the_selected_neurons_and_give_their_bits_back(dtype):
    weights, indices, axes = layers(dtype)
    before = [w.clone() for w in weights]
    values, _ = ops.gather([torch.ones_like(w) for w in weights], indices, axes)
    backups = [torch.full_like(v, torch.nan, dtype=dtype) for v in values]
    scale = torch.tensor([0.25, -0.5], dtype=F64)
    realised = ops.perturb_(weights, indices, axes, values, scale, backups)
    expected = [before[0].clone(), before[1].clone()]
    compute = values[0].dtype
    expected[0][:, [0, 3, 8]] = (before[0][:, [0, 3, 8]].to(compute) + 0.25).to(dtype)
    expected[1][[2, 6]] = (before[1][[2, 6]].to(compute) - 0.5).to(dtype)
    assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))
    for row, w, b, s in zip(realised, weights, before, scale, strict=True):
        moved = (w - b.to(w.dtype)).double() if dtype == F64 else w.double() - b.double()
        assert row[0].item() == pytest.approx(moved.square().sum().item(), rel=1e-6)
        assert row[1].item() == pytest.approx((moved * s).sum().item(), rel=1e-6)
    assert realised[0, 2].item() == pytest.approx(before[0][:, [0, 3, 8]].double().square().sum().item(), rel=1e-6)
    ops.restore_(weights, indices, axes, backups)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_scale_zero_writes_nothing_whatever_the_direction_holds():
    weight = torch.tensor([[-0.0, 1.0], [2.0, 3.0]])
    backup = torch.empty(2, 1)
    ops.perturb_(
        [weight], [torch.tensor([0])], [1], [torch.full((2, 1), torch.nan)], torch.zeros(1, dtype=F64), [backup]
    )
    assert str(weight[0, 0].item()) == "-0.0"
    assert weight.flatten().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert str(backup[0, 0].item()) == "-0.0"


def test_what_reaches_a_lower_compute_dtype_is_reported():
    weight = torch.ones(4, 3)
    direction = torch.full((4, 1), 1e-4)  # a fortieth of bfloat16's spacing at 1
    arguments = ([weight], [torch.tensor([1])], [1], [direction], torch.ones(1, dtype=F64), [torch.empty(4, 1)])
    realised = ops.perturb_(*arguments, compute_dtype=torch.bfloat16)
    assert realised[0, 0].item() == 0
    assert realised[0, 1].item() == 0
    ops.restore_(*arguments[:3], arguments[5])
    realised = ops.perturb_(*arguments)
    assert realised[0, 0].item() == pytest.approx(4e-8, rel=1e-2)


def test_backward_through_weights_perturbed_since_raises():
    weight = torch.nn.Parameter(torch.randn(3, 3))
    x = torch.randn(2, 3, requires_grad=True)
    loss = (x @ weight).sum()
    ops.perturb_(
        [weight.detach()], [torch.tensor([0])], [1], [torch.ones(3, 1)], torch.ones(1, dtype=F64), [torch.empty(3, 1)]
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_layers_are_no_work():
    assert ops.gather([], [], [])[0] == []
    assert ops.squared_norms([]).shape == (0,)
    assert ops.perturb_([], [], [], [], torch.empty(0, dtype=F64), []).shape == (0, 3)
    ops.restore_([], [], [], [])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
def test_column_cosine_is_the_cosine(axis, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 30, generator=generator).to(dtype)
    direction = torch.randn(weight.shape[1 - axis], generator=generator, dtype=F64)
    got = ops.column_cosine(weight, direction, axis=axis)
    expected = torch.nn.functional.cosine_similarity(weight.double(), direction.unsqueeze(axis), dim=1 - axis)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    weight[(slice(None), 3) if axis == 1 else 3] = 0
    assert ops.column_cosine(weight, direction, axis=axis)[3] == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w, i, a: ops.gather(w, i[:1], a), ValueError, "as many of each"),
        (lambda w, i, a: ops.gather([w[0].int(), w[1]], i, a), TypeError, "expected float32"),
        (lambda w, i, a: ops.gather([w[0][0], w[1]], i, a), ValueError, r"expected \[rows, columns\]"),
        (lambda w, i, a: ops.gather(w, [i[0].int(), i[1]], a), TypeError, "expected torch.int64"),
        (lambda w, i, a: ops.gather(w, [i[0][None], i[1]], a), ValueError, r"expected \[neurons\]"),
        (lambda w, i, a: ops.gather(w, i, [1, 2]), ValueError, "expected 0"),
        (lambda w, i, a: ops.gather(w, [i[0] + 1, i[1]], a), IndexError, r"indices\[0\] holds 9: expected"),
        (lambda w, i, a: ops.restore_(w, [i[0] - 1, i[1]], a, w), IndexError, r"indices\[0\] holds -1"),
        (lambda w, i, a: ops.restore_(w, i, a, [w[0], w[1]]), ValueError, "expected a contiguous"),
        (lambda w, i, a: ops.restore_(w, i, a, [w[0].double(), w[1]]), TypeError, "backups"),
        (lambda w, i, a: ops.perturbation_scale(torch.ones(2), torch.ones(2, dtype=F64)), TypeError, "float64"),
        (
            lambda w, i, a: ops.perturbation_scale(torch.ones(2, dtype=F64), torch.ones(3, dtype=F64)),
            ValueError,
            "one for each layer",
        ),
        (lambda w, i, a: ops.column_cosine(w[0], torch.ones(9)), ValueError, r"expected \[5\]"),
        (lambda w, i, a: ops.column_cosine(w[0], torch.ones(5), axis=2), ValueError, "expected 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(*layers())


def perturbed(**changes):
    weights, indices, axes = layers()
    arguments = {
        "weights": weights,
        "indices": indices,
        "axes": axes,
        "directions": [torch.ones(5, 3), torch.ones(2, 4)],
        "scale": torch.ones(2, dtype=F64),
        "backups": [torch.zeros(5, 3), torch.zeros(2, 4)],
    } | changes
    return ops.perturb_(*arguments.values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": [torch.zeros(1, 9).expand(5, 9), torch.zeros(7, 4)]}, ValueError, r"weights\[0\].*share memory"),
        ({"weights": [torch.zeros(20).unfold(0, 9, 2)[:5], torch.zeros(7, 4)]}, ValueError, "share memory"),
        (
            {"indices": [torch.tensor([0, 3, 3]), torch.tensor([2, 6])]},
            ValueError,
            r"indices\[0\] holds a neuron twice",
        ),
        ({"scale": torch.ones(2)}, TypeError, "scale is torch.float32"),
        ({"scale": torch.ones(3, dtype=F64)}, ValueError, r"scale has shape \[3\]"),
        ({"scale": torch.ones(2, dtype=F64, device="meta")}, ValueError, "scale is on meta"),
        ({"backups": [torch.zeros(5, 3, device="meta"), torch.zeros(2, 4)]}, ValueError, r"backups\[0\] is on meta"),
    ],
)
def test_what_perturb_cannot_undo_is_refused_and_nothing_is_written(changes, error, message):
    written = changes.get("weights") or layers()[0]
    before = [w.clone() for w in written]
    with pytest.raises(error, match=message):
        perturbed(**{"weights": written} | changes)
    assert all(torch.equal(w, b) for w, b in zip(written, before, strict=True))


def test_one_weight_twice_is_refused_and_parts_of_one_weight_are_not():
    fused = torch.zeros(10, 4)
    halves, index, ones = [fused[:5], fused[5:]], torch.tensor([0, 2]), torch.ones(2, dtype=F64)
    backups = [torch.zeros(5, 2), torch.zeros(5, 2)]
    with pytest.raises(ValueError, match=r"weights\[1\] is weights\[0\] again"):
        ops.perturb_([fused[:5]] * 2, [index] * 2, [1, 1], [torch.ones(5, 2)] * 2, ones, backups)
    ops.perturb_(halves, [index] * 2, [1, 1], [torch.ones(5, 2)] * 2, ones, backups)
    assert fused.sum() == 20


def test_rho_and_norms_on_another_device_are_refused():
    ones, elsewhere = torch.ones(2, dtype=F64), torch.ones(2, dtype=F64, device="meta")
    with pytest.raises(ValueError, match="rho is on meta"):
        ops.perturbation_scale(ones, elsewhere)
    with pytest.raises(ValueError, match="rho is on cpu and squared_norms on meta"):
        ops.perturbation_scale(elsewhere, ones)
    with pytest.raises(ValueError, match="weight_squared_norms is on meta"):
        ops.perturbation_scale(ones, ones, weight_squared_norms=elsewhere)
    with pytest.raises(ValueError, match="rho is on meta"):
        ops.norms_and_scale([torch.ones(3), torch.ones(2)], elsewhere)
    with pytest.raises(ValueError, match=r"indices\[0\] is on meta"):
        ops.gather([torch.ones(3, 3)], [torch.tensor([0], device="meta")], [1])


@pytest.mark.parametrize("size", [1e-200, 1e200, 5e-324, 1e308])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_cosine_neither_overflows_nor_underflows(size, dtype):
    weight = torch.tensor([[3.0, 0.0], [4.0, -2.0]], dtype=dtype)
    direction = torch.tensor([1.0, 0.0], dtype=F64)
    if dtype == F64:
        # 5e-324 is the smallest number; times 3, 4 and -2 it is exact.
        weight = weight * size if size < 1e300 else weight / 8 * size
    got = ops.column_cosine(weight, direction * size)
    torch.testing.assert_close(got.double(), torch.tensor([0.6, 0.0], dtype=F64), rtol=1e-7, atol=0)
    rows = ops.column_cosine(weight.t().contiguous(), direction * size, axis=0)
    torch.testing.assert_close(rows, got)
