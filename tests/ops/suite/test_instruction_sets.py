"""Every instruction set that this machine has, and memory that the kernels may not touch: in processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fused_margins.backends import cpu
from tests.forks import Forked, runs_backward
from tests.ops.suite import guard_pages
from tests.ops.suite.levels import LEVELS

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _needs_cpu(device_for):
    device_for("contrast", "cpu")


def test_parity_on_every_instruction_set():
    """But for the one that all other tests run on; those that this processor does not have are named as such."""
    others = [level for level, name in LEVELS.items() if name != cpu.module.instruction_set()]
    # glibc then fills what malloc returns with 0x7f: uninitialised numbers are 3.4e38, never zero by luck.
    environment = os.environ | {"MALLOC_PERTURB_": "128", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.suite.levels", *others, "v9"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    refused = "FUSED_MARGINS_ISA: this processor does not have"
    *found, unknown = run.stdout.splitlines()
    assert unknown == "v9: FUSED_MARGINS_ISA: expected baseline, v3, v4, v4-bf16 or amx, got v9"
    for level, line in zip(others, found, strict=True):
        assert line in (f"{level}: done", f"{level}: {refused} {level}"), run.stdout


@runs_backward
@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages with mprotect")
@pytest.mark.parametrize("side", ["after", "before"])
def test_nothing_is_read_beyond_a_tensor(side):
    assert Forked(guard_pages.run_cases, side).result(300) == (0, "done\n")


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages with mprotect")
def test_a_read_beyond_a_tensor_would_be_seen():
    code, printed = Forked(guard_pages.stray).result()
    assert printed.startswith("b'\\x00\\x00\\x80?"), printed  # the numbers themselves can be read
    assert code == -signal.SIGSEGV
