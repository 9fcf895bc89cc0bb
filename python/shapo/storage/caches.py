"""Files of tensors that are used again only by what they were made from.

The header of a cache holds a key, digests of the weights, the tokens and the settings behind its numbers, and a
checksum of the numbers themselves.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from shapo.storage.files import atomic_file
from shapo.storage.fingerprint import digest_tensors

_DIGEST = "tensors"


def load_cached(
    path: str | os.PathLike[str], key: Mapping[str, str], names: Collection[str], length: int
) -> dict[str, Tensor] | None:
    """The tensors of a cache file, or None where it is missing, damaged or made from something else.

    Args:
        path: What `save_cached` has written.
        key: What the numbers must be made from.
        names: Of the tensors.
        length: Of each tensor's first dimension.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
            digest = header.pop(_DIGEST, None)
            if header != key:
                return None
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError):
        return None
    whole = set(found) == set(names) and all(value.shape[:1] == (length,) for value in found.values())
    return found if whole and digest_tensors(found) == digest else None


def save_cached(path: str | os.PathLike[str], key: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors with the key of what they were made from and a checksum, atomically."""
    from safetensors.torch import save_file

    kept = {name: value.contiguous() for name, value in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(kept, temporary, metadata={**key, _DIGEST: digest_tensors(kept)})


def header_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """What the header of a safetensors file says; nothing where there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}
