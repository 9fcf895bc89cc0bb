"""The choice of backend: by device, by name, by environment; never a silent substitute."""

import os
import subprocess
import sys

import pytest
import torch

import shapo_kernels as sk


def test_reference_is_always_available_and_can_be_asked_for():
    assert "reference" in sk.backends.available()
    default = sk.backends.serving("cpu")
    with sk.backends.use("reference"):
        assert sk.backends.serving("cpu") == sk.backends.serving("cuda") == "reference"
    assert sk.backends.serving("cpu") == default


def test_an_unknown_or_unavailable_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'tpu'"), sk.backends.use("tpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not available"), sk.backends.use("cuda"):
            pass


def test_a_backend_is_put_back_after_an_exception():
    before = sk.backends.serving("cpu")
    with pytest.raises(KeyError), sk.backends.use("reference"):
        raise KeyError
    assert sk.backends.serving("cpu") == before


@pytest.mark.parametrize(("value", "expected"), [("reference", "reference"), ("tpu", "unknown backend 'tpu'")])
def test_the_environment_names_a_backend(value, expected):
    code = "import shapo_kernels as sk\ntry: print(sk.backends.serving('cpu'))\nexcept ValueError as e: print(e)"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={"SHAPO_BACKEND": value, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert expected in printed


def test_the_diagnosis_survives_an_unknown_backend():
    environment = {**os.environ, "SHAPO_BACKEND": "nope"}
    run = subprocess.run([sys.executable, "-m", "shapo_kernels"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0
    assert "cpu  is served by  nothing: unknown backend 'nope': choose one of reference," in run.stdout


def test_the_cpu_backend_serves_no_other_device():
    if "cpu" not in sk.backends.available():
        pytest.skip("the CPU library is not built")
    with sk.backends.use("cpu"), pytest.raises(ValueError, match="cannot serve tensors on 'meta'"):
        sk.ops.column_cosine(torch.empty(2, 2, device="meta"), torch.empty(2, device="meta"))


def test_importing_needs_neither_triton_nor_the_libraries_nor_transformers():
    code = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'datasets', 'safetensors', 'numpy_missing'): sys.modules[name] = None\n"
        "import shapo_kernels as sk, torch\n"
        "with sk.backends.use('reference'):\n"
        "    print(sk.ops.column_cosine(torch.eye(2), torch.ones(2)).tolist())\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("[0.70")
