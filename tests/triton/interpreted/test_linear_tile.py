"""The kernel of the head's tiles agrees with float64 mathematics: whole heads through it, and tiles of their own."""

import importlib

import pytest
import torch
import torch.distributed as dist

from shapo_kernels import backends, losses
from shapo_kernels.ops import linear_tiles, linear_walk
from tests.support.textbook import IGNORE, eager, head, make_labels

# By path: the package's attribute of this name is the function.
kernels = importlib.import_module("shapo_kernels.triton.linear_tile")

CONFIGURATION = kernels.configuration
F64 = torch.float64
HEADS = [{}, {"bias": True}, {"softcap": 3.0}, {"scale": 0.25}, {"bias": True, "softcap": 2.0, "scale": 1.5}]
# Of 70 columns and 5 tokens in fp32: everything in one tile, tiles of some tokens, of some columns.
CHUNKS = [None, 4 * 70 * 3, 4 * 5 * 40]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few lanes, so that a row takes several steps, and tiles of few columns."""
    monkeypatch.setattr(kernels, "configuration", lambda columns: {"LANES": 32, "num_warps": 1})
    monkeypatch.setattr(linear_tiles, "FEWEST_COLUMNS", 3)


def make(vocabulary=70, width=6, bias=False, **options):
    torch.manual_seed(1)
    tensors = {"hidden": torch.randn(2, 5, width), "weight": torch.randn(vocabulary, width)}
    if bias:
        tensors["bias"] = torch.randn(vocabulary)
    return tensors, make_labels(2, 5, vocabulary), options


def gradients(function, tensors, labels, dtype, **options):
    inputs = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
    sums = function(**inputs, labels=labels, **options)
    return sums.detach(), *torch.autograd.grad((sums * torch.tensor([0.7, -1.3])).sum(), list(inputs.values()))


def textbook(hidden, weight, labels, bias=None, **options):
    return eager(head(hidden, weight, bias, **options), labels)[0]


def ours(hidden, weight, labels, **options):
    return losses.linear_sequence_logps(hidden, weight, labels, **options)[0]


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_a_head_through_it_equals_the_textbook_in_float64(options, chunk_bytes):
    tensors, labels, options = make(**options)
    found = gradients(ours, tensors, labels, torch.float32, chunk_bytes=chunk_bytes, **options)
    expected = gradients(textbook, tensors, labels, F64, **options)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_every_tile_is_one_launch_and_the_bits_repeat(chunk_bytes, monkeypatch):
    tensors, labels, _ = make()
    launches, tiles = [], []
    kernel, project = kernels.linear_tile, linear_tiles.project
    monkeypatch.setitem(
        backends._functions["triton"], "linear_tile", lambda *a, **k: (launches.append(0), kernel(*a, **k))
    )
    monkeypatch.setattr(linear_tiles, "project", lambda *a: (tiles.append(0), project(*a))[1])
    first = gradients(ours, tensors, labels, torch.float32, chunk_bytes=chunk_bytes)
    assert len(launches) == len(tiles) > 0
    for one, other in zip(first, gradients(ours, tensors, labels, torch.float32, chunk_bytes=chunk_bytes), strict=True):
        assert torch.equal(one, other)


def test_float64_heads_keep_their_precision():
    tensors, labels, _ = make()
    found = gradients(ours, tensors, labels, F64, chunk_bytes=2000)
    for got, right in zip(found, gradients(textbook, tensors, labels, F64), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_factors_are_the_slopes_of_a_tile_in_the_dtype_of_the_next_product(dtype, softcap):
    """The parts of a vocabulary one after the other, as a walk takes them; then each part again, as backward does."""
    torch.manual_seed(0)
    products, targets, scale = 3 * torch.randn(5, 90), torch.tensor([3, 45, 0, 89, 63]), 0.5
    tiles_of = linear_tiles.Tiles(5, 90, 5, 40, dtype, torch.float32, torch.float32)
    options = linear_tiles.HeadOptions(IGNORE, 0, dtype, scale, softcap, None, None, False, False)
    walk = linear_walk.walk(products, targets, torch.ones(5, dtype=torch.bool), tiles_of, options)
    assert isinstance(walk, linear_walk.FusedWalk)
    per_token, sums, made = torch.zeros(3, 5), torch.zeros(5, 70), []
    for part in tiles_of.column_parts():
        tile = products[:, part].contiguous()
        spare = tile.view(-1) if dtype == torch.float32 else torch.full((300,), torch.nan, dtype=dtype)
        made.append(walk.take(tile, None, part, spare, sums, per_token, None).float())
        sums += made[-1] @ torch.eye(70)[:40][: part.stop - part.start]
    logits = products.double() * scale
    bend = torch.ones_like(logits)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
        bend = 1 - (logits / softcap) ** 2
    logps = torch.log_softmax(logits, 1)
    labelled = torch.arange(90)[None] == targets[:, None]
    slope = scale * bend * torch.where(labelled, -torch.expm1(logps), -logps.exp())
    unit = {"rtol": 2 * torch.finfo(dtype).eps + 3e-6, "atol": 6e-8 if dtype == torch.float16 else 1e-8}
    torch.testing.assert_close(per_token[0].double(), logps[labelled], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made[-1].double(), slope[:, 80:], **unit)
    # The sum has the label's share where it lies in the last tile alone.
    before = torch.where(labelled & (torch.arange(90) < 80), 0.0, slope)
    wanted = sum(before[:, p] @ torch.eye(70, dtype=F64)[:40][: p.stop - p.start] for p in tiles_of.column_parts())
    torch.testing.assert_close(sums.double(), wanted, rtol=4 * unit["rtol"], atol=8 * unit["rtol"] * slope.abs().max())
    for part in tiles_of.column_parts():
        tile = products[:, part].contiguous()
        spare = tile.view(-1) if dtype == torch.float32 else torch.full((300,), torch.nan, dtype=dtype)
        again = linear_tiles.slopes(tile, spare, targets, None, part, per_token, options)
        assert again.dtype == dtype
        torch.testing.assert_close(again.double(), slope[:, part], **unit)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.5}])
@pytest.mark.parametrize("chunk_bytes", [None, 4 * 5 * 40])
def test_the_statistics_of_a_token_are_those_of_its_logits(options, chunk_bytes):
    tensors, labels, _ = make()
    tensors["hidden"][0, 3] = tensors["hidden"][0, 2]
    tensors["weight"][[33, 50]] = 3 * tensors["hidden"][0, 2]  # a tie, over two tiles
    labels[0, 3:5] = torch.tensor([33, 50])
    found = losses.linear_token_logps(**tensors, labels=labels, statistics=True, chunk_bytes=chunk_bytes, **options)
    logits = head(tensors["hidden"].double(), tensors["weight"].double(), **options)[:, :-1]
    counted, everything = labels[:, 1:] != IGNORE, torch.log_softmax(logits, -1)
    for name, expected in (
        ("entropy", -(everything.exp() * everything).sum(-1)),
        ("mean_logit", logits.mean(-1)),
    ):
        value = getattr(found, name)[:, :-1].double()
        torch.testing.assert_close(value, torch.where(counted, expected, 0.0), rtol=1e-5, atol=2e-5)
    top = (logits.argmax(-1) == labels[:, 1:]) & counted
    assert torch.equal(found.is_top[:, :-1], top)
    assert top[0, 2]
    assert not top[0, 3]


@pytest.mark.parametrize("chunk_bytes", [None, 4 * 48])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan, 1e4, 3e38])
@pytest.mark.parametrize("columns", [slice(1, 2), slice(50, 51), slice(2, 70), slice(0, 70)])
def test_extreme_logits_mean_what_they_mean_in_log_softmax(value, columns, chunk_bytes):
    bias = 3 * torch.randn(70, generator=torch.Generator().manual_seed(0))
    bias[columns] = value
    tensors = {"hidden": torch.randn(1, 1, 2), "weight": torch.zeros(70, 2), "bias": bias}
    labels = torch.ones(1, 1, dtype=torch.int64)

    def found(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in tensors.values()]
        logps = function(*inputs)
        return logps.detach(), *torch.autograd.grad(logps.sum(), inputs)

    def through(h, w, b):
        return losses.linear_token_logps(h, w, labels, bias=b, shift=0, chunk_bytes=chunk_bytes).logps

    def exact(h, w, b):
        return torch.log_softmax(torch.nn.functional.linear(h, w, b), -1)[:, :, 1]

    for one, other in zip(found(through, torch.float32), found(exact, F64), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_probability_close_to_one_keeps_its_gradient():
    """1 - p and log p are of the order 1e-10, far below what float32 tells from 1."""
    weight = torch.tensor([[24.0], [1.0], [0.0]])
    tensors, labels = {"hidden": torch.ones(1, 2, 1), "weight": weight}, torch.tensor([[0, 0]])

    def found(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in tensors.values()]
        value = function(*inputs, labels).sum()
        return value.detach(), *torch.autograd.grad(value, inputs)

    for got, right in zip(found(ours, torch.float32), found(textbook, F64), strict=True):
        assert right.abs().max() < 1e-8
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk_bytes", [None, 4 * 70 * 4])
def test_a_preference_loss_by_pairs_equals_the_textbook_in_float64(chunk_bytes):
    tensors, labels, _ = make(bias=True)

    def share(sums, *_):
        return torch.nn.functional.softplus(sums[1] - sums[0])

    def by_pairs(labels, **inputs):
        return losses.linear_preference_loss(**inputs, labels=labels, share=share, chunk_bytes=chunk_bytes)[0]

    def found(function, dtype):
        inputs = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
        loss = function(labels=labels, **inputs)
        return loss.detach(), *torch.autograd.grad(loss, list(inputs.values()))

    exact = found(lambda **inputs: share(textbook(**inputs)), F64)
    for got, right in zip(found(by_pairs, torch.float32), exact, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_a_vocabulary_over_ranks_is_joined_between_sums_and_slopes(chunk_bytes):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tensors, labels, options = make(bias=True, softcap=2.0)
        options |= {"chunk_bytes": chunk_bytes}
        found = gradients(ours, tensors, labels, torch.float32, group=dist.group.WORLD, **options)
        for got, right in zip(found, gradients(ours, tensors, labels, torch.float32, **options), strict=True):
            torch.testing.assert_close(got, right, rtol=2e-6, atol=2e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("columns", "warps"), [(1, 1), (2047, 1), (2048, 2), (8191, 4), (8192, 8), (262144, 8)])
def test_a_thread_takes_sixteen_elements_whatever_the_number_of_warps(columns, warps):
    chosen = CONFIGURATION(columns)
    assert (chosen["num_warps"], chosen["LANES"]) == (warps, 32 * 16 * warps)
