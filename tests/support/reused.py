"""A Llama whose two upper blocks of four hold selected neurons, and updates that reuse the two below, or do not."""

import torch

import shapo_kernels as sk
from tests.support.llamas import llama
from tests.support.updates import wrap

SUBSPACE = sk.Subspace(
    {"model.layers.2.mlp.down_proj.weight": [1, 5, 9], "model.layers.3.mlp.down_proj.weight": [0, 30]}
)


def build(**config):
    return llama(num_hidden_layers=4, **config).double()


def tokens(step, rows=4, length=9):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(step))


def loss(model, batch):
    return model(batch, labels=batch).loss


def by_context(opt, model, batches, loss=loss):
    with opt.ascent():
        for batch in batches:
            opt.ascend(loss(model, batch) / len(batches))
    with opt.perturbed():
        for batch in batches:
            (loss(model, batch) / len(batches)).backward()
    opt.step()
    opt.zero_grad()


def by_closure(opt, model, batches, loss=loss):
    def closure():
        opt.zero_grad()
        value = sum(loss(model, batch) / len(batches) for batch in batches)
        value.backward()
        return value

    opt.step(closure)
    opt.zero_grad()


def by_hand(opt, model, batches, loss=loss):
    with opt.ascent():
        for batch in batches:
            opt.ascend(loss(model, batch) / len(batches))
    opt.perturb()
    for batch in batches:
        (loss(model, batch) / len(batches)).backward()
    opt.restore()
    opt.step()
    opt.zero_grad()


WAYS = {"contexts": by_context, "closure": by_closure, "hand": by_hand}


def trained(build, subspace=SUBSPACE, *, way=by_context, updates=3, micro_batches=2, loss=loss, seed=None, **options):
    """The model after some updates, and its optimizer."""
    model = build()
    opt = wrap(model, subspace, base=torch.optim.AdamW, lr=0.01, **options)
    for step in range(updates):
        if seed is not None:
            torch.manual_seed(seed + step)
        way(opt, model, [tokens(10 * step + i) for i in range(micro_batches)], loss)
    return model, opt


def assert_reuse_changes_no_bit(build, subspace=SUBSPACE, *, blocks=2, **options):
    plain, _ = trained(build, subspace, **options)
    reusing, opt = trained(build, subspace, reuse_prefix=True, **options)
    assert opt.stats["prefix_blocks"] == blocks
    start = build()
    changed = [not torch.equal(a, b) for a, b in zip(start.parameters(), plain.parameters(), strict=True)]
    assert any(changed)
    for (name, mine), other in zip(reusing.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other), name
    return opt
