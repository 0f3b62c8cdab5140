"""``python -m benchmarks``: measure rows, all implementations of each in turns, and store them."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

# Inductor's own worker processes would compete with whoever takes a turn.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

from . import growth as series
from . import results
from .machine import RunsWith, this_machine
from .peak import peak_gflops
from .rows import measure
from .workloads import SERIES, rows_on


def main(
    names: Sequence[str] = (),
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
    large: bool = False,
    seconds: float = 0.3,
    output: Path = results.FOLDER,
    without: Sequence[str] = (),
    growth: bool = False,
) -> None:
    """Measure rows and store them; the arguments are the command's, see `_options`."""
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
    peak = peak_gflops(torch.get_num_threads()) if device == "cpu" else None
    machine, runs_with, wrong = this_machine(device), RunsWith.now(device, peak), 0
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure rows and store them.")
    add = parser.add_argument
    add("names", nargs="*", help="texts that the name of a row must hold one of, such as magnet; none: every row")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="to measure on; it decides the sizes")
    add("--threads", type=int, help="that torch, and so everybody, may use; by default torch's own choice")
    add("--large", action="store_true", help="also the rows that take minutes or gigabytes")
    add("--seconds", type=float, default=0.3, help="time for each implementation's turns (default: %(default)s)")
    add("--output", type=Path, default=results.FOLDER, help="folder of the results files")
    of_without = "leave out an implementation (torch.compile takes seconds to compile) or the memory; stores nothing"
    add("--without", action="append", default=[], metavar="NAME", help=of_without)
    add("--growth", action="store_true", help="how cost grows with the size, on a CPU, instead of rows")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(**vars(_options()))
    except results.ResultsError as error:
        sys.exit(f"error: {error}")
