"""Trainings on several ranks: the numbers of one process, one report, and a stop that all agree about."""

import contextlib
import json
import os
import sys

import pytest
import torch

from fused_margins.fewshot import report, trials
from fused_margins.fewshot.cli import main
from fused_margins.fewshot.datasets.features import Features, write_features
from fused_margins.fewshot.runs import Run

from ..distributed.ranks import free_port
from ..forks import Forked, runs_backward
from .trainings import StopAfter

pytestmark = runs_backward
OPTIONS = ["--features", "some.npz.safetensors", "--epochs", "3", "--batch-size", "11", "--episodes", "5"]
OPTIONS += ["--backbone", "mlp", "--channels", "8", "--embedding-size", "4"]
OPTIONS += ["--optimizer", "sgd", "--learning-rate", "0.02"]  # to Adam a gradient of half the size would be the same
MAGNET = ["--warm-epochs", "1", "--clusters-per-class", "2", "--num-clusters", "3", "--samples-per-cluster", "4"]


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat_interleave(6)
    features = 3 * torch.randn(8, 5, generator=generator)[labels] + torch.randn(48, 5, generator=generator)
    split = (torch.arange(48) % 3 == 0).to(torch.uint8) * 2
    names = tuple(f"c{i}" for i in range(8))
    write_features(tmp_path / "some.npz.safetensors", Features(features, labels, names, split=split), {})
    return tmp_path


def _command(folder, arguments, stop_after=None):
    """Ends with the command's exit code; `stop_after` steps it is asked to stop."""
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_draw", lambda *args: {})
        if stop_after is not None:
            asked = contextlib.nullcontext(StopAfter(stop_after))
            patch.setattr(trials, "stop_on_interrupt", lambda: asked)
        sys.exit(main(arguments))


def _rank(rank, ranks, port, *command):
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    _command(*command)


def _on_ranks(folder, arguments, stops=(None, None)):
    """Exit code and what was printed, of each of so many ranks as there are moments to stop."""
    port = free_port()
    children = [Forked(_rank, i, len(stops), port, folder, arguments, stop) for i, stop in enumerate(stops)]
    return [child.result() for child in children]


def _losses(folder):
    return [row["loss"] for row in Run(folder).read_metrics()]


@pytest.mark.parametrize(
    "loss",
    [["margin-softmax", "--margin", "-0.2"], ["triplet", "--memory", "20"], ["magnet", *MAGNET]],
    ids=lambda loss: loss[0],
)
def test_two_ranks_train_as_one_process_and_report_once(folder, loss):
    arguments = ["train", *OPTIONS, "--loss", *loss, "--output"]
    assert Forked(_command, folder, [*arguments, "one"]).result()[0] == 0
    (code, printed), (other_code, nothing) = _on_ranks(folder, [*arguments, "two"])
    assert (code, other_code) == (0, 0), printed
    assert "two/report.html" in printed
    assert not nothing
    torch.testing.assert_close(_losses(folder / "two"), _losses(folder / "one"), rtol=1e-4, atol=1e-5)
    one, two = (json.loads((folder / name / "report.json").read_text())["figures"] for name in ("one", "two"))
    assert two.keys() == one.keys()


def test_a_stop_that_one_rank_hears_of_stops_all_and_resumes_to_the_same_bits(folder):
    whole, stopped = (["train", *OPTIONS, "--output", name] for name in ("whole", "stopped"))
    _on_ranks(folder, whole)
    assert [code for code, _ in _on_ranks(folder, stopped, (1000, 4))] == [130, 130]
    assert len(_losses(folder / "stopped")) < 3
    assert _on_ranks(folder, ["train", "--resume", "--output", "stopped"])[0][0] == 0
    assert _losses(folder / "stopped") == _losses(folder / "whole")


def test_what_ranks_cannot_do_is_said(folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(folder)
    assert main(["sweep", *OPTIONS]) == 2
    assert "sweep runs in one process" in capsys.readouterr().err
    assert main(["train", *OPTIONS, "--device", "cuda:1"]) == 2
    assert "device: expected cuda" in capsys.readouterr().err
    few = [*OPTIONS, "--batch-size", "2"]
    code, printed = _on_ranks(folder, ["train", *few], (None, None, None))[1]
    assert code == 2
    assert "batch_size: expected at least a sample for each of 3 ranks, got 2" in printed
