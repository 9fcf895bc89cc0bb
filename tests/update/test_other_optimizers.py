"""Base optimizers that are not torch's own, and torch's faster implementations: the wrapper around each."""

import copy

import pytest
import torch
from torch import nn

import shapo_kernels as sk

po = pytest.importorskip("pytorch_optimizer")

ADAM_LIKE = [
    "AdamW", "AdamP", "AdaBelief", "ADOPT", "Adan", "AdamS", "AdEMAMix", "CAME", "DiffGrad", "LaProp", "Lamb", "Lion",
    "MARS", "NAdam", "RAdam", "SOAP", "ScheduleFreeAdamW", "StableAdamW", "Tiger", "Yogi",
]  # fmt: skip
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))


def torchao_adamw(parameters):
    return pytest.importorskip("torchao.optim").AdamW8bit(parameters, lr=0.01)


MAKERS = {
    **{name: lambda p, name=name: getattr(po, name)(p, lr=0.01) for name in ADAM_LIKE},
    "torchao AdamW8bit": torchao_adamw,
    **{
        f"{kind.__name__} {flag}={value}": lambda p, kind=kind, flag=flag, value=value: kind(
            p, lr=0.01, **{flag: value}
        )
        for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
        for flag in ("foreach", "fused")
        for value in (True, False)
    },
}


def build(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    base = make(list(model.parameters()))
    if callable(getattr(base, "train", None)):
        base.train()
    return model, base


def mse(model):
    return (model(X) - Y).square().mean()


def wrapped_step(model, opt):
    with opt.ascent():
        opt.ascend(mse(model))
    with opt.perturbed():
        mse(model).backward()
    opt.step()
    opt.zero_grad()


def written_out_step(model, base, rho):
    weight = model[2].weight
    (g,) = torch.autograd.grad(mse(model), [weight])
    old = weight.detach().clone()
    with torch.no_grad():
        weight[:, [0, 3]] += rho * g[:, [0, 3]] / g[:, [0, 3]].norm()
    mse(model).backward()
    with torch.no_grad():
        weight.copy_(old)
    base.step()
    base.zero_grad()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_a_shapo_update_equals_the_one_written_out_and_resumes_bit_exact(name):
    model, base = build(MAKERS[name])
    twin, bare = build(MAKERS[name])
    subspace = sk.Subspace({"2.weight": [0, 3]})
    opt = sk.ShaPOOptimizer(base, model, subspace, rho=0.1)
    for _ in range(3):
        wrapped_step(model, opt)
        written_out_step(twin, bare, 0.1)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    other, fresh = build(MAKERS[name])
    other.load_state_dict(model.state_dict())
    resumed = sk.ShaPOOptimizer(fresh, other, subspace, rho=0.1)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(2):
        wrapped_step(model, opt)
        wrapped_step(other, resumed)
    assert resumed.updates == opt.updates == 5
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_sams_and_pytorch_optimizers_lbfgs_are_refused_as_a_base():
    model = nn.Linear(6, 4)
    sam = po.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    for base in (sam, torch.optim.LBFGS(model.parameters())):
        with pytest.raises(TypeError, match="cannot be wrapped"):
            sk.ShaPOOptimizer(base, model, sk.Subspace({"weight": [0]}), rho=0.1)


def test_a_schedule_free_base_is_switched_through_the_wrapper():
    model, base = build(MAKERS["ScheduleFreeAdamW"])
    opt = sk.ShaPOOptimizer(base, model, sk.Subspace({"2.weight": [0, 3]}), rho=0.1)
    for _ in range(3):
        wrapped_step(model, opt)
    training = [p.detach().clone() for p in model.parameters()]
    opt.eval()
    assert not all(torch.equal(p, t) for p, t in zip(model.parameters(), training, strict=True))
    opt.train()
    for p, t in zip(model.parameters(), training, strict=True):
        torch.testing.assert_close(p, t, rtol=1e-5, atol=1e-6)
