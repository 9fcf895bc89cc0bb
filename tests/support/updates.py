"""A ShaPO update, and a model's weights bit by bit, for the tests of the optimizer."""

import itertools

import torch

import shapo_kernels as sk

COMBINATIONS = list(itertools.product(["selective", "grad"], ["in_place", "delta"]))


def wrap(model, subspace, *, base=torch.optim.SGD, lr=0.1, rho=0.3, **options):
    return sk.ShaPOOptimizer(base(model.parameters(), lr=lr), model, subspace, rho=rho, **options)


def update(opt, model, data, loss):
    with opt.ascent():
        opt.ascend(loss(model, data))
    with opt.perturbed():
        loss(model, data).backward()
    opt.step()
    opt.zero_grad()


def bits(model):
    return [p.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8) for p in model.parameters()]


def same_bits(model, before):
    return all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))
