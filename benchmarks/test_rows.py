"""Single rows, timed live by pytest-benchmark, one after another; python -m benchmarks compares them in turns."""

from typing import Any

import pytest
import torch

from .results import WRONG
from .rows import checked
from .timing import waiting_for
from .workload import Implementation, Row


def test_implementation(row: Row, implementation: Implementation, benchmark: Any) -> None:
    benchmark.group = row.id
    torch.compiler.reset()
    inputs = row.inputs()
    if reason := row.refusal(implementation, inputs):
        pytest.skip(reason)
    step, reason = checked(implementation, inputs, row.workload.check(inputs))
    if step is None:
        (pytest.fail if reason and reason.startswith(WRONG) else pytest.skip)(reason or "the backend is not here")
    wait = waiting_for(row.device)
    benchmark(step if wait is None else lambda: (step(), wait()))
