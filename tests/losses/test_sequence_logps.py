"""Log-probabilities of responses from logits, and what they share with those from hidden states: exact (L5)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from shapo_kernels import losses
from shapo_kernels.reference import sequence_logps as reference
from tests.support.textbook import IGNORE, eager, make_labels


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 4),
    length=st.integers(0, 7),
    vocabulary=st.integers(1, 9),
    seed=st.integers(0, 99),
    kept=st.sampled_from([0.0, 0.3, 1.0]),
    transposed=st.booleans(),
)
def test_sequence_logps_equals_the_gathered_log_softmax(rows, length, vocabulary, seed, kept, transposed):
    torch.manual_seed(seed)
    logits = 5 * torch.randn(rows, length, vocabulary, dtype=torch.float64)
    if transposed:
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    labels = make_labels(rows, length, vocabulary, seed, kept)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    sums, counts = losses.sequence_logps(ours, labels)
    expected, expected_counts = eager(theirs, labels)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, expected_counts)
    assert torch.allclose(sums, expected, rtol=1e-12, atol=1e-12)
    slope = torch.randn(rows, dtype=torch.float64)
    (sums * slope).sum().backward()
    (expected * slope).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_the_logits_of_a_position_are_those_of_the_next_label():
    logits = torch.full((1, 3, 4), -50.0)
    labels = torch.tensor([[3, 1, 2]])
    logits[0, 0, 1] = logits[0, 1, 2] = 50.0
    sums, counts = losses.sequence_logps(logits, labels)
    assert sums.item() == 0
    assert counts.item() == 2


def test_sums_and_counts_are_those_of_the_loss_of_a_hugging_face_model():
    pytest.importorskip("transformers")
    from tests.support.llamas import llama

    model = llama(vocab_size=31, num_hidden_layers=1)
    labels = make_labels(3, 10, 31)
    ids = labels.clamp(min=0)
    output = model(input_ids=ids, labels=labels, output_hidden_states=True)
    for sums, counts in (
        losses.sequence_logps(output.logits, labels),
        losses.linear_sequence_logps(output.hidden_states[-1], model.lm_head.weight, labels),
    ):
        assert torch.allclose(-sums.sum() / counts.sum(), output.loss, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_of_low_precision_logits_are_as_good_as_fp32(dtype):
    """Summing a bf16 log_softmax over 256 tokens is off by 2 on average; the rounding of the logits is the caller's."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(4, 257, 500)).to(dtype)
    labels = torch.randint(0, 500, (4, 257))
    truth, _ = eager(logits.double(), labels)
    sums, _ = losses.sequence_logps(logits, labels)
    assert sums.dtype == torch.float32
    error = (sums.double() - truth).abs().max()
    assert error <= 2e-7 * truth.abs().max()
    assert error <= (eager(logits, labels)[0].double() - truth).abs().max() + 1e-4


def test_gradients_of_low_precision_logits_are_no_worse_than_eager():
    torch.manual_seed(0)
    logits = (4 * torch.randn(2, 20, 50)).bfloat16()
    labels = torch.randint(0, 50, (2, 20))

    def gradient(function, source):
        source = source.clone().requires_grad_()
        function(source, labels)[0].sum().backward()
        return source.grad.double()

    truth = gradient(eager, logits.double())
    ours = (gradient(losses.sequence_logps, logits) - truth).abs().max()
    assert ours <= (gradient(eager, logits) - truth).abs().max()
    assert ours <= 2**-8


def test_a_row_without_a_token_gives_a_differentiable_zero():
    for labels in (torch.tensor([[1, IGNORE, IGNORE], [0, 1, 2]]), torch.full((2, 3), IGNORE)):
        logits, hidden = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
        weight = torch.randn(5, 4, requires_grad=True)
        for sums, counts in (
            losses.sequence_logps(logits, labels),
            losses.linear_sequence_logps(hidden, weight, labels),
        ):
            assert sums[0].item() == counts[0].item() == 0
            sums.sum().backward()
        for tensor in (logits, hidden):
            assert (tensor.grad[0] == 0).all()
        assert torch.isfinite(weight.grad).all()


def test_huge_logits_neither_overflow_nor_lose_the_difference():
    logits = torch.tensor([[[3e4, 3e4 - 1, -3e4], [0.0, 0.0, 0.0]]], requires_grad=True)
    sums, _ = losses.sequence_logps(logits, torch.tensor([[0, 1]]))
    assert sums.item() == pytest.approx(-1 - torch.tensor(-1.0).exp().log1p().item(), rel=1e-6)
    sums.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_a_masked_vocabulary_entry_has_no_gradient():
    logits = torch.tensor([[[0.0, -torch.inf, 1.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    sums, _ = losses.sequence_logps(logits, torch.tensor([[0, 2]]))
    sums.sum().backward()
    assert logits.grad[0, 0, 1].item() == 0
    assert torch.isfinite(logits.grad).all()


def test_sequence_logps_holds_no_second_tensor_of_the_logits_but_their_gradient(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 4 * 500)
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() > 4 * 500:
                made.append((str(function), tuple(result.shape)))
            return result

    logits = torch.randn(2, 33, 500, requires_grad=True)
    with Made():
        sums, _ = losses.sequence_logps(logits, torch.randint(0, 500, (2, 33)))
        assert not made
        sums.sum().backward()
    assert {shape for _, shape in made} == {(2, 33, 500)}


def test_second_derivatives_are_refused():
    hidden, weight = torch.randn(1, 4, 3, requires_grad=True), torch.randn(5, 3)
    labels = torch.tensor([[0, 1, 2, 3]])
    for sums, _ in (
        losses.linear_sequence_logps(hidden, weight, labels),
        losses.sequence_logps(hidden @ weight.t(), labels),
    ):
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            torch.autograd.grad(sums.sum(), hidden, create_graph=True)


def test_another_ignore_index_and_integer_width_are_honoured():
    logits = torch.randn(1, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 2, 0]], dtype=torch.int32)
    sums, counts = losses.sequence_logps(logits, labels, ignore_index=0)
    assert counts.item() == 1
    assert sums.item() == pytest.approx(F.log_softmax(logits[0, 1], -1)[2].item())
    sums, counts = losses.linear_sequence_logps(logits, torch.eye(5, dtype=torch.float64), labels, ignore_index=0)
    assert counts.item() == 1
    assert sums.item() == pytest.approx(F.log_softmax(logits[0, 1], -1)[2].item())


@pytest.mark.parametrize("label", [5, -1, -101])
def test_labels_out_of_range_are_named(label):
    labels = torch.tensor([[0, label, 1]])
    message = rf"labels contains {label}: expected -100 \(ignored\) or a token in \[0, 5\)"
    with pytest.raises(ValueError, match=message):
        losses.sequence_logps(torch.randn(1, 3, 5), labels)
    with pytest.raises(ValueError, match=message):
        losses.linear_sequence_logps(torch.randn(1, 3, 4), torch.randn(5, 4), labels)


def test_arguments_that_do_not_fit_are_refused():
    logits, hidden, weight = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(5, 4)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    for arguments, error, message in (
        ((logits[0], labels), ValueError, r"logits has shape \[3, 5\]"),
        ((logits, labels[:, 1:]), ValueError, r"labels has shape \[2, 2\]: expected \[2, 3\]"),
        ((logits, labels.float()), TypeError, "labels is torch.float32"),
        ((logits.long(), labels), TypeError, "logits is torch.int64"),
        ((logits, labels.to("meta")), ValueError, "labels is on meta"),
    ):
        with pytest.raises(error, match=message):
            losses.sequence_logps(*arguments)
    for arguments, options, error, message in (
        ((hidden[0], weight, labels), {}, ValueError, r"hidden has shape \[3, 4\]"),
        ((hidden, weight.t(), labels), {}, ValueError, r"weight has shape \[4, 5\]: expected \[V, 4\]"),
        ((hidden, weight.double(), labels), {}, TypeError, "expected one dtype"),
        ((hidden, weight, labels), {"bias": torch.ones(4)}, ValueError, r"bias has shape \[4\]"),
        ((hidden, weight, labels), {"bias": torch.ones(5).double()}, TypeError, "bias is torch.float64"),
        ((hidden, weight, labels), {"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ((hidden, weight, labels), {"scale": -1.0}, ValueError, "scale is -1.0"),
        ((hidden, weight, labels), {"chunk_bytes": 0}, ValueError, "chunk_bytes is 0"),
    ):
        with pytest.raises(error, match=message):
            losses.linear_sequence_logps(*arguments, **options)
