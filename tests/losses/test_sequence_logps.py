"""Log-probabilities of responses, from logits or hidden states: exact, in chunks, never [tokens, vocabulary] (L5)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from shapo_kernels import losses
from shapo_kernels.losses import linear_token_logps as kernels
from shapo_kernels.reference import sequence_logps as reference

IGNORE = -100


def eager(logits, labels, ignore_index=IGNORE):
    """Textbook: the full log_softmax, in the dtype of the logits."""
    logps, targets = F.log_softmax(logits[:, :-1], -1), labels[:, 1:]
    picked = logps.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    counted = targets != ignore_index
    return torch.where(counted, picked, 0).sum(1), counted.sum(1)


def head(hidden, weight, bias=None, softcap=None, scale=1.0):
    logits = F.linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def make_labels(rows, length, vocabulary, seed=0, kept=0.6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    return torch.where(torch.rand(rows, length, generator=generator) < kept, labels, IGNORE)


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
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
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


HEADS = [
    {},
    {"bias": True},
    {"softcap": 3.0},
    {"scale": 0.25},
    {"bias": True, "softcap": 2.0, "scale": 1.5},
]


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 1000])
def test_linear_sequence_logps_equals_the_head_and_the_log_softmax(options, chunk_size):
    torch.manual_seed(1)
    options = dict(options)
    tensors = {"hidden": torch.randn(3, 8, 6), "weight": torch.randn(11, 6)}
    if options.pop("bias", False):
        tensors["bias"] = torch.randn(11)
    labels = make_labels(3, 8, 11)
    ours = {name: x.double().requires_grad_() for name, x in tensors.items()}
    theirs = {name: x.double().requires_grad_() for name, x in tensors.items()}
    sums, counts = losses.linear_sequence_logps(**ours, labels=labels, chunk_size=chunk_size, **options)
    expected, expected_counts = eager(head(**theirs, **options), labels)
    assert torch.equal(counts, expected_counts)
    assert torch.allclose(sums, expected, rtol=1e-12)
    slope = torch.randn(3, dtype=torch.float64)
    (sums * slope).sum().backward()
    (expected * slope).sum().backward()
    for name in tensors:
        assert torch.allclose(ours[name].grad, theirs[name].grad, rtol=1e-10, atol=1e-13), name


def test_linear_sequence_logps_passes_gradcheck():
    torch.manual_seed(2)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 3), (7, 3), (7,))
    )
    labels = make_labels(2, 5, 7)
    assert torch.autograd.gradcheck(
        lambda h, w, b: losses.linear_sequence_logps(h, w, labels, bias=b, softcap=2.0, scale=0.7, chunk_size=3)[0],
        (hidden, weight, bias),
    )


def test_the_soft_cap_comes_after_the_scale_as_in_gemma_2():
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.05,
    )
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).double()
    ids = torch.randint(0, 31, (2, 9))
    output = model(input_ids=ids, output_hidden_states=True)
    sums, _ = losses.linear_sequence_logps(output.hidden_states[-1], model.lm_head.weight, ids, softcap=0.05)
    assert torch.allclose(sums, eager(output.logits, ids)[0], rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_head_has_at_most_the_error_of_the_models_own(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 257, 64).to(dtype), torch.randn(300, 64).to(dtype)
    labels = torch.randint(0, 300, (2, 257))
    truth, _ = eager(head(hidden.double(), weight.double()), labels)
    sums, _ = losses.linear_sequence_logps(hidden, weight, labels)
    assert sums.dtype == torch.float32
    own, _ = eager(head(hidden, weight).float(), labels)
    assert (sums.double() - truth).abs().max() <= 1.02 * (own.double() - truth).abs().max()


@pytest.mark.parametrize("block", [64, 1 << 22])
def test_gradients_of_a_16_bit_weight_are_summed_in_fp32(block, monkeypatch):
    """Over many chunks a bf16 sum would stall: adding 1/512 to 1 changes nothing in bf16."""
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", block)
    hidden, weight = torch.ones(1, 1025, 4).bfloat16(), torch.zeros(2, 4).bfloat16().requires_grad_()
    labels = torch.zeros(1, 1025, dtype=torch.int64)
    losses.linear_sequence_logps(hidden, weight, labels, chunk_size=1)[0].sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert (weight.grad[0] == 512).all()
    assert (weight.grad[1] == -512).all()


def test_autocast_rounds_the_inputs_and_leaves_gradients_in_their_dtypes():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 16, requires_grad=True), torch.randn(20, 16, requires_grad=True)
    labels = make_labels(2, 9, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums, _ = losses.linear_sequence_logps(hidden, weight, labels)
        mixed, _ = losses.linear_sequence_logps(hidden.bfloat16(), weight, labels)
    assert sums.dtype == torch.float32
    assert torch.equal(sums, mixed)
    sums.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    theirs = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = eager(head(*theirs).float(), labels)[0]
    assert torch.allclose(sums, expected, rtol=1e-6)
    expected.sum().backward()
    for ours, other in zip((hidden, weight), theirs, strict=True):
        assert torch.allclose(ours.grad, other.grad, rtol=0.05, atol=0.05)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns or is given."""

    elements = 0
    multiplied = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        if "mm" in str(function):
            self.multiplied += 1
        return result


@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_sequence_logps_never_holds_the_logits_of_all_tokens(chunk_size, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "chunk_bytes", lambda device: 32 * 600 * 4)
    tokens, vocabulary, width = 2 * 64, 600, 8
    hidden = torch.randn(2, 65, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (2, 65))
    with LargestTensor() as largest:
        sums, counts = losses.linear_sequence_logps(hidden, weight, labels, softcap=5.0, chunk_size=chunk_size)
        sums.sum().backward()
    assert counts.sum() == tokens
    assert largest.elements <= (32 if chunk_size is None else 8) * vocabulary


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


def test_ignored_tokens_are_never_multiplied():
    hidden = torch.full((2, 50, 4), torch.nan)
    labels = torch.full((2, 50), IGNORE)
    hidden[:, 10] = 1.0
    labels[:, 11] = 3
    hidden.requires_grad_()
    weight = torch.randn(6, 4, requires_grad=True)
    sums, _ = losses.linear_sequence_logps(hidden, weight, labels)
    sums.sum().backward()
    assert torch.isfinite(sums).all()
    assert torch.isfinite(weight.grad).all()
    assert (hidden.grad[:, :10] == 0).all()


@pytest.mark.parametrize("through", ["leaf", "node"])
@pytest.mark.parametrize(("chunk_size", "expected"), [(100, (1, 1, 2)), (4, (4, 0, 4))])
def test_no_product_is_made_that_is_not_asked_for(through, chunk_size, expected):
    """One chunk keeps its slope. Several make the hidden states' gradient while they have the logits."""
    hidden, leaf = torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    weight = leaf if through == "leaf" else leaf * 1.0
    labels = make_labels(2, 5, 6, kept=1.0)

    def products(inputs, weight):
        with LargestTensor() as forward:
            sums, _ = losses.linear_sequence_logps(hidden, weight, labels, chunk_size=chunk_size)
        with LargestTensor() as backward:
            gradients = torch.autograd.grad(sums.sum(), inputs)
        return forward.multiplied, backward.multiplied, gradients

    forward, only_hidden, (alone,) = products([hidden], weight)
    _, both, (together, for_weight) = products([hidden, weight], weight)
    assert (forward, only_hidden, both) == expected
    assert torch.equal(alone, together)
    assert for_weight.abs().sum() > 0
    forward, backward, (frozen,) = products([hidden], weight.detach())
    assert (forward, backward) == (4 if chunk_size == 4 else 2, 0)
    assert torch.allclose(frozen, alone, rtol=1e-5, atol=1e-6)
    with torch.no_grad(), LargestTensor() as nothing:
        losses.linear_sequence_logps(hidden, weight, labels, chunk_size=chunk_size)
    assert nothing.multiplied == (2 if chunk_size == 4 else 1)


def test_the_graph_of_the_head_can_be_gone_through_twice():
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    labels = make_labels(2, 5, 6, kept=1.0)
    for chunk_size in (3, 100):
        sums, _ = losses.linear_sequence_logps(hidden, weight, labels, chunk_size=chunk_size)
        first = torch.autograd.grad(sums.sum(), [hidden, weight], retain_graph=True)
        second = torch.autograd.grad(sums.sum(), [hidden, weight])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    from torch.utils.checkpoint import checkpoint

    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    labels = make_labels(2, 5, 6)

    def sums(h, w):
        return losses.linear_sequence_logps(h * 2, w, labels, chunk_size=3)[0]

    expected = torch.autograd.grad(sums(hidden, weight).sum(), [hidden, weight])
    checkpoint(sums, hidden, weight, use_reentrant=reentrant).sum().backward()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


def test_a_frozen_head_gets_no_gradient():
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 4)
    sums, _ = losses.linear_sequence_logps(hidden, weight, make_labels(2, 5, 6))
    sums.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_backward_through_a_weight_that_was_changed_raises():
    hidden, weight = torch.randn(1, 4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    sums, _ = losses.linear_sequence_logps(hidden, weight, torch.tensor([[0, 1, 2, 3]]))
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sums.sum().backward()


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
        ((logits[0], labels), ValueError, r"logits has the shape \[3, 5\]"),
        ((logits, labels[:, 1:]), ValueError, r"labels has the shape \[2, 2\]: expected \[2, 3\]"),
        ((logits, labels.float()), TypeError, "labels is torch.float32"),
        ((logits.long(), labels), TypeError, "logits is torch.int64"),
        ((logits, labels.to("meta")), ValueError, "labels lies on meta"),
    ):
        with pytest.raises(error, match=message):
            losses.sequence_logps(*arguments)
    for arguments, options, error, message in (
        ((hidden[0], weight, labels), {}, ValueError, r"hidden has the shape \[3, 4\]"),
        ((hidden, weight.t(), labels), {}, ValueError, r"weight has the shape \[4, 5\]: expected \[V, 4\]"),
        ((hidden, weight.double(), labels), {}, TypeError, "expected one dtype"),
        ((hidden, weight, labels), {"bias": torch.ones(4)}, ValueError, r"bias is \[4\]"),
        ((hidden, weight, labels), {"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ((hidden, weight, labels), {"scale": -1.0}, ValueError, "scale is -1.0"),
        ((hidden, weight, labels), {"chunk_size": 0}, ValueError, "chunk_size is 0"),
        ((hidden, weight, labels), {"chunk_size": 1.5}, ValueError, "chunk_size is 1.5"),
    ):
        with pytest.raises(error, match=message):
            losses.linear_sequence_logps(*arguments, **options)
