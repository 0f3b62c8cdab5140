"""One row, measured: the gate, the turns, the memory."""

import gc
import math
import time
from datetime import datetime, timezone

import torch

from . import memory
from .machine import RunsWith
from .results import Figure, RowResult
from .timing import Times, take_turns, waiting_for
from .workload import Contestant, Inputs, Judge, Row, Step

MEMORY = "memory"  # among the names in `without`: no peak memory


def measure(
    row: Row,
    seconds_each: float,
    runs_with: RunsWith,
    without: frozenset[str] = frozenset(),
    patience: float = math.inf,
) -> tuple[RowResult, dict[str, Times]]:
    """The row's result, and the times of every contestant that passed the gate.

    `without` leaves some out; a contestant whose second call takes more than `patience` seconds takes no turns.
    """
    torch.compiler.reset()  # compiled for the shapes of this row alone, however many rows came before
    inputs = row.inputs()
    judge = row.workload.judge(inputs)
    figures, steps = {}, {}
    for contestant in row.contestants:
        ours = contestant.backend is not None
        figure = Figure(contestant=contestant.name, ours=ours, note=contestant.note, floor=contestant.floor)
        figures[contestant.name] = figure
        figure.reason = "left out" if contestant.name in without else contestant.refuses(inputs) or ""
        if figure.reason:
            continue
        step, figure.reason, figure.red = _through_gate(contestant, inputs, judge)
        if step is not None and patience < math.inf:
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
            if seconds > patience:
                figure.reason, step = f"{seconds:.0f} s a call", None
        if step is not None:
            steps[contestant.name] = step
        _free_memory(row.device)
    del judge  # what it compares with is as large as the outputs
    _free_memory(row.device)

    times = take_turns(steps, seconds_each, wait=waiting_for(row.device))
    baseline = times.get(row.workload.baseline)
    for name, taken in times.items():
        figure = figures[name]
        figure.median_s, figure.quartiles_s = taken.median, taken.quartiles
        figure.rounds, figure.calls_per_turn = len(taken.seconds), taken.calls_per_turn
        figure.speedup = None if baseline is None else baseline.median / taken.median
        if MEMORY not in without:
            figure.extra_memory_bytes = _memory_of(name, row, steps[name])
    del steps
    _free_memory(row.device)
    bytes_of = row.size.compulsory_bytes
    result = RowResult(
        id=row.id,
        workload=row.workload.name,
        title=row.workload.title,
        symbols=row.workload.symbols,
        size_name=row.size.name,
        size=row.size.text,
        dtype=row.dtype_name,
        baseline=row.workload.baseline,
        multiply_adds=row.size.multiply_adds,
        compulsory_bytes=None if bytes_of is None else bytes_of(row.dtype),
        figures=list(figures.values()),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        runs_with=runs_with,
    )
    return result, times


def _through_gate(contestant: Contestant, inputs: Inputs, judge: Judge) -> tuple[Step | None, str, bool]:
    """The contestant's step; or None, why, and whether it is wrong: too much memory is a reason, no error."""
    try:
        step = contestant.step(inputs)
        outputs = step()
        faults = [] if contestant.floor else judge(contestant, outputs)
    except torch.OutOfMemoryError:
        return None, "out of memory", False
    except Exception as error:  # whatever a contestant raises is its failure, not the harness's
        text = str(error).strip() or "no message"
        return None, f"{type(error).__name__}: {text.splitlines()[0]}", True
    return (None, "; ".join(faults), True) if faults else (step, "", False)


def _memory_of(contestant: str, row: Row, step: Step) -> int | None:
    if not row.workload.contestant(contestant).allocates:
        return None
    if row.device == "cuda":
        return memory.peak_growth_on_gpu(step)
    return memory.measure_in_child(row.id, contestant) if memory.available() else None


def _free_memory(device: str) -> None:
    """Give what nobody holds any more back to the GPU: contestants do not share what the allocator keeps for them."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
