"""The driver that `make sanitize` runs covers every op."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_driver_calls_every_op():
    driver = (ROOT / "tests/native/driver.cpp").read_text()
    ops = [path.parent.name for path in ROOT.glob("csrc/*/cpu.h")]
    assert len(ops) >= 5
    assert [op for op in ops if f"{op}_forward({{" not in driver] == []
