"""The update against independent truths: pytorch_optimizer's SAM, and itself taken by other ways in fp64."""

import itertools

import pytest
import torch
from torch import nn

import shapo_kernels as sk
from tests.support.updates import assert_moved, closure_for

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


def hand_driven(opt, model, data, loss):
    loss(model, data).backward()
    opt.first_step(zero_grad=True)
    loss(model, data).backward()
    opt.second_step(zero_grad=True)


def by_context(opt, model, data, loss):
    with opt.ascent():
        opt.ascend(loss(model, data))
    with opt.perturbed():
        loss(model, data).backward()
    assert_moved(opt)
    opt.step()
    opt.zero_grad()


def by_closure(opt, model, data, loss):
    opt.step(closure_for(opt, model, data, loss))
    assert_moved(opt)
    opt.zero_grad()


WAYS = {"context": by_context, "closure": by_closure, "hand": hand_driven}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ascent", ["selective", "grad"])
@pytest.mark.parametrize("base", BASES)
def test_with_everything_selected_twenty_steps_equal_pytorch_optimizers_sam(toy, batch, loss, base, ascent, way):
    kind, options = BASES[base]
    ours, theirs = toy(), toy()
    opt = sk.ShaPOOptimizer(kind(ours.parameters(), **options), ours, sk.Subspace.full(ours), rho=0.1, ascent=ascent)
    sam = pytorch_optimizer.SAM(theirs.parameters(), kind, rho=0.1, **options)
    for step in range(20):
        WAYS[way](opt, ours, batch(step), loss)
        loss(theirs, batch(step)).backward()
        sam.first_step(zero_grad=True)
        loss(theirs, batch(step)).backward()
        sam.second_step(zero_grad=True)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # pytorch_optimizer accumulates its norm in float32, whatever the weights are.
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


def masked_sam_step(model, base, subspace, rho, data, loss):
    """ShaPO written out with dense masks, independent of the library's operators."""
    parameters = dict(model.named_parameters())
    loss(model, data).backward()
    masked = {}
    for name in subspace:
        mask = torch.zeros_like(parameters[name])
        mask[:, subspace[name]] = 1
        masked[name] = parameters[name].grad * mask
    norm = torch.sqrt(sum(g.square().sum() for g in masked.values()))
    old = {name: parameters[name].detach().clone() for name in masked}
    with torch.no_grad():
        for name, g in masked.items():
            parameters[name].add_(rho * g / (norm + 1e-12))
    base.zero_grad()
    loss(model, data).backward()
    with torch.no_grad():
        for name, value in old.items():
            parameters[name].copy_(value)
    base.step()
    base.zero_grad()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("ascent", "perturbation"), itertools.product(["selective", "grad"], ["in_place", "delta", "auto"])
)
def test_every_combination_equals_shapo_written_out_with_masks(toy, batch, loss, subspace, ascent, perturbation, way):
    ours, theirs = toy(), toy()
    opt = sk.ShaPOOptimizer(
        torch.optim.AdamW(ours.parameters(), lr=0.01),
        ours,
        subspace,
        rho=0.3,
        ascent=ascent,
        perturbation=perturbation,
    )
    base = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    for step in range(5):
        WAYS[way](opt, ours, batch(step), loss)
        masked_sam_step(theirs, base, subspace, 0.3, batch(step), loss)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ascent", ["selective", "grad"])
@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_micro_batches_equal_one_large_batch(toy, batch, loss, subspace, ascent, perturbation):
    x, y = batch(rows=12)
    whole, parts = toy(), toy()
    options = {"rho": 0.3, "ascent": ascent, "perturbation": perturbation}
    one = sk.ShaPOOptimizer(torch.optim.SGD(whole.parameters(), lr=0.1), whole, subspace, **options)
    many = sk.ShaPOOptimizer(torch.optim.SGD(parts.parameters(), lr=0.1), parts, subspace, **options)
    by_context(one, whole, (x, y), loss)
    pieces = list(zip(x.chunk(4), y.chunk(4), strict=True))
    with many.ascent():
        for piece in pieces:
            many.ascend(loss(parts, piece) / 4)
    with many.perturbed():
        for piece in pieces:
            (loss(parts, piece) / 4).backward()
    many.step()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ascent", ["selective", "grad"])
def test_each_micro_batch_may_have_its_own_perturbation(toy, batch, loss, subspace, ascent):
    pieces = [batch(step) for step in range(3)]
    model = toy()
    opt = sk.ShaPOOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, subspace, rho=0.3, ascent=ascent)
    for piece in pieces:
        with opt.ascent():
            opt.ascend(loss(model, piece))
        with opt.perturbed():
            loss(model, piece).backward()
    expected = []
    for piece in pieces:
        other = toy()
        single = sk.ShaPOOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), other, subspace, rho=0.3)
        with single.ascent():
            single.ascend(loss(other, piece))
        with single.perturbed():
            loss(other, piece).backward()
        expected.append([p.grad for p in other.parameters()])
    assert_moved(opt)
    for p, grads in zip(model.parameters(), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(p.grad, sum(grads), rtol=1e-12, atol=1e-14)


class Conv1D(nn.Module):
    """As transformers': y = x W + b with W `[in, out]`."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf, dtype=torch.float64) * 0.3)
        self.bias = nn.Parameter(torch.zeros(nf, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("layer", ["Linear", "Conv1D"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_delta_equals_in_place_on_both_axes_of_both_layers(batch, loss, layer, axis, count):
    def build():
        torch.manual_seed(0)
        middle = nn.Linear(8, 6, dtype=torch.float64) if layer == "Linear" else Conv1D(6, 8)
        return nn.Sequential(nn.Linear(8, 8, dtype=torch.float64), middle, nn.Linear(6, 3, dtype=torch.float64))

    results = []
    for perturbation, ascent in itertools.product(["in_place", "delta"], ["selective", "grad"]):
        model = build()
        s = sk.Subspace({"1.weight": list(range(count))}, axis=axis)
        opt = sk.ShaPOOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, s, rho=0.5, ascent=ascent, perturbation=perturbation
        )
        for step in range(3):
            by_context(opt, model, batch(step), loss)
        results.append([p.detach().clone() for p in model.parameters()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("norm", ["global", "layer", "none"])
@pytest.mark.parametrize("relative", [False, True])
def test_radius_follows_norm_mode_and_relative(toy, batch, loss, subspace, norm, relative):
    model = toy()
    build = lambda: sk.ShaPOOptimizer(  # noqa: E731
        torch.optim.SGD(model.parameters(), lr=0.1), model, subspace, rho=0.2, norm=norm, relative=relative
    )
    if norm == "none" and relative:
        with pytest.raises(ValueError, match="needs a norm"):
            build()
        return
    opt = build()
    parameters = dict(model.named_parameters())
    loss(model, batch()).backward()
    gradients = {n: parameters[n].grad[:, i].clone() for n, i in subspace.items()}
    weights = {n: parameters[n].detach()[:, i].clone() for n, i in subspace.items()}
    model.zero_grad()
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    with opt.perturbed():
        moved = {n: parameters[n].detach()[:, i] - weights[n] for n, i in subspace.items()}
    total = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
    total_weight = torch.sqrt(sum(w.square().sum() for w in weights.values()))
    for name, g in gradients.items():
        divisor = {"global": total, "layer": g.norm(), "none": torch.tensor(1.0)}[norm]
        radius = 0.2
        if relative:
            radius = 0.2 * (total_weight if norm == "global" else weights[name].norm())
        torch.testing.assert_close(moved[name], radius * g / divisor, rtol=1e-9, atol=1e-12)
