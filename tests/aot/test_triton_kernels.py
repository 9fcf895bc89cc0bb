"""Every Triton kernel compiled ahead of time for GPUs that are not there: within its registers, spilling nothing.

The representative specialisations are compiled here for every target; `SHAPO_AOT=all` compiles all of them, as does
`python -m benchmarks.binaries.table`, whose table in docs/gpu_kernels.md must belong to the kernels as they are.
"""

import importlib
import os
import pkgutil

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from benchmarks.binaries import aot, table

EVERY = os.environ.get("SHAPO_AOT") == "all"
CHOSEN = [spec for spec in aot.specialisations() if EVERY or spec.core]


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_keep_within_their_registers_and_move_wide_where_they_can(target):
    problems = []
    for spec in CHOSEN:
        problems += aot.violations(spec, target, aot.compiled(spec, target, widest=spec.wide))
    assert not problems, "\n".join(problems)


def test_every_kernel_is_among_the_specialisations():
    package = importlib.import_module("shapo_kernels.triton")
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {spec.kernel.__name__ for spec in aot.specialisations()} == kernels
    assert {spec.kernel.__name__ for spec in CHOSEN} == kernels


def test_specialisations_have_names_of_their_own():
    names = [spec.name for spec in aot.specialisations()]
    assert len(names) == len(set(names))


def test_a_spill_and_a_narrow_access_are_noticed():
    spec = next(s for s in aot.specialisations() if s.wide)
    found = aot.violations(spec, "sm_90", aot.Resources(registers=999, shared=0, spills=8, widest=4))
    assert [problem.rpartition(": ")[2] for problem in found] == [
        "8 bytes spilled",
        f"999 registers, {spec.registers} allowed",
        "accesses of 4 bytes, 16 expected",
    ]


def test_the_documented_table_belongs_to_these_kernels():
    document = table.DOCUMENT.read_text()
    assert table.fingerprint() in document, "the kernels have changed: run python -m benchmarks.binaries.table"
    for spec in aot.specialisations():
        assert f"`{spec.kernel.__name__}` | {spec.label} |" in document
