"""Adds the compiled libraries to setuptools' build; what is packaged stands in pyproject.toml, how csrc/ is built in
CMakeLists.txt."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

from native_build import COMMANDS, NativeDistribution

setup(cmdclass=COMMANDS, distclass=NativeDistribution)
