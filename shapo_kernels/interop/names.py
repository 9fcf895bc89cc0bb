"""Parameter names as the unwrapped model has them, without what DDP, torch.compile, FSDP, checkpointing, PEFT add."""

from __future__ import annotations

from torch import nn

# Where torch.compile, FSDP1, and DDP, DataParallel and engines built alike keep the model that they wrap.
COMPILED, FSDP1, REPLICATED = "_orig_mod", "_fsdp_wrapped_module", "module"
# Inserted anywhere, also by activation checkpointing, and by PEFT around a layer that it adapts.
_COMPONENTS = (COMPILED, FSDP1, "_checkpoint_wrapped_module", "base_layer")
# Put before everything, also by PEFT around the whole model.
_PREFIXES = (f"{REPLICATED}.", "base_model.model.")


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under its name in the unwrapped model; a tied one under each of its names."""
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unwrapped = aliases(name)[-1]
        clash = parameters.get(unwrapped, parameter) is not parameter
        parameters[name if clash else unwrapped] = parameter
    return parameters


def parameter_aliases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under each name that a subspace may give it: as it stands, and with wrappers seen through.

    Literal names come first, so that a module that is really called `module` keeps its name.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    parameters: dict[str, nn.Parameter] = dict(named)
    for name, parameter in named:
        for alias in aliases(name):
            parameters.setdefault(alias, parameter)
    return parameters


def plain_name(name: str) -> str:
    """A module's or parameter's name without what wrappers of single layers put into it."""
    return ".".join(part for part in name.split(".") if part not in _COMPONENTS)


def module_aliases(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under each name that a user may give it: as it stands, and with wrappers seen through."""
    named = dict(model.named_modules())
    modules = dict(named)
    for name, module in named.items():
        for alias in aliases(name):
            modules.setdefault(alias, module)
    return modules


def aliases(name: str) -> list[str]:
    """A name as it stands, then with ever more wrappers seen through; the last is the unwrapped model's."""
    found = [name, plain_name(name)]
    while prefix := next((p for p in _PREFIXES if found[-1].startswith(p)), None):
        found.append(found[-1][len(prefix) :])
    return found


def owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a parameter -> the modules that hold it, and under which attribute; several where weights are tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append((module, attribute))
    return found
