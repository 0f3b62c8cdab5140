"""Stored results: one JSON file a machine, one entry a row; a new measurement of a row takes the place of the old.

A processor's are ``results/<kind>.json``, a GPU's ``results/<kind>/results.json``.
"""

import os
import tempfile
from pathlib import Path

from pydantic import BaseModel, ValidationError

from .machine import Gpu, Machine, RunsWith

FOLDER = Path(__file__).parent / "results"


class ResultsError(Exception):
    """A results file that cannot be read or must not be written."""


class Figure(BaseModel):
    """One contestant of a row. Without a figure, `reason` says why; `red`: because the correctness gate was."""

    contestant: str
    ours: bool
    note: str = ""
    reason: str = ""
    red: bool = False
    floor: bool = False  # of less than the row's work: the least time that it could take
    median_s: float | None = None
    quartiles_s: tuple[float, float] | None = None
    rounds: int = 0
    calls_per_turn: int = 0
    speedup: float | None = None  # the baseline's median over this one's
    extra_memory_bytes: int | None = None


class RowResult(BaseModel):
    """All contestants of a row, and what they ran with."""

    id: str
    workload: str
    title: str
    symbols: str
    size_name: str
    size: str
    dtype: str
    baseline: str
    multiply_adds: int | None
    compulsory_bytes: int | None
    figures: list[Figure]
    date: str
    runs_with: RunsWith

    def figure(self, contestant: str) -> Figure:
        return next(f for f in self.figures if f.contestant == contestant)


class Results(BaseModel):
    """A results file."""

    machine: Machine | Gpu
    rows: list[RowResult]


def read(path: Path) -> Results:
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ResultsError(f"{path}: not a results file: {place}: {first['msg']}") from None


def files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.json"), *folder.glob("*/results.json")])


def store(folder: Path, machine: Machine | Gpu, row: RowResult) -> Path:
    """Put `row` into the machine's file, in place of the same row of an earlier run."""
    path = folder / machine.file
    results = read(path) if path.exists() else Results(machine=machine, rows=[])
    if results.machine != machine:
        raise ResultsError(
            f"{path}: measured on another machine ({results.machine}), this is {machine}; use another --results folder"
        )
    known = [r.id for r in results.rows]
    if row.id in known:
        results.rows[known.index(row.id)] = row
    else:
        results.rows.append(row)
    write_text(path, results.model_dump_json(indent=1) + "\n")
    return path


def write_text(path: Path, text: str) -> None:
    """The whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
