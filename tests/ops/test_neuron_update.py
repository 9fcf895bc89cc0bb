"""The neuron update, its gradient and the tap against float64 mathematics; autograd, tracing and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shapo_kernels import ops

F64 = torch.float64


dtypes = st.sampled_from(
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
     (torch.bfloat16, torch.float32), (F64, F64)]
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    dtypes,
    st.sampled_from(((1,), (0,), (2, 33), (70,))),
    st.sampled_from((1, 48, 130)),
    st.sampled_from((0, 1, 70, 140)),
    st.booleans(),
)
def test_neuron_update_and_gradient_equal_fp64_mathematics(pair, tokens, features, neurons, indexed):
    dtype, input_dtype = pair
    generator = torch.Generator().manual_seed(features + neurons)
    output = torch.randn(*tokens, features, generator=generator).to(dtype)
    x = torch.randn(*tokens, 160 if indexed else neurons, generator=generator).to(input_dtype)
    direction = torch.randn(neurons, features, generator=generator).t()
    index = torch.randperm(160, generator=generator)[:neurons] if indexed else None
    selected = (x if index is None else x[..., index]).to(dtype).double()
    rounded = direction.to(dtype).double()

    got = ops.neuron_update(output, x, direction, index)
    product = selected @ rounded.t()
    bound = (selected.abs() @ rounded.abs().t() + output.double().abs() + 1e-30) * 4 * torch.finfo(dtype).eps
    assert got.dtype == dtype
    assert ((got.double() - output.double() - product).abs() <= bound).all()

    got = ops.neuron_gradient(output, x, index)
    g, s = output.double().flatten(0, -2), selected.flatten(0, -2)
    compute = F64 if dtype == F64 else torch.float32
    assert got.dtype == compute
    bound = (g.abs().t() @ s.abs() + 1e-30) * 4 * len(s) ** 0.5 * torch.finfo(compute).eps
    assert ((got.double() - g.t() @ s).abs() <= bound).all()


def test_a_gradient_over_several_parts_of_the_tokens_is_added_up_in_full():
    g, x = torch.randn(1200, 5), torch.randn(1200, 9)
    index = torch.tensor([0, 8])
    torch.testing.assert_close(
        ops.neuron_gradient(g, x, index).double(), g.double().t() @ x[:, index].double(), rtol=1e-5, atol=1e-4
    )


def eager_update(output, x, direction, index):
    return output + x[..., index] @ direction.t()


def test_neuron_update_and_its_gradients_equal_eager_and_numerical_ones():
    torch.manual_seed(0)
    output, x = torch.randn(2, 3, 4, dtype=F64, requires_grad=True), torch.randn(2, 3, 6, dtype=F64, requires_grad=True)
    direction = torch.randn(4, 2, dtype=F64, requires_grad=True)
    index = torch.tensor([1, 5])
    torch.testing.assert_close(
        ops.neuron_update(output, x, direction, index), eager_update(output, x, direction, index), rtol=1e-12, atol=0
    )
    assert torch.autograd.gradcheck(lambda o, i, d: ops.neuron_update(o, i, d, index), (output, x, direction))
    full = torch.randn(4, 6, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda o, i, d: ops.neuron_update(o, i, d), (output, x, full))


def test_neuron_tap_passes_the_output_on_and_gives_the_gradient_at_zero():
    torch.manual_seed(0)
    output, x = torch.randn(3, 4, dtype=F64, requires_grad=True), torch.randn(3, 6, dtype=F64)
    leaf = torch.zeros((), dtype=F64).expand(4, 2).requires_grad_()
    index = torch.tensor([0, 4])
    tapped = ops.neuron_tap(output, x, leaf, index)
    assert torch.equal(tapped, output)
    zero = torch.zeros(4, 2, dtype=F64, requires_grad=True)
    (got,) = torch.autograd.grad(tapped.pow(3).sum(), leaf)
    (expected,) = torch.autograd.grad(eager_update(output, x, zero, index).pow(3).sum(), zero)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_gradients_of_gradients_are_numerical_ones_or_refused():
    torch.manual_seed(0)
    output, x = torch.randn(3, 4, dtype=F64, requires_grad=True), torch.randn(3, 6, dtype=F64, requires_grad=True)
    direction, index = torch.randn(4, 2, dtype=F64), torch.tensor([1, 5])
    assert torch.autograd.gradgradcheck(
        lambda o, i: ops.neuron_update(o, i, direction, index).tanh(), (output, x), atol=1e-6
    )
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(ops.neuron_update(output, x, direction.requires_grad_(), index).sum(), x, create_graph=True)
    zero = torch.zeros(4, 2, dtype=F64, requires_grad=True)
    found = []
    for tap in (ops.neuron_tap, eager_update):
        (slope,) = torch.autograd.grad(tap(output, x, zero, index).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.pow(2).sum() + slope.sum(), zero)[0])
    assert found[1].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("index", [torch.tensor([1, 5]), None])
def test_a_single_token_without_a_batch_is_a_batch_of_one(index):
    torch.manual_seed(0)
    x, g = torch.randn(6), torch.randn(4)
    got = ops.neuron_gradient(g, x, index)
    torch.testing.assert_close(got, torch.outer(g, x if index is None else x[index]))


def test_neuron_gradient_accumulates_low_precision_in_float32():
    torch.manual_seed(0)
    g, x = torch.randn(4096, 8).bfloat16(), torch.randn(4096, 16).bfloat16()
    index = torch.tensor([3, 7])
    got = ops.neuron_gradient(g, x, index)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), g.double().t() @ x[:, index].double(), rtol=1e-5, atol=1e-3)


def test_neuron_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="direction has shape"):
        ops.neuron_update(torch.zeros(2, 4), torch.zeros(2, 6), torch.zeros(4, 3), torch.tensor([1]))
    with pytest.raises(ValueError, match="differ in their last dimension only"):
        ops.neuron_tap(torch.zeros(2, 4), torch.zeros(3, 6), torch.zeros(4, 1), torch.tensor([1]))


@pytest.mark.parametrize("missing", [0, 3])
def test_padded_features_change_neither_the_update_nor_the_gradients(missing, monkeypatch):
    """What CUDA is given, on the CPU."""
    import importlib

    module = importlib.import_module("shapo_kernels.ops.neuron_update")
    monkeypatch.setattr(module, "_padded", lambda m: torch.nn.functional.pad(m, (0, missing)))
    torch.manual_seed(0)
    output, x = torch.randn(2, 3, 4, dtype=F64, requires_grad=True), torch.randn(2, 3, 6, dtype=F64, requires_grad=True)
    direction, index = torch.randn(4, 2, dtype=F64, requires_grad=True), torch.tensor([1, 5])
    for where, inputs in ((index, x), (None, x[..., :2])):
        tensors = (output, inputs, direction)
        found = ops.neuron_update(*tensors, where)
        expected = eager_update(*tensors, index if where is not None else slice(None))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        slope = torch.randn_like(found)
        for one, other in zip(
            torch.autograd.grad(found, tensors, slope, retain_graph=True),
            torch.autograd.grad(expected, tensors, slope, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        leaf = torch.zeros(4, 2, dtype=F64, requires_grad=True)
        (tapped,) = torch.autograd.grad(ops.neuron_tap(output, inputs, leaf, where), leaf, slope)
        torch.testing.assert_close(
            tapped, slope.flatten(0, 1).t() @ found_inputs(inputs, where), rtol=1e-12, atol=1e-12
        )


def found_inputs(x, index):
    return (x if index is None else x[..., index]).detach().flatten(0, -2)


def test_a_feature_that_is_selected_twice_gets_both_parts_of_its_gradient():
    torch.manual_seed(0)
    tensors = [torch.randn(*shape, dtype=F64, requires_grad=True) for shape in ((3, 4), (3, 6), (4, 3))]
    index = torch.tensor([5, 1, 5])
    slope = torch.randn(3, 4, dtype=F64)
    found = torch.autograd.grad(ops.neuron_update(*tensors, index), tensors, slope)
    expected = torch.autograd.grad(eager_update(*tensors, index), tensors, slope)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("laid_out", ["contiguous", "transposed"])
def test_in_place_the_result_and_its_gradients_are_the_same_in_the_memory_of_the_output(laid_out):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 6, dtype=F64, requires_grad=True), torch.randn(4, 6, dtype=F64, requires_grad=True)
    direction, index = torch.randn(4, 2, dtype=F64, requires_grad=True), torch.tensor([1, 5])
    results = []
    for in_place in (False, True):
        output = torch.nn.functional.linear(x, weight)
        if laid_out == "transposed":
            output = (output * 1.0).transpose(0, 2).contiguous().transpose(0, 2)
        found = ops.neuron_update(output, x, direction, index, in_place=in_place)
        assert (found.data_ptr() == output.data_ptr()) == in_place
        results.append([found.detach().clone(), *torch.autograd.grad(found.pow(3).sum(), (x, weight, direction))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_in_place_refuses_an_output_that_it_must_not_write_and_what_needs_the_old_one_raises():
    x, direction = torch.randn(3, 6), torch.randn(4, 6)
    with pytest.raises(ValueError, match="use in_place=False"):
        ops.neuron_update(torch.zeros(1, 4).expand(3, 4), x, direction, in_place=True)
    with pytest.raises(ValueError, match="use in_place=False"):
        ops.neuron_update(torch.zeros(3, 4, requires_grad=True), x, direction, in_place=True)
    output = torch.zeros(3, 4, requires_grad=True).exp()  # which saves its result
    updated = ops.neuron_update(output, x, direction, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        updated.sum().backward()


def test_a_direction_that_was_written_to_is_not_remembered_as_it_was():
    output, x, direction = torch.zeros(3, 4), torch.randn(3, 2), torch.randn(4, 2)
    for _ in range(2):
        torch.testing.assert_close(ops.neuron_update(output, x, direction), x @ direction.t())
        direction.mul_(3)


LAYER = {
    "output": torch.zeros(2, 3, 4), "input": torch.zeros(2, 3, 6), "index": torch.tensor([1, 5])
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(3, 2, 6)}, ValueError, "differ in their last dimension only"),
        ({"input": torch.zeros(6, 6)}, ValueError, "differ in their last dimension only"),
        ({"output": torch.zeros(2, 3, 4).long()}, TypeError, "is torch.int64"),
        ({"input": torch.zeros(2, 3, 6).long()}, TypeError, "input is torch.int64"),
        ({"input": torch.zeros(2, 3, 6, device="meta")}, ValueError, "input is on meta"),
        ({"index": torch.tensor([1, 5], device="meta")}, ValueError, "index is on meta"),
        ({"index": torch.tensor([1, 5], dtype=torch.int32)}, TypeError, "index is torch.int32"),
        ({"index": torch.tensor([[1, 5]])}, ValueError, r"expected \[neurons\]"),
        ({"index": torch.tensor([1, 6])}, IndexError, r"index holds 6: expected neurons in \[0, 6\)"),
        ({"index": torch.tensor([-1, 5])}, IndexError, "index holds -1"),
    ],
)
def test_every_neuron_operator_refuses_what_does_not_fit(change, error, message):
    given = LAYER | change
    direction = torch.zeros(4, 2)
    for call in (
        lambda: ops.neuron_update(given["output"], given["input"], direction, given["index"]),
        lambda: ops.neuron_tap(given["output"], given["input"], direction, given["index"]),
        lambda: ops.neuron_gradient(given["output"], given["input"], given["index"]),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_compiled_forward_is_one_graph_and_is_not_compiled_anew():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    index = torch.tensor([0, 3])

    @torch.compile(backend=counter, fullgraph=True)
    def forward(output, x, direction):
        return ops.neuron_update(output, x, direction, index).relu()

    for seed in range(3):
        torch.manual_seed(seed)
        output, x, direction = torch.randn(3, 4), torch.randn(3, 6), torch.randn(4, 2, requires_grad=True)
        got = forward(output, x, direction)
        torch.testing.assert_close(got, (output + x[:, index] @ direction.t()).relu(), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_every_setting_of_tf32_is_served(setting):
    """After torch's newer setting, torch.get_float32_matmul_precision() raises: nothing here may ask for it."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, setting
    try:
        output, x, direction = torch.randn(3, 4), torch.randn(3, 6), torch.randn(4, 6)
        torch.testing.assert_close(ops.neuron_update(output, x, direction), output + x @ direction.t())
        torch.testing.assert_close(ops.neuron_gradient(output, x), output.t() @ x)
    finally:
        matmul.fp32_precision = before
