"""S14 and S15: what the device waits for, and what is compiled."""

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from tests.requirements import peers
from tests.requirements.registry import requirement
from tests.requirements.small import loss_of, mlp
from tests.requirements.wrappers import OursByDelta, PytorchOptimizer

aten = torch.ops.aten
#: Operators whose result is a Python value, or has a size that only the data knows: on a GPU the host waits for them.
WAITS = (aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.equal, aten._unique2, aten.masked_select)


class Calls(TorchDispatchMode):
    """What reaches the dispatcher, but for views and allocations, which launch nothing."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not (function.is_view or "empty" in function.name() or "detach" in function.name()):
            self.seen.append(function)
        return function(*args, **(kwargs or {}))


@requirement("S14", missed_by=(peers.WaitsForTheDevice,), met_by=(PytorchOptimizer, OursByDelta, peers.SubtractsEps))
def an_update_never_waits_for_the_device(wrapper):
    model = mlp()
    wrapped = wrapper(model, only={"2.weight": [1, 5, 20]}, momentum=0.9)
    for step in range(2):  # the first one makes the base's state
        with Calls() as calls:
            wrapped.update(loss_of(model, step))
        waits = [function for function in calls.seen if function.overloadpacket in WAITS]
        assert not waits, waits


def launches(wrapper, layers):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    only = {f"{i}.weight": [1, 3] for i in range(layers)}
    wrapped = wrapper(model, only=only, foreach=True)
    counts = []
    for _ in range(2):
        x = torch.randn(4, 8)
        wrapped.find(lambda x=x: model(x).square().mean())
        with Calls() as calls:
            wrapped.move()
        wrapped.descend(lambda x=x: model(x).square().mean())
        with calls:
            wrapped.finish()
        counts.append(len(calls.seen))
    return counts[1]


@requirement("S14", missed_by=(PytorchOptimizer, peers.SubtractsEps), met_by=(OursByDelta,))
def moving_and_coming_back_take_as_many_launches_for_any_number_of_layers(wrapper):
    few, many = launches(wrapper, 2), launches(wrapper, 12)
    assert few == many, f"{few} launches for 2 layers, {many} for 12"


@requirement("S15", missed_by=(peers.TogglesRequiresGrad,), met_by=(PytorchOptimizer, OursByDelta, peers.SubtractsEps))
def a_compiled_model_is_not_compiled_anew_from_the_second_update_on(wrapper):
    torch._dynamo.reset()
    counter = CompileCounter()
    model = mlp()
    # A layer's neurons and not the whole, for taps to be part of it.
    wrapped = wrapper(model, only={"2.weight": [1, 5, 20]})
    compiled = torch.compile(model, backend=counter)
    frames = []
    for step in range(6):
        wrapped.update(loss_of(compiled, step))
        frames.append(counter.frame_count)
    torch._dynamo.reset()
    assert frames[1:] == frames[1:2] * 5, frames
