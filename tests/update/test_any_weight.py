"""An update of a weight in any kind of memory: moved as float64 mathematics says, or refused; its bits as before."""

from collections import OrderedDict

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shapo_kernels as sk
from tests.support.draws import F64, REFUSED, Draw, fuzzed


def addresses(tensor):
    places = torch.ones(tensor.shape).nonzero().tolist()
    return [sum(p * s for p, s in zip(place, tensor.stride(), strict=True)) for place in places]


@fuzzed
@given(st.data())
def test_a_weight_is_moved_and_comes_back_or_is_refused(data):
    draw = Draw(data)
    out, width, dtype = draw.one(1, 2, 5), draw.one(1, 3, 4), draw.one(torch.float32, F64)
    weight = nn.Parameter(draw.tensor(out, width, dtype=dtype))
    model = nn.Sequential(OrderedDict(a=nn.Linear(width, out, bias=False)))
    model.a.weight = weight
    axis = draw.one(0, 1)
    count = weight.shape[axis]
    index = torch.randperm(count, generator=draw.generator)[: draw.one(1, count)].sort().values
    how, rho = draw.one("in_place", "delta", "auto"), draw.one(0.5, 1e-3)
    x = torch.randn(3, width, generator=draw.generator, dtype=F64).to(dtype)
    before, overlaps = weight.detach().clone(), len(set(addresses(weight))) < weight.numel()

    try:
        opt = sk.ShaPOOptimizer(
            torch.optim.SGD([weight], lr=0.0),
            model,
            sk.Subspace({"a.weight": index}, axis),
            rho=rho,
            perturbation=how,
            ascent=draw.one("selective", "grad"),
        )
        with opt.ascent():
            opt.ascend(model(x).square().sum())
        with opt.perturbed():
            found = model(x).square().sum()
        assert not (overlaps and how == "in_place"), "each element must be moved once"
    except REFUSED:
        assert overlaps, "nothing is wrong with this weight"
        assert torch.equal(weight, before)
        return
    wide = before.double().requires_grad_()
    (gradient,) = torch.autograd.grad((x.double() @ wide.t()).square().sum(), wide)
    part = gradient.index_select(axis, index)
    moved = wide.detach().clone()
    if part.norm() > 0:
        moved.index_add_(axis, index, rho * part / part.norm())
    expected = (x.double() @ moved.t()).square().sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-9 if dtype == F64 else 2e-5, atol=1e-6)
    assert torch.equal(weight, before)
