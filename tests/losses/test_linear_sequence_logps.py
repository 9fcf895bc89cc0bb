"""Log-probabilities from hidden states and the head's weight: exact, in tiles, never [tokens, vocabulary] (L5)."""

import pytest
import torch

from benchmarks.measure import peak_extra_bytes
from shapo_kernels import losses
from shapo_kernels.ops import linear_head, linear_tiles
from tests.support.textbook import IGNORE, eager, head, make_labels

HEADS = [
    {},
    {"bias": True},
    {"softcap": 3.0},
    {"scale": 0.25},
    {"bias": True, "softcap": 2.0, "scale": 1.5},
]


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("chunk_bytes", [None, 1, 8 * 12, 8 * 40, 8 * 100])
def test_linear_sequence_logps_equals_the_head_and_the_log_softmax(options, chunk_bytes, small_tiles):
    torch.manual_seed(1)
    options = dict(options)
    tensors = {"hidden": torch.randn(3, 8, 6), "weight": torch.randn(11, 6)}
    if options.pop("bias", False):
        tensors["bias"] = torch.randn(11)
    labels = make_labels(3, 8, 11)
    ours = {name: x.double().requires_grad_() for name, x in tensors.items()}
    theirs = {name: x.double().requires_grad_() for name, x in tensors.items()}
    sums, counts = losses.linear_sequence_logps(**ours, labels=labels, chunk_bytes=chunk_bytes, **options)
    expected, expected_counts = eager(head(**theirs, **options), labels)
    assert torch.equal(counts, expected_counts)
    assert torch.allclose(sums, expected, rtol=1e-12)
    slope = torch.randn(3, dtype=torch.float64)
    (sums * slope).sum().backward()
    (expected * slope).sum().backward()
    for name in tensors:
        assert torch.allclose(ours[name].grad, theirs[name].grad, rtol=1e-10, atol=1e-13), name


def test_linear_sequence_logps_passes_gradcheck(small_tiles):
    torch.manual_seed(2)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 3), (7, 3), (7,))
    )
    labels = make_labels(2, 5, 7)
    assert torch.autograd.gradcheck(
        lambda h, w, b: losses.linear_sequence_logps(h, w, labels, bias=b, softcap=2.0, scale=0.7, chunk_bytes=70)[0],
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
@pytest.mark.parametrize("multiplies", [False, True])
def test_gradients_of_a_16_bit_weight_are_summed_in_fp32(block, multiplies, monkeypatch):
    """Over many parts of the tokens a bf16 sum would stall: adding 1/512 to 1 changes nothing in bf16."""
    monkeypatch.setattr(linear_tiles, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(linear_tiles, "_multiplies", lambda dtype: multiplies)
    hidden, weight = torch.ones(1, 1025, 4).bfloat16(), torch.zeros(2, 4).bfloat16().requires_grad_()
    labels = torch.zeros(1, 1025, dtype=torch.int64)
    losses.linear_sequence_logps(hidden, weight, labels, chunk_bytes=8)[0].sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert (weight.grad[0] == 512).all()
    assert (weight.grad[1] == -512).all()


@pytest.mark.parametrize("multiplies", [False, True])
def test_gradients_of_a_16_bit_head_are_no_worse_than_eager(multiplies, monkeypatch, small_tiles):
    """Whether the products are bf16 ones or, on a CPU without them, fp32 ones of bf16 numbers."""
    monkeypatch.setattr(linear_tiles, "_multiplies", lambda dtype: multiplies)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 33, 48).bfloat16(), torch.randn(300, 48).bfloat16()
    labels = torch.randint(0, 300, (2, 33))

    def gradients(function, dtype):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        function(*inputs).sum().backward()
        return [x.grad.double() for x in inputs]

    truth = gradients(lambda h, w: eager(head(h, w), labels)[0], torch.float64)
    theirs = gradients(lambda h, w: eager(head(h, w).float(), labels)[0], torch.bfloat16)
    for chunk_bytes in (None, 20_000):
        ours = gradients(
            lambda h, w, c=chunk_bytes: losses.linear_sequence_logps(h, w, labels, chunk_bytes=c)[0], torch.bfloat16
        )
        for mine, other, exact in zip(ours, theirs, truth, strict=True):
            assert (mine - exact).norm() <= 1.02 * (other - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_inputs_and_leaves_gradients_in_their_dtypes(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 16, requires_grad=True), torch.randn(20, 16, requires_grad=True)
    labels = make_labels(2, 9, 20)
    with torch.autocast("cpu", dtype=dtype):
        sums, _ = losses.linear_sequence_logps(hidden, weight, labels)
        mixed, _ = losses.linear_sequence_logps(hidden.to(dtype), weight, labels)
    assert sums.dtype == torch.float32
    assert torch.equal(sums, mixed)
    inside = torch.autograd.grad(sums.sum(), [hidden, weight], retain_graph=True)
    with torch.autocast("cpu", dtype=dtype):  # where trainers run the backward pass too
        sums.sum().backward()
    assert torch.equal(hidden.grad, inside[0])
    assert torch.equal(weight.grad, inside[1])
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    theirs = [x.detach().to(dtype).double().requires_grad_() for x in (hidden, weight)]
    expected = eager(head(*theirs), labels)[0]
    with torch.autocast("cpu", dtype=dtype):
        own = eager(head(hidden, weight).float(), labels)[0]
    assert (sums - expected).abs().max() <= (own - expected).abs().max()
    expected.sum().backward()
    for ours, other in zip((hidden, weight), theirs, strict=True):
        torch.testing.assert_close(ours.grad.double(), other.grad, rtol=0.05, atol=0.05)


def events(run):
    """What a call did: the operators it called, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    return [event.name for event in profile.events()], result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_linear_sequence_logps_never_holds_the_logits_of_all_tokens(kept, dtype, small_tiles, monkeypatch):
    """A tile; of hidden size what it takes in and gives out; of the weight its gradient, once."""
    monkeypatch.setattr(linear_tiles, "BLOCK_ELEMENTS", 1 << 12)
    monkeypatch.setattr(linear_tiles, "_multiplies", lambda dtype: False)  # oneDNN's products take memory of their own
    tokens, vocabulary, width, chunk = 2 * 64, 20_000, 8, 1 << 20
    hidden = torch.randn(2, 65, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (2, 65))
    labels[:, 1 : 1 + round(64 * (1 - kept))] = IGNORE

    def step():
        sums, counts = losses.linear_sequence_logps(hidden, weight, labels, chunk_bytes=chunk)
        assert counts.sum() == tokens * kept
        return torch.autograd.grad(sums.sum(), [hidden, weight])

    step()
    gradients = weight.nbytes + hidden.nbytes
    assert tokens * kept * vocabulary * 4 > 4 * chunk
    assert peak_extra_bytes(step) <= 1.1 * chunk + gradients + 4 * 4 * tokens * width


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
@pytest.mark.parametrize("tiles", [1, 3])
def test_no_product_is_made_that_is_not_asked_for(through, tiles, small_tiles):
    """The last tile is kept for the weight's gradient, the others are made again: three products, or four."""
    hidden, leaf = torch.randn(2, 5, 4, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    labels = make_labels(2, 5, 48, kept=1.0)
    chunk_bytes = 8 * 48 * 4 // tiles

    def products(run):
        names, result = events(run)
        return sum(name in ("aten::mm", "aten::addmm_") for name in names), result

    def gradients(inputs, weight):
        forward, (sums, _) = products(
            lambda: losses.linear_sequence_logps(hidden, weight, labels, chunk_bytes=chunk_bytes)
        )
        backward, found = products(lambda: torch.autograd.grad(sums.sum(), inputs))
        return forward, backward, found

    weight = leaf if through == "leaf" else leaf * 1.0
    forward, only_hidden, (alone,) = gradients([hidden], weight)
    _, both, (together, for_weight) = gradients([hidden, weight], weight)
    made = tiles if tiles == 1 else 2 * tiles  # half as large where two of them are held
    assert (forward, only_hidden, both) == (2 * made, 0, 2 * made - 1)
    assert torch.equal(alone, together)
    assert for_weight.abs().sum() > 0
    forward, backward, (frozen,) = gradients([hidden], weight.detach())
    assert (forward, backward) == (2 * tiles, 0)
    torch.testing.assert_close(frozen, alone, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        forward, _ = products(lambda: losses.linear_sequence_logps(hidden, weight, labels, chunk_bytes=chunk_bytes))
    assert forward == tiles


def test_the_graph_of_the_head_can_be_gone_through_twice(small_tiles):
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    labels = make_labels(2, 5, 6, kept=1.0)
    for chunk_bytes in (64, None):
        sums, _ = losses.linear_sequence_logps(hidden, weight, labels, chunk_bytes=chunk_bytes)
        first = torch.autograd.grad(sums.sum(), [hidden, weight], retain_graph=True)
        second = torch.autograd.grad(sums.sum(), [hidden, weight])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    from torch.utils.checkpoint import checkpoint

    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    labels = make_labels(2, 5, 6)

    def sums(h, w):
        return losses.linear_sequence_logps(h * 2, w, labels, chunk_bytes=64)[0]

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


@pytest.mark.parametrize("chunk_bytes", [None, 256])
def test_a_compiled_head_is_one_graph_and_other_numbers_of_labels_compile_nothing_anew(chunk_bytes, small_tiles):
    torch._dynamo.reset()

    def loss(hidden, weight, bias, labels):
        sums, counts = losses.linear_sequence_logps(
            hidden * 1.0, weight, labels, bias=bias, softcap=4.0, chunk_bytes=chunk_bytes
        )
        return (sums / counts.clamp(min=1)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    weight, bias = torch.randn(31, 4, requires_grad=True), torch.randn(31, requires_grad=True)
    for step, (length, kept) in enumerate([(5, 0.5), (7, 0.9), (7, 0.0), (9, 1.0), (12, 0.3)]):
        hidden = torch.randn(2, length, 4, requires_grad=True)
        labels = make_labels(2, length, 31, seed=step, kept=kept)
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            got = torch.autograd.grad(compiled(hidden, weight, bias, labels), (hidden, weight, bias))
        expected = torch.autograd.grad(loss(hidden, weight, bias, labels), (hidden, weight, bias))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    labels[0, 2] = 31
    with pytest.raises(ValueError, match=r"labels contains 31: expected -100 \(ignored\) or a token in \[0, 31\)"):
        compiled(hidden, weight, bias, labels)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
def test_the_operators_of_the_head_pass_opcheck(padded, statistics, small_tiles):
    hidden, weight, bias = torch.randn(2, 6, 4), torch.randn(40, 4), torch.randn(40)
    labels = make_labels(2, 6, 40)
    head_options = (IGNORE, 1, torch.float32, 0.5, 3.0, 400, None, statistics, padded)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    arguments = (*inputs, labels, *head_options, True, True)
    # Of several outputs one alone is differentiable, which opcheck's gradient test cannot know.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(linear_head.linear_token_logps, arguments, test_utils=utilities)
    with torch.no_grad():
        logps, _, *saved = linear_head.linear_token_logps(*arguments)
        backward = (torch.randn_like(logps), hidden.detach(), weight.detach(), bias.detach(), labels, *saved)
        torch.library.opcheck(
            linear_head.linear_token_logps_gradient,
            (*backward, *head_options, True, True, True),
            test_utils=utilities,
        )


STATISTICS = [{}, {"softcap": 3.0, "scale": 0.5}]


@pytest.mark.parametrize("options", STATISTICS)
@pytest.mark.parametrize("chunk_bytes", [None, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_statistics_of_a_token_are_those_of_its_logits(options, chunk_bytes, dtype, small_tiles, monkeypatch):
    monkeypatch.setattr(linear_tiles, "_multiplies", lambda dtype: False)  # else logits are rounded to bfloat16
    torch.manual_seed(3)
    hidden, weight, labels = torch.randn(2, 9, 5).to(dtype), torch.randn(23, 5).to(dtype), make_labels(2, 9, 23)
    weight[7] = weight[3]  # a tie
    labels[0, 4] = 7
    found = losses.linear_token_logps(hidden, weight, labels, statistics=True, chunk_bytes=chunk_bytes, **options)
    logits = head(hidden.double(), weight.double(), **options)[:, :-1]
    targets, everything = labels[:, 1:], torch.log_softmax(logits, -1)
    counted = targets != IGNORE
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for name, expected in (
        ("logps", everything.gather(2, targets.clamp(min=0)[..., None])[..., 0]),
        ("entropy", -(everything.exp() * everything).sum(-1)),
        ("mean_logit", logits.mean(-1)),
    ):
        value = getattr(found, name)
        assert (value[:, -1] == 0).all()
        torch.testing.assert_close(value[:, :-1].double(), torch.where(counted, expected, 0.0), **close)
    assert torch.equal(found.is_top[:, :-1], (logits.argmax(-1) == targets) & counted)
    beside = losses.linear_token_logps(hidden[:, :-1], weight, labels[:, 1:], shift=0, **options)
    torch.testing.assert_close(beside.logps.double(), found.logps[:, :-1].double(), **close)
    assert beside.entropy is None


def test_a_checkpointed_block_that_contains_the_loss_gives_the_same_gradients(small_tiles):
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    body = torch.nn.Linear(4, 4)
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    labels = make_labels(2, 5, 30)

    def block(h, w):
        sums, counts = losses.linear_sequence_logps(torch.tanh(body(h)), w, labels, chunk_bytes=256)
        return -(sums / counts.clamp(min=1)).mean()

    inputs = [hidden, weight, *body.parameters()]
    expected = torch.autograd.grad(block(hidden, weight), inputs)
    got = torch.autograd.grad(checkpoint(block, hidden, weight, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_statistics_of_a_divided_vocabulary_are_refused():
    hidden, weight, labels = torch.zeros(1, 3, 4), torch.zeros(5, 4), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="statistics=True with a group"):
        losses.linear_token_logps(hidden, weight, labels, statistics=True, group=object())
