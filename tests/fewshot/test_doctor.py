"""What `fused-margins doctor` tells of a machine, and the faults that it finds."""

import json
import sys
import types

import pytest

from fused_margins import command, doctor
from fused_margins.backends import registry
from fused_margins.fewshot.cli import main, parse
from fused_margins.fewshot.terminal import UserError

from .conftest import needs_cpu_backend


def test_doctor_knows_this_machine_and_finds_nothing_wrong(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert output.count("\n") < 40  # one screen
    for word in (
        "python",
        "torch",
        "compiler",
        "margin softmax / cpu",
        "Self-check",
        "All is well: the kernels of cpu agree",
    ):
        assert word in output


def test_the_command_needs_the_trainers_packages_for_the_trainer_alone(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("fused_margins.fewshot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    for words in (["doctor"], ["plan", "--classes", "1000", "--ranks", "2"]):
        monkeypatch.setattr(sys, "argv", ["fused-margins", *words])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 0
    monkeypatch.setattr(sys, "argv", ["fused-margins", "train"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        'error: the trainer needs pydantic, which is not installed: pip install "fused-margins[fewshot]"; '
        "doctor and plan run without it\n"
    )


def test_doctor_refuses_a_device_that_is_not_there(capsys):
    assert main(["doctor", "--device", "cuda:77"]) == 2
    assert "device: 'cuda:77' cannot be used" in capsys.readouterr().err


@needs_cpu_backend
def test_doctor_finds_a_wrong_backend(monkeypatch):
    right = doctor.functional.margin_softmax_loss

    def wrong(*args, backend, **kwargs):
        return right(*args, backend=backend, **kwargs) * (1.001 if backend == "cpu" else 1)

    monkeypatch.setattr(doctor.functional, "margin_softmax_loss", wrong)
    assert main(["doctor"]) == 1


@needs_cpu_backend
def test_doctor_and_parity_find_a_backend_that_returns_nan(tmp_path):
    right = registry.kernel("contrast", "cpu")

    def forward(a, plan):
        return tuple(t if t is None else t * float("nan") for t in right.forward(a, plan))

    wrong = types.SimpleNamespace(**(vars(right) | {"forward": forward}))
    with registry.substitute("contrast", "cpu", wrong):
        assert main(["doctor"]) == 1
        options = ["--loss", "margin-softmax", "--steps", "2", "--epochs", "1", "--episodes", "5", "--workers", "1"]
        with pytest.raises(UserError, match="training diverged"):
            parse(["parity", *options, "--output", str(tmp_path)]).main()
        steps = json.loads(
            (tmp_path / "parity" / "margin-softmax-seed0-steps-reference-cpu" / "steps.json").read_text()
        )
        assert steps["differences"][0]["loss_difference"] is None  # infinite
