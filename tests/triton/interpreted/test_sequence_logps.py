"""The Triton kernels of log-probabilities agree with float64 mathematics and with the reference (P7, P8)."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shapo_kernels import losses, ops, reference
from shapo_kernels.ops import linear_tiles

# By path: the package's attributes of these names are functions of operators.
kernels = importlib.import_module("shapo_kernels.triton.sequence_logps")

F64, IGNORE = torch.float64, -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16, F64]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few lanes, so that rows of several tiles and programs stay cheap."""
    monkeypatch.setattr(kernels, "LANES", {False: 32, True: 16})
    monkeypatch.setattr(kernels, "STEPS", 2)


def make(rows, length, vocabulary, dtype, seed=0, kept=0.7, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, length, vocabulary, generator=generator, dtype=F64)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    ignored = torch.rand(rows, length, generator=generator) >= kept
    return logits, labels.masked_fill(ignored, IGNORE)


def both(logits, labels, shift=1, first=0, vocabulary=None, entropy=True):
    """(forward results, gradient) of the kernels and of the reference on the logits in float64."""
    results = []
    for own, x in ((kernels, logits), (reference, logits.double())):
        forward = own.token_logps(x, labels, IGNORE, shift, first, vocabulary or logits.shape[2], entropy)
        grad = torch.linspace(-2, 2, labels.numel(), dtype=forward[0].dtype).reshape(labels.shape)
        results.append((*forward, own.token_logps_gradient(x, labels, *forward[:2], grad, IGNORE, shift, first)))
    return results


def assert_close(got, expected, dtype):
    wide = F64 if dtype == F64 else torch.float32
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 3e-6, "atol": 3e-6}
    for one, other in zip(got[:3], expected[:3], strict=True):
        assert one.dtype == wide
        torch.testing.assert_close(one.double(), other, equal_nan=True, **tolerance)
    # The interpreter cuts off where a GPU rounds to bfloat16.
    unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 0)
    assert got[3].dtype == dtype
    torch.testing.assert_close(
        got[3].double(), expected[3], rtol=tolerance["rtol"] + unit, atol=tolerance["atol"], equal_nan=True
    )


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 2),
    length=st.integers(0, 4),
    vocabulary=st.sampled_from([1, 2, 31, 32, 33, 130]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "transposed", "every other"]),
    shift=st.integers(0, 2),
    kept=st.sampled_from([0.0, 0.6, 1.0]),
    seed=st.integers(0, 99),
)
def test_they_agree_on_any_shape_and_layout(rows, length, vocabulary, dtype, layout, shift, kept, seed):
    logits, labels = make(rows, length, vocabulary, dtype, seed, kept)
    if layout == "transposed":
        logits = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif layout == "every other":
        logits = logits.repeat_interleave(2, 2)[..., ::2]
    got, expected = both(logits, labels, shift)
    assert_close(got, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_agree_on_infinities_and_nans(dtype):
    logits, labels = make(1, 8, 70, dtype, kept=1.0)
    labels[:] = 1
    logits[0, 1, 0] = -torch.inf
    logits[0, 2, 1] = -torch.inf
    logits[0, 3, [2, 40]] = torch.inf
    logits[0, 4, 3] = torch.nan
    logits[0, 5] = -torch.inf
    logits[0, 6, :69] = -torch.inf
    logits[0, 7] *= 1e3 if dtype != torch.float16 else 10
    (*got, grad), (*expected, exact) = both(logits, labels, 0)
    for one, other in zip(got[:1], expected[:1], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got[2][0, 3:5].isnan().all()
    torch.testing.assert_close(got[2][0, [0, 1, 7]].double(), expected[2][0, [0, 1, 7]], rtol=1e-5, atol=1e-5)
    finite = [0, 1, 2, 6, 7]
    torch.testing.assert_close(grad[0, finite].double(), exact[0, finite], rtol=1e-2, atol=1e-5)
    assert grad[0, [3, 4, 5]].isnan().any(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_tokens_are_not_read_and_every_gradient_is_written(dtype):
    logits, labels = make(2, 5, 70, dtype, kept=0.5)
    counted = torch.cat([labels[:, 1:], torch.full((2, 1), IGNORE)], 1) != IGNORE
    logits[~counted] = torch.nan
    got, _ = both(logits, labels)
    for tensor in (got[0], got[2], got[3]):
        assert (tensor[~counted] == 0).all()
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("first", [0, 40, 60])
def test_they_agree_on_a_part_of_the_vocabulary(first):
    logits, labels = make(2, 6, 100, F64, kept=1.0)
    got, expected = both(logits[..., first : first + 40], labels, 0, first, 100)
    assert_close(got, expected, F64)


def test_the_gradient_can_be_written_over_the_logits():
    logits, labels = make(2, 6, 70, torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ops.token_logps(leaf, labels)[0].sum(), leaf)
    kept = leaf * 1
    (got,) = torch.autograd.grad(ops.token_logps(kept, labels, in_place=True)[0].sum(), kept)
    assert got.data_ptr() == kept.data_ptr()
    assert torch.equal(got, expected)


def test_a_label_outside_of_the_vocabulary_is_not_read():
    logits, labels = make(1, 4, 70, torch.float32, kept=1.0)
    labels[0, 2] = 1 << 40
    logps, _, _ = kernels.token_logps(logits, labels, IGNORE, 1, 0, 70, False)
    assert logps[0, 1] == 0
    with pytest.raises(ValueError, match="labels contains 1099511627776"):
        ops.token_logps(logits, labels)


def test_a_compiled_loss_is_one_graph_and_equals_eager():
    logits, labels = make(2, 6, 70, torch.float32)

    def loss(x, in_place):
        return ops.token_logps(x * 2, labels, in_place=in_place)[0].sum()

    for in_place in (False, True):
        leaf = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, False), leaf)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        (got,) = torch.autograd.grad(compiled(leaf, in_place), leaf)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("value", [None, -torch.inf, torch.inf, torch.nan, 1e4])
def test_a_head_whose_tiles_go_through_them_equals_the_head_and_the_log_softmax(value, monkeypatch):
    monkeypatch.setattr(linear_tiles, "FEWEST_COLUMNS", 3)
    torch.manual_seed(0)
    bias, labels = torch.zeros(13, dtype=F64), torch.tensor([[1, 5]])
    if value is not None:
        bias[[0, 7]] = value
    tensors = torch.randn(1, 2, 4, dtype=F64), torch.randn(13, 4, dtype=F64), bias

    def found(function):
        inputs = [x.clone().requires_grad_() for x in tensors]
        logps = function(*inputs)
        return logps.detach(), *torch.autograd.grad(logps.sum(), inputs)

    def textbook(h, w, b):
        return torch.log_softmax(torch.nn.functional.linear(h, w, b), -1).gather(2, labels[..., None])[..., 0]

    def ours(h, w, b):
        return losses.linear_token_logps(h, w, labels, bias=b, shift=0, chunk_bytes=100).logps

    for one, other in zip(found(ours), found(textbook), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [30.0, 1e4])
def test_the_folded_exponent_loses_nothing_on_large_logits(dtype, spread):
    """exp(x - m) as a power of two, x log2(e) - m log2(e), has products of thousands to subtract."""
    logits, labels = make(2, 6, 100, dtype, kept=1.0, spread=spread)
    assert_close(*both(logits, labels), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_at_the_ends_of_their_dtype_are_told_apart_and_neither_overflow_nor_become_nan(dtype):
    """Masks write the smallest number rather than -inf, over whole rows too."""
    ends = torch.finfo(dtype)
    logits, labels = make(1, 8, 40, dtype, kept=1.0)
    labels[:] = 1
    logits[0, 0] = ends.min
    logits[0, 1, 20:] = ends.min
    logits[0, 2, 2:], logits[0, 2, :2] = -torch.inf, ends.min
    logits[0, 3] = ends.max
    logits[0, 4, 0], logits[0, 4, 1:] = ends.max, 0.9 * ends.max
    logits[0, 5, 1], logits[0, 5, 3] = ends.max, ends.min
    logits[0, 6] = min(2.0**30, ends.max)  # where the fold changes
    logits[0, 7] = 1e6 if ends.max > 1e6 else 1e4  # products of which the fold rounds by much
    logits[0, 6, 1:20] -= 2.0**23 if ends.max > 2**30 else 0
    assert_close(*both(logits, labels, shift=0), dtype)
    results = both(logits, labels, shift=0)[0]
    assert results[0][0, 0].item() == pytest.approx(-math.log(40), rel=1e-6)
    assert results[0][0, 2].item() == pytest.approx(-math.log(2), rel=1e-6)
