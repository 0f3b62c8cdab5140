"""What the benchmark over ranks compares is equal on two ranks, and has its place in a table."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytorch_metric_learning")

from benchmarks import ranks as program

from ..distributed import ranks


def _measure(rank: int, workload: str) -> Any:
    program.CLASSES = 50
    program.ROWS |= {"supcon": 12, "ntxent": 8, "classes": 5}
    return {name: tuple(figures) for name, figures in program.measure(workload, rank, 2, rounds=1).items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("workload", "names"),
    [("ntxent", ["gather", "ring", "eager", "pml"]), ("classes", ["sharded", "eager", "partial-fc"])],
)
def test_peers_return_what_ours_return(workload: str, names: list[str], tmp_path: Path) -> None:
    found, _ = ranks.run(_measure, 2, tmp_path, workload)
    assert list(found) == names
    assert all(time_s > 0 and work_s >= 0 and peak >= 0 for time_s, work_s, peak in found.values())
    table = program.table_of(workload, 2, {name: program.Figures(2e-3, 4e-3, 2**20) for name in found})
    assert f"| {names[-1]} | 2.0 | 1.00× | 4.0 | 1.00× | 1.0 | 1.00× |" in table
