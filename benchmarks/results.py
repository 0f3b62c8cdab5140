"""Stored results: one JSON file a machine, a row a line; a new measurement of a row takes the place of the old.

A figure is ``[median in microseconds, interquartile range in microseconds, extra bytes of memory or null]``, or a text
that says why there is none. Rows name the run (date, commit, versions) that they are of by its number in ``runs``.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from .machine import Machine, RunsWith

FOLDER = Path(__file__).parent / "results"
WRONG = "wrong: "


class ResultsError(Exception):
    """A results file that cannot be read or must not be written."""


@dataclass
class Figure:
    """One implementation at a row. Without a figure, `reason` says why; it begins with WRONG where the correctness
    check failed."""

    median_s: float | None = None
    iqr_s: float | None = None
    memory_bytes: int | None = None
    reason: str = ""

    @property
    def wrong(self) -> bool:
        return self.reason.startswith(WRONG)


@dataclass
class RowResult:
    """All implementations of a row, and what they ran with."""

    workload: str
    case: str
    size: str
    dtype: str
    runs_with: RunsWith
    figures: dict[str, Figure]

    @property
    def id(self) -> str:
        return "-".join((self.workload, self.case, self.size.replace(" ", ""), self.dtype))


@dataclass
class Results:
    """A results file."""

    machine: Machine
    rows: list[RowResult]


def read(path: Path) -> Results:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        runs = [RunsWith(**run) for run in stored["runs"]]
        rows = []
        for row in stored["rows"]:
            figures = {name: _from_json(value) for name, value in row.pop("figures").items()}
            rows.append(RowResult(runs_with=runs[row.pop("run")], figures=figures, **row))
        return Results(Machine(**stored["machine"]), rows)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ResultsError(f"{path}: not a results file: {type(error).__name__}: {error}") from None


def _from_json(value: str | list) -> Figure:
    if isinstance(value, str):
        return Figure(reason=value)
    median, iqr, memory = value
    return Figure(median / 1e6, iqr / 1e6, memory)


def _to_json(figure: Figure) -> str | list:
    if figure.median_s is None or figure.iqr_s is None:
        return figure.reason
    return [float(f"{1e6 * figure.median_s:.6g}"), float(f"{1e6 * figure.iqr_s:.3g}"), figure.memory_bytes]


def write(path: Path, results: Results) -> None:
    runs: list[RunsWith] = []
    rows = []
    for r in results.rows:
        if r.runs_with not in runs:
            runs.append(r.runs_with)
        row = {"workload": r.workload, "case": r.case, "size": r.size, "dtype": r.dtype}
        figures = {name: _to_json(figure) for name, figure in r.figures.items()}
        rows.append(row | {"run": runs.index(r.runs_with), "figures": figures})
    write_lines(path, {"machine": asdict(results.machine)}, {"runs": [asdict(run) for run in runs], "rows": rows})


def write_lines(path: Path, values: dict, lists: dict[str, list]) -> None:
    """A JSON object with an entry of a list a line: short, and a change shows as the lines that it is."""

    def dump(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    parts = [f"{dump(key)}:{dump(value)}" for key, value in values.items()]
    parts += [f"{dump(key)}:[\n" + ",\n".join(map(dump, entries)) + "\n]" for key, entries in lists.items()]
    write_text(path, "{" + ",\n".join(parts) + "}\n")


def store(folder: Path, machine: Machine, row: RowResult) -> Path:
    """Put `row` into the machine's file, in place of the same row of an earlier run."""
    path = folder / f"{machine.kind}.json"
    results = read(path) if path.exists() else Results(machine, [])
    if results.machine != machine:
        raise ResultsError(f"{path}: measured on another machine ({results.machine}), this is {machine}")
    known = [r.id for r in results.rows]
    if row.id in known:
        results.rows[known.index(row.id)] = row
    else:
        results.rows.append(row)
    write(path, results)
    return path


def write_text(path: Path, text: str) -> None:
    """The whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
