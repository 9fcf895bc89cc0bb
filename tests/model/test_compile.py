"""Compiled models: the taps break no graph, and nothing is compiled anew from the second update on (S15)."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import shapo_kernels as sk
from tests.support.updates import closure_for


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
@pytest.mark.parametrize("wrap_before_compile", [False, True])
@pytest.mark.parametrize("ascent", ["selective", "grad"])
def test_a_compiled_model_runs_whole_graphs_compiled_once_and_equals_eager(
    toy, batch, loss, subspace, ascent, perturbation, wrap_before_compile
):
    torch._dynamo.reset()
    eager, model = toy(), toy()
    counter = CompileCounter()

    def optimizer(of, seen):
        base = torch.optim.SGD(of.parameters(), lr=0.1)
        return sk.ShaPOOptimizer(base, seen, subspace, rho=0.3, ascent=ascent, perturbation=perturbation)

    if wrap_before_compile:
        opt = optimizer(model, model)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        opt = optimizer(model, compiled)
    plain = optimizer(eager, eager)
    for step in range(5):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            for o, forward in ((opt, compiled), (plain, eager)):
                with o.ascent():
                    o.ascend(loss(forward, batch(step)))
                with o.perturbed():
                    loss(forward, batch(step)).backward()
                o.step()
                o.zero_grad()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    # In place, the perturbed forward is the plain one on other numbers; the grad ascent's is the plain one, too.
    assert counter.frame_count == 1 + (ascent == "selective") * (perturbation == "in_place") + (perturbation == "delta")


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_plain_updates_between_compile_one_more_graph_at_most(toy, batch, loss, subspace, perturbation):
    torch._dynamo.reset()
    eager, model = toy(), toy()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    options = {"rho": 0.3, "interval": 3, "perturbation": perturbation}
    opt = sk.ShaPOOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, subspace, **options)
    plain = sk.ShaPOOptimizer(torch.optim.SGD(eager.parameters(), lr=0.1), eager, subspace, **options)
    for step in range(8):
        # Two plain updates, then the first ShaPO update; after that, all has been seen.
        with torch._dynamo.config.patch(error_on_recompile=step > 2):
            for o, forward in ((opt, compiled), (plain, eager)):
                o.step(closure_for(o, forward, batch(step), loss))
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_compiled_backward_passes_after_the_descent_raise_or_are_right(toy, batch, loss, subspace):
    for perturbation in ("in_place", "delta"):
        torch._dynamo.reset()
        gradients = []
        for inside in (True, False):
            model = toy()
            compiled = torch.compile(model, backend="aot_eager")
            base = torch.optim.SGD(model.parameters(), lr=0.1)
            opt = sk.ShaPOOptimizer(base, model, subspace, rho=0.3, perturbation=perturbation)
            with opt.ascent():
                opt.ascend(loss(compiled, batch()))
            with opt.perturbed():
                value = loss(compiled, batch())
                if inside:
                    value.backward()
            if inside:
                gradients = [p.grad for p in model.parameters()]
            elif perturbation == "in_place":
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    value.backward()
            else:
                value.backward()
                assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
