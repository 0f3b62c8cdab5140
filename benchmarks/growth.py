"""How cost grows: ``python -m benchmarks.growth`` measures every series, draws it, and stores both.

A series is a workload at sizes that grow in one number. Its rows are measured as all others (``rows.py``), from the
smallest on; a contestant that would need more than the patience or the memory at the next size, by what it took at the
last ones, leaves. Rows are stored one by one: an interrupted run goes on from there.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from fused_margins.fewshot.plots import COLOURS, MARKERS, panels_of, save
from fused_margins.fewshot.tables import Table
from fused_margins.fewshot.terminal import progress, say

from . import results
from .machine import Machine, RunsWith, this_machine
from .results import Figure, Results, ResultsError, RowResult
from .rows import measure
from .workload import Series
from .workloads import SERIES

FOLDER = results.FOLDER / "growth"
FITTED = 4  # the largest sizes, where what a call costs in any case no longer shows
GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What a contestant may take for one call."""

    seconds: float
    memory_bytes: float


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """p of cost ~ size^p, fitted by least squares in logarithms to the FITTED largest sizes; None for fewer than two.

    >>> round(exponent([10, 20, 40, 80, 160], [900, 40, 160, 640, 2560]), 6)
    2.0
    """
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes[-FITTED:]), np.log(costs[-FITTED:]), 1)[0])


def expected(points: Sequence[tuple[float, float]], size: float) -> float:
    """The cost at a larger size, by the exponent between the last two points, but at least 1; 0 where there is none.

    >>> expected([(10, 1.0), (20, 4.0)], 40)
    16.0
    """
    if not points:
        return 0.0
    last, cost = points[-1]
    power = 1.0
    if len(points) > 1 and min(points[-2][1], cost) > 0:
        power = max(power, math.log(cost / points[-2][1]) / math.log(last / points[-2][0]))
    return cost * (size / last) ** power


def measured(series: Series, rows: Mapping[str, RowResult], contestant: str) -> list[tuple[int, Figure]]:
    """The sizes at which the contestant has a figure."""
    found = []
    for value, row in zip(series.values, series.rows):
        figures = [f for f in rows[row.id].figures if f.contestant == contestant] if row.id in rows else []
        found += [(value, figure) for figure in figures if figure.median_s is not None]
    return found


def _points(figures: Sequence[tuple[int, Figure]], cost: str) -> list[tuple[float, float]]:
    """(size, cost) where there is a cost above 0, `cost` being a figure's field."""
    return [(value, float(getattr(f, cost))) for value, f in figures if (getattr(f, cost) or 0) > 0]


def leaving(series: Series, rows: Mapping[str, RowResult], size: int, limits: Limits) -> dict[str, str]:
    """Who does not take part at `size`, and why: contestant -> reason."""
    reasons = {}
    for contestant in series.workload.contestants:
        figures = measured(series, rows, contestant.name)
        seconds = expected(_points(figures, "median_s"), size)
        memory = expected(_points(figures, "extra_memory_bytes"), size)
        if seconds > limits.seconds:
            reasons[contestant.name] = f"about {seconds:.0f} s expected"
        elif memory > limits.memory_bytes:
            reasons[contestant.name] = f"about {memory / GIB:.0f} GiB expected"
    return reasons


def run(series: Sequence[Series], folder: Path, limits: Limits, seconds_each: float) -> Results:
    """Measure what is not stored yet at this commit, and store it."""
    machine, runs_with = this_machine(), RunsWith.now()
    if not isinstance(machine, Machine):
        raise ResultsError("the growth of cost is measured on a CPU")
    path = folder / machine.file
    stored = results.read(path).rows if path.exists() else []
    current = {row.id: row for row in stored if row.runs_with.commit == runs_with.commit}
    with progress("growth", total=sum(len(s.rows) for s in series), unit="rows") as advance:
        for one in series:
            for value, row in zip(one.values, one.rows):
                if row.id not in current:
                    reasons = leaving(one, current, value, limits)
                    result, _ = measure(row, seconds_each, runs_with, frozenset(reasons), limits.seconds)
                    for figure in result.figures:
                        figure.reason = reasons.get(figure.contestant, figure.reason)
                        if figure.red:
                            raise ResultsError(f"{figure.contestant} does not compute {row.id}: {figure.reason}")
                    results.store(folder, machine, result)
                    current[row.id] = result
                advance()
    return results.read(path)


def draw(series: Series, rows: Mapping[str, RowResult], path: Path) -> None:
    """Time and memory against the size, both axes logarithmic, a line a contestant."""
    figure, grid = panels_of(2, 5.2, 4.0, columns=2)
    costs = (("median_s", 1e3, "milliseconds a call"), ("extra_memory_bytes", 2.0**-20, "extra memory, MiB"))
    shown = [c for c in series.workload.contestants if measured(series, rows, c.name)]
    for axes, (cost, unit, label) in zip(grid, costs):
        for number, contestant in enumerate(shown):
            points = _points(measured(series, rows, contestant.name), cost)
            if points:
                axes.loglog(
                    *zip(*((size, unit * value) for size, value in points)),
                    marker=MARKERS[number % len(MARKERS)],
                    color=COLOURS[number % len(COLOURS)],
                    linewidth=2.4 if contestant.backend else 1.2,
                    label=f"ours: {contestant.name}" if contestant.backend else contestant.name,
                )
        axes.set(xlabel=series.axis, ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save(figure, path)


def table(series: Series, rows: Mapping[str, RowResult]) -> Table:
    """A row a contestant: exponents, what it took at the largest size that it reached, and why it went no further."""
    cells = []
    last = rows[series.rows[-1].id]
    for contestant in series.workload.contestants:
        figures = measured(series, rows, contestant.name)
        if not figures:
            continue
        size, largest = figures[-1]
        powers = []
        for cost in ("median_s", "extra_memory_bytes"):
            points = _points(figures, cost)
            power = exponent(*zip(*points)) if points else None
            powers.append("—" if power is None else f"{power:.2f}")
        memory = largest.extra_memory_bytes
        cells.append(
            [
                f"ours: {contestant.name}" if contestant.backend else contestant.name,
                *powers,
                f"{size:,}",
                f"{1e3 * (largest.median_s or 0):.3g}",
                "—" if memory is None else f"{memory / 2**20:.1f}",
                last.figure(contestant.name).reason or "the end",
            ]
        )
    columns = ["", "time ~ size^", "memory ~ size^", f"largest {series.axis}", "ms there", "MiB there", "stopped by"]
    sizes = f"{series.workload.symbols} from {series.rows[0].size.text} to {series.rows[-1].size.text}"
    return Table(f"{series.workload.title}; {sizes}, float32", columns, cells)


def render(folder: Path = FOLDER, series: Sequence[Series] = SERIES, beside: Path = results.FOLDER.parents[1]) -> str:
    """The README's region: tables and pictures of every machine; paths are relative to `beside`."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        stored = results.read(path)
        rows = {row.id: row for row in stored.rows}
        complete = [one for one in series if all(row.id in rows for row in one.rows)]
        if complete:
            runs = dict.fromkeys(f"{row.date[:10]}, commit {row.runs_with.commit}" for row in stored.rows)
            parts.append(f"{stored.machine}. Measured {'; '.join(runs)}.")
        for one in complete:
            picture = path.with_name(f"{path.stem}-{one.name}.png").relative_to(beside)
            parts += [
                table(one, rows).markdown(),
                f"![Time and memory of {one.workload.name} against the {one.axis}.]({picture})",
            ]
    return "\n\n".join(parts) if parts else "Not measured yet."


def main(
    output: Path = FOLDER,
    threads: int | None = None,
    patience: float = 3.0,
    memory_gib: float = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB / 3,
    seconds: float = 0.3,
) -> None:
    """Measure how cost grows, on a CPU.

    Args:
        output: folder of results and pictures.
        threads: that torch, and so everybody, may use; by default torch's own choice.
        patience: seconds that a call may take.
        memory_gib: that a call may add at its peak; by default a third of the machine's.
        seconds: time for each contestant's turns.
    """
    if threads:
        torch.set_num_threads(threads)
    try:
        stored = run(SERIES, output, Limits(patience, memory_gib * GIB), seconds)
    except ResultsError as error:
        sys.exit(f"error: {error}")
    rows = {row.id: row for row in stored.rows}
    for one in SERIES:
        path = output / f"{stored.machine.kind}-{one.name}.png"
        draw(one, rows, path)
        say(f"drawn: {path}")


if __name__ == "__main__":
    tyro.cli(main)
