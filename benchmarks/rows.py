"""One row, measured: the gate, the turns, the memory."""

from datetime import datetime, timezone

import torch

from . import memory
from .machine import RunsWith
from .results import Figure, RowResult
from .timing import Times, take_turns
from .workload import Contestant, Inputs, Judge, Row, Step

MEMORY = "memory"  # among the names in `without`: no peak memory


def measure(
    row: Row, seconds_each: float, runs_with: RunsWith, without: frozenset[str] = frozenset()
) -> tuple[RowResult, dict[str, Times]]:
    """The row's result, and the times of every contestant that passed the gate; `without` leaves some out."""
    torch.compiler.reset()  # compiled for the shapes of this row alone, however many rows came before
    inputs = row.inputs()
    judge = row.workload.judge(inputs)
    figures, steps = {}, {}
    for contestant in row.workload.contestants:
        figure = Figure(contestant=contestant.name, ours=contestant.backend is not None, note=contestant.note)
        figures[contestant.name] = figure
        figure.reason = "left out" if contestant.name in without else contestant.refuses(inputs) or ""
        if figure.reason:
            continue
        step, faults = _through_gate(contestant, inputs, judge)
        if step is None:
            figure.red, figure.reason = True, faults
        else:
            steps[contestant.name] = step

    times = take_turns(steps, seconds_each)
    baseline = times.get(row.workload.baseline)
    for name, taken in times.items():
        figure = figures[name]
        figure.median_s, figure.quartiles_s = taken.median, taken.quartiles
        figure.rounds, figure.calls_per_turn = len(taken.seconds), taken.calls_per_turn
        figure.speedup = None if baseline is None else baseline.median / taken.median
        if MEMORY not in without and memory.available():
            figure.extra_memory_bytes = memory.measure_in_child(row.id, name)
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


def _through_gate(contestant: Contestant, inputs: Inputs, judge: Judge) -> tuple[Step | None, str]:
    """The contestant's step, or None and what is wrong with it."""
    try:
        step = contestant.step(inputs)
        faults = judge(contestant, step())
    except Exception as error:  # whatever a contestant raises is its failure, not the harness's
        text = str(error).strip() or "no message"
        return None, f"{type(error).__name__}: {text.splitlines()[0]}"
    return (None, "; ".join(faults)) if faults else (step, "")
