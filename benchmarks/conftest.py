"""Options of single rows under pytest-benchmark: ``python -m pytest benchmarks -k NAME``."""

import pytest
import torch

from .workload import DEVICES
from .workloads import rows_on


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-margins benchmarks")
    group.addoption("--device", choices=DEVICES, default="cpu", help="to measure on; it decides the sizes")
    group.addoption("--large", action="store_true", help="also the rows that take minutes or gigabytes")
    group.addoption("--threads", type=int, help="that torch, and so everybody, may use (default: torch's own choice)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: no GPU is at hand")
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    # A peer's warnings are its own business: as errors they would take its figure away.
    config.addinivalue_line("filterwarnings", "default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every implementation of every row of the device."""
    if {"row", "implementation"} <= set(metafunc.fixturenames):
        rows = rows_on(metafunc.config.getoption("--device"))
        metafunc.parametrize(
            ("row", "implementation"),
            [
                pytest.param(row, implementation, id=f"{row.id}-{implementation.name.replace(' ', '_')}")
                for row in rows
                if metafunc.config.getoption("--large") or not row.size.large
                for implementation in row.implementations
            ],
        )
