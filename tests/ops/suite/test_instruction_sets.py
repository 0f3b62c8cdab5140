"""Every instruction set that this machine has, and memory that the kernels may not touch: in processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fused_margins.backends import cpu

ROOT = Path(__file__).parents[3]
LEVELS = {
    "baseline": "baseline",
    "v3": "x86-64-v3",
    "v4": "x86-64-v4",
    "v4-bf16": "x86-64-v4 with AVX512_BF16",
    "amx": "x86-64-v4 with AMX",
}
NAME_OF_LEVEL = "from fused_margins.backends import cpu; print(cpu.module.instruction_set())"


def python(*arguments: str, level: str = "") -> subprocess.CompletedProcess[str]:
    # glibc then fills what malloc returns with 0x7f: uninitialised numbers are 3.4e38, never zero by luck.
    environment = os.environ | {"FUSED_MARGINS_ISA": level, "MALLOC_PERTURB_": "128", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(autouse=True)
def _needs_cpu(device_for):
    device_for("contrast", "cpu")


@pytest.mark.parametrize("level", LEVELS)
def test_parity_on_every_instruction_set(level):
    probe = python("-c", NAME_OF_LEVEL, level=level)
    if f"this processor does not have {level}" in probe.stderr:
        pytest.skip(f"this processor does not have {level}")
    assert probe.stdout.strip() == LEVELS[level], probe.stderr
    if probe.stdout.strip() == cpu.module.instruction_set():
        return  # what all other tests run on
    chosen = "(test_parity and cpu) or no_bit_of_a_gradient or forward_saves"
    if level == "v4-bf16":  # v4 but for products of bfloat16
        chosen = f"({chosen}) and not float64 and not float32 and not float16"
    files = [f"tests/ops/suite/test_{name}.py" for name in ("parity", "memory")]
    options = ["-k", chosen, "--require-backends=cpu", "-p", "no:xdist"]
    run = python("-m", "pytest", *files, *options, level=level)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr


def test_an_unknown_instruction_set_is_named():
    run = python("-c", NAME_OF_LEVEL, level="v9")
    assert "FUSED_MARGINS_ISA: expected baseline, v3, v4, v4-bf16 or amx, got v9" in run.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages with mprotect")
@pytest.mark.parametrize("side", ["after", "before"])
def test_nothing_is_read_beyond_a_tensor(side):
    run = python("-m", "tests.ops.suite.guard_pages", side)
    assert run.stdout.strip() == "done", f"exit {run.returncode}\n{run.stderr}"


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages with mprotect")
def test_a_read_beyond_a_tensor_would_be_seen():
    run = python("-m", "tests.ops.suite.guard_pages", "stray")
    assert run.stdout.startswith("b'\\x00\\x00\\x80?"), run.stderr  # the numbers themselves can be read
    assert run.returncode == -signal.SIGSEGV
