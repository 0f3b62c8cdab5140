"""Options of single rows under pytest-benchmark: ``python -m pytest benchmarks -k NAME``."""

import pytest
import torch

from .workload import DEVICES
from .workloads import rows_on


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-margins benchmarks")
    group.addoption("--device", choices=DEVICES, default="cpu", help="to measure on; it decides the sizes")
    group.addoption("--large", action="store_true", help="also the rows that take minutes or gigabytes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: no GPU is at hand")
    # A peer's warnings are its own business: as errors they would take its figure away.
    config.addinivalue_line("filterwarnings", "default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every implementation of every row of the device."""
    large, device = metafunc.config.getoption("--large"), metafunc.config.getoption("--device")
    rows = [row for row in rows_on(device) if large or not row.size.large]
    pairs = [(row, implementation) for row in rows for implementation in row.implementations]
    ids = [f"{row.id}-{implementation.name.replace(' ', '_')}" for row, implementation in pairs]
    if {"row", "implementation"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("row", "implementation"), pairs, ids=ids)
