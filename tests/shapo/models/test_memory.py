"""What glibc does with freed blocks, counted in page faults of a process of its own."""

import os
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from shapo.models.memory import keep_freed_memory
print(keep_freed_memory())
torch.set_num_threads(1)
for _ in range(24):  # aligned blocks do not fit their own holes: the heap grows until holes have joined
    torch.ones(16, 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(16, 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
FAULTS = 8 * 16 * 2**22 // 4096  # of eight blocks of 64 MiB, mapped anew each time in pages of 4 KiB


def run(**environment):
    given = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**given, **environment}, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="glibc"
)
def test_kept_memory_is_used_again_without_page_faults():
    kept, faults = run()
    returned, faults_before = run(SHAPO_RETURN_MEMORY="1")
    assert (kept, returned) == (True, False)
    assert faults < 0.02 * faults_before
    assert faults < 0.02 * FAULTS


def test_a_setting_of_ones_own_is_left_alone():
    assert run(MALLOC_TRIM_THRESHOLD_="100000")[0] is False
