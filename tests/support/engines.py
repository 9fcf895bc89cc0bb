"""One small model under every engine, and the same updates written out for one process."""

import re

import torch
from torch import nn

RHO, LR = 0.4, 0.1
# Columns of the down-projection that one of two ranks holds, under tensor parallelism the other has none; rows of the
# up-projection; rows of a Conv1D; a head of 3 rows, of which one of four ranks holds none.
INDICES = {"up.weight": [1, 6], "down.weight": [0, 2], "conv.weight": [0, 5], "head.weight": [1, 4]}
AXES = {"up.weight": 0, "down.weight": 1, "conv.weight": 0, "head.weight": 1}


class Conv1D(nn.Module):
    """As in GPT-2: the weight is stored [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / 2)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 6)
        self.conv, self.head = Conv1D(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(torch.tanh(self.down(torch.tanh(self.up(x)))))))


def build(width=8):
    torch.manual_seed(0)
    return Net(width).double()


def batches(updates=3):
    generator = torch.Generator().manual_seed(7)
    for _ in range(updates):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randn(8, 3, generator=generator, dtype=torch.float64)


def mse(model, data):
    return (model(data[0]) - data[1]).square().mean()


def plain_name(name):
    """A parameter's name without what wrappers put into it."""
    return re.sub(r"^module\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.", "", name)


def groups(model, rhos):
    """Param groups of which some carry a radius of their own: name -> rho."""
    if not rhos:
        return list(model.parameters())
    of = {plain_name(name): p for name, p in model.named_parameters()}
    own = {id(of[name]) for name in rhos}
    rest = [p for p in model.parameters() if id(p) not in own]
    return [{"params": rest}, *({"params": [of[name]], "rho": rho} for name, rho in rhos.items())]


def one_process(
    width=8,
    *,
    norm="global",
    relative=False,
    rhos=None,
    own_directions=1,
    clip=None,
    updates=3,
    interval=1,
    momentum=0.0,
):
    """Some updates of ShaPO, written out in float64.

    Args:
        own_directions: into how many parts the batch falls that are each perturbed along their own gradient.
        clip: the greatest norm of pass 2's gradient.
        interval: every `interval`-th update is a ShaPO update.
    """
    model = build(width)
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum)
    weights = {name: p for name, p in model.named_parameters() if name in INDICES}
    radius = {name: (rhos or {}).get(name, RHO) for name in INDICES}

    def selected(tensors):
        return {name: t.index_select(AXES[name], torch.tensor(INDICES[name])) for name, t in tensors.items()}

    for number, (x, y) in enumerate(batches(updates), 1):
        parts = zip(x.chunk(own_directions), y.chunk(own_directions), strict=True)
        if number % interval:
            parts = ()
            mse(model, (x, y)).backward()
        for part in parts:
            g = selected(dict(zip(weights, torch.autograd.grad(mse(model, part), list(weights.values())), strict=True)))
            w = selected({name: p.detach() for name, p in weights.items()})
            size = {name: (g[name].norm(), w[name].norm()) for name in g}
            if norm == "global":
                both = [torch.stack(list(column)).norm() for column in zip(*size.values(), strict=True)]
                size = dict.fromkeys(size, both)
            eps = {n: radius[n] * (size[n][1] if relative else 1) / (size[n][0] + 1e-12) * g[n] for n in g}
            old = {name: p.detach().clone() for name, p in weights.items()}
            with torch.no_grad():
                for name, p in weights.items():
                    p.index_add_(AXES[name], torch.tensor(INDICES[name]), eps[name])
            (mse(model, part) / own_directions).backward()
            with torch.no_grad():
                for name, p in weights.items():
                    p.copy_(old[name])
        if clip is not None:
            length = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            assert length > clip
            for p in model.parameters():
                p.grad *= clip / (length + 1e-6)  # as torch.nn.utils.clip_grad_norm_ has it
        base.step()
        base.zero_grad()
    stats = {
        "grad_norm": torch.cat([v.flatten() for v in g.values()]).norm().item(),
        "epsilon_norm": torch.cat([v.flatten() for v in eps.values()]).norm().item(),
        "realised_norm": torch.cat([v.flatten() for v in eps.values()]).norm().item(),
        "weight_norm": torch.cat([v.flatten() for v in w.values()]).norm().item(),
        "realised_cosine": 1.0,
    }
    return {name: p.detach() for name, p in model.named_parameters()}, stats


def one_process_of(case, ways):
    """What :func:`one_process` gives for a case of the engines' tests; no stats where `ways` ranks have their own."""
    options = case.get("options", {})
    own = 1 if options.get("sync", True) else ways
    parameters, stats = one_process(
        case.get("width", 8),
        norm=options.get("norm", "global"),
        relative=options.get("relative", False),
        rhos=case.get("rhos"),
        own_directions=own,
        clip=case.get("clip"),
        interval=options.get("interval", 1),
        momentum=case.get("momentum", 0.0),
    )
    return parameters, stats if own == 1 else {}
