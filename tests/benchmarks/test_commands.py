"""The commands, as a user gives them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.machine import ROOT


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Where pytest-xdist shares out these tests, pytest-benchmark would take the command for one of its workers.
    here = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=here | environment, capture_output=True, text=True, timeout=300
    )


def test_rows_are_measured_and_stored(tmp_path: Path) -> None:
    """Without pytorch-metric-learning and pytest-benchmark, too."""
    gone = "import sys\nfor name in ('pytorch_metric_learning', 'pytest_benchmark'):\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(gone)
    command = ["-m", "benchmarks", "magnet-batch-12x4x128", "--seconds=0.01", "--output", str(tmp_path / "results")]
    result = run(*command, "--without", "torch.compile", "--without", "memory", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("magnet-batch-12x4x128-float32\n  eager ")
    assert not (tmp_path / "results").exists()  # incomplete rows are not stored


def test_a_single_row_is_timed_by_pytest_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="needs the bench extra")
    command = ["-m", "pytest", "benchmarks", "-k", "magnet and 12x4x128 and (eager or reference)"]
    result = run(*command, "--benchmark-max-time=0.01", f"--benchmark-json={tmp_path / 'times.json'}")
    assert result.returncode == 0, result.stdout + result.stderr
    times = json.loads((tmp_path / "times.json").read_text())["benchmarks"]
    assert [b["group"] for b in times] == ["magnet-batch-12x4x128-float32"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_and_a_row_that_is_none_are_said_at_once() -> None:
    with pytest.raises(SystemExit, match="error: --device cuda: no GPU is at hand"):
        main(device="cuda")
    with pytest.raises(SystemExit, match="error: no row of cpu is named like magnet-1x1"):
        main(("magnet-1x1",))


@pytest.mark.parametrize(
    "script", [("sanitize", "--backend"), ("determinism", "--ops", "magnet", "--repeats", "2", "--backends")]
)
def test_the_scripts_for_a_gpu_run_on_a_cpu(script: tuple[str, ...]) -> None:
    name, *options = script
    result = run("-m", f"tests.gpu.{name}", "--device", "cpu", *options, "reference")
    assert result.returncode == 0, result.stdout + result.stderr
    nothing = run("-m", f"tests.gpu.{name}", "--device", "cpu", *options, "cuda")
    assert nothing.returncode == 1
    assert "cuda ran nothing on cpu" in nothing.stderr
