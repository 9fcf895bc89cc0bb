"""The PEP 517 build backend: setuptools', with build requirements that depend on what is installed already.

Torch is needed for its headers only, and the installed one will do: it is found by its path and never imported. A build
environment in isolation would otherwise download a second torch of several gigabytes, and perhaps another version.
CMake and ninja are asked for only where the machine has none.
"""

from __future__ import annotations

import shutil
from typing import Any

import native_build
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.build_meta import get_requires_for_build_wheel as _setuptools_requires

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_setuptools_requires(config_settings), *_native_requires()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


def _native_requires() -> list[str]:
    if native_build.find_compiler() is None:
        return []
    requires = []
    if native_build.find_torch() is None:
        requires.append(f"torch>={native_build.MINIMUM_TORCH}")
    if shutil.which("cmake") is None:
        requires.append("cmake>=3.18")
    if shutil.which("ninja") is None:
        requires.append("ninja")
    return requires
