"""The commands, as a user gives them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.machine import ROOT


def test_a_short_run_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="needs the bench extra")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-v", "-k", "magnet and 12x4x128", "--seconds=0.01"]
    command += ["--without=torch.compile", "--without=memory", f"--results={tmp_path}"]
    command += [f"--benchmark-json={tmp_path / 'pytest-benchmark.json'}"]
    # Where pytest-xdist shares out these tests, pytest-benchmark would take the command for one of its workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed, 3 skipped" in run.stdout
    assert os.listdir(tmp_path) == ["pytest-benchmark.json"]  # incomplete rows are not stored
    stored = json.loads((tmp_path / "pytest-benchmark.json").read_text())["benchmarks"]
    medians = {b["params"]["contestant"]: b["stats"]["median"] for b in stored}
    for b in stored:  # what was played back is what was measured
        ratio = medians["eager"] / medians[b["params"]["contestant"]]
        assert b["extra_info"]["speedup"] == pytest.approx(ratio)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_at_once() -> None:
    result = run("-m", "pytest", "benchmarks", "--device", "cuda")
    assert result.returncode == 4
    assert "--device cuda: no GPU is at hand" in result.stderr


def test_rows_are_measured_without_pytest_benchmark_and_pytorch_metric_learning(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['pytorch_metric_learning'] = None\n")
    (tmp_path / "results").mkdir()
    command = ["-m", "pytest", "-p", "no:benchmark", "benchmarks", "-k", "magnet and 12x4x128", "--seconds=0.01"]
    command += ["--without=torch.compile", "--dry-run", f"--results={tmp_path / 'results'}", "--without=memory"]
    result = run(*command, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed, 3 skipped" in result.stdout


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
