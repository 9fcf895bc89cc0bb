"""The wrapper around every torch optimizer, in every configuration that torch's own optimizer tests run."""

import copy
import warnings

import pytest
import torch
from torch import nn

import shapo_kernels as sk

common_optimizers = pytest.importorskip("torch.testing._internal.common_optimizers")

REFUSED = ("LBFGS", "SparseAdam")
CASES = [
    pytest.param(info, given, id=f"{info.name}-{position}-{given.desc.replace(' ', '_')}")
    for info in common_optimizers.optim_db
    if info.name not in REFUSED
    for position, given in enumerate(info.optim_inputs_func(device="cpu"))
    if not given.kwargs.get("differentiable")  # such an optimizer takes no leaf parameters
]


def build(info, options, rho):
    torch.manual_seed(0)
    bias = info.name != "Muon"  # which takes matrices only
    model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 2, bias=bias))
    parameters = list(model.parameters())
    base = info.optim_cls(parameters, **copy.deepcopy(options))
    subspace = sk.Subspace({"2.weight": [0, 3]})
    return model, base, sk.ShaPOOptimizer(base, model, subspace, rho=rho)


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 2, generator=torch.Generator().manual_seed(2))


def mse(model):
    return (model(X) - Y).square().mean()


def closure_for(model, opt):
    def closure():
        opt.zero_grad()
        loss = mse(model)
        loss.backward()
        return loss

    return closure


def two_passes(model, base, rho):
    """A ShaPO update written out, around the bare optimizer. What is maximised is worst down its gradient."""
    mse(model).backward()
    if base.param_groups[0].get("maximize"):
        rho = -rho
    weight = model[2].weight
    g = weight.grad[:, [0, 3]].clone()
    old = weight.detach().clone()
    with torch.no_grad():
        weight[:, [0, 3]] += rho * g / g.norm()
    base.zero_grad()
    mse(model).backward()
    with torch.no_grad():
        weight.copy_(old)
    base.step()
    base.zero_grad()


@pytest.mark.parametrize(("info", "given"), CASES)
def test_with_rho_zero_the_wrapper_is_its_base_bit_for_bit(info, given):
    model, _, opt = build(info, given.kwargs, rho=0.0)
    bare_model, bare, _ = build(info, given.kwargs, rho=0.0)
    for _ in range(3):
        ours, theirs = opt.step(closure_for(model, opt)), bare.step(closure_for(bare_model, bare))
        assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), bare_model.parameters(), strict=True))


@pytest.mark.parametrize(("info", "given"), CASES)
def test_a_shapo_update_equals_the_one_written_out_around_the_bare_optimizer(info, given):
    model, _, opt = build(info, given.kwargs, rho=0.1)
    bare_model, bare, spare = build(info, given.kwargs, rho=0.1)
    spare.detach()
    for _ in range(3):
        opt.step(closure_for(model, opt))
        opt.zero_grad()
        two_passes(bare_model, bare, 0.1)
        assert opt.stats["epsilon_norm"] == pytest.approx(0.1, rel=1e-5)
    for a, b in zip(model.parameters(), bare_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("info", "given"), CASES)
def test_state_dict_and_deepcopy_continue_bit_exact(info, given):
    model, _, opt = build(info, given.kwargs, rho=0.1)
    for _ in range(2):
        opt.step(closure_for(model, opt))
    other_model, _, other = build(info, given.kwargs, rho=0.1)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    copied = copy.deepcopy(opt)
    for m, o in ((model, opt), (other_model, other), (copied.model, copied)):
        for _ in range(2):
            o.step(closure_for(m, o))
    for p, q, r in zip(model.parameters(), other_model.parameters(), copied.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


@pytest.mark.parametrize("info", [i for i in common_optimizers.optim_db if i.name not in REFUSED], ids=lambda i: i.name)
def test_torchs_scheduler_combinations_lower_the_loss_without_warnings(info):
    for schedulers in info.scheduler_inputs:
        model, _, opt = build(info, {}, rho=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = [make(opt) for make in schedulers]
            first = mse(model).item()
            for _ in range(20):
                loss = opt.step(closure_for(model, opt))
                for scheduler in made:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*([loss.item()] if plateau else []))
        assert mse(model).item() < first
