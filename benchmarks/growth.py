"""How cost grows: ``python -m benchmarks --growth`` measures every series and stores it.

A series is a workload at sizes that grow in one number. Its rows are measured as all others (``rows.py``), from the
smallest on; who would need more than the patience or the memory at the next size, by what it took at the last ones,
leaves. Rows are stored one by one: an interrupted run goes on from there.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from . import results
from .machine import RunsWith, this_machine
from .results import Figure, Results, ResultsError, RowResult
from .rows import measure
from .workload import Series

FOLDER = results.FOLDER / "growth"
FITTED = 4  # the largest sizes, where what a call costs in any case no longer shows
GIB = 2**30


PATIENCE_S = 3.0  # that a call may take
MOST_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 3  # that a call may add at its peak


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


def measured(series: Series, rows: Mapping[str, RowResult], name: str) -> list[tuple[int, Figure]]:
    """The sizes at which the implementation has a figure."""
    found = ((v, rows[row.id].figures.get(name)) for v, row in zip(series.values, series.rows) if row.id in rows)
    return [(value, figure) for value, figure in found if figure is not None and figure.median_s is not None]


def points_of(figures: Sequence[tuple[int, Figure]], cost: str) -> list[tuple[float, float]]:
    """(size, cost) where there is a cost above 0, `cost` being a figure's field."""
    return [(value, float(getattr(f, cost))) for value, f in figures if (getattr(f, cost) or 0) > 0]


def leaving(series: Series, rows: Mapping[str, RowResult], size: int) -> dict[str, str]:
    """Who does not take part at `size`, and why: name -> reason."""
    reasons = {}
    for implementation in series.workload.implementations:
        figures = measured(series, rows, implementation.name)
        seconds = expected(points_of(figures, "median_s"), size)
        memory = expected(points_of(figures, "memory_bytes"), size)
        if seconds > PATIENCE_S:
            reasons[implementation.name] = f"about {seconds:.0f} s expected"
        elif memory > MOST_BYTES:
            reasons[implementation.name] = f"about {memory / GIB:.0f} GiB expected"
    return reasons


def run(series: Sequence[Series], folder: Path, seconds_each: float) -> None:
    """Measure what is not stored yet at this commit, and store it."""
    machine, runs_with = this_machine(), RunsWith.now()
    path = folder / f"{machine.kind}.json"
    stored = results.read(path).rows if path.exists() else []
    current = {row.id: row for row in stored if row.runs_with.commit == runs_with.commit}
    for one in series:
        for value, row in zip(one.values, one.rows):
            if row.id in current:
                continue
            print(row.id, flush=True)
            reasons = leaving(one, current, value)
            result = measure(row, seconds_each, runs_with, reasons, PATIENCE_S)
            if wrong := [name for name, figure in result.figures.items() if figure.wrong]:
                raise ResultsError(f"{row.id} is not what these compute: {', '.join(wrong)}")
            results.store(folder, machine, result)
            current[row.id] = result


def complete(stored: Results, series: Sequence[Series]) -> Iterator[tuple[Series, dict[str, RowResult]]]:
    """Series that are stored whole, with their rows."""
    rows = {row.id: row for row in stored.rows}
    yield from ((one, rows) for one in series if all(row.id in rows for row in one.rows))


def draw(series: Series, rows: Mapping[str, RowResult], path: Path) -> None:
    """Time and memory against the size, both axes logarithmic, a line an implementation."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(10.4, 4.0), layout="constrained")
    costs = (("median_s", 1e3, "milliseconds a call"), ("memory_bytes", 2.0**-20, "extra memory, MiB"))
    for axes, (cost, unit, label) in zip(picture.subplots(1, 2), costs):
        for number, implementation in enumerate(series.workload.implementations):
            points = points_of(measured(series, rows, implementation.name), cost)
            if points:
                sizes, values = zip(*points)
                name = f"ours: {implementation.name}" if implementation.backend else implementation.name
                width = 2.4 if implementation.backend else 1.2
                axes.loglog(
                    sizes, [unit * v for v in values], "osD^vPX*"[number % 8] + "-", linewidth=width, label=name
                )
        axes.set(xlabel=series.axis, ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=120)
