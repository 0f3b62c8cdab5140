"""``python -m benchmarks``: measure rows, all implementations of each in turns, and store them."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

# Inductor's own worker processes would compete with whoever takes a turn.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
import tyro

from . import growth as series
from . import results
from .machine import RunsWith, this_machine
from .rows import measure
from .workloads import SERIES, rows_on


def main(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
    large: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    seconds: float = 0.3,
    output: Path = results.FOLDER,
    without: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    growth: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Measure rows and store them.

    Args:
        names: texts that the name of a row must hold one of, such as magnet or 256x512x64-float32; none: every row.
        device: to measure on; it decides the sizes.
        threads: that torch, and so everybody, may use; by default torch's own choice.
        large: also the rows that take minutes or gigabytes.
        seconds: time for each implementation's turns.
        output: folder of the results files.
        without: leave out an implementation (torch.compile takes seconds to compile) or the memory; stores nothing.
        growth: how cost grows with the size, on a CPU, instead of rows.
    """
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: no GPU is at hand")
    if threads:
        torch.set_num_threads(threads)
    if growth:
        return series.run(SERIES, output / "growth", seconds)
    rows = [row for row in rows_on(device) if not names or any(name in row.id for name in names)]
    rows = [row for row in rows if large or not row.size.large]
    if not rows:
        sys.exit(f"error: no row of {device} is named like {', '.join(names)}")
    machine, runs_with, wrong = this_machine(device), RunsWith.now(device), 0
    for row in rows:
        result = measure(row, seconds, runs_with, dict.fromkeys(without, "left out"))
        print(row.id)
        for name, figure in result.figures.items():
            time = "" if figure.median_s is None else f"{1e3 * figure.median_s:.4g} ms"
            print(f"  {name:<34} {time:>12}  {figure.reason}", flush=True)
            wrong += figure.wrong
        if not without:
            results.store(output, machine, result)
    if wrong:
        sys.exit(f"error: {wrong} implementations do not compute their row")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except results.ResultsError as error:
        sys.exit(f"error: {error}")
