"""The scripts of docs/examples, on ranks that get what torchrun gives them."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from . import ranks

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def example(rank: int, name: str, *args: Any) -> float:
    return runpy.run_path(str(EXAMPLES / name))["main"](*args)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ddp_learns_and_goes_on(num_ranks: int, tmp_path: Path) -> None:
    whole = ranks.run(example, num_ranks, None, "ddp.py", str(tmp_path))
    assert len(set(whole)) == 1
    assert whole[0] < 1.0
    saved = tmp_path / "last"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last"]
    assert (saved / ".metadata").exists()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fsdp2_learns(num_ranks: int) -> None:
    found = ranks.run(example, num_ranks, None, "fsdp2.py")
    assert len(set(found)) == 1
    assert found[0] < 4.0
