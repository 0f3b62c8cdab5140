"""Every contestant of every row: its gate must be green, and its times go to pytest-benchmark."""

import pytest

from .conftest import Measure
from .workload import Row

# pytest-benchmark times one function after another, and turns must alternate. So the turns are taken first, all
# contestants of a row in one go (timing.py), and then played back to it: its clock is this one, which moves by the
# seconds of one turn whenever the "benchmarked" function is called. Its statistics, tables and stored runs are those
# of the real turns.
_now = 0.0


def _played_back() -> float:
    return _now


@pytest.mark.benchmark(timer=_played_back)
def test_contestant(row: Row, contestant: str, measured: Measure, request: pytest.FixtureRequest) -> None:
    result, times = measured(row)
    figure = result.figure(contestant)
    if figure.red:
        pytest.fail(f"{contestant} does not compute {row.id}: {figure.reason}", pytrace=False)
    if figure.reason:
        pytest.skip(f"{contestant}: {figure.reason}")

    if not request.config.pluginmanager.hasplugin("benchmark"):
        return  # the row is stored

    turns = iter(times[contestant].seconds)

    def turn() -> None:
        global _now
        _now += next(turns)

    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = row.id
    benchmark.extra_info |= figure.model_dump(include={"speedup", "extra_memory_bytes", "calls_per_turn", "note"})
    benchmark.pedantic(turn, rounds=len(times[contestant].seconds))
