"""The scripts of docs/examples, on ranks that get what torchrun gives them."""

import runpy
from pathlib import Path
from typing import Any

from . import ranks

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def example(rank: int, name: str, *args: Any) -> float:
    return runpy.run_path(str(EXAMPLES / name))["main"](*args)


def test_ddp_learns_and_goes_on(tmp_path: Path) -> None:
    whole = ranks.run(example, 2, None, "ddp.py", str(tmp_path))
    assert whole[0] == whole[1] < 1.0
    saved = tmp_path / "last"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last"]
    assert (saved / ".metadata").exists()


def test_fsdp2_learns(tmp_path: Path) -> None:
    found = ranks.run(example, 2, None, "fsdp2.py")
    assert found[0] == found[1] < 4.0
