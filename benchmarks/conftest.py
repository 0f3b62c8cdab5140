"""Options of a benchmark run, and the fixture that measures each row once and stores it."""

import os
from collections.abc import Callable
from pathlib import Path

# Inductor's own worker processes would compete with whoever takes a turn.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

from . import results
from .machine import RunsWith, this_machine
from .results import RowResult
from .rows import measure
from .timing import Times
from .workload import DEVICES, Row
from .workloads import rows_on

Measure = Callable[[Row], tuple[RowResult, dict[str, Times]]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-margins benchmarks")
    group.addoption(
        "--device", choices=DEVICES, default="cpu", help="to measure on (default cpu); it decides the sizes"
    )
    group.addoption("--large", action="store_true", help="also the rows that take minutes or gigabytes")
    group.addoption("--seconds", type=float, default=0.3, help="time for each contestant's turns (default 0.3)")
    group.addoption("--threads", type=int, help="that torch, and so everybody, may use (default: torch's own choice)")
    group.addoption("--results", type=Path, default=results.FOLDER, help="folder of the results files")
    group.addoption("--dry-run", action="store_true", help="measure and compare, store nothing")
    text = "leave out a contestant (torch.compile takes seconds to compile) or the memory; nothing is stored then"
    group.addoption("--without", action="append", default=[], metavar="NAME", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: no GPU is at hand")
        # A peer's warnings are its own business: as errors they would take its figure away.
        config.addinivalue_line("filterwarnings", "default")
    if not config.pluginmanager.hasplugin("benchmark"):
        config.addinivalue_line(
            "markers", "benchmark: of pytest-benchmark, which is not here: rows are measured all the same"
        )
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    # Inductor imports torch.utils.mkldnn, which still uses what torch itself has deprecated.
    config.addinivalue_line("filterwarnings", r"ignore:`torch\.jit\.script_method`:DeprecationWarning")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every contestant of every row of the device."""
    if {"row", "contestant"} <= set(metafunc.fixturenames):
        metafunc.parametrize(
            ("row", "contestant"),
            [
                pytest.param(row, contestant.name, id=f"{row.id}-{contestant.name.replace(' ', '_')}")
                for row in rows_on(metafunc.config.getoption("--device"))
                for contestant in row.contestants
            ],
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--large"):
        large = [i for i in items if (spec := getattr(i, "callspec", None)) and spec.params["row"].size.large]
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if item not in large]


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Measure:
    """Measures a row when its first contestant comes up, with all of them whoever was selected, and stores it at
    once."""
    device = pytestconfig.getoption("--device")
    machine, runs_with = this_machine(device), RunsWith.now(device)
    seconds, without = pytestconfig.getoption("--seconds"), frozenset(pytestconfig.getoption("--without"))
    storing = not without and not pytestconfig.getoption("--dry-run")
    known: dict[str, tuple[RowResult, dict[str, Times]]] = {}

    def measure_once(row: Row) -> tuple[RowResult, dict[str, Times]]:
        if row.id not in known:
            known[row.id] = measure(row, seconds, runs_with, without)
            if storing:
                results.store(pytestconfig.getoption("--results"), machine, known[row.id][0])
        return known[row.id]

    return measure_once
