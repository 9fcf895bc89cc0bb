"""Column cosine, neuron update and neuron gradient in Triton against fp64; autograd, tracing and opcheck."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shapo_kernels import ops

F64 = torch.float64
quick = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quick
@given(
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16, F64)),
    st.sampled_from((1, 7, 64, 300)),
    st.sampled_from((1, 3, 48, 260)),
    st.sampled_from((0, 1)),
    st.booleans(),
)
def test_column_cosine_is_the_cosine(dtype, rows, columns, axis, transposed):
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(columns if transposed else rows, rows if transposed else columns, generator=generator)
    weight = (weight.t() if transposed else weight).to(dtype)
    direction = torch.randn(2 * weight.shape[1 - axis], generator=generator)[::2]
    got = ops.column_cosine(weight, direction, axis=axis)
    expected = torch.nn.functional.cosine_similarity(weight.double(), direction.double().unsqueeze(axis), dim=1 - axis)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-7)
    neurons = weight.unbind(axis)
    neurons[-1].zero_()
    assert ops.column_cosine(weight, direction, axis=axis)[-1] == 0
    neurons[-1].fill_(torch.nan)
    assert ops.column_cosine(weight, direction, axis=axis)[-1].isnan()


def test_a_direction_of_zeros_has_no_cosine():
    assert ops.column_cosine(torch.ones(4, 3), torch.zeros(4)).tolist() == [0, 0, 0]


dtypes = st.sampled_from(
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
     (torch.bfloat16, torch.float32), (F64, F64)]
)  # fmt: skip


@quick
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
    # Values that need no rounding to the output's dtype, which the interpreter would cut off instead.
    x = torch.randn(*tokens, 160 if indexed else neurons, generator=generator).to(dtype).to(input_dtype)
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


def test_the_update_is_differentiable_in_all_three_tensors():
    torch.manual_seed(0)
    tensors = [torch.randn(5, 4), torch.randn(5, 6), torch.randn(4, 2)]
    index = torch.tensor([1, 5])
    mine = [t.clone().requires_grad_() for t in tensors]
    theirs = [t.double().requires_grad_() for t in tensors]
    ops.neuron_update(*mine, index).pow(2).sum().backward()
    (theirs[0] + theirs[1][:, index] @ theirs[2].t()).pow(2).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [torch.tensor([0, 3]), None])
def test_the_operators_pass_opcheck(index):
    output, x = torch.randn(3, 4), torch.randn(3, 6 if index is not None else 2)
    torch.library.opcheck(torch.ops.shapo_triton.neuron_update, (output, x, torch.randn(4, 2), index))
    torch.library.opcheck(torch.ops.shapo_triton.neuron_gradient, (output, x, index))


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
