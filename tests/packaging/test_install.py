"""What an installation does without a compiler, and with a choice of build; the import without a native module."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import setuptools

import fused_margins

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fused_margins.__file__).parent


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "", "FUSED_MARGINS_BUILD": "auto", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_compiler_it_installs_and_says_why(tmp_path):
    result = build(tmp_path, CXX="no-such-compiler")
    assert result.returncode == 0
    assert "installs without its C++ kernels: no C++ compiler found (looked for no-such-compiler)" in result.stderr
    assert "no C++ compiler found" in (tmp_path / "fused_margins/native_build_failure.txt").read_text()


def test_insisting_on_the_build_fails_without_a_compiler(tmp_path):
    result = build(tmp_path, CXX="no-such-compiler", FUSED_MARGINS_BUILD="cpu")
    assert result.returncode != 0
    assert "no C++ compiler found" in result.stderr


def test_a_build_can_be_declined(tmp_path):
    assert build(tmp_path, FUSED_MARGINS_BUILD="none").returncode == 0
    assert "FUSED_MARGINS_BUILD=none" in (tmp_path / "fused_margins/native_build_failure.txt").read_text()


def test_an_unknown_build_is_an_error(tmp_path):
    result = build(tmp_path, FUSED_MARGINS_BUILD="gpu")
    assert result.returncode != 0
    assert "FUSED_MARGINS_BUILD: expected auto, cpu, cuda or none, got 'gpu'" in result.stderr


@pytest.fixture
def setup_py(monkeypatch) -> dict[str, Any]:
    """Its functions; nothing is set up."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("version", "expected"),
    [(None, False), ("cuda: Optional[str] = None\nhip = '6.3'", False), ("debug = False\ncuda: str = '12.8'", True)],
)
def test_cuda_is_built_beside_a_torch_that_is(setup_py, tmp_path, monkeypatch, version, expected):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    if version:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/version.py").write_text(version)
    assert setup_py["torch_is_built_for_cuda"]() == expected


@pytest.mark.skipif(sys.platform == "win32", reason="makes a script of the shell")
def test_cuda_is_built_for_the_gpus_that_are_here(setup_py, tmp_path, monkeypatch):
    monkeypatch.delenv("FUSED_MARGINS_CUDA_ARCHS", raising=False)
    for program, prints in (("nvidia-smi", "9.0\\n8.6\\n9.0\\n[N/A]"), ("nvcc", "compute_80\\ncompute_90")):
        (tmp_path / program).write_text(f"#!/bin/sh\nprintf '{prints}\\n'\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    of_nvcc = partial(setup_py["architecture_flags"], str(tmp_path / "nvcc"))
    assert of_nvcc() == ["-gencode=arch=compute_86,code=sm_86", "-gencode=arch=compute_90,code=sm_90"]
    monkeypatch.setenv("FUSED_MARGINS_CUDA_ARCHS", "80")
    assert of_nvcc() == ["-gencode=arch=compute_80,code=sm_80"]
    monkeypatch.delenv("FUSED_MARGINS_CUDA_ARCHS")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    assert of_nvcc()[-1] == "-gencode=arch=compute_90,code=compute_90"


def import_without_native(folder: Path, reason: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` on a copy of the package that has no native module, for the given reason."""
    shutil.copytree(PACKAGE, folder / "fused_margins", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    (folder / "fused_margins/native_build_failure.txt").write_text(reason)
    # -S: no .pth file, so that an editable installation does not lend its native module.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), sysconfig.get_path("purelib")])}
    return subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_without_the_native_module_one_warning_and_the_reference(tmp_path):
    code = """
import torch, fused_margins
x, w, y = torch.eye(3), torch.eye(3), torch.arange(3)
print(fused_margins.functional.margin_softmax_loss(x, w, y, scale=4.0).item())
fused_margins.explain("contrast", rows=3, columns=3, width=3)
try:
    fused_margins.functional.margin_softmax_loss(x, w, y, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    result = import_without_native(tmp_path, "no C++ compiler found (looked for g++)", code)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("RuntimeWarning") == 1
    assert "without the C++ kernels: no C++ compiler found (looked for g++)" in result.stderr
    assert "* reference" in result.stdout
    assert "backend 'cpu' cannot run this contrast: no C++ compiler found" in result.stdout


def test_a_declined_build_does_not_warn_and_imports_are_light(tmp_path):
    # The package needs torch and numpy alone; what the help of the command adds is checked as quickly.
    code = """
import sys
import fused_margins
heavy = {"sklearn", "scipy", "matplotlib", "torch._inductor.compile_fx", "torch.distributed.tensor"}
found = (heavy | {"rich", "pydantic"}) & set(sys.modules)
assert not found, found
import fused_margins.fewshot.cli
found = heavy & set(sys.modules)
assert not found, found
"""
    result = import_without_native(tmp_path, "built with FUSED_MARGINS_BUILD=none", code)
    assert (result.returncode, result.stderr) == (0, "")
