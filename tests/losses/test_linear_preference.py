"""A loss from hidden states and the head, walked prompt by prompt: exact, three products, never all logits."""

import pytest
import torch

from benchmarks.measure import peak_extra_bytes
from shapo_kernels import losses
from shapo_kernels.ops import linear_tiles
from tests.support.textbook import IGNORE, eager, head, make_labels

B, T, H, V = 3, 8, 6, 11


pytestmark = pytest.mark.usefixtures("small_tiles")


def dpo(sums, counts, prompts, *, of=B, reference=None):
    chosen, rejected = sums.chunk(2)
    of_chosen, of_rejected = (torch.zeros(2, of) if reference is None else reference)[:, prompts].to(sums.dtype)
    return losses.dpo(chosen, rejected, of_chosen, of_rejected, beta=0.3).sum() / of


def simpo(sums, counts, prompts, *, of=B):
    chosen, rejected = losses.token_mean(sums, counts).chunk(2)
    return losses.simpo(chosen, rejected, beta=2.0, gamma=0.5).sum() / of


def make(dtype=torch.float64, bias=False, rows=2 * B, kept=0.7):
    torch.manual_seed(1)
    tensors = {"hidden": torch.randn(rows, T, H, dtype=dtype), "weight": torch.randn(V, H, dtype=dtype)}
    if bias:
        tensors["bias"] = torch.randn(V, dtype=dtype)
    return tensors, make_labels(rows, T, V, kept=kept)


def leaves(tensors, dtype=None):
    return {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()}


#: All prompts at once; two; one after the other; and of each, the logits in several tiles.
CHUNKS = [None, 8 * V * 2 * T * 2, 8 * V * 2 * T, 8 * 40, 1]


@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 2.0, "scale": 1.5}])
@pytest.mark.parametrize("share", [dpo, simpo])
@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_the_loss_and_its_gradients_are_those_of_the_head_and_the_log_softmax(options, share, chunk_bytes):
    options = dict(options)
    tensors, labels = make(bias=options.pop("bias", False))
    ours, theirs = leaves(tensors), leaves(tensors)
    expected_sums, expected_counts = eager(head(**theirs, **options), labels)
    expected = share(expected_sums, expected_counts, torch.arange(B))
    loss, sums, counts = losses.linear_preference_loss(
        **ours, labels=labels, share=share, chunk_bytes=chunk_bytes, **options
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums, expected_sums.detach(), rtol=1e-12, atol=0)
    assert torch.equal(counts, expected_counts)
    (7 * loss).backward()
    (7 * expected).backward()
    for name in tensors:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_a_likelihood_is_walked_response_by_response(chunk_bytes):
    tensors, labels = make(rows=5)
    ours, theirs = leaves(tensors), leaves(tensors)
    tokens = (labels[:, 1:] != IGNORE).sum()
    expected = -eager(head(**theirs), labels)[0].sum() / tokens
    loss, _, _ = losses.linear_preference_loss(
        **ours,
        labels=labels,
        share=lambda sums, counts, prompts: -sums.sum() / tokens,
        responses=1,
        chunk_bytes=chunk_bytes,
    )
    loss.backward()
    expected.backward()
    for name in tensors:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-10, atol=1e-13)


def test_each_prompt_comes_with_its_own_reference_and_is_asked_for_once():
    tensors, labels = make()
    reference, seen = torch.randn(2, B, dtype=torch.float64), []

    def share(sums, counts, prompts):
        seen.extend(prompts.tolist())
        return dpo(sums, counts, prompts, reference=reference)

    theirs = leaves(tensors)
    expected = dpo(*eager(head(**theirs), labels), torch.arange(B), reference=reference)
    loss, _, _ = losses.linear_preference_loss(**leaves(tensors), labels=labels, share=share, chunk_bytes=8 * 40)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert seen == list(range(B))


def test_shares_of_dr_dpo_with_a_likelihood_add_up_to_the_loss_of_the_whole_batch():
    tensors, labels = make()
    objective = losses.PreferenceLoss("simpo", "drdpo", beta=2.0, gamma=0.5, beta_prime=0.7, nll=0.3)

    def output(sums, counts, whole=None):
        batch = losses.PreferenceBatch(*sums.chunk(2), None, None, *counts.chunk(2))
        return objective(batch, whole=whole)

    theirs = leaves(tensors)
    sums, counts = eager(head(**theirs), labels)
    first = output(sums, counts)
    whole = objective.whole_batch(first.per_pair.detach(), chosen_counts=counts[:B])
    ours = leaves(tensors)
    loss, _, _ = losses.linear_preference_loss(
        **ours, labels=labels, share=lambda s, c, _: output(s, c, whole).loss, chunk_bytes=8 * V * 2 * T
    )
    torch.testing.assert_close(loss, first.loss, rtol=1e-10, atol=0)
    loss.backward()
    first.loss.backward()
    for name in tensors:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-9, atol=1e-12)


def math_of(event):
    first = int(event.name == "aten::addmm_")
    (rows, inner), (_, columns) = event.input_shapes[first : first + 2]
    return 2 * rows * inner * columns


def test_a_batch_of_many_parts_takes_three_products_of_matrices_where_the_sums_alone_take_four():
    tensors, labels = make(torch.float32, kept=1.0)
    chunk_bytes = 4 * V * 2 * T  # of a prompt
    product = 2 * (2 * B * (T - 1)) * H * V

    def by_prompt():
        ours = leaves(tensors)
        losses.linear_preference_loss(**ours, labels=labels, share=dpo, chunk_bytes=chunk_bytes)[0].backward()

    def by_sums():
        ours = leaves(tensors)
        sums, counts = losses.linear_sequence_logps(**ours, labels=labels, chunk_bytes=chunk_bytes)
        dpo(sums, counts, torch.arange(B)).backward()

    def count(run):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            run()
        return sum(math_of(event) for event in profile.events() if event.name in ("aten::mm", "aten::addmm_"))

    assert count(by_prompt) == 3 * product
    assert 3.5 * product < count(by_sums) <= 4 * product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_all_tokens_are_never_held(dtype, monkeypatch):
    """A tile, two gradients of the weight in float32 at most, and a few tensors of the hidden states' size."""
    monkeypatch.setattr(linear_tiles, "BLOCK_ELEMENTS", 1 << 12)
    monkeypatch.setattr(linear_tiles, "_multiplies", lambda dtype: False)
    pairs, length, vocabulary, width = 8, 17, 20_000, 4
    chunk = 4 * vocabulary * 2 * (length - 1)
    hidden = torch.randn(2 * pairs, length, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (2 * pairs, length))

    def step():
        share = lambda *given: dpo(*given, of=pairs)  # noqa: E731
        loss, _, _ = losses.linear_preference_loss(hidden, weight, labels, share, chunk_bytes=chunk)
        return torch.autograd.grad(loss, [hidden, weight])

    step()
    logits = 4 * vocabulary * 2 * pairs * (length - 1)
    gradients = 4 * weight.numel() + weight.nbytes
    peak = peak_extra_bytes(step)
    assert peak <= 1.25 * chunk + gradients + 6 * 4 * hidden.numel()
    assert peak < 0.5 * logits


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * V * 2 * T, None])
def test_gradients_of_a_16_bit_weight_are_summed_in_fp32_over_the_parts(chunk_bytes, multiplies, monkeypatch):
    monkeypatch.setattr(linear_tiles, "_multiplies", lambda dtype: multiplies)
    tensors, labels = make(torch.bfloat16, rows=128)
    share = lambda *given: dpo(*given, of=64)  # noqa: E731
    exact = leaves(tensors, torch.float64)
    share(*eager(head(**exact), labels), torch.arange(64)).backward()
    ours, plain = leaves(tensors), leaves(tensors)
    losses.linear_preference_loss(**ours, labels=labels, share=share, chunk_bytes=chunk_bytes)[0].backward()
    share(*eager(head(**plain), labels), torch.arange(64)).backward()
    for name in tensors:
        assert ours[name].grad.dtype == torch.bfloat16
        wrong, eagers = ((x[name].grad.double() - exact[name].grad).norm() for x in (ours, plain))
        assert wrong <= eagers


def test_only_what_is_trained_gets_a_gradient_and_without_recording_there_is_none():
    tensors, labels = make()
    hidden = tensors["hidden"].requires_grad_()
    loss, _, _ = losses.linear_preference_loss(hidden, tensors["weight"], labels, dpo)
    loss.backward()
    assert tensors["weight"].grad is None
    assert hidden.grad.abs().sum() > 0
    with torch.no_grad():
        loss, sums, _ = losses.linear_preference_loss(hidden, tensors["weight"], labels, dpo)
    assert not loss.requires_grad
    assert not sums.requires_grad


@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_a_grad_scalers_scale_beyond_float16_gives_the_gradients_of_the_two_step_form(chunk_bytes):
    tensors, labels = make()
    ours, theirs = leaves(tensors, torch.float16), leaves(tensors, torch.float16)
    small = 2.0**-12  # below it a float16 loses digits, and 2**16 is more than it can say
    loss, _, _ = losses.linear_preference_loss(
        **ours, labels=labels, share=lambda *given: small * dpo(*given), chunk_bytes=chunk_bytes
    )
    sums, counts = losses.linear_sequence_logps(**theirs, labels=labels)
    (2.0**16 * loss).backward()
    (2.0**16 * small * dpo(sums, counts, torch.arange(B))).backward()
    for name in tensors:
        assert ours[name].grad.isfinite().all()
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("chunk_bytes", [None, 1])
@pytest.mark.parametrize("small", [2.0**-20, 0.0])
def test_upstream_gradients_below_float16_keep_their_digits_in_float16_factors(chunk_bytes, small, monkeypatch):
    """As on CUDA, where hidden states times upstream gradient are a float16 factor before a scale is known."""
    monkeypatch.setattr(linear_tiles, "_multiplies", lambda dtype: True)
    tensors, labels = make(bias=True)
    ours, exact = leaves(tensors, torch.float16), leaves(tensors)
    for x, y in zip(ours.values(), exact.values(), strict=True):
        y.data.copy_(x.data)
    loss, _, _ = losses.linear_preference_loss(
        **ours, labels=labels, share=lambda *given: small * dpo(*given), chunk_bytes=chunk_bytes
    )
    (2.0**20 * loss).backward()
    (2.0**20 * small * dpo(*eager(head(**exact), labels), torch.arange(B))).backward()
    for name in tensors:
        wrong = (ours[name].grad.double() - exact[name].grad).norm()
        assert wrong <= 4e-3 * exact[name].grad.norm(), name


def test_a_share_with_a_trainable_number_of_its_own_is_for_use_without_gradients():
    tensors, labels = make()
    ours, factor = leaves(tensors), torch.ones((), requires_grad=True)
    with torch.no_grad():
        loss, sums, _ = losses.linear_preference_loss(
            **ours, labels=labels, share=lambda sums, *_: factor * sums.sum(), responses=1
        )
    torch.testing.assert_close(loss, sums.sum(), rtol=1e-12, atol=0)
    for share in (lambda sums, *_: factor * sums.sum(), lambda sums, *_: (2 * factor) * sums.detach().sum()):
        with pytest.raises(ValueError, match="depends on a tensor beside sums that takes a gradient"):
            losses.linear_preference_loss(**ours, labels=labels, share=share, responses=1)
    with pytest.raises(ValueError, match="depends on a tensor beside sums"):
        losses.linear_preference_loss(**ours, labels=labels, share=lambda *_: factor, responses=1)


def test_a_share_without_a_graph_raises_in_backward_as_the_two_step_form_does():
    tensors, labels = make()
    loss, _, _ = losses.linear_preference_loss(
        **leaves(tensors), labels=labels, share=lambda sums, *_: -sums.sum().detach()
    )
    assert not loss.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_a_batch_of_no_prompt_has_a_loss_and_gradients_of_zero(chunk_bytes):
    tensors, labels = make(rows=0)
    ours = leaves(tensors)
    loss, sums, counts = losses.linear_preference_loss(**ours, labels=labels, share=dpo, chunk_bytes=chunk_bytes)
    assert (loss.item(), sums.shape, counts.shape) == (0, (0,), (0,))
    loss.backward()
    assert ours["hidden"].grad.shape == (0, T, H)
    assert not ours["weight"].grad.any()


def test_gradients_are_handed_out_once_and_cannot_be_differentiated():
    tensors, labels = make()
    ours = leaves(tensors)
    loss, _, _ = losses.linear_preference_loss(**ours, labels=labels, share=dpo)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()
    loss, _, _ = losses.linear_preference_loss(**ours, labels=labels, share=dpo)
    with pytest.raises(RuntimeError, match="use linear_sequence_logps"):
        torch.autograd.grad(loss, list(ours.values()), create_graph=True)


def test_a_response_without_a_token_and_a_loss_without_a_gradient_add_nothing():
    tensors, labels = make()
    labels[1] = IGNORE
    ours = leaves(tensors)
    loss, sums, counts = losses.linear_preference_loss(**ours, labels=labels, share=dpo, chunk_bytes=8 * 40)
    loss.backward()
    assert (sums[1], counts[1]) == (0, 0)
    assert (ours["hidden"].grad[1] == 0).all()
    loss, _, _ = losses.linear_preference_loss(**ours, labels=labels, share=lambda *_: torch.zeros(()))
    assert loss == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": 4}, "6 rows and responses is 4"),
        ({"share": lambda sums, counts, prompts: sums}, "share returned the shape"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_what_does_not_fit_raises(change, message):
    tensors, labels = make()
    with pytest.raises(ValueError, match=message):
        losses.linear_preference_loss(**{**leaves(tensors), "labels": labels, "share": dpo, **change})


@pytest.mark.parametrize(
    ("tokens", "saves"),
    [([], False), ([0, 0], False), ([5, 5], False), ([5, 6], True), ([10, 1], True), ([11], False), ([11, 3], False)],
)
def test_walking_by_pairs_saves_a_product_where_a_pair_fits_and_the_batch_does_not(tokens, saves):
    """Counted in products too: three where it saves one; what does not is walked as well or better by the sums."""
    weight = torch.randn(V, 4)
    room = 4 * V * 10  # of ten tokens
    assert losses.saves_a_product(tokens, weight, chunk_bytes=room) is saves
    assert losses.saves_a_product(tokens, weight, dtype=torch.float64, chunk_bytes=2 * room) is saves


def test_a_compiled_loss_is_one_graph_that_equals_eager_and_serves_other_numbers_of_labels():
    tensors, labels = make()
    reference = torch.linspace(-1, 1, 2 * B).view(2, B).to(tensors["hidden"].dtype)

    def gradients(function, labels, reference):
        inputs = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        loss, sums, counts = function(inputs, labels, reference)
        assert not sums.requires_grad
        return loss.detach(), sums, counts, *torch.autograd.grad(loss, list(inputs.values()))

    def by_parts(inputs, labels, reference):
        def share(sums, counts, prompts):
            chosen, rejected = sums.chunk(2)
            return losses.dpo(chosen, rejected, *reference[:, prompts], beta=0.3).sum() / B

        return losses.linear_preference_loss(**inputs, labels=labels, share=share, softcap=3.0, chunk_bytes=8 * V * T)

    torch._dynamo.reset()
    compiled = torch.compile(by_parts, fullgraph=True, backend="aot_eager")
    fewer = labels.clone()
    fewer[0, 3:] = IGNORE
    for step, (given, numbers) in enumerate([(labels, reference), (fewer, -reference)]):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            found = gradients(compiled, given, numbers)
        for got, right in zip(found, gradients(by_parts, given, numbers), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-12)
