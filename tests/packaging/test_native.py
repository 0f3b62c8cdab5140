"""The driver that `make sanitize` runs covers every kernel."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DECLARED = re.compile(r"FM(?:_BF16)?_KERNEL\((\w+), (\w+)")


def test_the_driver_calls_every_kernel():
    driver = (ROOT / "tests/native/driver.cpp").read_text()
    kernels = [k for path in ROOT.glob("csrc/*/cpu.h") for k in DECLARED.findall(path.read_text())]
    assert len(kernels) >= 9
    # Called with its arguments as a braced list, of a named type or not.
    assert [name for name, arguments in kernels if not re.search(rf"\b{name}\(\s*(?:{arguments})?\{{", driver)] == []
