"""What log-probabilities of labels refuse and promise: input, autograd, compilation, the same bits everywhere."""

import os
import subprocess
import sys

import pytest
import torch

from shapo_kernels import losses, native, ops
from tests.support.token_logits import IGNORE, make, run, textbook

needs_library = pytest.mark.skipif(not native.has_cpu, reason="the CPU library is not built")


def test_in_place_refuses_logits_that_it_must_not_overwrite():
    leaf, labels = make(2, 6, 7)
    leaf.requires_grad_()
    with pytest.raises(ValueError, match="leaf of the graph"):
        ops.token_logps(leaf, labels, in_place=True)
    with pytest.raises(ValueError, match="overlaps itself"):
        ops.token_logps((leaf * 2)[:, :1].expand(2, 6, 7), labels, in_place=True)
    ops.token_logps(leaf.detach(), labels, in_place=True)


def test_the_entropy_is_not_differentiable_and_the_log_probability_only_once():
    logits, labels = make(2, 6, 7)
    logits.requires_grad_()
    logps, entropy = ops.token_logps(logits, labels, entropy=True)
    assert not entropy.requires_grad
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(logps.sum(), logits, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, ValueError, r"expected \[B, T, V\]"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "expected float32"),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"labels \[2, 4\]: expected"),
        ({"labels": torch.zeros(2, 3)}, TypeError, "labels is torch.float32"),
        ({"labels": torch.full((2, 3), 4)}, ValueError, r"labels contains 4: expected -100 \(ignored\) or a token in"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, ValueError, "expected one device"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    arguments = {"logits": torch.zeros(2, 3, 4), "labels": torch.zeros(2, 3, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        ops.token_logps(**arguments)


@needs_library
def test_the_kernel_itself_refuses_a_label_that_it_could_not_read():
    logits, labels = make(1, 3, 4, dtype=torch.float32)
    labels[0, 1] = 4
    with pytest.raises(RuntimeError, match="labels contains 4"):
        torch.ops.shapo_kernels.token_logps(logits, labels, IGNORE, 1, 0, 4, False)


@needs_library
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, entropy):
    logits, labels = make(2, 5, 70, dtype=dtype)
    own = torch.ops.shapo_kernels
    torch.library.opcheck(own.token_logps.default, (logits, labels, IGNORE, 1, 0, 70, entropy))
    logps, normalizers, _ = own.token_logps(logits, labels, IGNORE, 1, 0, 70, entropy)
    arguments = logits, labels, logps, normalizers, torch.randn(2, 5), IGNORE, 1, 0
    torch.library.opcheck(own.token_logps_gradient.default, arguments)
    torch.library.opcheck(own.token_logps_gradient_.default, arguments)


@needs_library
def test_the_number_of_threads_changes_no_bit():
    logits, labels = make(4, 33, 3001, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run(lambda x: ops.token_logps(x, labels), logits, torch.ones(4, 33)))
    finally:
        torch.set_num_threads(threads)
    for logps, _, grad in results[1:]:
        assert torch.equal(logps, results[0][0])
        assert torch.equal(grad, results[0][2])


DIGEST = """
import hashlib, torch
from shapo_kernels import ops
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = (9 * torch.randn(2, 9, 2500, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, 2500, (2, 9), generator=generator)
    logps, entropy = ops.token_logps(logits, labels, entropy=True)
    logps.sum().backward()
    for tensor in (logps, entropy, logits.grad):
        digest.update(bytes(tensor.detach().contiguous().view(torch.uint8).flatten().tolist()))
print(digest.hexdigest())
"""


@needs_library
@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits():
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=os.environ | {"SHAPO_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for capability in ("baseline", "avx2", "")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_loss_is_one_graph_equals_eager_and_is_not_compiled_anew(in_place):
    torch._dynamo.reset()

    def loss(hidden, weight, labels):
        sums, counts = losses.sequence_logps(hidden @ weight.t(), labels, in_place=in_place)
        return (sums / counts.clamp(min=1)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    weight = torch.randn(11, 4, requires_grad=True)
    for step, length in enumerate((5, 7, 7, 9, 12)):
        hidden, labels = make(2, length, 4, dtype=torch.float32, seed=step)[0].requires_grad_(), make(2, length, 11)[1]
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            got = torch.autograd.grad(compiled(hidden, weight, labels), (hidden, weight))
        expected = torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    labels[0, 2] = 11
    with pytest.raises(RuntimeError, match=r"labels contains .* a token in \[0, 11\)"):
        compiled(hidden, weight, labels)


def test_checkpointing_recomputes_what_the_gradient_needs():
    from torch.utils.checkpoint import checkpoint

    logits, labels = make(2, 6, 30, dtype=torch.float32)
    results = [
        run(lambda x, reentrant=r: checkpoint(ops.token_logps, x, labels, use_reentrant=reentrant), logits, 1.0)
        for r in (False, True)
    ]
    expected = run(lambda x: ops.token_logps(x, labels), logits, 1.0)
    for logps, _, grad in results:
        assert torch.equal(logps, expected[0])
        assert torch.equal(grad, expected[2])


def test_in_place_refuses_a_view_of_a_parameter_and_logits_that_share_memory():
    """They would be overwritten, or given the wrong gradient, without a word."""
    labels = torch.zeros(2, 3, dtype=torch.int64)
    parameter = torch.nn.Parameter(torch.randn(2, 3, 7))
    for view in (parameter.view(2, 3, 7), parameter[:, :, :5], parameter.transpose(0, 0).unsqueeze(0)[0]):
        with pytest.raises(ValueError, match="a view of one"):
            ops.token_logps(view, labels, in_place=True)
    leaf = torch.randn(20, requires_grad=True)
    wide = (leaf * 2).unfold(0, 8, 4)[:3].unsqueeze(0).expand(1, 3, 8)
    strided = (leaf * 2).as_strided((2, 3, 7), (6, 3, 1))
    for overlapping in (wide, strided):
        with pytest.raises(ValueError, match="overlaps itself"):
            ops.token_logps(overlapping, torch.zeros(overlapping.shape[:2]).long(), in_place=True)
    for overlapping in (wide, strided):
        counted = torch.ones(overlapping.shape[:2]).long()
        (grad,) = torch.autograd.grad(ops.token_logps(overlapping, counted)[0].sum(), leaf, retain_graph=True)
        (expected,) = torch.autograd.grad(textbook(overlapping, counted, dtype=torch.float32)[0].sum(), leaf)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_a_shift_below_zero_is_refused():
    with pytest.raises(ValueError, match="shift is -1"):
        ops.token_logps(*make(1, 3, 4), shift=-1)
