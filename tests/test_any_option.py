"""Every option of the public interface, given something of another kind: None for a switch, a text for a number.

The options are read from the signatures, so that one whose check is forgotten fails here.
"""

import inspect
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import shapo_kernels as sk
from shapo_kernels import losses, ops

F64 = torch.float64
PAIR = (torch.zeros(2),) * 4
LAYERS = ([torch.zeros(4, 6)], [torch.tensor([1, 3])])
COMPACT, SCALE = [torch.zeros(4, 2)], torch.zeros(1, dtype=F64)
HEAD = (torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.ones(2, 3, dtype=torch.int64))
LOGITS = (torch.zeros(2, 3, 5), HEAD[2])
SUBSPACE = sk.Subspace({"weight": [0, 2]})


def optimizer(**options):
    model = nn.Linear(4, 3).double()
    return sk.ShaPOOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, SUBSPACE, **({"rho": 0.1} | options))


def rewarded(*pair, **options):
    return losses.reward_level(*pair, reward_chosen=PAIR[0], reward_rejected=PAIR[0], **options)


# Everything public that has options -> a call of it, and options that the call needs.
CALLS = {
    sk.ShaPOOptimizer: (optimizer, {}),
    sk.ShaPOOptimizer.first_step: (lambda **o: optimizer().first_step(**o), {}),
    sk.ShaPOOptimizer.second_step: (lambda **o: optimizer(rho=0.0).second_step(**o), {}),
    sk.Subspace: (lambda **o: sk.Subspace({"weight": [0]}, **o), {}),
    sk.Subspace.top: (lambda **o: sk.Subspace.top({"weight": torch.arange(4.0)}, **o), {"percent": 50.0}),
    sk.Subspace.random: (lambda **o: sk.Subspace.random({"weight": 4}, **o), {"percent": 50.0, "seed": 0}),
    sk.Subspace.random_like: (lambda **o: sk.Subspace.random_like(SUBSPACE, {"weight": 4}, **o), {"seed": 0}),
    sk.Subspace.head: (lambda **o: sk.Subspace.head(nn.Sequential(nn.Linear(2, 2)), **o), {"name": "0"}),
    losses.PreferenceLoss: (losses.PreferenceLoss, {"name": "dpo", "beta": 0.1}),
    losses.dpo: (lambda **o: losses.dpo(*PAIR, **o), {"beta": 0.1}),
    losses.cdpo: (lambda **o: losses.cdpo(*PAIR, **o), {"beta": 0.1, "epsilon": 0.1}),
    losses.rdpo: (lambda **o: losses.rdpo(*PAIR, **o), {"beta": 0.1, "epsilon": 0.1}),
    losses.ipo: (lambda **o: losses.ipo(*PAIR, **o), {"beta": 0.1}),
    losses.hinge: (lambda **o: losses.hinge(*PAIR, **o), {"beta": 0.1}),
    losses.simpo: (lambda **o: losses.simpo(*PAIR[:2], **o), {"beta": 0.1, "gamma": 0.5}),
    losses.reward_level: (lambda **o: rewarded(*PAIR, **o), {"beta": 0.1, "beta_reward": 1.0}),
    losses.soft_preference: (lambda **o: losses.soft_preference(PAIR[0], **o), {"q": 0.5}),
    losses.drdpo: (lambda **o: losses.drdpo(PAIR[0], **o), {"beta_prime": 1.0}),
    losses.whole_batch: (lambda **o: losses.whole_batch(PAIR[0], **o), {}),
    losses.sequence_logps: (lambda **o: losses.sequence_logps(*LOGITS, **o), {}),
    losses.linear_sequence_logps: (lambda **o: losses.linear_sequence_logps(*HEAD, **o), {}),
    losses.linear_preference_loss: (lambda **o: losses.linear_preference_loss(*HEAD, lambda s, *_: s.sum(), **o), {}),
    losses.saves_a_product: (lambda **o: losses.saves_a_product(weight=HEAD[1], **o), {"tokens": [1]}),
    ops.linear_token_logps: (lambda **o: ops.linear_token_logps(*HEAD, **o), {}),
    ops.token_logps: (lambda **o: ops.token_logps(*LOGITS, **o), {}),
    ops.neuron_update: (lambda **o: ops.neuron_update(*(torch.zeros(4, 4) for _ in range(3)), **o), {}),
    ops.column_cosine: (lambda **o: ops.column_cosine(torch.ones(4, 4), torch.ones(4), **o), {}),
    ops.gather: (lambda axes: ops.gather(*LAYERS, axes), {"axes": [1]}),
    ops.selected_squared_norms: (lambda axes: ops.selected_squared_norms(*LAYERS, axes), {"axes": [1]}),
    ops.perturb_: (lambda axes, **o: ops.perturb_(*LAYERS, axes, COMPACT, SCALE, COMPACT, **o), {"axes": [1]}),
    ops.restore_: (lambda axes: ops.restore_(*LAYERS, axes, COMPACT), {"axes": [1]}),
    ops.perturbation_scale: (lambda **o: ops.perturbation_scale(SCALE, SCALE, **o), {}),
    ops.norms_and_scale: (lambda **o: ops.norms_and_scale(COMPACT, SCALE, **o), {}),
}
# What takes data, and no option: records, an entry's name, a file's.
OTHER_WORK = {losses.LossSpec, losses.WholeBatch, sk.RandomState, sk.Subspace.axis, sk.Subspace.own_layer}
OTHER_WORK |= {sk.Subspace.save, sk.Subspace.load.__func__, sk.SubspaceError, sk.PhaseError}

NUMBERS = (None, True, "1", torch.tensor(1), [1])
OF_ANOTHER_KIND = {
    "bool": (None, 0, 1, "false", "True", np.True_, torch.tensor(True)),
    "int": (*NUMBERS, 1.0),
    "float": NUMBERS,
    "str": (None, True, 0, "no such choice"),
    "Sequence[int]": ([True], [1.0], ["1"], [None], [torch.tensor(1)]),
}
# An annotation that names another kind too -> what that kind takes.
TAKEN = {"None": (None,), "bool": (True,), "Tensor": (torch.tensor(1),), "float": (1.0,)}


def public():
    for module in (sk, losses, ops):
        for found in map(vars(module).get, module.__all__):
            if callable(found):
                yield found
            if inspect.isclass(found):
                yield from (getattr(f, "__func__", f) for name, f in vars(found).items() if not name.startswith("_"))


def options():
    """What has options, an option, and the kinds that its annotation names."""
    for function in dict.fromkeys(public()):
        if callable(function) and function not in OTHER_WORK:
            for parameter in inspect.signature(function).parameters.values():
                kinds = {part.strip() for part in str(parameter.annotation).split("|")}
                if kinds & set(OF_ANOTHER_KIND):
                    yield function, parameter, kinds


def same(a, b):
    return a is b or (type(a) is type(b) and repr(a) == repr(b))


def values_of_another_kind(kinds):
    taken = list(itertools.chain.from_iterable(TAKEN.get(kind, ()) for kind in kinds))
    found = itertools.chain.from_iterable(OF_ANOTHER_KIND.get(kind, ()) for kind in sorted(kinds))
    return [value for value in found if not any(same(value, other) for other in taken)]


CASES = [
    pytest.param(function, parameter, value, id=f"{function.__qualname__}-{parameter.name}-{value!r}")
    for function, parameter, kinds in options()
    for value in values_of_another_kind(kinds)
]


def call(function, **changes):
    by_function = {getattr(f, "__func__", f): made for f, made in CALLS.items()}
    run, needed = by_function[function]
    return run(**(needed | changes))


@pytest.mark.parametrize("function", list(dict.fromkeys(function for function, _, _ in options())))
def test_the_call_itself_is_right(function):
    call(function)


@pytest.mark.parametrize(("function", "parameter", "value"), CASES)
def test_an_option_of_another_kind_is_refused_by_name(function, parameter, value):
    name = "beta" if parameter.kind is parameter.VAR_KEYWORD else parameter.name
    with pytest.raises((TypeError, ValueError)) as raised:
        call(function, **{name: value})
    assert name in str(raised.value) or repr(value) in str(raised.value)
