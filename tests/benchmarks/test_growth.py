"""How cost grows: exponents, who leaves and why, resuming, and what is shown."""

import dataclasses
import doctest
import time
from pathlib import Path

import pytest
import torch

from benchmarks import growth, results, tables
from benchmarks.growth import expected, exponent, leaving
from benchmarks.results import Figure, ResultsError, RowResult
from benchmarks.rows import MEMORY, measure
from benchmarks.workload import Implementation, Inputs, Series, Size, Step, Workload
from benchmarks.workloads import SERIES, find_row

from .samples import MACHINE, WITH, row_result

VALUES = (4, 8, 16)


def _make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {"x": torch.randn(4, generator=generator, dtype=dtype)}


def _step(inputs: Inputs) -> Step:
    return lambda: {"y": inputs["x"] + 1}


def _series(*implementations: Implementation) -> Series:
    sizes = tuple(Size("rows", (value,), _make) for value in VALUES)
    workload = Workload("sums", "Sums", "B", sizes, implementations, lambda inputs: lambda i, o: [])
    return Series("sums-rows", "rows B", VALUES, workload)


def _stored(series: Series, seconds: dict[str, list[float]]) -> dict[str, RowResult]:
    """Results of the first rows, in which memory grows as the square of the time."""
    count = len(next(iter(seconds.values())))
    return {
        row.id: row_result(
            id=row.id,
            figures={
                name: Figure(s[i], 0.0, int(1e6 * s[i] ** 2)) if s[i] else Figure(reason="about 2 GiB expected")
                for name, s in seconds.items()
            },
        )
        for i, row in enumerate(series.rows[:count])
    }


TWO = _series(Implementation("eager", _step), Implementation("cpu", _step, backend="cpu"))


def test_the_exponent_is_fitted_to_the_largest_sizes() -> None:
    sizes = [10.0 * 2**i for i in range(6)]
    costs = [7.0, 7.0] + [3 * size**1.5 for size in sizes[2:]]
    assert exponent(sizes, costs) == pytest.approx(1.5)
    assert exponent([3], [4]) is None


def test_what_is_expected_follows_the_last_two_points_and_grows_at_least_linearly() -> None:
    assert expected([], 10) == 0
    assert expected([(10, 3.0)], 20) == 6
    assert expected([(10, 3.0), (20, 3.0)], 40) == 6
    assert expected([(10, 1.0), (20, 8.0)], 40) == pytest.approx(64)


def test_who_would_take_too_long_or_too_much_leaves_and_says_what_was_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = _stored(TWO, {"eager": [1.0, 4.0], "cpu": [1.0, 2.0]})
    gib = 1e6 * 16**2 / 2**30
    reasons = {(16.1, 1e12): {}, (15.9, 1e12): {"eager": "about 16 s expected"}}
    reasons |= {(99.0, 1e8): {"eager": f"about {gib:.0f} GiB expected"}}
    for (seconds, memory), expects in reasons.items():
        monkeypatch.setattr(growth, "PATIENCE_S", seconds)
        monkeypatch.setattr(growth, "MOST_BYTES", memory)
        assert leaving(TWO, stored, 16) == expects


def test_series_have_as_many_values_as_rows_and_memory_finds_them() -> None:
    for series in SERIES:
        assert len(series.values) == len(series.rows) == len({row.id for row in series.rows})
        assert list(series.values) == sorted(series.values)
        for value, row in zip(series.values, series.rows):
            assert str(value) in row.size.text.split(" x ")
            assert find_row(row.id) == row


@pytest.fixture(autouse=True)
def _fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth.RunsWith, "now", lambda *_: WITH)
    monkeypatch.setattr(growth, "this_machine", lambda: MACHINE)
    monkeypatch.setattr(growth, "PATIENCE_S", 10.0)


def test_a_run_goes_on_from_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure_or_stop(row, seconds, runs_with, without, patience):
        assert patience == 10.0
        asked.append((row.id, without))
        if len(asked) == 3:
            raise KeyboardInterrupt
        slow = Figure(1.0 if row.size.text == "4" else 8.0, 0.0)
        return row_result(id=row.id, figures={"eager": Figure(reason=without.get("eager", "")) if without else slow})

    monkeypatch.setattr(growth, "measure", measure_or_stop)
    with pytest.raises(KeyboardInterrupt):
        growth.run([TWO], tmp_path, 0.1)
    first, second, third = (row.id for row in TWO.rows)
    leaves = {"eager": "about 64 s expected"}
    assert asked == [(first, {}), (second, {}), (third, leaves)]
    growth.run([TWO], tmp_path, 0.1)
    assert asked[3:] == [(third, leaves)]
    done = results.read(tmp_path / f"{MACHINE.kind}.json")
    assert [row.id for row in done.rows] == [first, second, third]
    assert done.rows[2].figures["eager"].reason == "about 64 s expected"
    growth.run([TWO], tmp_path, 0.1)
    assert len(asked) == 4


def test_a_wrong_implementation_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(TWO.workload, check=lambda inputs: lambda implementation, outputs: ["y: off by 1"])
    monkeypatch.setattr(
        growth, "measure", lambda row, seconds, runs_with, *_: measure(row, seconds, runs_with, {MEMORY: "left out"})
    )
    with pytest.raises(ResultsError, match="sums-rows-4-float32 is not what these compute: eager, cpu"):
        growth.run([dataclasses.replace(TWO, workload=wrong)], tmp_path, 0.01)
    assert list(tmp_path.iterdir()) == []


def test_table_and_picture_show_everybody_and_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SERIES", [TWO])
    stored = _stored(TWO, {"eager": [0.1, 0.4, 0.0], "cpu": [0.1, 0.2, 0.4]})
    for row in stored.values():
        results.store(tmp_path, MACHINE, row)
    text = tables.growth_page(tmp_path)
    assert "| eager | 2.00 | 4.00 | 8 | 400 | 0.2 | about 2 GiB expected |" in text
    assert "| ours: cpu | 1.00 | 2.00 | 16 | 400 | 0.2 | the end |" in text
    picture = tmp_path / "pictures" / "sums-rows.png"
    growth.draw(TWO, stored, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_examples() -> None:
    found = doctest.testmod(growth)
    assert found.attempted
    assert not found.failed


def test_who_turns_out_to_be_slow_takes_no_turns() -> None:
    calls = []

    def slow(inputs: Inputs) -> Step:
        return lambda: calls.append(1) or time.sleep(0.05 * (len(calls) > 1)) or {}  # its first call compiles

    series = _series(Implementation("eager", _step), Implementation("slow", slow))
    result = measure(series.rows[0], 0.01, WITH, {MEMORY: "left out"}, patience=0.02)
    assert result.figures["slow"] == Figure(reason="0 s a call")
    assert result.figures["eager"].median_s is not None
    assert len(calls) == 2
