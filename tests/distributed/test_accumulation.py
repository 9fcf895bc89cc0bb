"""Accumulation on several ranks: one perturbation an update, or one a micro-batch (m-sharpness), synchronised or not,
with gradients reduced in every backward pass or in the last alone (S12, S13).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.rank_accumulation import INDICES, LR, MICRO_BATCHES, RANKS, RHO, build, mse, updates
from tests.support.ranks import run_ranks

# engine, a perturbation for each micro-batch, gradients reduced in the last backward pass alone, options
CASES: list[tuple[str, bool, bool, dict[str, Any]]] = [
    ("ddp", each, late, {"ascent": ascent, "sync": sync})
    for each in (False, True)
    for late in (False, True)
    for ascent in ("selective", "grad")
    for sync in (True, False)
]
CASES += [
    ("ddp with views", each, True, {"ascent": ascent}) for each in (False, True) for ascent in ("selective", "grad")
]
CASES += [("ddp", True, True, {"perturbation": "delta"}), ("fsdp", True, False, {}), ("fsdp", False, False, {})]
CASES += [
    ("ddp by closure", False, False, {"ascent": a, "sync": s}) for a in ("selective", "grad") for s in (True, False)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The parameters after training, for every case from each rank."""
    return run_ranks(tmp_path_factory.mktemp("ranks"), RANKS, CASES, "rank_accumulation.py")


def written_out(groups_of):
    """The same updates without the library: each group of pieces is perturbed along its own gradient."""
    model = build()
    weights = {"2.weight": model[2].weight, "4.weight": model[4].weight}
    masks = {}
    for name, weight in weights.items():
        masks[name] = torch.zeros_like(weight)
        masks[name][:, INDICES[name]] = 1
    for x, y in updates():
        total = [torch.zeros_like(p) for p in model.parameters()]
        groups = groups_of(x, y)
        for group in groups:
            loss = sum(mse(model, *piece) for piece in group) / len(group)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            eps = [g * masks[name] for name, g in zip(weights, gradients, strict=True)]
            norm = torch.cat([e.flatten() for e in eps]).norm()
            with torch.no_grad():
                for weight, e in zip(weights.values(), eps, strict=True):
                    weight.add_(RHO * e / norm)
            loss = sum(mse(model, *piece) for piece in group) / len(group)
            for t, g in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                t.add_(g / len(groups))
            with torch.no_grad():
                for weight, e in zip(weights.values(), eps, strict=True):
                    weight.sub_(RHO * e / norm)
        with torch.no_grad():
            for p, t in zip(model.parameters(), total, strict=True):
                p.sub_(LR * t)
    return [p.detach() for p in model.parameters()]


def groups(each, sync):
    """Which (rank, micro-batch) pieces share a perturbation."""
    ranks, micro_batches = range(RANKS), range(MICRO_BATCHES)
    if each:
        return (
            [[(r, k) for r in ranks] for k in micro_batches]
            if sync
            else [[(r, k)] for r in ranks for k in micro_batches]
        )
    return (
        [[(r, k) for k in micro_batches for r in ranks]] if sync else [[(r, k) for k in micro_batches] for r in ranks]
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_ranks_with_micro_batches_equal_the_update_written_out(trained, number):
    _, each, _, options = CASES[number]
    sharing = groups(each, options.get("sync", True))
    expected = written_out(lambda x, y: [[(x[piece], y[piece]) for piece in group] for group in sharing])
    for parameters in trained[number]:
        for mine, other in zip(parameters, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_the_ways_to_share_a_perturbation_differ():
    ends = [
        torch.cat([p.flatten() for p in written_out(lambda x, y, s=s: [[(x[i], y[i]) for i in g] for g in s])])
        for s in (groups(each, sync) for each in (False, True) for sync in (False, True))
    ]
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(ends) for b in ends[:i])
