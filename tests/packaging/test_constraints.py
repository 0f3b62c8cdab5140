"""What `make` holds pip to: the pinned versions, but for the torch that an environment has already."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINNED = next(line for line in PINS if line.startswith("torch=="))


def constraints(tmp_path: Path, torch: str) -> list[str]:
    """Of an environment in which python says that this version is installed; "": none is."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\n{f'echo {torch}' if torch else 'exit 1'}\n", encoding="utf-8")
    python.chmod(0o755)
    make = ["make", "--no-print-directory", f"VENV={tmp_path}", str(tmp_path / "constraints.txt")]
    subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
    return (tmp_path / "constraints.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("local", ["", "+cpu", "+cu130"])
def test_the_pinned_torch_is_held(local, tmp_path):
    assert constraints(tmp_path, PINNED.removeprefix("torch==") + local) == PINS


def test_without_torch_everything_is_pinned(tmp_path):
    assert constraints(tmp_path, "") == PINS


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu130", "2.13.1", PINNED.removeprefix("torch==") + "0"])
def test_another_torch_that_is_there_stays(version, tmp_path):
    found = constraints(tmp_path, version)
    assert [line for line in found if line.startswith("torch==")] == [f"torch=={version}"]
    others = [line for line in PINS if not line.startswith(("torch==", "triton=="))]
    assert [line for line in found if not line.startswith("torch==")] == others
