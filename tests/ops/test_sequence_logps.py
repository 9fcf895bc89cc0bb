"""Log-probabilities of labels and their gradient: exact in every backend, whatever the logits hold (P6, P7, L5)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shapo_kernels import backends, ops
from shapo_kernels.ops import linear_tiles
from tests.support.token_logits import F64, IGNORE, make, run, textbook

DTYPES = [torch.float32, torch.bfloat16, torch.float16, F64]
HERE = [name for name in ("reference", "cpu") if name in backends.available()]


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 3),
    length=st.integers(0, 6),
    vocabulary=st.sampled_from([1, 2, 7, 8, 63, 64, 65, 2047, 2049, 4100]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "transposed", "every other", "sliced"]),
    shift=st.integers(0, 2),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_logps_entropy_and_gradient_equal_the_textbook(
    backend, rows, length, vocabulary, dtype, layout, shift, kept, seed
):
    logits, labels = make(rows, length, vocabulary, dtype=dtype, seed=seed, kept=kept)
    if layout == "transposed":
        logits = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif layout == "every other":
        logits = logits.repeat_interleave(2, 2)[..., ::2]
    elif layout == "sliced":
        logits = torch.cat([logits.new_full((rows, 1, vocabulary), torch.nan), logits], 1)[:, 1:]
    slope = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed), dtype=F64)
    wide = torch.promote_types(dtype, torch.float32)
    with backends.use(backend):
        logps, entropy, grad = run(
            lambda x: ops.token_logps(x, labels, shift=shift, entropy=True), logits, slope.to(wide)
        )
    truth = logits.double().requires_grad_()
    expected, expected_entropy = textbook(truth, labels, min(shift, length))
    (expected * slope.to(wide)).sum().backward()
    assert logps.dtype == entropy.dtype == wide
    assert grad.dtype == dtype
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(logps.double(), expected.detach(), **close)
    torch.testing.assert_close(entropy.double(), expected_entropy.detach(), **close)
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0)
    torch.testing.assert_close(
        grad.double(), truth.grad, rtol=close["rtol"] + unit, atol=close["atol"] + (6e-8 if unit else 0)
    )


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_never_above_that_of_eager_in_the_same_dtype(backend, dtype):
    logits, labels = make(2, 40, 5000, dtype=dtype, kept=1.0, spread=4.0)
    slope = torch.randn(2, 40, dtype=F64).to(torch.promote_types(dtype, torch.float32))
    with backends.use(backend):
        logps, _, grad = run(lambda x: ops.token_logps(x, labels), logits, slope)
    eager, _, eager_grad = run(lambda x: textbook(x, labels, dtype=dtype), logits, slope)
    truth, _, true_grad = run(lambda x: textbook(x, labels), logits.double(), slope.double())

    def error(value, exact):
        return (value.double() - exact).abs().max().item()

    assert error(logps, truth) <= error(eager, truth)
    assert error(grad, true_grad) <= error(eager_grad, true_grad)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [5, 70, 5000])
def test_infinities_and_nans_stay_in_their_token_and_mean_what_they_mean_in_log_softmax(backend, dtype, vocabulary):
    logits, labels = make(1, 8, vocabulary, dtype=dtype, kept=1.0)
    labels[:] = 1
    logits[0, 1, 0] = -torch.inf  # a masked entry
    logits[0, 2, 1] = -torch.inf  # a masked label
    logits[0, 3, 2] = torch.inf
    logits[0, 4, 3] = torch.nan
    logits[0, 5] = -torch.inf
    logits[0, 6, : vocabulary - 1] = -torch.inf  # the label and whole blocks masked
    slope = torch.ones(1, 8, dtype=torch.promote_types(dtype, torch.float32))
    with backends.use(backend):
        logps, _, grad = run(lambda x: ops.token_logps(x, labels, shift=0), logits, slope)
    truth, _, true_grad = run(lambda x: textbook(x, labels, 0), logits.double(), slope.double())
    torch.testing.assert_close(logps.double(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert logps[0, 2].item() == logps[0, 6].item() == -torch.inf
    assert logps[0, 3:6].isnan().all()
    assert torch.isfinite(logps[0, [0, 1, 7]]).all()
    finite = [0, 1, 2, 6, 7]
    torch.testing.assert_close(grad[0, finite].double(), true_grad[0, finite], rtol=1e-2, atol=1e-5)
    assert grad[0, [3, 4, 5]].isnan().any(1).all()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_ten_thousand_neither_overflow_nor_lose_their_difference(backend, dtype):
    logits, labels = make(2, 9, 300, dtype=dtype, kept=1.0, spread=1e4)
    slope = torch.ones(2, 9, dtype=torch.promote_types(dtype, torch.float32))
    with backends.use(backend):
        logps, _, grad = run(lambda x: ops.token_logps(x, labels), logits, slope)
    truth, _, true_grad = run(lambda x: textbook(x, labels), logits.double(), slope.double())
    torch.testing.assert_close(logps.double(), truth, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backend", HERE)
def test_a_vocabulary_of_one_has_probability_one_and_no_gradient(backend):
    logits, labels = make(2, 5, 1, dtype=torch.float32, kept=1.0)
    with backends.use(backend):
        logps, entropy, grad = run(lambda x: ops.token_logps(x, labels, entropy=True), logits, torch.ones(2, 5))
    for tensor in (logps, entropy, grad):
        assert (tensor == 0).all()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_256k_is_summed_exactly(backend, dtype):
    logits, labels = make(1, 3, 262144, dtype=dtype, kept=1.0, spread=0.5)
    with backends.use(backend):
        logps, _, grad = run(lambda x: ops.token_logps(x, labels), logits, torch.ones(1, 3))
    truth, _, true_grad = run(lambda x: textbook(x, labels), logits.double(), torch.ones(1, 3, dtype=F64))
    torch.testing.assert_close(logps.double(), truth, rtol=3e-7, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-12)


@pytest.mark.parametrize("backend", HERE)
def test_a_probability_close_to_one_keeps_its_gradient(backend):
    """1 - p is 1e-9 here, which 1 minus a float32 p would make 0."""
    logits, labels = torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64)
    logits[0, 0, 1] = -20.0
    with backends.use(backend):
        _, _, grad = run(lambda x: ops.token_logps(x, labels, shift=0), logits, torch.ones(1, 1))
    if backend == "cpu":
        assert grad[0, 0, 0].item() == pytest.approx(2.0611536e-9, rel=1e-5)
    assert grad[0, 0, 1].item() == pytest.approx(-2.0611536e-9, rel=1e-5)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_tokens_are_not_read_and_get_a_gradient_of_zero(backend, dtype):
    logits, labels = make(3, 7, 90, dtype=dtype, kept=0.4, seed=3)
    labels[1] = IGNORE
    counted = torch.cat([labels[:, 1:], torch.full((3, 1), IGNORE)], 1) != IGNORE
    logits[~counted] = torch.nan
    with backends.use(backend):
        logps, entropy, grad = run(
            lambda x: ops.token_logps(x, labels, entropy=True), logits, torch.ones(3, 7).to(logits)
        )
    assert torch.isfinite(logps).all()
    assert torch.isfinite(grad).all()
    for tensor in (logps, entropy, grad):
        assert (tensor[~counted] == 0).all()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_in_place_is_the_gradient_in_the_memory_of_the_logits(backend, dtype):
    leaf, labels = make(2, 6, 77, dtype=dtype)
    leaf.requires_grad_()
    with backends.use(backend):
        (expected,) = torch.autograd.grad(ops.token_logps(leaf * 2, labels)[0].sum(), leaf)
        logits = leaf * 2
        logps, _ = ops.token_logps(logits, labels, in_place=True)
        (grad_logits,) = torch.autograd.grad(logps.sum(), logits, retain_graph=True)
        assert grad_logits.data_ptr() == logits.data_ptr()
        assert torch.equal(2 * grad_logits, expected)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(logps.sum(), leaf)


@pytest.mark.parametrize("shift", [0, 1])
def test_gradcheck(shift):
    logits, labels = make(2, 4, 9, spread=1.0)
    assert torch.autograd.gradcheck(
        lambda x: ops.token_logps(x, labels, shift=shift)[0], logits.requires_grad_(), fast_mode=False
    )


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("first", "total"), [(0, 12), (5, 12), (8, 12)])
def test_a_part_of_the_vocabulary_gives_its_part_of_the_sum_and_of_the_gradient(backend, first, total):
    whole, labels = make(2, 6, total, kept=1.0)
    mine = slice(first, first + 4)
    with backends.use(backend):
        forward = backends.function(whole.device, "token_logps")
        backward = backends.function(whole.device, "token_logps_gradient")
    logps, normalizers, _ = forward(whole[..., mine], labels, IGNORE, 0, first, total, False)
    held = (labels >= first) & (labels < first + 4)
    expected = textbook(whole[..., mine], torch.where(held, labels - first, IGNORE), 0)[0]
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        normalizers[0] + normalizers[1].log(), whole[..., mine].logsumexp(-1), rtol=1e-12, atol=1e-12
    )
    truth = whole.clone().requires_grad_()
    all_logps = textbook(truth, labels, 0)[0]
    all_logps.sum().backward()
    highest = whole.amax(-1)
    all_normalizers = torch.stack([highest, (whole - highest[..., None]).exp().sum(-1)])
    grad = backward(
        whole[..., mine],
        labels,
        all_logps.detach(),
        all_normalizers,
        torch.ones(2, 6, dtype=F64),
        IGNORE,
        0,
        first,
    )
    torch.testing.assert_close(grad, truth.grad[..., mine], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shift", [5, 6, 2**31, 2**63 - 1])
def test_a_shift_beyond_the_tokens_counts_nothing(backend, shift):
    logits, labels = make(2, 5, 7, kept=1.0)
    with backends.use(backend):
        logps, entropy, grad = run(
            lambda x: ops.token_logps(x, labels, shift=shift, entropy=True), logits, torch.ones(2, 5, dtype=F64)
        )
    for found in (logps, entropy, grad):
        assert not found.any()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tile_of_the_head_gives_its_slopes_as_factors_of_a_product(backend, dtype):
    """On CUDA tiles are float32 and factors have 16 bits: the slopes of the one, rounded to the other."""
    torch.manual_seed(0)
    logits, targets, highest = torch.randn(5, 40), torch.tensor([3, 45, 0, 39, 12]), torch.full((5,), 3.0)
    per_token = torch.stack([torch.randn(5) - 2, highest, torch.full((5,), 50.0)])
    with backends.use(backend):
        for made in (
            lambda x, spare: linear_tiles.slope(x, spare, targets, slice(0, 40), per_token, 0.5, None),
            lambda x, spare: linear_tiles.exponentials(x, spare, highest, None),
        ):
            exact = logits.clone()
            expected = made(exact, exact.view(-1))
            assert expected.data_ptr() == exact.data_ptr()
            factor = made(logits.clone(), torch.full((250,), torch.nan, dtype=dtype))
            assert factor.dtype == dtype
            torch.testing.assert_close(factor.float(), expected, rtol=torch.finfo(dtype).eps, atol=6e-8)
        slope = linear_tiles.slope(logits.clone(), logits.new_empty(200), targets, slice(0, 40), per_token, 0.5, None)
    labelled = torch.arange(40)[None] == targets[:, None]
    others = -(logits.double() - 3).exp() / 50
    textbook_slope = 0.5 * torch.where(labelled, -torch.expm1(per_token[0].double())[:, None], others)
    torch.testing.assert_close(slope.double(), textbook_slope, rtol=1e-5, atol=1e-7)
