"""The README's tables, from the stored results: ``python -m benchmarks.tables``.

A region of the README between ``<!-- table:NAME -->`` and ``<!-- end:NAME -->``, where NAME is a workload's, is
rewritten with its tables: one pair (speed, memory) for every processor and GPU that has results.
"""

import html
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import tyro

from fused_margins.fewshot.tables import Table

from . import growth, negligible
from .machine import ROOT
from .results import FOLDER, Figure, Results, ResultsError, RowResult, files, read, write_text
from .workloads import WORKLOADS

REGION = re.compile(r"<!-- table:(?P<name>[\w-]+) -->\n(?P<old>.*?)<!-- end:(?P=name) -->", re.DOTALL)
IDLE_LOAD = 0.3
MIB = 2**20


SUITES = ("demo", "fewshot", "parity")
GROWTH, NEGLIGIBLE, OVERVIEW = "growth", "negligible", "overview"


def render_suite(folder: Path, name: str) -> str:
    """The tables that ``fused-margins demo`` or ``fused-margins reproduce`` stored, as they stand in its report."""
    path = folder / name / "studies.json"
    if not path.exists():
        return "Not measured yet."
    results = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = []
    for study in results["studies"]:
        tables = [Table(**table).markdown() for table in study["tables"]]
        parts.append(_folded(study["title"], "\n\n".join([*tables, study["lead"]])))
    return "\n\n".join([*parts, f"Training took {results['seconds']:.0f} s, added up; {versions}."])


def _folded(summary: str, text: str) -> str:
    """Text that a reader opens: the README stays short enough to read."""
    return f"<details>\n<summary>{html.escape(summary)}</summary>\n\n{text}\n\n</details>"


def render_overview(results: list[Results]) -> str:
    """The fastest of ours in every row of the machine that was measured last."""
    if not any(result.rows for result in results):
        return "Not measured yet."
    latest = max(results, key=lambda result: max((row.date for row in result.rows), default=""))
    table = Table(
        str(latest.machine),
        ["what", "size", "dtype", "ours, ms", "over eager", "over torch.compile", "over the fastest other"],
        [cells for row in latest.rows if (cells := _overview_of(row))],
    )
    return table.markdown()


def _overview_of(row: RowResult) -> list[str] | None:
    measured = [f for f in row.figures if f.median_s is not None and not f.floor]
    ours, others = ([f for f in measured if f.ours == mine] for mine in (True, False))
    if not ours or not others:
        return None
    best, fastest = (min(figures, key=_median) for figures in (ours, others))

    def ratio(figure: Figure | None) -> str:
        return "—" if figure is None else f"{_median(figure) / _median(best):.2f}×"

    named = {f.contestant: f for f in others}
    return [
        row.title.partition(":")[0],
        f"{row.symbols} = {row.size}",
        row.dtype,
        f"{1e3 * _median(best):.3g}",
        ratio(named.get("eager")),
        ratio(named.get("torch.compile")),
        f"{ratio(fastest)} ({fastest.contestant})",
    ]


def _median(figure: Figure) -> float:
    assert figure.median_s is not None
    return figure.median_s


def render(workload: str, results: list[Results]) -> str:
    """The Markdown of a workload's region: what it is, and each machine's tables."""
    parts = []
    for result in results:
        rows = [row for row in result.rows if row.workload == workload]
        if rows:
            parts += [] if parts else [f"{rows[-1].title}."]
            parts.append(_folded(str(result.machine), _render_machine(rows)))
    return "\n\n".join(parts) if parts else "Not measured yet."


def _render_machine(rows: list[RowResult]) -> str:
    first = rows[-1]
    names = list(dict.fromkeys(f.contestant for row in rows for f in row.figures))
    ours = {f.contestant for row in rows for f in row.figures if f.ours}
    floors = {f.contestant for row in rows for f in row.figures if f.floor}
    titles = [f"ours: {name}" if name in ours else f"floor: {name}" if name in floors else name for name in names]
    costs = any(row.multiply_adds for row in rows)

    speed = [["case", first.symbols, "dtype", f"{first.baseline} ms", *titles] + ["best of ours, GFLOP/s"] * costs]
    memory = [["case", first.symbols, "dtype", *titles]]
    for row in rows:
        speedups = {f.contestant: f.speedup for f in row.figures if f.speedup is not None}
        best = max((s for name, s in speedups.items() if name not in floors), default=None)
        figures = {f.contestant: f for f in row.figures}
        speed_cells, memory_cells = [], []
        for name in names:
            figure = figures.get(name)
            if figure is None or figure.speedup is None:
                speed_cells.append("wrong" if figure is not None and figure.red else "—")
            else:
                cell = f"{figure.speedup:.2f}×"
                speed_cells.append(f"**{cell}**" if figure.speedup == best and not figure.floor else cell)
            extra = None if figure is None else figure.extra_memory_bytes
            memory_cells.append("—" if extra is None else f"{extra / MIB:.1f}")
        speed.append([row.size_name, row.size, row.dtype, _milliseconds(row, row.baseline), *speed_cells])
        if costs:
            speed[-1].append(_throughput(row))
        memory.append([row.size_name, row.size, row.dtype, *memory_cells])

    text = [f"Speed-up over {first.baseline} (the ratio of medians; above 1 is faster):"]
    text += ["", *_aligned(speed), "", "Extra memory at the peak of one call, MiB, with its outputs and gradients:"]
    text += ["", *_aligned(memory), "", *_remarks(rows)]
    return "\n".join(text).rstrip()


def _milliseconds(row: RowResult, contestant: str) -> str:
    median = row.figure(contestant).median_s
    return "—" if median is None else f"{1e3 * median:.3g}"


def _throughput(row: RowResult) -> str:
    """Of the fastest of ours, in floating-point operations that the row needs (two a multiply-add)."""
    medians = [f.median_s for f in row.figures if f.ours and f.median_s is not None]
    return f"{2e-9 * row.multiply_adds / min(medians):.0f}" if medians and row.multiply_adds else "—"


def _remarks(rows: list[RowResult]) -> list[str]:
    """What each contestant does differently, why figures are missing, and what the rows ran with."""
    remarks = dict.fromkeys(f"{f.contestant}: {f.note}." for row in rows for f in row.figures if f.note)
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for f in row.figures:
            if f.reason:
                missing.setdefault((f.contestant, f.reason), []).append(f"{row.size_name}, {row.size}, {row.dtype}")
    for (contestant, reason), places in missing.items():
        where = "" if len(places) == len(rows) else f" at {'; '.join(places)}"
        remarks[f"{contestant}{where}: {reason}."] = None
    runs = dict.fromkeys(
        f"{row.date[:10]}, commit {row.runs_with.commit}, {_software(row.runs_with.versions)}" for row in rows
    )
    busy = max(row.runs_with.load_before for row in rows)
    lines = [f"- {remark}" for remark in remarks] + [f"- Measured {'; '.join(runs)}."]
    if busy > IDLE_LOAD:
        lines.append(f"- The machine was not idle: load {busy:.1f} before the run.")
    return lines


def _software(versions: dict[str, str]) -> str:
    text = f"torch {versions['torch']}"
    if "cuda" in versions:
        text += f", CUDA {versions['cuda']}, driver {versions['driver']}, Triton {versions['triton']}"
        text += f", beside {versions['processor']}"
    return text


def _aligned(table: list[list[str]]) -> list[str]:
    """A Markdown table whose columns line up as text, too; numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*table)]
    left = {0, 1, 2}

    def line(cells: list[str]) -> str:
        padded = (
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [line(table[0]), line(rule), *map(line, table[1:])]


def rewrite(text: str, results: list[Results], suites: Mapping[str, str] = MappingProxyType({})) -> str:
    """`text` with the regions of every workload and suite filled anew; others belong to somebody else."""
    opened, closed = (len(re.findall(rf"<!-- {word}:", text)) for word in ("table", "end"))
    if not opened == closed == len(REGION.findall(text)):
        raise ResultsError(f"{opened} regions opened by <!-- table:NAME -->, {closed} closed by <!-- end:NAME -->")
    known = {workload.name for workload in WORKLOADS}

    def region(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in known and name not in suites:
            return match[0]
        tables = suites[name] if name in suites else render(name, results)
        return f"<!-- table:{name} -->\n\n{tables}\n\n<!-- end:{name} -->"

    return REGION.sub(region, text)


def main(
    readme: Path = ROOT / "README.md",
    results: Path = FOLDER,
    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Write the benchmark tables into the README.

    Args:
        readme: the file whose marked regions are rewritten.
        results: the folder of results files.
        check: change nothing; fail if the file does not hold the present tables.
    """
    try:
        text = readme.read_text(encoding="utf-8")
        others = {name: render_suite(results, name) for name in SUITES}
        others[GROWTH] = growth.render(results / GROWTH)
        others[NEGLIGIBLE] = negligible.render(results / NEGLIGIBLE / "weights.json")
        stored = [read(path) for path in files(results)]
        others[OVERVIEW] = render_overview(stored)
        filled = rewrite(text, stored, others)
    except (OSError, ResultsError) as error:
        sys.exit(f"error: {error}")
    known = {*others, *(workload.name for workload in WORKLOADS)}
    unknown = sorted({m["name"] for m in REGION.finditer(text)} - known)
    if unknown:
        print(f"{readme}: left alone, no workloads of these names: {', '.join(unknown)}")
    if filled == text:
        print(f"{readme}: up to date")
    elif check:
        sys.exit(f"{readme}: not the tables of {results}; run python -m benchmarks.tables")
    else:
        write_text(readme, filled)
        print(f"{readme}: tables written")


if __name__ == "__main__":
    tyro.cli(main)
