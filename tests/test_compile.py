"""Compiled models: the taps break no graph, and nothing is compiled anew once each pass has been seen (S15)."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import shapo_kernels as sk


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
@pytest.mark.parametrize("wrap_before_compile", [False, True])
def test_a_compiled_model_runs_whole_graphs_and_equals_eager(
    toy, batch, loss, subspace, perturbation, wrap_before_compile
):
    torch._dynamo.reset()
    eager, model = toy(), toy()
    counter = CompileCounter()

    def optimizer(of, seen):
        return sk.ShaPOOptimizer(
            torch.optim.SGD(of.parameters(), lr=0.1), seen, subspace, rho=0.3, perturbation=perturbation
        )

    if wrap_before_compile:
        opt = optimizer(model, model)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        opt = optimizer(model, compiled)
    plain = optimizer(eager, eager)
    graphs = []
    for step in range(5):
        for o, forward in ((opt, compiled), (plain, eager)):
            with o.ascent():
                o.ascend(loss(forward, batch(step)))
            with o.perturbed():
                loss(forward, batch(step)).backward()
            o.step()
            o.zero_grad()
        graphs.append(counter.frame_count)
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert graphs[1] == graphs[-1]
