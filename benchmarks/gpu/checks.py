"""What must hold of the kernels on a GPU, as functions that raise AssertionError where it does not.

`tests/cuda/test_gpu.py` runs them for every backend, and `python -m benchmarks.gpu` does before it times anything.
Those in `ANYWHERE` hold on any device, so that a dry run on the CPU executes their code; those in `ON_GPU` need a
CUDA device.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shapo_kernels import backends, ops

F64 = torch.float64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, F64)
LAYOUTS = ("rows", "columns", "strided", "single")


class Layers:
    """Weights and gradients of every dtype, axis and layout, some of their neurons, and room for an update of them."""

    def __init__(self, device: torch.device, *, hidden: int = 96, intermediate: int = 272, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.axes: list[int] = []
        for number, (dtype, layout) in enumerate(itertools.product(DTYPES, LAYOUTS)):
            axis = 0 if layout == "rows" else 1
            shape = (intermediate, hidden) if axis == 0 else (hidden, intermediate)
            wide = (shape[0], 2 * shape[1]) if layout == "strided" else shape
            for kind in (self.weights, self.gradients):
                made = torch.randn(wide, generator=generator).to(dtype).to(device)
                kind.append(made[:, ::2] if layout == "strided" else made)
            count = 1 if layout == "single" else 11 + number
            self.indices.append(torch.randperm(shape[axis], generator=generator)[:count].sort().values.to(device))
            self.axes.append(axis)
        self.rho = torch.linspace(0.1, 0.5, len(self.weights), dtype=F64, device=device)

    def compact(self, dtypes: list[torch.dtype]) -> list[Tensor]:
        """Room for compact tensors, poisoned with NaN: what is not written is noticed."""
        found = []
        for weight, index, axis, dtype in zip(self.weights, self.indices, self.axes, dtypes, strict=True):
            shape = (weight.shape[0], len(index)) if axis == 1 else (len(index), weight.shape[1])
            found.append(torch.full(shape, torch.nan, dtype=dtype, device=weight.device))
        return found

    def update(self) -> dict[str, list[Tensor]]:
        """Everything that an update gives, the weights while perturbed and after being restored among it."""
        values, squares = ops.gather(self.gradients, self.indices, self.axes)
        again, scale = ops.norms_and_scale(values, self.rho)
        backups = self.compact([w.dtype for w in self.weights])
        realised = ops.perturb_(self.weights, self.indices, self.axes, values, self.rho, backups)
        perturbed = [w.clone() for w in self.weights]
        ops.restore_(self.weights, self.indices, self.axes, backups)
        selected = ops.selected_squared_norms(self.gradients, self.indices, self.axes)
        sums = [squares, again, selected, scale, ops.perturbation_scale(squares, self.rho), realised]
        return {"bits": [*values, *backups, *perturbed, *self.weights], "sums": [s.clone() for s in sums]}


def equal(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert torch.equal(a.cpu(), b.cpu()), f"tensor {number} differs in its bits"


def close(mine: list[Tensor], theirs: list[Tensor], rtol: float = 1e-12, atol: float = 1e-300) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=rtol, atol=atol)


def textbook_update(layers: Layers) -> dict[str, list[Tensor]]:
    """What `Layers.update` gives, written down again with indexing, layer by layer; sums in an order of their own."""
    values, backups, perturbed, squares, realised = [], [], [], [], []
    for w, g, i, axis, rho in zip(
        layers.weights, layers.gradients, layers.indices, layers.axes, layers.rho, strict=True
    ):
        at = (slice(None), i) if axis == 1 else (i,)
        compute = F64 if w.dtype == F64 else torch.float32
        value, old = g[at].to(compute), w[at].clone()
        step = value * rho.to(compute)
        moved = w.clone()
        moved[at] = (old.to(compute) + step).to(w.dtype)
        change = (moved[at].double() - old.double()).flatten()
        values.append(value)
        backups.append(old)
        perturbed.append(moved)
        squares.append(value.double().norm() ** 2)
        realised.append(torch.stack([change @ change, change @ step.double().flatten(), old.double().norm() ** 2]))
    norms = torch.stack(squares)
    scale = layers.rho / (norms.sum().sqrt() + 1e-12)
    sums = [norms, norms, norms, scale, scale, torch.stack(realised)]
    return {"bits": [*values, *backups, *perturbed, *layers.weights], "sums": sums}


def update_equals_the_textbook(device: torch.device) -> None:
    layers = Layers(device)
    got = layers.update()
    expected = textbook_update(Layers(torch.device("cpu")))
    equal(got["bits"], expected["bits"])
    close(got["sums"], expected["sums"], rtol=1e-11)


def update_repeats_to_the_bit(device: torch.device) -> None:
    first = Layers(device, hidden=256, intermediate=512).update()
    for _ in range(4):
        again = Layers(device, hidden=256, intermediate=512).update()
        equal(again["bits"] + again["sums"], first["bits"] + first["sums"])


def scale_zero_writes_nothing(device: torch.device) -> None:
    layers = Layers(device)
    before = [w.clone() for w in layers.weights]
    directions = layers.compact([F64 if w.dtype == F64 else torch.float32 for w in layers.weights])
    backups = layers.compact([w.dtype for w in layers.weights])
    realised = ops.perturb_(
        layers.weights, layers.indices, layers.axes, directions, torch.zeros_like(layers.rho), backups
    )
    equal(layers.weights, before)
    assert realised[:, :2].abs().max().item() == 0


def norms_that_are_not_finite_skip_the_update(device: torch.device) -> None:
    for bad in (math.nan, math.inf, 0.0):
        values = [torch.full((3, 5), bad, device=device), torch.zeros(4, 4, dtype=torch.bfloat16, device=device)]
        _, scale = ops.norms_and_scale(values, torch.ones(2, dtype=F64, device=device))
        assert scale.tolist() == [0, 0], f"a gradient of {bad}"


def cosine_equals_fp64(device: torch.device) -> None:
    for dtype in DTYPES:
        for axis in (0, 1):
            for columns in (512, 301):
                weight = torch.randn(384, 2 * columns, device=device).to(dtype)
                for laid in (weight, weight[:, ::2]):
                    direction = torch.randn(laid.shape[1 - axis], device=device)
                    expected = torch.nn.functional.cosine_similarity(
                        laid.double(), direction.double().unsqueeze(axis), dim=1 - axis
                    )
                    got = ops.column_cosine(laid, direction, axis=axis)
                    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-7)


def neuron_operators_err_no_more_than_eager(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for tokens, features, neurons in ((1, 8, 1), (700, 200, 82), (513, 96, 300), (64, 33, 64)):
            make = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
            output, x = make(tokens, features).to(device, dtype), make(tokens, 384).to(device, dtype)
            direction = make(features, neurons).to(device, dtype)
            index = torch.randperm(384, generator=generator)[:neurons].sort().values.to(device)
            for places, inputs in ((index, x), (None, x[:, :neurons])):
                chosen = inputs if places is None else inputs[:, places]
                truth = output.double() + chosen.double() @ direction.double().t()
                eager = output + chosen @ direction.t()
                got = ops.neuron_update(output, inputs, direction, places)
                no_worse(got, eager, truth)
                truth = output.double().t() @ chosen.double()
                eager = output.t() @ chosen
                got = ops.neuron_gradient(output, inputs, places)
                assert got.dtype == (F64 if dtype == F64 else torch.float32)
                no_worse(got, eager, truth)


def logps_err_no_more_than_eager(device: torch.device) -> None:
    for dtype, vocabulary, layout in itertools.product(DTYPES, (1, 70, 2048, 5001), ("rows", "every other")):
        wide = torch.promote_types(dtype, torch.float32)
        torch.manual_seed(vocabulary)
        logits = (4 * torch.randn(2, 5, vocabulary)).to(dtype).to(device)
        if layout == "every other":
            logits = logits.repeat_interleave(2, 2)[..., ::2]
        labels = torch.randint(0, vocabulary, (2, 5), device=device)
        labels[0, 2], counted = -100, torch.ones(2, 5, dtype=torch.bool, device=device)
        counted[0, 1] = counted[:, 4] = False
        logits[~counted] = torch.nan  # is not read

        def eager(x: Tensor, labels: Tensor = labels) -> Tensor:
            picked = torch.log_softmax(x[:, :-1], -1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
            return torch.where(labels[:, 1:] != -100, picked, 0.0)

        results = []
        for function, x in (
            (lambda x, labels=labels: ops.token_logps(x, labels)[0][:, :-1], logits),
            (eager, logits.nan_to_num()),
            (eager, logits.nan_to_num().double()),
        ):
            x = x.detach().requires_grad_()
            logps = function(x)
            slope = torch.linspace(-2, 2, 8, device=device, dtype=F64).reshape(2, 4).to(logps.dtype)
            (grad,) = torch.autograd.grad((logps * slope).sum(), x)
            results.append((logps.detach(), grad))
        for got, own, truth in zip(*results, strict=True):
            assert got.dtype in (wide, dtype)
            # Of eager's error and a last bit: of fewest tokens, either may be the luckier. In fp64 eager is the truth,
            # whose own last bits are no better.
            room = (32 if dtype == F64 else 4) * torch.finfo(wide).eps * truth.abs().max()
            assert (got.double() - truth).abs().max() <= (own.double() - truth).abs().max() + room
        logps, entropy = ops.token_logps(logits, labels, entropy=True)
        spread = torch.distributions.Categorical(logits=logits.nan_to_num().double()).entropy()
        expected = torch.where(counted, spread, 0.0)
        close([entropy.double()], [expected], rtol=1e-10 if dtype == F64 else 1e-5)
        for first in (0, vocabulary // 2):  # a part of the vocabulary, and a gradient over the logits' memory
            part = logits[..., first:].nan_to_num().contiguous()
            arguments = (labels, -100, 1, first, vocabulary)
            logps, normalizers, _ = _function("token_logps", device)(part, *arguments, False)
            wide_part, beside = part.double(), labels.roll(-1, 1)
            beside[:, -1] = -100
            held = (beside >= first) & (beside < vocabulary)
            highest = wide_part.amax(-1)
            total = (wide_part - highest[..., None]).exp().sum(-1)
            at = (beside - first).clamp(0, part.shape[2] - 1)
            picked = wide_part.gather(2, at[..., None])[..., 0] - highest - total.log()
            expected_logps = torch.where(held, picked, 0.0)
            expected_normalizers = [torch.where(counted, highest, 0.0), torch.where(counted, total, 1.0)]
            close(
                [logps.double(), *normalizers.double()],
                [expected_logps, *expected_normalizers],
                rtol=1e-5,
                atol=1e-5 if dtype != F64 else 1e-12,
            )
            slope = torch.ones_like(logps)
            rest = (labels, logps, normalizers, slope, -100, 1, first)
            grad = _function("token_logps_gradient", device)(part, *rest)
            _function("token_logps_gradient_", device)(part, *rest)
            assert torch.equal(grad, part)


def _function(name: str, device: torch.device) -> Callable[..., Any]:
    return backends.function(device, name)


def no_worse(got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The largest error is at most twice eager's in the same dtype: another order of adding, and no more."""
    # Eager's float64 is the truth itself: there, some units in the last place are what another order costs.
    unit = torch.finfo(eager.dtype).eps * truth.abs().max() * (16 if eager.dtype == F64 else 1)
    mine, theirs = (x.double().sub(truth).abs().max() for x in (got, eager))
    assert mine <= 2 * theirs + unit, f"error {mine:.2e}, eager's {theirs:.2e}"


def nothing_waits_for_the_device(device: torch.device) -> None:
    layers = Layers(device)
    layers.update()
    torch.cuda.synchronize(device)
    x, y = torch.randn(64, 96, device=device), torch.randn(64, 48, device=device)
    direction, index = torch.randn(48, 3, device=device), torch.arange(3, device=device)
    ops.neuron_update(y, x, direction, index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layers.update()
        Layers.update(layers)
        ops.neuron_update(y, x, direction, index)
        ops.neuron_gradient(y, x, index)
        ops.column_cosine(layers.weights[0], torch.randn(96, device=device), axis=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def a_captured_update_replays_on_new_gradients(device: torch.device) -> None:
    layers = Layers(device)
    layers.update()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        layers.update()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers.update()
    for seed in (1, 2):
        fresh = Layers(device, seed=seed)
        for mine, theirs in zip(layers.gradients, fresh.gradients, strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(layers.weights, fresh.weights, strict=True):
            mine.copy_(theirs)
        graph.replay()
        torch.cuda.synchronize(device)
        expected = fresh.update()
        equal(captured["bits"] + captured["sums"], expected["bits"] + expected["sums"])


def another_stream_sees_its_own_order(device: torch.device) -> None:
    expected = Layers(device).update()
    layers, stream = Layers(device), torch.cuda.Stream(device)
    late = [g.clone() for g in layers.gradients]
    for gradient in layers.gradients:
        gradient.zero_()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the gradients come late on the stream that the operators run on
        for gradient, right in zip(layers.gradients, late, strict=True):
            gradient.copy_(right)
        got = layers.update()
    torch.cuda.current_stream(device).wait_stream(stream)
    equal(got["bits"] + got["sums"], expected["bits"] + expected["sums"])


def offsets_beyond_32_bits_are_reached(device: torch.device) -> None:
    """A weight and an input of more than 2^31 elements, whose last rows are selected, read and written."""
    rows, columns = 2**31 // 16384 + 64, 16384
    if torch.cuda.mem_get_info(device)[0] < 24 * 2**30:
        raise SkipCheckError("less than 24 GiB of GPU memory are free")
    big = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
    big[-1, -1], big[-1, 0] = 3.0, 4.0
    try:
        for axis, index, squares in ((1, [0, columns - 1], 25.0), (0, [5, rows - 1], 25.0)):
            places = torch.tensor(index, device=device)
            values, norms = ops.gather([big], [places], [axis])
            assert norms.item() == squares
            backup = torch.empty_like(values[0], dtype=big.dtype)
            ops.perturb_([big], [places], [axis], values, torch.ones(1, dtype=F64, device=device), [backup])
            assert big[-1, -1].item() == 6.0
            assert big[-1, 0].item() == 8.0
            ops.restore_([big], [places], [axis], [backup])
            assert big[-1, -1].item() == 3.0
        assert ops.squared_norms([big]).item() == 25.0
        last = torch.tensor([columns - 1], device=device)
        output = torch.zeros(rows, 16, dtype=big.dtype, device=device)
        updated = ops.neuron_update(output, big, torch.ones(16, 1, dtype=big.dtype, device=device), last)
        assert updated[-1].tolist() == [3.0] * 16
        assert ops.neuron_gradient(torch.ones_like(output), big, last).flatten().tolist() == [3.0] * 16
        cosine = ops.column_cosine(big, torch.ones(rows, device=device), axis=1)
        assert abs(cosine[-1].item() - rows**-0.5) < 1e-6
    finally:
        del big
        gc.collect()
        torch.cuda.empty_cache()


def a_device_that_is_not_the_current_one_is_served(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        raise SkipCheckError("there is one CUDA device")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    here = torch.cuda.current_device()
    got = Layers(other).update()
    assert torch.cuda.current_device() == here
    expected = Layers(device).update()
    equal(got["bits"], expected["bits"])


def a_compiled_forward_is_one_graph(device: torch.device) -> None:
    torch._dynamo.reset()
    index = torch.tensor([0, 3], device=device)

    @torch.compile(fullgraph=True)
    def forward(output: Tensor, x: Tensor, direction: Tensor) -> Tensor:
        return ops.neuron_update(output, x, direction, index).relu()

    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            torch.manual_seed(seed)
            output, x = torch.randn(32, 16, device=device), torch.randn(32, 64, device=device)
            direction = torch.randn(16, 2, device=device, requires_grad=True)
            got = forward(output, x, direction)
            expected = (output + x[:, index] @ direction.t()).relu()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            got.sum().backward()


def operators_pass_opcheck(device: torch.device) -> None:
    name = backends.serving(device.type)
    if name == "reference":
        raise SkipCheckError("the reference has no operators")
    space: Any = torch.ops.shapo_triton if name == "triton" else torch.ops.shapo_kernels
    if name == "triton":
        logits, labels = torch.randn(2, 4, 9, device=device), torch.tensor([[1, 2, 3, -100]] * 2, device=device)
        torch.library.opcheck(space.token_logps, (logits, labels, -100, 1, 0, 9, True))
        logps, normalizers, _ = space.token_logps(logits, labels, -100, 1, 0, 9, False)
        rest = (labels, logps, normalizers, torch.ones_like(logps), -100, 1, 0)
        torch.library.opcheck(space.token_logps_gradient, (logits, *rest))
        torch.library.opcheck(space.token_logps_gradient_, (logits, *rest))
        return  # the others are called as plain functions
    x, index = torch.randn(6, 8, device=device), torch.tensor([1, 6], device=device)
    rho = torch.ones(1, dtype=F64, device=device)
    values, scale = [torch.randn(6, 2, device=device)], torch.ones(1, dtype=F64, device=device)
    layer = ([x], [index], [1])
    torch.library.opcheck(space.gather_into, (*layer, values, scale))
    torch.library.opcheck(space.squared_norms, (values,))
    torch.library.opcheck(space.selected_squared_norms, layer)
    torch.library.opcheck(space.perturbation_scale, (scale, rho, None, "global", 1e-12))
    torch.library.opcheck(space.perturb_, (*layer, values, scale, [torch.empty(6, 2, device=device)], None))
    torch.library.opcheck(space.restore_, (*layer, values))
    if name == "cpu":
        torch.library.opcheck(space.column_cosine, (x, torch.randn(6, device=device), 1))


class SkipCheckError(Exception):
    """Raised by a check that this machine cannot run, with the reason."""


Check = Callable[[torch.device], None]
ANYWHERE: tuple[Check, ...] = (
    update_equals_the_textbook,
    update_repeats_to_the_bit,
    scale_zero_writes_nothing,
    norms_that_are_not_finite_skip_the_update,
    cosine_equals_fp64,
    neuron_operators_err_no_more_than_eager,
    logps_err_no_more_than_eager,
    operators_pass_opcheck,
)
ON_GPU: tuple[Check, ...] = (
    nothing_waits_for_the_device,
    a_captured_update_replays_on_new_gradients,
    another_stream_sees_its_own_order,
    offsets_beyond_32_bits_are_reached,
    a_device_that_is_not_the_current_one_is_served,
    a_compiled_forward_is_one_graph,
)
#: Small, and together through every kernel: what compute-sanitizer is to watch.
SANITIZED: tuple[Check, ...] = (
    update_equals_the_textbook,
    cosine_equals_fp64,
    neuron_operators_err_no_more_than_eager,
    logps_err_no_more_than_eager,
)
