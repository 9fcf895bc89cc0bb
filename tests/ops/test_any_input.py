"""Any input to any public operator: the value of float64 mathematics, or a refusal that leaves all as it was.

Inputs are drawn with views, expanded and overlapping memory, repeated indices, sizes of zero, infinities and other
devices. A refusal is a TypeError, ValueError or IndexError; a crash, another error or another value is a failure.
"""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shapo_kernels import losses, ops
from tests.support.draws import DTYPES, F64, IGNORE, INF, Draw, assert_near, fuzzed, in_range, outcome, sizes


@fuzzed
@given(st.data())
def test_neuron_operators(data):
    draw = Draw(data)
    tokens, dtype = draw.one((3,), (0,), (2, 3), (2, 0, 1)), draw.one(*DTYPES)
    out, width, k = (data.draw(sizes) for _ in range(3))
    special = draw.one(False, True)
    index = draw.index(width, k)
    output, x, direction = draw.elsewhere(
        draw.tensor(*tokens, out, dtype=dtype, special=special),
        draw.tensor(*tokens, width + draw.one(*[0] * 9, 1), dtype=draw.one(dtype, torch.float32), special=special),
        draw.tensor(out, k, dtype=draw.one(dtype, F64)),
    )
    fits = in_range(index, x.shape[-1]) and not (output.is_meta or x.is_meta or direction.is_meta)
    updated = outcome(lambda: ops.neuron_update(output, x, direction, index), output, x, direction)
    tapped = outcome(lambda: ops.neuron_tap(output, x, direction, index), output, x, direction)
    assert (updated is not None) == (tapped is not None) == fits
    if not fits:
        return
    selected = x[..., index].to(dtype).double()
    assert torch.equal(tapped.nan_to_num(7), output.nan_to_num(7))
    whole = (output.isfinite().all(-1) & selected.isfinite().all(-1)).nonzero(as_tuple=True)
    product = selected @ direction.to(dtype).double().t()
    size = float(selected.nan_to_num(0, 0, 0).abs().sum() + output.double().nan_to_num(0, 0, 0).abs().sum() + 1)
    assert_near(updated[whole], (output.double() + product)[whole], dtype, size)
    gradient = ops.neuron_gradient(output, x, index)
    flat, columns = output.double().flatten(0, -2), selected.flatten(0, -2)
    expected = flat.t() @ columns
    sound = flat.isfinite().all(0)[:, None] & columns.isfinite().all(0)
    assert_near(gradient[sound], expected[sound], torch.float32 if dtype != F64 else F64, size * size)


@fuzzed
@given(st.data())
def test_the_subspace_update(data):
    draw = Draw(data)
    count = draw.one(0, 1, 2, 3)
    weights, gradients, indices, axes = [], [], [], []
    for _ in range(count):
        dtype, axis, shape = draw.one(*DTYPES), draw.one(0, 1), [data.draw(sizes), data.draw(sizes)]
        weights.append(draw.tensor(*shape, dtype=dtype))
        gradients.append(draw.tensor(*shape, dtype=dtype, special=draw.one(False, False, True)))
        indices.append(draw.index(shape[axis], min(draw.one(0, 1, 2), shape[axis])))
        axes.append(axis)
    fits = all(in_range(i, w.shape[a]) for w, i, a in zip(weights, indices, axes, strict=True))
    found = outcome(lambda: ops.gather(gradients, indices, axes), *gradients)
    assert (found is not None) == fits
    if not fits:
        return
    values, squares = found
    taken = [g.index_select(a, i).double() for g, i, a in zip(gradients, indices, axes, strict=True)]
    for value, expected, square in zip(values, taken, squares, strict=True):
        assert torch.equal(value.double().nan_to_num(7), expected.nan_to_num(7))
        torch.testing.assert_close(square, expected.square().sum(), rtol=1e-12, atol=0, equal_nan=True)
    assert torch.equal(ops.selected_squared_norms(gradients, indices, axes).nan_to_num(7), squares.nan_to_num(7))
    torch.testing.assert_close(ops.squared_norms(values), squares, rtol=1e-12, atol=0, equal_nan=True)
    (rho,) = draw.elsewhere(torch.full((count,), 0.5, dtype=F64))
    scale = outcome(lambda: ops.perturbation_scale(squares, rho), squares)
    assert (scale is not None) == (not rho.is_meta)
    if scale is None:
        return
    total = squares.sum()
    usable = bool(total.isfinite() and total > 0)
    torch.testing.assert_close(scale, torch.full_like(scale, 0.5 / (float(total) ** 0.5 + 1e-12) if usable else 0.0))
    key = draw.one(None, None, 3)
    writable = all(
        len(set(i.tolist())) == len(i) and len(set(addresses(w))) == w.numel()
        for w, i in zip(weights, indices, strict=True)
    )
    before, backups = (
        [w.clone() for w in weights],
        [torch.empty_like(v, dtype=w.dtype) for v, w in zip(values, weights, strict=True)],
    )
    realised = outcome(lambda: ops.perturb_(weights, indices, axes, values, scale, backups, rounding_key=key), *weights)
    assert (realised is not None) == writable
    if not writable:
        assert count
        assert outcome(lambda: (ops.restore_(weights, indices, axes, backups), 1), *weights) is None
        return
    for w, old, i, a, expected, s in zip(weights, before, indices, axes, taken, scale, strict=True):
        moved = old.double().clone()
        if s:
            step = s * expected
            at = (i,) if a == 0 else (slice(None), i)
            moved[at] = moved[at] + step
        # Rounded stochastically, to either neighbour.
        assert_near(w, moved, w.dtype, float(moved.abs().max()) if moved.numel() else 1.0)
    ops.restore_(weights, indices, axes, backups)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


def addresses(tensor):
    """Of every element."""
    return [
        sum(p * s for p, s in zip(place, tensor.stride(), strict=True))
        for place in torch.ones(tensor.shape).nonzero().tolist()
    ]


@fuzzed
@given(st.data())
def test_the_cosine(data):
    draw = Draw(data)
    dtype, axis = draw.one(*DTYPES), draw.one(0, 1)
    weight = draw.tensor(data.draw(sizes), data.draw(sizes), dtype=dtype, special=draw.one(False, True))
    direction = draw.tensor(weight.shape[1 - axis], dtype=draw.one(torch.float32, F64)) * draw.one(1.0, 1e-30, 1e30)
    weight, direction = draw.elsewhere(weight, direction)
    got = outcome(lambda: ops.column_cosine(weight, direction, axis=axis), weight, direction)
    assert (got is not None) == (not weight.is_meta and not direction.is_meta)
    if got is None:
        return
    w, v = weight.double().movedim(axis, 0), direction.double()
    norms = w.norm(dim=1) * v.norm() if w.numel() else torch.zeros(len(w), dtype=F64)
    expected = torch.where(norms == 0, 0.0, (w @ v) / norms)
    assert_near(got, torch.where(w.isfinite().all(1), expected, math.nan), got.dtype)


@fuzzed
@given(st.data())
def test_log_probabilities_from_logits(data):
    draw = Draw(data)
    dtype, special = draw.one(*DTYPES), draw.one(False, True)
    rows, length, vocabulary = draw.one(0, 1, 2), data.draw(sizes), data.draw(sizes)
    shift, in_place = draw.one(0, 1, 2, 7, 2**63 - 1), draw.one(False, True)
    base = draw.tensor(length, vocabulary, dtype=dtype, special=special) if draw.one(False, True) else None
    leaf = draw.tensor(rows, length, vocabulary, dtype=dtype, special=special) if base is None else base
    logits = leaf.detach().requires_grad_() * 1.0
    if base is not None:
        logits = logits.expand(rows, length, vocabulary)
    labels = torch.randint(-1, max(vocabulary, 1), (rows, length), generator=draw.generator)
    labels[labels < 0] = IGNORE
    if not vocabulary:
        labels.fill_(IGNORE)
    bad = bool(labels.numel()) and draw.one(*[False] * 9, True)
    if bad:
        labels.view(-1)[0] = vocabulary
    given_logits, given_labels = draw.elsewhere(logits, labels)
    overlaps = base is not None and rows > 1 and base.numel() > 0
    fits = not bad and not (in_place and overlaps) and not given_logits.is_meta and not given_labels.is_meta
    call = lambda: ops.token_logps(given_logits, given_labels, shift=shift, entropy=True, in_place=in_place)  # noqa: E731
    with torch.no_grad():
        kept = logits.clone()
    got = outcome(call)
    assert (got is not None) == fits
    if not fits:
        assert torch.equal(logits.nan_to_num(7), kept.nan_to_num(7))
        return
    logps, entropy = got
    targets = torch.full_like(labels, IGNORE)
    if shift < length:
        targets[:, : length - shift] = labels[:, shift:]
    counted = targets != IGNORE
    assert not logps[~counted].any()
    assert not entropy[~counted].any()
    own = kept.double()[counted].requires_grad_()
    every = torch.log_softmax(own, -1)
    expected = every.gather(1, targets[counted][:, None])[:, 0] if len(own) else own.new_zeros(0)
    wide = torch.promote_types(dtype, torch.float32)
    assert_near(logps[counted], expected.detach(), wide, 1e4)
    slope = torch.randn(logps.shape, generator=draw.generator, dtype=F64).to(wide)
    (grad,) = torch.autograd.grad(logps, logits, slope)
    assert not grad[~counted].any()
    (expected_grad,) = torch.autograd.grad(expected, own, slope.double()[counted]) if len(own) else (own.detach(),)
    finite = own.isfinite().all(1)
    assert_near(grad[counted][finite], expected_grad[finite], dtype, 3.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_log_probabilities_from_hidden_states(data):
    draw = Draw(data)
    rows, length, width, vocabulary = draw.one(0, 1, 2), data.draw(sizes), data.draw(sizes), draw.one(0, 1, 2, 9)
    hidden = draw.tensor(rows, length, width, dtype=F64).detach().requires_grad_()
    weight = draw.tensor(vocabulary, width, dtype=F64).detach().requires_grad_()
    bias = draw.tensor(vocabulary, dtype=F64) if draw.one(False, True) else None
    if bias is not None and vocabulary > 1 and draw.one(False, True):
        bias = bias.clone()
        bias[0] = -INF  # a masked token
    labels = torch.randint(-1, max(vocabulary, 1), (rows, length), generator=draw.generator)
    labels[labels < (1 if bias is not None and vocabulary > 1 else 0)] = IGNORE
    if not vocabulary:
        labels.fill_(IGNORE)
    given_hidden, given_labels = draw.elsewhere(hidden, labels)
    softcap, scale, chunk = draw.one(None, 2.0), draw.one(1.0, 0.5), draw.one(None, 1, 64)
    got = outcome(
        lambda: losses.linear_sequence_logps(
            given_hidden, weight, given_labels, bias=bias, softcap=softcap, scale=scale, chunk_bytes=chunk
        )
    )
    assert (got is not None) == (not given_hidden.is_meta and not given_labels.is_meta)
    if got is None:
        return
    logits = (hidden @ weight.t() + (0 if bias is None else bias)) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = losses.sequence_logps(logits, labels)
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=1e-10, atol=1e-10)
    if got[0].requires_grad:
        pairs = (torch.autograd.grad(sums.sum(), (hidden, weight)) for sums in (got[0], expected[0]))
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@fuzzed
@given(st.data())
def test_the_scale_of_a_perturbation(data):
    draw = Draw(data)
    count, norm, relative = draw.one(0, 1, 2, 3), draw.one("global", "layer", "none"), draw.one(False, True)
    squares = draw.tensor(count, dtype=F64, special=draw.one(False, True)).abs()
    rho, held = (draw.tensor(count, dtype=F64).abs() for _ in range(2))
    squares, rho, held = draw.elsewhere(squares, rho, held)
    weights = held if relative else None
    given_tensors = [squares, rho, *([held] if relative else [])]
    fits = not any(x.is_meta for x in given_tensors) and not (relative and norm == "none")
    got = outcome(lambda: ops.perturbation_scale(squares, rho, weight_squared_norms=weights, norm=norm), *given_tensors)
    assert (got is not None) == fits
    if not fits:
        return
    whole = norm != "layer"
    length = (squares.sum().expand(count) if whole else squares).sqrt()
    usable = length.isfinite()
    expected = rho
    if norm != "none":
        radius = rho * (held.sum() if whole else held).sqrt() if relative else rho
        expected, usable = radius / (length + 1e-12), usable & (length > 0)
    torch.testing.assert_close(got, torch.where(usable, expected, 0.0), rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_statistics_of_log_probabilities_from_hidden_states(data):
    draw = Draw(data)
    rows, length, width, vocabulary = draw.one(0, 1, 2), data.draw(sizes), data.draw(sizes), draw.one(1, 2, 9)
    hidden, weight = draw.tensor(rows, length, width, dtype=F64), draw.tensor(vocabulary, width, dtype=F64)
    labels = torch.randint(-1, vocabulary, (rows, length), generator=draw.generator)
    labels[labels < 0] = IGNORE
    given_hidden, given_weight, given_labels = draw.elsewhere(hidden, weight, labels)
    shift, chunk = draw.one(0, 1), draw.one(None, 1, 64)
    got = outcome(
        lambda: ops.linear_token_logps(
            given_hidden, given_weight, given_labels, shift=shift, statistics=True, chunk_bytes=chunk
        )
    )
    assert (got is not None) == (not any(x.is_meta for x in (given_hidden, given_weight, given_labels)))
    if got is None:
        return
    targets = torch.full_like(labels, IGNORE)
    if shift < length:
        targets[:, : length - shift] = labels[:, shift:]
    counted = targets != IGNORE
    logits = (hidden @ weight.t())[counted]
    every = torch.log_softmax(logits, -1)
    expected = every.gather(1, targets[counted][:, None])[:, 0]
    torch.testing.assert_close(got.logps[counted], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.entropy[counted], -(every.exp() * every).sum(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.mean_logit[counted], logits.mean(-1), rtol=1e-9, atol=1e-9)
    assert not any(value[~counted].any() for value in got)
