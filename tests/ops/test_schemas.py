"""One list of operators: the schemas of compiled libraries, of Triton and of the reference agree with it."""

import inspect

import pytest
import torch

from shapo_kernels import backends, native, reference
from shapo_kernels.ops._schemas import OPERATORS

BACKENDS = [operator for operator in OPERATORS.values() if not operator.name.startswith("linear_")]


def parsed(operator):
    return torch._C.parse_schema(operator.name + operator.signature)


@pytest.mark.skipif(not native.has_cpu, reason="the CPU library is not built")
def test_the_compiled_libraries_register_these_schemas_and_no_others():
    registered = {
        name.removeprefix("shapo_kernels::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("shapo_kernels::")
    }
    # What only Triton and the reference have is no compiled operator.
    here = [operator for operator in OPERATORS.values() if operator.compiled or operator.name.startswith("linear_")]
    assert registered == {operator.name for operator in here}
    for operator in here:
        schema = getattr(torch.ops.shapo_kernels, operator.name).default._schema
        assert str(schema).removeprefix("shapo_kernels::") == str(parsed(operator))


def test_the_reference_has_every_operator_with_the_arguments_of_its_schema():
    assert set(reference.__all__) == {operator.name for operator in BACKENDS}
    for operator in BACKENDS:
        arguments = list(inspect.signature(getattr(reference, operator.name)).parameters)
        expected = [argument.name for argument in parsed(operator).arguments]
        # What is more is an option of the reference alone, with a default.
        assert arguments[: len(expected)] == expected
        assert set(arguments[len(expected) :]) <= {"rounding_key"}


def test_every_backend_has_operators_of_the_list_only_and_the_reference_fills_the_gaps():
    for name in backends.available():
        # A tile of the head is no operator: it does the work of several, and the walk has a form without it.
        assert set(backends._functions[name]) - {"linear_tile"} <= set(reference.__all__)
        with backends.use(name):
            device = torch.device("cpu")
            if not backends._serves(name, "cpu"):
                continue
            for operator in BACKENDS:
                own = backends._functions[name].get(operator.name, getattr(reference, operator.name))
                assert backends.function(device, operator.name) is own


def test_options_of_the_head_are_in_the_order_of_its_schemas():
    from shapo_kernels.ops.linear_tiles import HeadOptions

    for name, before, after in (("linear_token_logps", 4, 2), ("linear_token_logps_gradient", 10, 3)):
        arguments = [argument.name for argument in parsed(OPERATORS[name]).arguments]
        assert tuple(arguments[before : len(arguments) - after]) == HeadOptions._fields
