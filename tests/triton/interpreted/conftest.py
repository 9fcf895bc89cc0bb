"""These tests run the Triton kernels in Triton's interpreter, which must be chosen before triton is imported.

So they have a process of their own, which tests/triton/test_interpreter.py starts; others pass over them.
"""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]


@pytest.fixture(autouse=True)
def triton_backend():
    from shapo_kernels import backends

    with backends.use("triton"):
        yield
