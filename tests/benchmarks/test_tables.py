"""The generated pages, from the stored results."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import results, tables
from benchmarks.peak import peak_gflops
from benchmarks.results import Figure, Results, RowResult

from .samples import GPU, GPU_VERSIONS, MACHINE, WITH, row_result, workload


def lines_of(*rows: RowResult, name: str = "magnet", machine: results.Machine = MACHINE) -> list[str]:
    return tables.page(workload(name), [Results(machine, list(rows))]).splitlines()


def test_tables_show_who_has_no_figure_and_why() -> None:
    lines = lines_of(row_result("2x3"), row_result("40x50000"))
    assert lines[2:7] == ["# Magnet", "", f"{workload('magnet').title}.", "", f"## {MACHINE.name}"]
    speed, memory = (line for line in lines if line.startswith("| batch | 2 x 3 |"))
    assert speed == "| batch | 2 x 3 | float32 | 2 | 1.00× | **2.00×** | wrong | — |"
    assert memory == "| batch | 2 x 3 | float32 | 3.0 | 0.5 | — | — |"
    assert "| case | clusters x samples x D | dtype | eager ms | eager | ours: cpu | peer | far |" in lines
    assert "- far: no such device." in lines  # in every row: said once
    assert lines[-1] == "- Measured 2025-02-03, commit abc, torch 2.9, beside a load of 0.5."


def test_a_reason_of_some_rows_names_them() -> None:
    here = row_result("2x3")
    elsewhere = row_result("4x5", figures={n: f for n, f in here.figures.items() if n != "far"})
    lines = lines_of(here, elsewhere)
    assert "- far at batch, 2 x 3, float32: no such device." in lines
    assert "- peer: wrong: loss: relative error 0.5." in lines


def test_tables_show_a_lower_bound_as_one_and_name_a_gpus_software() -> None:
    figures = row_result().figures | {"three products alone": Figure(1e-4, 1e-6)}
    with_gpu = replace(WITH, versions=GPU_VERSIONS, load_before=0.1)
    row = RowResult("margin_softmax-few_shot-256x512x64-float32", with_gpu, figures)
    lines = lines_of(row, name="margin_softmax", machine=GPU)
    head, _, speed = [line for line in lines if line.startswith("|")][:3]
    assert "| lower bound: three products alone |" in head
    assert " 20.00× |" in speed
    assert "**2.00×**" in speed  # the best is the best of those that compute the loss
    assert speed.endswith(" 50 | — |")  # 2 x 3 x 256 x 512 x 64 operations in a millisecond
    software = "torch 2.11, CUDA 13.0, Triton 3.6, beside A CPU, 8 CPUs"
    assert lines[-1] == f"- Measured 2025-02-03, commit abc, {software}."


def test_tables_show_the_share_of_a_peak_that_was_measured_with_them() -> None:
    row = RowResult(
        "margin_softmax-few_shot-256x512x64-float32", replace(WITH, peak_gflops=201.3), row_result().figures
    )
    lines = lines_of(row, name="margin_softmax")
    assert [line for line in lines if line.startswith("|")][2].endswith(" 50 | 25% |")
    assert "torch 2.9, peak 201 GFLOP/s, beside" in lines[-1]


def test_the_peak_is_a_rate_wherever_something_compiles() -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    rate = peak_gflops(2)
    assert (rate is None) == (compiler is None)
    assert rate is None or 0.1 < rate < 1e6


def test_the_readmes_table_is_of_the_machine_measured_last_and_has_the_fastest_of_each_side() -> None:
    figures = row_result().figures | {"reference": Figure(5e-4, 1e-5), "torch.compile": Figure(1e-3, 1e-5)}
    old = row_result("12x16x1024")
    new = row_result("12x16x1024", figures=figures, runs_with=replace(WITH, date="2025-03-03", commit="def"))
    other = row_result("1x1", runs_with=replace(WITH, date="2025-04-04"))  # newer, and no row of this table
    text = tables.gains([Results(MACHINE, [old, other]), Results(GPU, [new, row_result("1x1")])])
    assert "| magnet loss | 12 x 16 x 1024, float32 | 0.5 | 4.00× | 2.00× (torch.compile) |" in text.splitlines()
    assert text.endswith(f"{GPU.name}. Measured 2025-03-03, at commits def, beside a load of 0.5 to 0.5.\n")


def test_pages_are_written_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, folder, docs = tmp_path / "README.md", tmp_path / "results", tmp_path / "docs"
    readme.write_text("before\n<!-- table:gains -->\n<!-- end:gains -->\nafter\n")
    results.store(folder, MACHINE, row_result("12x16x1024"))
    docs.mkdir()
    (docs / "report.md").write_text("# Somebody else's\n")
    with pytest.raises(SystemExit, match="not the present tables: "):
        tables.main(folder, docs, readme, check=True)
    tables.main(folder, docs, readme)
    tables.main(folder, docs, readme, check=True)
    assert readme.read_text().startswith("before\n<!-- table:gains -->\n\n| what | size |")
    assert readme.read_text().endswith("\n<!-- end:gains -->\nafter\n")
    assert "- [Somebody else's](report.md)" in (docs / "index.md").read_text()
    assert "Not measured yet." in (docs / "contrast.md").read_text()
    assert re.search(r"\b0 of \d\d files written\n$", capsys.readouterr().out)
    readme.write_text("no region")
    with pytest.raises(SystemExit, match=r"README.md: no region <!-- table:gains -->"):
        tables.main(folder, docs, readme)


def test_the_committed_pages_are_up_to_date() -> None:
    tables.main(check=True)
