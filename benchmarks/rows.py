"""One row, measured: the correctness check, the turns, the memory."""

import gc
import math
import time
from collections.abc import Mapping
from types import MappingProxyType

import torch

from . import memory
from .machine import RunsWith
from .results import WRONG, Figure, RowResult
from .timing import take_turns, waiting_for
from .workload import Check, Implementation, Inputs, Row, Step

MEMORY = "memory"  # among the names in `without`: no peak memory


def measure(
    row: Row,
    seconds_each: float,
    runs_with: RunsWith,
    without: Mapping[str, str] = MappingProxyType({}),
    patience: float = math.inf,
) -> RowResult:
    """The row's result. `without` leaves some implementations out, and says why; one whose second call takes more than
    `patience` seconds takes no turns."""
    torch.compiler.reset()  # compiled for the shapes of this row alone, however many rows came before
    inputs = row.inputs()
    check = row.workload.check(inputs)
    figures: dict[str, Figure] = {}
    steps: dict[str, Step] = {}
    for implementation in row.implementations:
        name = implementation.name
        reason = without.get(name) or row.refusal(implementation, inputs)
        step, reason = (None, reason) if reason else checked(implementation, inputs, check)
        if step is not None and patience < math.inf:
            start = time.perf_counter()
            step()
            if (seconds := time.perf_counter() - start) > patience:
                step, reason = None, f"{seconds:.0f} s a call"
        if step is not None:
            steps[name] = step
        if step is not None or reason:
            figures[name] = Figure(reason=reason or "")
        _free_memory(row.device)
    del check  # what it compares with is as large as the outputs
    _free_memory(row.device)
    for name, taken in take_turns(steps, seconds_each, wait=waiting_for(row.device)).items():
        figures[name].median_s, figures[name].iqr_s = taken.median, taken.iqr
        if MEMORY not in without:
            figures[name].memory_bytes = _memory_of(name, row, steps[name])
    del steps
    _free_memory(row.device)
    return RowResult(row.id, runs_with, figures)


def checked(implementation: Implementation, inputs: Inputs, check: Check) -> tuple[Step | None, str | None]:
    """The implementation's step; or None and why: WRONG, what else it is, or None for a backend that is not here."""
    try:
        step = implementation.step(inputs)
        outputs = step()
        faults = [] if implementation.lower_bound else check(implementation, outputs)
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except Exception as error:  # whatever an implementation raises is its failure, not the harness's
        if implementation.backend is not None and str(error).startswith(f"backend {implementation.backend!r} cannot"):
            return None, None
        text = str(error).strip() or "no message"
        return None, f"{WRONG}{type(error).__name__}: {text.splitlines()[0]}"
    return (None, WRONG + "; ".join(faults)) if faults else (step, None)


def _memory_of(name: str, row: Row, step: Step) -> int | None:
    if not row.workload.implementation(name).allocates:
        return None
    if row.device == "cuda":
        return memory.peak_growth_on_gpu(step)
    return memory.measure_in_child(row.id, name) if memory.available() else None


def _free_memory(device: str) -> None:
    """Give what nobody holds any more back to the GPU: others do not share what the allocator keeps for one."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
