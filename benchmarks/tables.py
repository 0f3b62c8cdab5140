"""The pages of docs/benchmarks and the README's table, from the stored results: ``python -m benchmarks.tables``.

A page a workload, with a pair of tables (speed, memory) for every machine that has results, and a page of how cost
grows. The pages of few-shot reports beside them are stored by ``make reproduce`` and ``make parity``.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import growth
from .machine import ROOT
from .results import FOLDER, Figure, Results, ResultsError, RowResult, read, write_text
from .workload import Workload
from .workloads import SERIES, WORKLOADS, rows_on

IDLE_LOAD = 0.3
MIB = 2**20
GENERATED = "<!-- Written by python -m benchmarks.tables: change the code or the results, not this page. -->"
REGION = re.compile(r"(<!-- table:gains -->\n).*?(<!-- end:gains -->)", re.DOTALL)
GAINS = {  # the README's rows: what they are called there
    "margin_softmax-few_shot-32x32x16-float32": "margin softmax, the smallest batch",
    "margin_softmax-few_shot-256x512x64-float32": "margin softmax, few-shot",
    "margin_softmax-many_classes-128x512x10000-float32": "margin softmax, many classes",
    "margin_softmax-many_classes-128x512x10000-bfloat16": "margin softmax, many classes",
    "easy_positives-batch-2048x512x16-float32": "easy positives",
    "easy_positive_triplet-batch-512x128x4-float32": "triplet on easy positives, small",
    "easy_positive_triplet-batch-2048x512x16-float32": "triplet on easy positives",
    "sample-batch-2048x512x16-float32": "distance-weighted negatives",
    "magnet-batch-12x16x1024-float32": "magnet loss",
    "kmeans-index-10000x128x100-float32": "k-means of every class",
    "cluster_distances-batch-1024x64x50-float32": "distances to few centres",
}


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table; the first `left` columns to the left, numbers to the right."""
    head, *lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (columns, *rows))
    return "\n".join([head, "|" + "---|" * left + "---:|" * (len(columns) - left), *lines])


def gains(results: list[Results]) -> str:
    """The README's table: the fastest of ours in the rows of GAINS, of the machine that measured these rows last."""

    def age(r: Results) -> tuple[str, int, str]:
        dates = [row.runs_with.date for row in r.rows if row.id in GAINS]
        return max(dates, default=""), len(dates), r.machine.kind

    latest = max(results, key=age)
    shown = {row.id: row for row in latest.rows if row.id in GAINS}
    cells = []
    for row in (shown[row_id] for row_id in GAINS if row_id in shown):
        workload, _, size, dtype = row.labels
        ours = our_names(next(w for w in WORKLOADS if w.name == workload))
        medians = medians_of(row)
        others = {name: median for name, median in medians.items() if name not in ours}
        best, fastest = min(m for name, m in medians.items() if name in ours), min(others, key=lambda n: others[n])
        eager = f"{others['eager'] / best:.2f}×" if "eager" in others else "—"
        ratio = f"{others[fastest] / best:.2f}× ({fastest})"
        cells.append([GAINS[row.id], f"{size}, {dtype}", f"{1e3 * best:.3g}", eager, ratio])
    columns = ["what", "size", "ours, ms", "over eager PyTorch", "over the fastest other"]
    runs = [row.runs_with for row in shown.values()]
    commits, dates = (", ".join(sorted({getattr(run, what) for run in runs})) for what in ("commit", "date"))
    loads = sorted(run.load_before for run in runs)
    text = f"{latest.machine.name}. Measured {dates}, at commits {commits}"
    return f"{markdown(columns, cells, 2)}\n\n{text}, beside a load of {loads[0]:.1f} to {loads[-1]:.1f}.\n"


def our_names(workload: Workload) -> set[str]:
    return {i.name for i in workload.implementations if i.backend is not None}


def medians_of(row: RowResult) -> dict[str, float]:
    return {name: figure.median_s for name, figure in row.figures.items() if figure.median_s is not None}


def page(workload: Workload, results: list[Results]) -> str:
    """What the workload is, and each machine's tables."""
    parts = [GENERATED, f"# {workload.name.replace('_', ' ').capitalize()}", f"{workload.title}."]
    for result in results:
        if rows := [row for row in result.rows if row.labels[0] == workload.name]:
            parts += [f"## {result.machine.name}", *_of_machine(workload, rows)]
    return "\n\n".join(parts if len(parts) > 3 else [*parts, "Not measured yet."]) + "\n"


def _of_machine(workload: Workload, rows: list[RowResult]) -> list[str]:
    known = [i.name for i in workload.implementations]
    found = dict.fromkeys(name for row in rows for name in row.figures)
    names = [name for name in known if name in found] + [name for name in found if name not in known]
    ours, bounds = our_names(workload), {i.name for i in workload.implementations if i.lower_bound}
    needs = {row.id: row.size.multiply_adds for row in (*rows_on("cpu"), *rows_on("cuda"))}
    costs = any(needs.get(row.id) for row in rows)
    titles = [f"ours: {n}" if n in ours else f"lower bound: {n}" if n in bounds else n for n in names]
    speed, memory = [], []
    for row in rows:
        medians = medians_of(row)
        baseline = medians.get(workload.baseline)
        best = min((m for name, m in medians.items() if name not in bounds), default=None)
        cells = []
        for name in names:
            figure = row.figures.get(name, Figure())
            ratio = f"{baseline / medians[name]:.2f}×" if baseline and name in medians else ""
            bold = name not in bounds and medians.get(name) == best
            cells.append((f"**{ratio}**" if bold else ratio) if ratio else "wrong" if figure.wrong else "—")
        of_ours = min((m for name, m in medians.items() if name in ours), default=None)
        flops = _rates(2e-9 * (needs.get(row.id) or 0) / of_ours if of_ours else 0, row.runs_with.peak_gflops) * costs
        _, *size = row.labels
        speed.append([*size, f"{1e3 * baseline:.3g}" if baseline else "—", *cells, *flops])
        extra = [row.figures.get(name, Figure()).memory_bytes for name in names]
        memory.append([*size, *("—" if e is None else f"{e / MIB:.1f}" for e in extra)])
    head, throughput = ["case", workload.symbols, "dtype"], ["best of ours, GFLOP/s", "% of float32's peak"] * costs
    return [
        f"Speed-up over {workload.baseline} (the ratio of medians; above 1 is faster):",
        markdown([*head, f"{workload.baseline} ms", *titles, *throughput], speed, 3),
        "Extra memory at the peak of one call, MiB, with its outputs and gradients:",
        markdown([*head, *titles], memory, 3),
        "\n".join(f"- {remark}" for remark in _remarks(workload, names, rows)),
    ]


def _rates(gflops: float, peak_gflops: float | None) -> list[str]:
    """A throughput, and what it is of the peak where that was measured."""
    if not gflops:
        return ["—", "—"]
    return [f"{gflops:.0f}", f"{gflops / peak_gflops:.0%}" if peak_gflops else "—"]


def _remarks(workload: Workload, names: list[str], rows: list[RowResult]) -> list[str]:
    """What each implementation does differently, why figures are missing, and what the rows ran with."""
    remarks = [f"{i.name}: {i.note}." for i in workload.implementations if i.name in names and i.note]
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, figure in row.figures.items():
            if figure.reason:
                missing.setdefault((name, figure.reason), []).append(", ".join(row.labels[1:]))
    for (name, reason), places in missing.items():
        where = "" if len(places) == len(rows) else f" at {'; '.join(places)}"
        remarks.append(f"{name}{where}: {reason}.")
    return [*remarks, f"Measured {runs_of(rows)}."]


def runs_of(rows: Sequence[RowResult]) -> str:
    texts = []
    for run in (row.runs_with for row in rows):
        text = f"{run.date}, commit {run.commit}, torch {run.versions['torch']}"
        if "cuda" in run.versions:
            text += ", CUDA {cuda}, Triton {triton}, beside {processor}".format(**run.versions)
        if run.peak_gflops is not None:
            text += f", peak {run.peak_gflops:.0f} GFLOP/s"
        texts.append(text + (f", beside a load of {run.load_before:.1f}" if run.load_before > IDLE_LOAD else ""))
    return "; ".join(dict.fromkeys(texts))


def growth_page(folder: Path) -> str:
    """Tables of every machine: exponents, what an implementation took at its largest size, why it went no further."""
    parts = [GENERATED, "# How cost grows"]
    for path in sorted(folder.glob("*.json")):
        stored = read(path)
        parts.append(f"## {stored.machine.name}\n\nMeasured {runs_of(stored.rows)}.")
        for series, rows in growth.complete(stored, SERIES):
            ours, cells, last = our_names(series.workload), [], rows[series.rows[-1].id]
            for name in (i.name for i in series.workload.implementations):
                if figures := growth.measured(series, rows, name):
                    end = last.figures.get(name, Figure()).reason or "the end"
                    cells.append([f"ours: {name}" if name in ours else name, *_growth_cells(figures), end])
            head = ["", "time ~ size^", "memory ~ size^", f"largest {series.axis}", "ms there", "MiB there", "end"]
            sizes = f"{series.workload.symbols} from {series.rows[0].size.text} to {series.rows[-1].size.text}"
            parts += [f"**{series.workload.title}; {sizes}, float32**", markdown(head, cells)]
    return "\n\n".join(parts) + "\n"


def _growth_cells(figures: list[tuple[int, Figure]]) -> list[str]:
    points = [growth.points_of(figures, cost) for cost in ("median_s", "memory_bytes")]
    powers = [growth.exponent(*zip(*each)) if each else None for each in points]
    size, largest = figures[-1]
    memory = "—" if largest.memory_bytes is None else f"{largest.memory_bytes / MIB:.1f}"
    exponents = ["—" if power is None else f"{power:.2f}" for power in powers]
    return [*exponents, f"{size:,}", f"{1e3 * (largest.median_s or 0):.3g}", memory]


def pages(results: Path, docs: Path, readme: Path) -> dict[Path, str]:
    """Every generated file and its text."""
    stored = [read(path) for path in sorted(results.glob("*.json"))]
    named = {w.name.replace("_", "-"): page(w, stored) for w in WORKLOADS}
    named["growth"] = growth_page(results / "growth")
    files = {docs / f"{name}.md": text for name, text in named.items()}
    # Others in the folder, such as few-shot reports, are listed as well.
    texts = {path: path.read_text(encoding="utf-8") for path in docs.glob("*.md") if path.name != "index.md"} | files
    titles = {path.name: re.search("^# (.+)$", texts[path], re.MULTILINE) for path in sorted(texts)}
    links = "\n".join(f"- [{title[1]}]({name})" for name, title in titles.items() if title)
    files[docs / "index.md"] = f"{GENERATED}\n\n# Measurements\n\n{links}\n"
    text = readme.read_text(encoding="utf-8")
    if not REGION.search(text):
        raise ResultsError(f"{readme}: no region <!-- table:gains --> ... <!-- end:gains -->")
    table = gains(stored) if stored else "Not measured yet.\n"
    return files | {readme: REGION.sub(lambda region: f"{region[1]}\n{table}\n{region[2]}", text)}


def main(
    results: Path = FOLDER,
    docs: Path = ROOT / "docs" / "benchmarks",
    readme: Path = ROOT / "README.md",
    check: bool = False,
    pictures: Path | None = None,
) -> None:
    """Write the benchmark tables into the documentation.

    Args:
        results: the folder of results files.
        docs: the folder of the generated pages.
        readme: the file whose marked region is rewritten.
        check: change nothing; fail if a file does not hold the present tables.
        pictures: also draw how cost grows, into this folder.
    """
    try:
        files = pages(results, docs, readme)
        for path in sorted((results / "growth").glob("*.json")) if pictures else ():
            for one, rows in growth.complete(read(path), SERIES):
                growth.draw(one, rows, pictures / f"{path.stem}-{one.name}.png")
    except (OSError, ResultsError) as error:
        sys.exit(f"error: {error}")
    changed = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check and changed:
        sys.exit(f"error: not the present tables: {', '.join(map(str, changed))}; run python -m benchmarks.tables")
    for path in changed:
        write_text(path, files[path])
    print(f"{len(changed)} of {len(files)} files written")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file does not hold the tables")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="also draw how cost grows, into this folder")
    main(**vars(parser.parse_args()))
