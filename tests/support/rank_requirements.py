"""What each rank of the tests of S12 does: three updates by some wrapper, of a model under some engine."""

import torch
import torch.distributed as dist

from tests.requirements import peers, wrappers
from tests.support.engines import batches, build, mse, plain_name
from tests.support.rank_cases import wrap
from tests.support.ranks import on_rank

ONLY = {"up.weight": [1, 4], "down.weight": [0, 2]}


def trained(wrapper, model, ways=1, place=0):
    """The parameters, whole, by name."""
    parameters = dict(model.named_parameters())
    wrapped = wrapper(model, only=ONLY)
    for x, y in batches():
        data = x.chunk(ways)[place], y.chunk(ways)[place]
        wrapped.update(lambda data=data: mse(model, data))
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in parameters.items()}
    return {plain_name(name): p.detach() for name, p in whole.items()}


def named(name):
    return getattr(peers, name, None) or getattr(wrappers, name)


def mean_over_ranks(parameter):
    """What a user does for a weight that the engine leaves alone."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def run(case):
    torch.set_num_threads(1)
    try:
        model, ways, place = wrap(build(case["width"]), case["engine"])
        if case["engine"] == "fsdp_ignoring":
            model.head.weight.register_post_accumulate_grad_hook(mean_over_ranks)
        return trained(named(case["wrapper"]), model, ways, place)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    on_rank(run)
