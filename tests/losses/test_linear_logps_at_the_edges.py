"""Log-probabilities from hidden states at the edges: infinities, NaN, vocabularies of 1 and of 256k, sizes of zero."""

import pytest
import torch

from shapo_kernels import backends, losses
from tests.support.textbook import IGNORE, eager, head


@pytest.mark.parametrize("chunk_bytes", [None, 24])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan, 1e4, -1e4])
@pytest.mark.parametrize("columns", [slice(0, 1), slice(1, 2), slice(9, 10), slice(2, 13), slice(0, 13)])
def test_extreme_logits_of_a_head_mean_what_they_mean_in_log_softmax(value, columns, chunk_bytes, small_tiles):
    logits = 3 * torch.randn(13, 1, generator=torch.Generator().manual_seed(0))
    logits[columns] = value
    hidden = torch.ones(1, 1, 1, requires_grad=True)
    labels = torch.ones(1, 1, dtype=torch.int64)
    found = losses.linear_token_logps(hidden, logits, labels, shift=0, chunk_bytes=chunk_bytes).logps
    exact = torch.log_softmax(logits[:, 0].double(), 0)[1]
    torch.testing.assert_close(found[0, 0].double(), exact, rtol=1e-6, atol=1e-6, equal_nan=True)
    if torch.isfinite(logits).all():
        (gradient,) = torch.autograd.grad(found.sum(), hidden)
        expected = logits[1, 0].double() - (torch.softmax(logits[:, 0].double(), 0) * logits[:, 0].double()).sum()
        torch.testing.assert_close(gradient[0, 0, 0].double(), expected, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu") if name in backends.available()])
@pytest.mark.parametrize("chunk_bytes", [None, 60, 200])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan, 1e4])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}])
def test_gradients_of_extreme_logits_are_those_of_the_head_and_the_log_softmax(
    options, value, chunk_bytes, backend, small_tiles
):
    """Infinities in one column, in the label's, in all but the first two, in all: NaN where the textbook has NaN."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 2, 4, dtype=torch.float64), torch.randn(13, 4, dtype=torch.float64)
    labels = torch.tensor([[1, 5]])

    def found(function, columns):
        bias = torch.zeros(13, dtype=torch.float64)
        bias[columns] = value
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        logps = function(*inputs)
        return logps.detach(), *torch.autograd.grad(logps.sum(), inputs)

    def textbook(h, w, b):
        return torch.log_softmax(head(h, w, b, **options), -1).gather(2, labels[..., None])[..., 0]

    def ours(h, w, b):
        return losses.linear_token_logps(h, w, labels, bias=b, shift=0, chunk_bytes=chunk_bytes, **options).logps

    for columns in (slice(0, 1), slice(1, 2), slice(2, 13), slice(0, 13)):
        with backends.use(backend):
            got = found(ours, columns)
        for one, other in zip(got, found(textbook, columns), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, equal_nan=True)


def test_a_probability_close_to_one_keeps_its_gradient_through_the_head(small_tiles):
    """1 - p is 4e-9, which 1 minus a float32 p would make 0; the label lies in the first of several tiles."""
    hidden = torch.ones(1, 2, 1, requires_grad=True)
    weight = torch.full((9, 1), -21.0)
    weight[0] = 0.0
    for chunk_bytes in (None, 24):
        sums, _ = losses.linear_sequence_logps(hidden, weight, torch.zeros(1, 2).long(), chunk_bytes=chunk_bytes)
        (gradient,) = torch.autograd.grad(sums.sum(), hidden)
        exact = 8 * torch.tensor(-21.0, dtype=torch.float64).exp()
        assert sums.item() == pytest.approx(-exact.item(), rel=1e-6)
        assert gradient[0, 0, 0].item() == pytest.approx(21 * exact.item(), rel=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 262_144])
def test_one_token_and_256k_token_vocabularies(vocabulary):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 3, requires_grad=True), torch.randn(vocabulary, 3, requires_grad=True)]
    labels = torch.randint(0, vocabulary, (1, 4))

    def found(function, inputs):
        sums, _ = function(*inputs)
        return [x.double() for x in (sums.detach(), *torch.autograd.grad(sums.sum(), inputs))]

    exact = found(lambda h, w: eager(head(h, w), labels), [x.detach().double().requires_grad_() for x in inputs])
    theirs = found(lambda h, w: eager(head(h, w), labels), inputs)
    for chunk_bytes in (None, 1 << 20):
        ours = found(lambda h, w, c=chunk_bytes: losses.linear_sequence_logps(h, w, labels, chunk_bytes=c), inputs)
        for mine, other, truth in zip(ours, theirs, exact, strict=True):
            room = max((other - truth).abs().max().item(), 1e-7 * truth.abs().max().item())
            assert (mine - truth).abs().max() <= room


@pytest.mark.parametrize("chunk_bytes", [None, 40])
@pytest.mark.parametrize("shape", [(0, 5, 4, 7), (2, 0, 4, 7), (2, 1, 4, 7), (2, 5, 4, 0), (2, 5, 0, 7), (0, 0, 0, 0)])
def test_sizes_of_zero_are_served_as_from_logits(shape, chunk_bytes, small_tiles):
    rows, length, width, vocabulary = shape
    hidden = torch.randn(rows, length, width, dtype=torch.float64, requires_grad=True)
    weight, bias = (
        torch.randn(vocabulary, width, dtype=torch.float64, requires_grad=True),
        torch.randn(vocabulary, dtype=torch.float64),
    )
    bias.requires_grad_()
    labels = torch.zeros(rows, length, dtype=torch.int64) if vocabulary else torch.full((rows, length), IGNORE)
    found, counts = losses.linear_sequence_logps(hidden, weight, labels, bias=bias, chunk_bytes=chunk_bytes)
    grads = torch.autograd.grad(found.sum(), (hidden, weight, bias))
    expected, expected_counts = losses.sequence_logps(hidden @ weight.t() + bias, labels)
    expected_grads = torch.autograd.grad(expected.sum(), (hidden, weight, bias))
    assert torch.equal(counts, expected_counts)
    for one, other in zip((found, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    statistics = losses.linear_token_logps(hidden, weight, labels, bias=bias, statistics=True, chunk_bytes=chunk_bytes)
    assert statistics.entropy.shape == statistics.is_top.shape == (rows, length)


def test_a_label_of_a_vocabulary_of_none_is_refused():
    hidden, labels = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels contains 0: expected .* in \[0, 0\)"):
        losses.linear_sequence_logps(hidden, torch.zeros(0, 4), labels)
    with pytest.raises(ValueError, match=r"labels contains 0: expected .* in \[0, 0\)"):
        losses.sequence_logps(hidden[..., :0], labels)
