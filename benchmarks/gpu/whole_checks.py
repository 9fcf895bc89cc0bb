"""What must hold of whole computations on a device: the head's loss, and an update of a model.

As those of `checks` they raise AssertionError where it does not, on any device.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

import shapo_kernels as sk
from benchmarks.baselines import IGNORE, eager
from benchmarks.gpu.checks import F64
from shapo_kernels import losses

RHO = 0.1


def linear_logps_err_no_more_than_the_models_own(device: torch.device) -> None:
    """Sums and both gradients, by one tile and by many, with the head frozen, the hidden states frozen, and neither."""
    shape = (3, 40, 1000, 64)
    for dtype, asked in itertools.product((torch.float32, torch.bfloat16, F64), ("both", "hidden", "weight")):
        generator = torch.Generator().manual_seed(0)
        rows, tokens, vocabulary, width = shape
        hidden = torch.randn(rows, tokens, width, generator=generator).to(dtype).to(device)
        weight = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(dtype).to(device)
        labels = torch.randint(0, vocabulary, (rows, tokens), generator=generator).to(device)
        labels[:, 1:9] = IGNORE
        truth = _sums_and_gradients(hidden.double(), weight.double(), labels, asked, None)
        own = _sums_and_gradients(hidden, weight, labels, asked, None)
        for chunk_bytes in (1 << 13, 1 << 15, 1 << 26):
            got = _sums_and_gradients(hidden, weight, labels, asked, chunk_bytes)
            for number, (mine, theirs, right) in enumerate(zip(got, own, truth, strict=True)):
                unit = torch.finfo(mine.dtype).eps * right.norm() * (64 if mine.dtype == F64 else 4)
                error, room = (mine.double() - right).norm(), 2 * (theirs.double() - right).norm() + unit
                assert error <= room, (
                    f"{dtype}, gradients of {asked}, tiles of {chunk_bytes} bytes, result {number}: "
                    f"error {error.item():.1e}, {room.item():.1e} allowed"
                )


def _sums_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, asked: str, chunk_bytes: int | None
) -> tuple[Tensor, ...]:
    """By the model's own head where `chunk_bytes` is None."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    wanted = leaves if asked == "both" else [leaves[asked == "weight"]]
    given = [x if any(x is w for w in wanted) else x.detach() for x in leaves]
    if chunk_bytes is None:
        sums = eager(given[0] @ given[1].t(), labels)
    else:
        sums = losses.linear_sequence_logps(*given, labels, chunk_bytes=chunk_bytes)[0]
    upstream = torch.linspace(-1, 2, len(sums), dtype=sums.dtype, device=sums.device)
    return (sums.detach(), *torch.autograd.grad((sums * upstream).sum(), wanted))


def a_head_with_all_its_options_equals_fp64_and_repeats_to_the_bit(device: torch.device) -> None:
    """Bias, scale, soft cap and statistics, by one tile, by long rows and by short ones."""
    rows, tokens, vocabulary, width, scale, softcap = 2, 40, 9000, 32, 0.5, 6.0
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    tensors = make(rows, tokens, width), make(vocabulary, width), make(vocabulary)
    labels = torch.randint(0, vocabulary, (rows, tokens), generator=generator).to(device)
    labels[:, 1:9] = IGNORE
    targets, counted = labels[:, 1:].clamp(min=0), labels[:, 1:] != IGNORE

    def gradients(value: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype, device=device).view_as(value)
        return torch.autograd.grad((value * upstream).sum(), inputs)

    def exact() -> tuple[Tensor, ...]:
        hidden, weight, bias = inputs = [x.double().requires_grad_() for x in tensors]
        logits = softcap * torch.tanh((hidden @ weight.t() + bias) * scale / softcap)[:, :-1]
        every = torch.log_softmax(logits, -1)
        picked = torch.where(counted, every.gather(2, targets[..., None])[..., 0], 0.0)
        facts = -(every.exp() * every).sum(-1), logits.mean(-1), (logits.argmax(-1) == targets).double()
        found = (picked, *(torch.where(counted, fact, 0.0) for fact in facts))
        padded = [nn.functional.pad(x, (0, 1)) for x in found]
        return (*(x.detach() for x in padded), *gradients(padded[0], inputs))

    def ours(chunk_bytes: int) -> tuple[Tensor, ...]:
        hidden, weight, bias = inputs = [x.clone().requires_grad_() for x in tensors]
        options = {"bias": bias, "scale": scale, "softcap": softcap, "chunk_bytes": chunk_bytes}
        found = losses.linear_token_logps(hidden, weight, labels, statistics=True, **options)
        assert found.entropy is not None
        assert found.mean_logit is not None
        assert found.is_top is not None
        facts = found.entropy, found.mean_logit, found.is_top.float()
        return (found.logps.detach(), *facts, *gradients(found.logps, inputs))

    truth = exact()
    for chunk_bytes in (1 << 26, 1 << 20, 1 << 17):
        first = ours(chunk_bytes)
        for number, (mine, again, right) in enumerate(zip(first, ours(chunk_bytes), truth, strict=True)):
            said = f"tiles of {chunk_bytes} bytes, result {number}"
            assert torch.equal(mine, again), f"{said}: other bits the second time"
            error = ((mine.double() - right).norm() / right.norm().clamp(min=1)).item()
            assert error <= 2e-5, f"{said}: error {error:.1e}, 2.0e-05 allowed"


def a_preference_loss_by_pairs_equals_fp64(device: torch.device) -> None:
    """All pairs at once, some at a time, one at a time, and of each the logits in several tiles."""
    pairs, tokens, vocabulary, width = 4, 24, 3000, 32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * pairs, tokens, width, generator=generator).to(device)
    weight = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(device)
    labels = torch.randint(0, vocabulary, (2 * pairs, tokens), generator=generator).to(device)
    labels[:, 1:9] = IGNORE

    def share(sums: Tensor, *_: Tensor) -> Tensor:
        chosen, rejected = sums.chunk(2)
        return nn.functional.softplus(rejected - chosen).sum() / pairs

    def gradients(dtype: torch.dtype, chunk_bytes: int | None) -> tuple[Tensor, ...]:
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        if chunk_bytes is None:
            loss = share(eager(inputs[0] @ inputs[1].t(), labels))
        else:
            loss = losses.linear_preference_loss(*inputs, labels, share, chunk_bytes=chunk_bytes)[0]
        return (loss.detach(), *torch.autograd.grad(loss, inputs))

    for dtype, room in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        exact = gradients(F64, None)
        for chunk_bytes in (1 << 26, 1 << 20, 1 << 18):
            for number, (mine, right) in enumerate(zip(gradients(dtype, chunk_bytes), exact, strict=True)):
                error = ((mine.double() - right).norm() / right.norm()).item()
                assert error <= room, f"{dtype}, parts of {chunk_bytes} bytes, result {number}: error {error:.1e}"


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(24, 96) for _ in range(3))
        self.down_proj = nn.ModuleList(nn.Linear(96, 24, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down_proj, strict=True):
            x = x + down(torch.tanh(up(x)))
        return x


def an_update_is_the_textbooks(device: torch.device) -> None:
    """theta - lr grad L(theta + rho g_S / ||g_S||), by every ascent and every perturbation, three updates long."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(50, 24, generator=generator, dtype=F64).to(device) for _ in range(3)]
    torch.manual_seed(0)
    start = _Blocks().to(device, F64)
    subspace = sk.Subspace({f"down_proj.{n}.weight": list(range(n, 96, 7)) for n in range(3)})
    expected = _textbook(copy.deepcopy(start), subspace, batches)
    for ascent, perturbation in itertools.product(("selective", "grad"), ("in_place", "delta")):
        model = copy.deepcopy(start)
        opt = sk.ShaPOOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, subspace,
            rho=RHO, ascent=ascent, perturbation=perturbation,
        )  # fmt: skip
        for x in batches:
            with opt.ascent():
                opt.ascend(_loss(model, x))
            with opt.perturbed():
                _loss(model, x).backward()
            opt.step()
            opt.zero_grad()
        for mine, right in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-13, msg=f"{ascent} ascent, {perturbation}")


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def _textbook(model: nn.Module, subspace: sk.Subspace, batches: list[Tensor]) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    for x in batches:
        gradients = torch.autograd.grad(_loss(model, x), [parameters[name] for name in subspace])
        eps = [
            torch.zeros_like(g).index_copy_(1, i.to(g.device), g[:, i.to(g.device)])
            for g, i in zip(gradients, subspace.values(), strict=True)
        ]
        norm = torch.stack([e.norm() for e in eps]).norm()
        with torch.no_grad():
            for name, e in zip(subspace, eps, strict=True):
                parameters[name].add_(e, alpha=RHO / norm.item())
        gradients = torch.autograd.grad(_loss(model, x), list(parameters.values()))
        with torch.no_grad():
            for name, e in zip(subspace, eps, strict=True):
                parameters[name].sub_(e, alpha=RHO / norm.item())
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter.sub_(gradient, alpha=0.1)
    return list(parameters.values())
