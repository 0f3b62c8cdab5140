"""The driver that `make sanitize` runs covers every kernel; threads share loops as csrc/cpu/team.h says."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DECLARED = re.compile(r"FM(?:_BF16)?_KERNEL\((\w+), (\w+)")


def test_the_driver_calls_every_kernel():
    driver = (ROOT / "tests/native/driver.cpp").read_text()
    kernels = [k for path in ROOT.glob("csrc/*/cpu.h") for k in DECLARED.findall(path.read_text())]
    assert len(kernels) >= 9
    # Called with its arguments as a braced list, of a named type or not.
    assert [name for name, arguments in kernels if not re.search(rf"\b{name}\(\s*(?:{arguments})?\{{", driver)] == []


def test_no_thread_spins_at_a_barrier_of_openmp():
    """Loops are shared by csrc/cpu/team.h: beside other busy processes OpenMP's own take many times as long."""
    pragma = re.compile(r"#pragma omp (?!simd)(.*)")
    found = {(path.name, p) for path in ROOT.glob("csrc/**/*.*") for p in pragma.findall(path.read_text())}
    assert found == {("team.h", "parallel num_threads(threads)")}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_thread_that_is_late_or_slow_holds_nobody_up(tmp_path):
    program = str(tmp_path / "team")
    flags = ["-std=c++17", "-O1", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    subprocess.run(["g++", *flags, str(ROOT / "tests/native/team.cpp"), "-o", program], check=True)
    for threads in ("2", "5"):
        done = subprocess.run(
            [program], env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "passed\n"
