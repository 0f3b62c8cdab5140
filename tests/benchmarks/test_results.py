"""Results files are whole; a row measured again takes the place of the old."""

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.machine import Gpu, Machine
from benchmarks.results import ResultsError

from .samples import GPU, MACHINE, WITH, row_result


def test_a_row_measured_again_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = results.store(tmp_path, MACHINE, row_result("2 x 3"))
    assert path.name == "cpu-some-cpu-r-9-v3-2t.json"
    results.store(tmp_path, MACHINE, row_result("4 x 5"))
    results.store(tmp_path, MACHINE, row_result("2 x 3", runs_with=WITH.model_copy(update={"commit": "def"})))
    assert [(r.size, r.runs_with.commit) for r in results.read(path).rows] == [("2 x 3", "def"), ("4 x 5", "abc")]
    assert os.listdir(tmp_path) == [path.name]


def test_a_gpu_has_a_folder_of_its_own(tmp_path: Path) -> None:
    path = results.store(tmp_path, GPU, row_result())
    assert path == tmp_path / "nvidia-h100-80gb-hbm3" / "results.json"
    results.store(tmp_path, MACHINE, row_result())
    results.store(tmp_path, GPU, row_result("4 x 5"))
    stored = [results.read(p) for p in results.files(tmp_path)]
    assert [(type(s.machine), len(s.rows)) for s in stored] == [(Machine, 1), (Gpu, 2)]


def test_another_machine_of_the_same_kind_is_refused(tmp_path: Path) -> None:
    path = results.store(tmp_path, MACHINE, row_result())
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="measured on another machine"):
        results.store(tmp_path, MACHINE.model_copy(update={"cpus": 64}), row_result())
    assert path.read_bytes() == before


def test_a_damaged_results_file_is_named_and_left_alone(tmp_path: Path) -> None:
    path = results.store(tmp_path, MACHINE, row_result())
    path.write_text(path.read_text()[:-20])
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=r"cpu-some-cpu-r-9-v3-2t\.json: not a results file"):
        results.store(tmp_path, MACHINE, row_result())
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = results.store(tmp_path, MACHINE, row_result())
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        results.store(tmp_path, MACHINE, row_result("4 x 5"))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_the_committed_results_can_be_read() -> None:
    for path in results.files(results.FOLDER):
        stored = results.read(path)
        assert path == results.FOLDER / stored.machine.file
        assert not [f.contestant for row in stored.rows for f in row.figures if f.ours and f.red]
