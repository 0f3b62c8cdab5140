"""The CUDA sources without a GPU: compiled for every architecture without warnings or spills; the module imports."""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("csrc/*/cuda.cu"))
FLAGS = ["-std=c++17", "-O3", "--cubin", "-Werror", "all-warnings", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def resources(source: Path, arch: int, output: Path) -> list[tuple[int, int]]:
    """Registers of a thread and bytes of its stack, spills among them, of every kernel."""
    command = ["nvcc", *FLAGS, "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-o", str(output), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    stacks = [int(n) for n in re.findall(r"(\d+) bytes stack frame", run.stderr)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", run.stderr)]
    assert len(stacks) == len(registers) > 0
    return list(zip(registers, stacks))


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_compiles_without_spills(source, arch, tmp_path, record_property):
    kernels = resources(source, arch, tmp_path / "out.cubin")
    record_property("registers", [registers for registers, _ in kernels])
    assert [stack for _, stack in kernels] == [0] * len(kernels)


@needs_nvcc
def test_a_spill_is_seen(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void spills(float* out, int n) {\n"
        "  float local[512];\n"
        "  for (int i = 0; i < 512; ++i) local[i] = out[i];\n"
        "  out[0] = local[n % 512];\n"
        "}\n"
    )
    ((_, stack),) = resources(source, 90, tmp_path / "out.cubin")
    assert stack > 0


def test_the_module_imports_without_a_driver():
    if not list((ROOT / "fused_margins").glob("_CUDA*.so")):
        pytest.skip("built without CUDA")
    module = importlib.import_module("fused_margins._CUDA")
    assert hasattr(module, "contrast_forward")
