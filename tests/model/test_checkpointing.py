"""Activation checkpointing of both kinds: a pass that is computed twice is computed at the same weights twice."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shapo_kernels as sk
from benchmarks.measure import peak_extra_bytes
from tests.support.updates import COMBINATIONS, closure_for, update


class Checkpointed(nn.Module):
    """A toy whose first block (or every one) is recomputed in the backward pass."""

    def __init__(self, toy, *, reentrant, blocks=2):
        super().__init__()
        self.toy, self.reentrant, self.blocks = toy, reentrant, blocks

    def forward(self, x):
        x = x.clone().requires_grad_()  # a reentrant checkpoint asks for an input that takes a gradient
        for number, layer in enumerate(self.toy.layers):
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if number < self.blocks else layer(x)
        return self.toy.head(x)


def build(toy, subspace, *, reentrant=None, blocks=2, **options):
    model = toy()
    opt = sk.ShaPOOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, subspace, rho=0.3, **options)
    return model, opt, (model if reentrant is None else Checkpointed(model, reentrant=reentrant, blocks=blocks))


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("ascent", "perturbation", "reentrant"),
    # The selective ascent refuses reentrant checkpoints: see the next test.
    [(a, p, r) for a, p in COMBINATIONS for r in (False, True) if not (r and a == "selective")],
)
def test_checkpointed_updates_equal_plain_ones(toy, batch, loss, subspace, ascent, perturbation, reentrant):
    options = {"ascent": ascent, "perturbation": perturbation}
    model, opt, seen = build(toy, subspace, reentrant=reentrant, **options)
    plain, other, _ = build(toy, subspace, **options)
    for step in range(3):
        update(opt, seen, batch(step), loss)
        update(other, plain, batch(step), loss)
    assert_same(model, plain)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("whole", [False, True])
def test_the_selective_ascent_refuses_reentrant_checkpoints_even_of_some_layers(
    toy, batch, loss, subspace, whole, blocks
):
    _, opt, seen = build(toy, sk.Subspace.full(toy()) if whole else subspace, reentrant=True, blocks=blocks)
    with pytest.raises(RuntimeError, match="use_reentrant=False"), opt.ascent():
        opt.ascend(loss(seen, batch()))


def test_a_layer_without_a_graph_is_no_reentrant_checkpoint(toy, batch, loss, subspace):
    model, opt, _ = build(toy, subspace)
    with opt.ascent():
        with torch.no_grad():
            hidden = model.layers[0](batch()[0])
        opt.ascend(model.head(model.layers[1](hidden)).square().mean())
    with opt.perturbed():
        loss(model, batch()).backward()
    assert opt.stats["epsilon_norm"] == pytest.approx(0.3)


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_closure_sees_through_both_kinds(toy, batch, loss, subspace, perturbation, reentrant):
    model, opt, seen = build(toy, subspace, reentrant=reentrant, perturbation=perturbation)
    plain, other, _ = build(toy, subspace, perturbation=perturbation)
    for step in range(3):
        for o, m in ((opt, seen), (other, plain)):
            o.step(closure_for(o, m, batch(step), loss))
    assert_same(model, plain)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_a_backward_pass_after_the_descent_raises_instead_of_recomputing_at_other_weights(
    toy, batch, loss, subspace, perturbation, whole, reentrant
):
    # Without the refusal, checkpointed layers are recomputed at theta: in place without any error of torch's.
    if whole and perturbation == "delta":
        subspace = sk.Subspace({name: range(8) for name in subspace}, axis=0)
    elif whole:
        subspace = sk.Subspace.full(toy())
    model, opt, seen = build(toy, subspace, reentrant=reentrant, ascent="grad", perturbation=perturbation)
    with opt.ascent():
        opt.ascend(loss(seen, batch()))
    with opt.perturbed():
        value = loss(seen, batch())
    with pytest.raises(RuntimeError, match="call backward\\(\\) inside it too"):
        value.backward()
    opt.zero_grad()
    update(opt, seen, batch(), loss)  # and the next update is none the worse
    plain, other, _ = build(toy, subspace, ascent="grad", perturbation=perturbation)
    update(other, plain, batch(), loss)
    assert_same(model, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_evaluation_inside_a_descent_does_not_forbid_later_plain_updates(toy, batch, loss, subspace, reentrant):
    model, opt, seen = build(toy, subspace, reentrant=reentrant, interval=2, ascent="grad")
    plain, other, _ = build(toy, subspace, interval=2, ascent="grad")
    for step in range(4):
        for o, m in ((opt, seen), (other, plain)):
            if o.due:
                with o.ascent():
                    o.ascend(loss(m, batch(step)))
            with o.perturbed():
                loss(m, batch(step)).backward()
                with torch.no_grad():
                    m(batch(step)[0])
            o.step()
            o.zero_grad()
    assert_same(model, plain)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_transformers_gradient_checkpointing_changes_nothing(perturbation, reentrant):
    pytest.importorskip("transformers")
    from tests.support.llamas import llama

    subspace = sk.Subspace({f"model.layers.{i}.mlp.down_proj.weight": [1, 5, 30] for i in range(2)})
    ids = torch.arange(18).view(2, 9)
    models = []
    for checkpointed in (True, False):
        model = llama(vocab_size=40, num_key_value_heads=1, use_cache=False).double().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        opt = sk.ShaPOOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            subspace,
            rho=0.5,
            ascent="grad" if reentrant else "selective",
            perturbation=perturbation,
        )
        for _ in range(2):
            with opt.ascent():
                opt.ascend(model(input_ids=ids, labels=ids).loss)
            with opt.perturbed():
                model(input_ids=ids, labels=ids).loss.backward()
            opt.step()
            opt.zero_grad()
        models.append(model)
    assert_same(*models)


def test_the_first_ascent_through_checkpoints_needs_no_more_memory_than_a_later_one():
    def peak(updates):
        torch.manual_seed(0)
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32)) for _ in range(8))
        model = nn.ModuleDict({"blocks": blocks})
        subspace = sk.Subspace({f"blocks.{i}.2.weight": [0, 5] for i in range(8)})
        opt = sk.ShaPOOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, subspace, rho=0.1)

        def loss():
            x = torch.ones(256, 32)
            for block in blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return x.square().mean()

        def ascend():
            with opt.ascent():
                opt.ascend(loss())

        for _ in range(updates):
            ascend()
            with opt.perturbed():
                loss().backward()
            opt.step()
            opt.zero_grad()
        return peak_extra_bytes(ascend)

    assert peak(0) < 1.2 * peak(1)
