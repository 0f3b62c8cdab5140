"""Results files are small and whole; a row measured again takes the place of the old."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import Figure, ResultsError

from .samples import MACHINE, WITH, row_result


def test_what_is_stored_is_read_again(tmp_path: Path) -> None:
    row = row_result("2x3", figures={"cpu": Figure(1.2345678e-3, 5e-6, 7), "faiss": Figure(reason="not installed")})
    path = results.store(tmp_path, MACHINE, row)
    assert results.read(path) == results.Results(MACHINE, [row])
    assert row.labels == ("magnet", "batch", "2 x 3", "float32")
    assert '\n{"row":"magnet-batch-2x3-float32","run":0,"figures":{"cpu":[1234.5678,5.0,7],' in path.read_text()


def test_a_row_measured_again_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = results.store(tmp_path, MACHINE, row_result("2x3"))
    assert path.name == "cpu-some-cpu-r-9-v3-2t.json"
    results.store(tmp_path, MACHINE, row_result("4x5"))
    results.store(tmp_path, MACHINE, row_result("2x3", runs_with=replace(WITH, commit="def")))
    found = [(r.labels[2], r.runs_with.commit) for r in results.read(path).rows]
    assert found == [("2 x 3", "def"), ("4 x 5", "abc")]
    assert os.listdir(tmp_path) == [path.name]


def test_another_machine_of_the_same_kind_is_refused(tmp_path: Path) -> None:
    path = results.store(tmp_path, MACHINE, row_result())
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="measured on another machine"):
        results.store(tmp_path, replace(MACHINE, name="Some CPU(R) 9, 2 of 64 CPUs"), row_result())
    assert path.read_bytes() == before


def test_a_damaged_results_file_is_named_and_left_alone(tmp_path: Path) -> None:
    path = results.store(tmp_path, MACHINE, row_result())
    for text in (path.read_text()[:-20], "[]", path.read_text().replace('"run":0', '"run":1')):
        path.write_text(text)
        with pytest.raises(ResultsError, match=r"cpu-some-cpu-r-9-v3-2t\.json: not a results file"):
            results.store(tmp_path, MACHINE, row_result())
        assert path.read_text() == text


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = results.store(tmp_path, MACHINE, row_result())
    before = path.read_bytes()

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        results.store(tmp_path, MACHINE, row_result("4x5"))
    assert path.read_bytes() == before


def test_the_committed_results_can_be_read_and_are_small() -> None:
    paths = [*results.FOLDER.rglob("*.json")]
    for path in paths:
        stored = results.read(path)
        assert path.stem == stored.machine.kind
        assert not [name for row in stored.rows for name, figure in row.figures.items() if figure.wrong]
    assert sum(path.stat().st_size for path in paths) < 100_000
    assert [path for path in results.FOLDER.rglob("*") if path.is_file() and path.suffix != ".json"] == []
