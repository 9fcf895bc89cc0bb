"""How the package is built: where torch is found, what a build asks for, what it does where something is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture
def native_build(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import native_build

    for name in ("SHAPO_TORCH", "SHAPO_CUDA", "VIRTUAL_ENV", "CXX", "CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return native_build


@pytest.fixture
def build_backend(native_build):
    import build_backend

    return build_backend


def install_torch(site_packages: Path, version: str) -> Path:
    folder = site_packages / "torch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('torch was imported')")
    (folder / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ncuda: Optional[str] = None\n"
    )
    return folder


def isolate(monkeypatch, native_build, purelib: Path):
    """As in pip's build isolation: nothing importable, the target's own paths in sysconfig."""
    monkeypatch.setattr(native_build, "_importable_torch", lambda: iter(()))
    monkeypatch.setattr(native_build, "_sees_system_packages", lambda: False)
    real = native_build.sysconfig.get_path

    def get_path(name, *arguments, vars=None):
        if vars is not None:
            return str(Path(vars["base"], "site-packages"))
        return str(purelib) if name in ("purelib", "platlib") else real(name)

    monkeypatch.setattr(native_build.sysconfig, "get_path", get_path)


def test_the_targets_torch_is_found_from_an_isolated_build_and_no_other_is_asked_for(
    monkeypatch, tmp_path, native_build, build_backend
):
    folder = install_torch(tmp_path, "2.13.0+cpu")
    isolate(monkeypatch, native_build, tmp_path)
    assert native_build.find_torch() == folder
    assert not any("torch" in requirement for requirement in build_backend.get_requires_for_build_wheel())


@pytest.mark.parametrize("version", [None, "2.9.1", "1.13.0+cu117"])
def test_torch_is_asked_for_where_there_is_none_new_enough(monkeypatch, tmp_path, native_build, build_backend, version):
    if version:
        install_torch(tmp_path, version)
    isolate(monkeypatch, native_build, tmp_path)
    monkeypatch.setattr(native_build, "find_compiler", lambda: "/usr/bin/c++")
    assert native_build.find_torch() is None
    assert "torch>=2.10" in build_backend.get_requires_for_build_wheel()
    assert "torch>=2.10" in build_backend.get_requires_for_build_editable()


def test_an_activated_environment_is_the_target_of_front_ends_that_build_in_their_own(
    monkeypatch, tmp_path, native_build
):
    folder = install_torch(tmp_path / "active" / "site-packages", "2.10.0")
    isolate(monkeypatch, native_build, tmp_path / "build-environment")
    assert native_build.find_torch() is None
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "active"))
    assert native_build.find_torch() == folder


def test_shapo_torch_names_the_torch_and_nothing_else_is_looked_at(monkeypatch, tmp_path, native_build):
    install_torch(tmp_path / "other", "2.13.0")
    isolate(monkeypatch, native_build, tmp_path / "other")
    folder = install_torch(tmp_path / "named", "2.11.0")
    monkeypatch.setenv("SHAPO_TORCH", str(folder))
    assert native_build.find_torch() == folder


def test_nothing_is_asked_for_where_nothing_can_be_compiled(monkeypatch, tmp_path, native_build, build_backend):
    isolate(monkeypatch, native_build, tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build_backend._native_requires() == []


def test_the_build_imports_neither_torch_nor_the_package():
    code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import build_backend; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert not {"torch", "numpy", "shapo_kernels", "shapo"} & set(modules.split())


def test_without_a_compiler_the_build_says_so_once_and_leaves_no_library(monkeypatch, tmp_path, native_build, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    stale = tmp_path / "libshapo_cpu.so"
    stale.touch()
    native_build.build_libraries(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "no C++ compiler found" in said[0]
    assert not stale.exists()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [("SHAPO_CUDA", "yes", "SHAPO_CUDA is 'yes'"), ("SHAPO_CUDA", "1", "nvcc is neither on PATH")],
)
def test_what_cannot_be_built_is_refused_in_one_line(monkeypatch, tmp_path, native_build, variable, value, message):
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(native_build.SetupError, match=message) as caught:
        native_build.build_libraries(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_version_stands_in_one_place():
    import shapo_kernels

    assert 'version = { attr = "shapo_kernels.__version__" }' in (ROOT / "pyproject.toml").read_text()
    assert shapo_kernels.__version__ not in (ROOT / "CMakeLists.txt").read_text() + (ROOT / "setup.py").read_text()


def test_python_m_shapo_kernels_tells_what_is_here():
    import torch

    run = subprocess.run(
        [sys.executable, "-m", "shapo_kernels"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.stderr == ""
    words = [line.split() for line in run.stdout.splitlines()]
    told = {line[0]: line[1] for line in words}
    assert told["torch"] == torch.__version__
    assert {"shapo-kernels", "python", "triton", "backends"} <= told.keys()
    assert "reference" in run.stdout
