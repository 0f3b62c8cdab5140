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
    """All implementations of a row, by the row's name, and what they ran with."""

    id: str
    runs_with: RunsWith
    figures: dict[str, Figure]

    @property
    def labels(self) -> tuple[str, str, str, str]:
        """Workload, case, size and dtype."""
        workload, case, size, dtype = self.id.split("-")
        return workload, case, size.replace("x", " x "), dtype


@dataclass
class Results:
    """A results file."""

    machine: Machine
    rows: list[RowResult]


def read(path: Path) -> Results:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        runs = [RunsWith(**run) for run in stored["runs"]]
        rows = [
            RowResult(row["row"], runs[row["run"]], {name: _from_json(value) for name, value in row["figures"].items()})
            for row in stored["rows"]
        ]
        return Results(Machine(**stored["machine"]), rows)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ResultsError(f"{path}: not a results file: {type(error).__name__}: {error}") from None


def _from_json(value: str | list) -> Figure:
    return Figure(reason=value) if isinstance(value, str) else Figure(value[0] / 1e6, value[1] / 1e6, value[2])


def _to_json(figure: Figure) -> str | list:
    if figure.median_s is None or figure.iqr_s is None:
        return figure.reason
    return [float(f"{1e6 * figure.median_s:.8g}"), float(f"{1e6 * figure.iqr_s:.3g}"), figure.memory_bytes]


def write(path: Path, results: Results) -> None:
    runs: list[RunsWith] = []
    rows = []
    for row in results.rows:
        if row.runs_with not in runs:
            runs.append(row.runs_with)
        figures = {name: _to_json(figure) for name, figure in row.figures.items()}
        rows.append({"row": row.id, "run": runs.index(row.runs_with), "figures": figures})
    lists = {"runs": [asdict(run) for run in runs], "rows": rows}
    parts = ["{" + f'"machine":{_dump(asdict(results.machine))}']
    parts += [f'"{name}":[\n' + ",\n".join(map(_dump, entries)) + "\n]" for name, entries in lists.items()]
    write_text(path, ",\n".join(parts) + "}\n")


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def store(folder: Path, machine: Machine, row: RowResult) -> Path:
    """Put `row` into the machine's file, in place of the same row of an earlier run."""
    path = folder / f"{machine.kind}.json"
    results = read(path) if path.exists() else Results(machine, [])
    if results.machine != machine:
        raise ResultsError(f"{path}: measured on another machine ({results.machine}), this is {machine}")
    rows = {known.id: known for known in results.rows} | {row.id: row}
    write(path, Results(machine, list(rows.values())))
    return path


def write_text(path: Path, text: str) -> None:
    """The whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
