"""The commands, as a user gives them."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import peak
from benchmarks.__main__ import _options, main
from benchmarks.machine import ROOT
from tests.forks import Forked, runs_backward
from tests.gpu import determinism, sanitize


def test_rows_are_measured_and_stored(tmp_path: Path) -> None:
    """Without pytorch-metric-learning and pytest-benchmark, too."""
    gone = "import sys\nfor name in ('pytorch_metric_learning', 'pytest_benchmark'):\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(gone)
    command = ["-m", "benchmarks", "magnet-batch-12x4x128", "--seconds=0.01", "--output", str(tmp_path / "results")]
    command += ["--without", "torch.compile", "--without", "memory"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("magnet-batch-12x4x128-float32\n  eager ")
    assert not (tmp_path / "results").exists()  # incomplete rows are not stored


def test_options_of_the_command_have_the_defaults_of_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    defaults = {name: parameter.default for name, parameter in inspect.signature(main).parameters.items()}
    options = {name: tuple(value) if value == [] else value for name, value in vars(_options()).items()}
    assert options == defaults


def test_shares_of_the_peak_are_of_three_products_and_of_the_fastest_calls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = peak.call_seconds((8, 4, 3), 0.01)
    assert len(taken) >= 20
    assert taken == sorted(taken)
    assert taken[0] > 0
    monkeypatch.setattr(sys, "argv", ["peak", "--threads", str(torch.get_num_threads()), "--seconds", "3"])
    monkeypatch.setattr(peak, "SIZES", [(100, 1000, 1000)])  # 0.6 GFLOP
    monkeypatch.setattr(peak, "peak_gflops", lambda threads: 60.0 * threads / torch.get_num_threads())
    monkeypatch.setattr(peak, "call_seconds", lambda size, seconds: [seconds / 300 * n for n in range(1, 101)])
    peak.main()
    assert capsys.readouterr().out.splitlines()[-1] == "| 100 x 1000 x 1000 | 100 | 60 | 100% | 17% | 4% | 2% |"


def run_pytest(*arguments: str) -> None:
    # Where pytest-xdist shares out these tests, pytest-benchmark would take the command for one of its workers.
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        del os.environ[name]
    sys.exit(pytest.main([*arguments]))


@runs_backward
def test_a_single_row_is_timed_by_pytest_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="needs the bench extra")
    options = ["-k", "magnet and 12x4x128 and (eager or reference)", "--benchmark-max-time=0.01"]
    code, printed = Forked(
        run_pytest, str(ROOT / "benchmarks"), *options, f"--benchmark-json={tmp_path / 'times.json'}"
    ).result()
    assert code == 0, printed
    times = json.loads((tmp_path / "times.json").read_text())["benchmarks"]
    assert [b["group"] for b in times] == ["magnet-batch-12x4x128-float32"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_and_a_row_that_is_none_are_said_at_once() -> None:
    with pytest.raises(SystemExit, match="error: --device cuda: no GPU is at hand"):
        main(device="cuda")
    with pytest.raises(SystemExit, match="error: no row of cpu is named like magnet-1x1"):
        main(("magnet-1x1",))


@pytest.mark.parametrize(
    ("script", "options"),
    [(sanitize, ["--backend"]), (determinism, ["--ops", "magnet", "--repeats", "2", "--backends"])],
    ids=["sanitize", "determinism"],
)
def test_the_scripts_for_a_gpu_run_on_a_cpu(
    script: ModuleType, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--device", "cpu", *options, "reference"])
    script.main()
    monkeypatch.setattr(sys, "argv", ["script", "--device", "cpu", *options, "cuda"])
    with pytest.raises(SystemExit, match="cuda ran nothing on cpu"):
        script.main()
