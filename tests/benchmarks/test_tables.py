"""The README's tables, from the stored results."""

from pathlib import Path

import pytest

from benchmarks import results, tables
from benchmarks.results import Figure, Results

from .samples import GPU, GPU_VERSIONS, MACHINE, WITH, row_result


def test_tables_are_aligned_and_show_who_has_no_figure() -> None:
    text = tables.render("magnet", [Results(machine=MACHINE, rows=[row_result("2 x 3"), row_result("40 x 50000")])])
    lines = text.splitlines()
    blocks = [
        [line for line in lines if line.startswith("|")][:4],
        [line for line in lines if line.startswith("|")][4:],
    ]
    for block in blocks:
        assert len(block) == 4
        assert len({len(line) for line in block}) == 1
    cells = [cell.strip() for cell in blocks[0][2].strip("|").split("|")]
    assert cells == ["batch", "2 x 3", "float32", "2", "1.00×", "wrong", "**2.00×**", "—", "2000"]
    assert [c.strip() for c in blocks[1][2].strip("|").split("|")] == [
        "batch",
        "2 x 3",
        "float32",
        "3.0",
        "—",
        "0.5",
        "—",
    ]
    assert "- peer: no margin." in lines
    assert "- far: no such device." in lines  # in every row: said once
    assert "- Measured 2025-02-03, commit abc, torch 2.9." in lines
    assert lines[-3:] == ["- The machine was not idle: load 0.5 before the run.", "", "</details>"]


def test_a_reason_of_some_rows_names_them() -> None:
    here = row_result("2 x 3")
    elsewhere = row_result("4 x 5", figures=[f for f in here.figures if f.contestant != "far"])
    lines = tables.render("magnet", [Results(machine=MACHINE, rows=[here, elsewhere])]).splitlines()
    assert "- far at batch, 2 x 3, float32: no such device." in lines
    assert "- peer: loss: relative error 0.5." in lines


def test_tables_show_a_floor_as_one_and_name_a_gpus_software() -> None:
    figures = [
        *row_result().figures,
        Figure(contestant="products", ours=False, floor=True, median_s=1e-4, speedup=20.0),
    ]
    row = row_result(figures=figures, runs_with=WITH.model_copy(update={"versions": GPU_VERSIONS}))
    lines = tables.render("magnet", [Results(machine=GPU, rows=[row])]).splitlines()
    assert lines[:4] == ["The title.", "", "<details>", "<summary>NVIDIA H100 80GB HBM3</summary>"]
    speed = [line for line in lines if line.startswith("|")][:3]
    assert "| floor: products |" in speed[0]
    assert " 20.00× |" in speed[2]
    assert "**2.00×**" in speed[2]  # the best is the best of those that compute the loss
    software = "torch 2.11, CUDA 13.0, driver 580.1, Triton 3.6, beside A CPU, 8 CPUs"
    assert f"- Measured 2025-02-03, commit abc, {software}." in lines


def test_the_overview_is_of_the_machine_measured_last_and_has_the_fastest_of_each_side() -> None:
    figures = [
        *row_result().figures,
        Figure(contestant="cpu, no memory", ours=True, median_s=5e-4, speedup=4.0),
        Figure(contestant="quick peer", ours=False, median_s=1e-3, speedup=2.0),
        Figure(contestant="products", ours=False, floor=True, median_s=1e-4, speedup=20.0),
    ]
    old, new = row_result(), row_result(figures=figures, date="2025-03-03T04:05:06+00:00")
    alone = row_result(figures=[f for f in figures if f.ours])
    text = tables.render_overview([Results(machine=MACHINE, rows=[old]), Results(machine=GPU, rows=[new, alone])])
    assert text.startswith("**NVIDIA H100 80GB HBM3**")
    (line,) = [line for line in text.splitlines() if line.startswith("| The title")]
    assert line == "| The title | B x D = 2 x 3 | float32 | 0.5 | 4.00× | — | 2.00× (quick peer) |"
    assert tables.render_overview([]) == "Not measured yet."


def test_tables_of_an_idle_machine_say_nothing_of_it() -> None:
    idle = row_result(runs_with=WITH.model_copy(update={"load_before": 0.1}))
    assert "not idle" not in tables.render("magnet", [Results(machine=MACHINE, rows=[idle])])


def test_the_readme_is_rewritten_in_its_regions_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    other = "<!-- table:somebody-elses -->\nkeep\n<!-- end:somebody-elses -->\n"
    readme.write_text(f"before\n<!-- table:magnet -->\n<!-- end:magnet -->\n{other}after\n")
    results.store(folder, MACHINE, row_result())

    with pytest.raises(SystemExit, match="not the tables of"):
        tables.main(readme, folder, check=True)
    tables.main(readme, folder)
    written = readme.read_text()
    assert written.startswith(
        "before\n<!-- table:magnet -->\n\nThe title.\n\n<details>\n<summary>Some CPU(R) 9, 2 of 8"
    )
    assert written.endswith(f"<!-- end:magnet -->\n{other}after\n")
    tables.main(readme, folder, check=True)
    assert readme.read_text() == written
    output = capsys.readouterr().out
    assert "left alone, no workloads of these names: somebody-elses\n" in output
    assert output.endswith("up to date\n")


def test_a_region_that_is_not_closed_is_an_error(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:magnet -->\n")
    with pytest.raises(SystemExit, match="1 regions opened by <!-- table:NAME -->, 0 closed"):
        tables.main(readme, tmp_path)
