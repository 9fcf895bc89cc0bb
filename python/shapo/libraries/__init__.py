"""What is read of other libraries beside their public interfaces: one module for each library.

Each name stands in a table with what is assumed of it. `tests/shapo/libraries` checks every name against the installed
release and fails by that name. Where a name is missing at run time, the user gets a fallback or one line.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

# What libraries log as they are imported, and no user of a command can change: logger -> how the message begins.
_AT_IMPORT = {
    "DeepSpeed": "Setting accelerator to CPU",  # Accelerate imports it to save any model
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # inference, by another package
    "torchao": "Failed to load",  # its kernels for GPUs that are not here
    "torch.utils._pytree": "%s is an Enum subclass",  # torchao's
}


@functools.cache
def quiet_imports() -> None:
    """Leaves these messages out, some of which go to the standard output."""
    for name, beginning in _AT_IMPORT.items():
        logging.getLogger(name).addFilter(functools.partial(_is_another, beginning))


def _is_another(beginning: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(beginning)


def lacking(owner: object, names: Mapping[str, str]) -> list[str]:
    """The names of a table that `owner` does not have."""
    return [name for name in names if not hasattr(owner, name)]
