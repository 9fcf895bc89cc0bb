"""Files of tensors that are used again only by what they were made from.

The header of a cache holds a key: digests of the weights, the tokens and the settings behind its numbers.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from shapo.storage.files import atomic_file


def load_cached(path: str | os.PathLike[str], key: dict[str, str]) -> dict[str, Tensor] | None:
    """The tensors of a cache file, or None where it is missing, unreadable or made from something else."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError:
        return None


def save_cached(path: str | os.PathLike[str], key: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Writes tensors with the digests of what they were made from, atomically."""
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=key)
