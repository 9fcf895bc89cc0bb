"""What each rank of the test of communication does: updates, and what the last one's passes sent over the ranks."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import shapo_kernels as sk
from tests.support.engines import AXES, INDICES, batches, build, mse
from tests.support.rank_cases import wrap
from tests.support.ranks import on_rank


class Collectives(TorchDispatchMode):
    """Every collective's kind and the bytes that this rank put into it, from Python and from C++."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.replace("_base", "").replace("_", "")
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "wrap")):
            # Tensors that a collective fills come first in its schema, where there are others.
            *_, given = [a for a in args if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(a))]
            tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
            self.seen.append((name, sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


def measured(case):
    model, ways, place = wrap(build(), case["engine"])
    opt = sk.ShaPOOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        sk.Subspace(INDICES, AXES),
        rho=0.1,
        **case.get("options", {}),
    )
    for x, y in batches():  # in the first updates engines set themselves up
        data = x.chunk(ways)[place], y.chunk(ways)[place]
        with Collectives() as ascent, opt.ascent():
            opt.ascend(mse(model, data))
        with Collectives() as descent, opt.perturbed():
            mse(model, data).backward()
        opt.step()
        opt.zero_grad()
    return {"ascent": ascent.seen, "descent": descent.seen}


if __name__ == "__main__":
    on_rank(measured)
