"""What `make sanitize` builds, which takes minutes, compiles: the driver calls the kernels by their structures."""

import shutil
import subprocess

import pytest

from tests.native.run import FLAGS, ROOT, compiler


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler is at hand")
def test_the_driver_speaks_of_the_kernels_as_they_are():
    source = ROOT / "tests" / "native" / "driver.cpp"
    checked = subprocess.run(
        [compiler(), *FLAGS, "-fopenmp", "-fsyntax-only", str(source)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
