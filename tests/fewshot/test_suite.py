"""Many trainings in folders of their own: they stop and go on, and a finished one is never trained again."""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

from fused_margins.fewshot import trials
from fused_margins.fewshot.cli import main, script
from fused_margins.fewshot.config import Backbone, Judging, MarginSoftmax, TrainConfig, make_loss
from fused_margins.fewshot.datasets import ImageSet
from fused_margins.fewshot.optimization import build_optimizer, build_scheduler, stopped_early
from fused_margins.fewshot.studies import margins, reproduce
from fused_margins.fewshot.studies.coarse_to_fine import EPHN
from fused_margins.fewshot.studies.margins import margin_sweep_study
from fused_margins.fewshot.studies.parity import parity_study
from fused_margins.fewshot.suite import placed_jobs, run_suite
from fused_margins.fewshot.terminal import UserError
from fused_margins.fewshot.trials import Trial
from tests.forks import Forked, runs_backward

from .conftest import with_digits


def _study(epochs=1, seeds=(0,), episodes=5):
    config = TrainConfig(
        dataset="digits",
        backbone=Backbone(blocks=2, channels=4, embedding_size=8),
        loss=MarginSoftmax(),
        epochs=epochs,
        threads=1,
    )
    return margin_sweep_study(config, (-0.1, 0.0), seeds, Judging(episodes=episodes))


@pytest.fixture(scope="module")
def carried_out_once(tmp_path_factory, _few):
    with pytest.MonkeyPatch.context() as patch:
        with_digits(patch, _few)
        folder = tmp_path_factory.mktemp("suite")
        run_suite([_study()], folder, "Title", workers=1)
        return folder


@pytest.fixture
def carried_out(carried_out_once, few_digits, tmp_path):
    """A copy of the folder of that study."""
    return shutil.copytree(carried_out_once, tmp_path, dirs_exist_ok=True)


@pytest.mark.usefixtures("carried_out")
def test_a_suite_reports_and_runs_once(tmp_path, monkeypatch):
    results = json.loads((tmp_path / "studies.json").read_text())
    (study,) = results["studies"]
    assert [trial["group"] for trial in study["trials"]] == ["m = -0.1", "m = 0"]
    assert any(table["title"].startswith("Published claims on this data") for table in study["tables"])
    assert "Margin softmax on digits" in (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "data:image/svg+xml;base64" in page
    assert 'href="margins/m-0-seed0/report.json"' in page
    assert "1-shot: highest " in page
    monkeypatch.setattr(Trial, "carry_out", lambda *args: pytest.fail("trained again"))
    run_suite([_study()], tmp_path, "Title", workers=1)


@pytest.mark.usefixtures("carried_out", "blank_pictures")
def test_a_stricter_judgement_does_not_train_again(tmp_path, contents):
    folder = tmp_path / "margins" / "m-0-seed0"
    before = contents(folder)
    run_suite([_study(episodes=6)], tmp_path, "Title", workers=1)
    after = contents(folder)
    assert before["metrics.jsonl"] == after["metrics.jsonl"]
    assert before["report.json"] != after["report.json"]


@pytest.mark.usefixtures("few_digits")
def test_a_mistake_in_the_last_job_shows_before_the_first_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(Trial, "carry_out", lambda *args: pytest.fail("trained"))
    good, bad = _study(), _study()
    change = {
        "warm_epochs: expected fewer than the 1 epochs, got 5": {"loss": make_loss("magnet")},
        "samples_per_class: expected at most half": {"samples_per_class": 100},
        "backend: expected one of": {"backend": "abacus"},
        "warmup_epochs: the schedule one-cycle has none": {"warmup_epochs": 3},
        "threads: expected at most": {"threads": 10**9},
    }
    for message, settings in change.items():
        trial = replace(bad.trials[-1], config=bad.trials[-1].config.but(**settings))
        study = replace(bad, name="bad", trials=[*bad.trials[:-1], trial])
        with pytest.raises(UserError, match=f"bad/m-0-seed0: {message}"):
            run_suite([good, study], tmp_path / "out", "Title", workers=1)
    steps = parity_study(bad.trials[0].config, {"softmax": MarginSoftmax()}, ("reference", "abacus"), Judging())
    with pytest.raises(UserError, match="parity/softmax-seed0-steps-reference-abacus: backend: expected one of"):
        run_suite([good, steps], tmp_path / "out", "Title", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("carried_out")
def test_a_damaged_checkpoint_of_the_last_job_shows_before_the_first_is_begun(tmp_path, monkeypatch):
    folders = [tmp_path / "margins" / f"m-{m}-seed0" for m in ("-0.1", "0")]
    for folder in folders:
        (folder / "report.json").unlink()
    (folders[1] / "checkpoint.pt").write_bytes(b"")
    monkeypatch.setattr(Trial, "carry_out", lambda *args: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"m-0-seed0: .*checkpoint\.pt: not a usable checkpoint"):
        run_suite([_study()], tmp_path, "Title", workers=1)


def run_command(*arguments):
    """As a process; its workers are forked from it, and do not import everything again."""
    forking = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method: forking
    sys.argv[1:] = arguments
    script()


@runs_backward
@pytest.mark.usefixtures("blank_pictures")
def test_control_c_stops_all_and_the_same_command_goes_on(tmp_path):
    options = ["--blocks", "2", "--channels", "4", "--epochs", "10", "--episodes", "5"]
    options += ["--margin", "-0.1", "0", "--seeds", "0"]
    logs = [tmp_path / "stopped" / "margins" / f"m-{m}-seed0" / "metrics.jsonl" for m in ("-0.1", "0")]
    command = Forked(run_command, "sweep", *options, "--workers", "2", "--output", str(tmp_path / "stopped"))
    deadline = time.monotonic() + 60
    while not all(log.exists() for log in logs) and command.process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(command.process.pid, signal.SIGINT)
    code, printed = command.result()
    assert code == 130, printed
    assert "the same command goes on" in printed
    assert any(len(log.read_text().splitlines()) < 10 for log in logs)

    for name in ("stopped", "whole"):
        assert main(["sweep", *options, "--output", str(tmp_path / name), "--workers", "1"]) == 0
    stopped, whole = (json.loads((tmp_path / name / "studies.json").read_text()) for name in ("stopped", "whole"))
    figures = [[trial["figures"] for trial in results["studies"][0]["trials"]] for results in (stopped, whole)]
    assert figures[0] == figures[1]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_command_runs_in_no_worker():
    """Which imports the module of its parent under this name."""
    assert runpy.run_module("fused_margins.fewshot.cli", run_name="__mp_main__")["main"]


def _some_images(dataset, image_size=None):
    """Twelve classes of ten images in three coarse ones, split by class, digits and alphabets by image."""
    labels = torch.arange(12).repeat_interleave(10)
    names = [tuple(f"{split}{c}" for c in range(12)) for split in ("train", "val", "test")]
    if dataset in ("digits", "omniglot-alphabets"):
        names = [names[0]] * 3
    size, channels = image_size or 32, 3 if dataset == "cifar-fs" else 1
    pixels = torch.zeros(120, channels, size, size, dtype=torch.uint8)
    return {
        split: ImageSet(pixels, labels, labels % 3, classes, ("x", "y", "z"))
        for split, classes in zip(("train", "val", "test"), names)
    }


def test_a_sweep_asks_few_validation_classes_nothing(monkeypatch):
    splits = _some_images("folder")
    few = splits["val"].labels < 4
    names = tuple(f"val{c}" for c in range(4))
    splits["val"] = ImageSet(
        splits["val"].images[few], splits["val"].labels[few], splits["val"].coarse_labels[few], names, ("x", "y", "z")
    )
    monkeypatch.setattr(margins, "load", lambda dataset, image_size=None: splits)
    config = TrainConfig(dataset="omniglot", loss=MarginSoftmax())
    study = margin_sweep_study(config, (-0.0, 0.1), (0,), Judging())
    assert "validation_5way_1shot" not in study.columns.values()
    assert study.baseline == study.trials[0].group == "m = 0"
    # Base classes are judged as well, by images that are held out unless the data are split by image.
    assert {trial.config.held_out for trial in study.trials} == {0.1}
    assert {"accuracy", "discriminability"} <= set(study.columns.values())
    monkeypatch.setattr(margins, "load", _some_images)
    assert "validation_5way_1shot" in margin_sweep_study(config, (0.0,), (0,), Judging()).columns.values()
    for dataset, given, held_out in (("digits", 0.0, 0.0), ("cifar-fs", 0.3, 0.3)):
        config = TrainConfig(dataset=dataset, loss=MarginSoftmax(), held_out=given)
        assert margin_sweep_study(config, (0.0,), (0,), Judging()).trials[0].config.held_out == held_out


def test_the_reproduced_studies_have_folders_of_their_own_and_one_thread_each(monkeypatch, tmp_path):
    for module in (trials, margins):
        monkeypatch.setattr(module, "load", _some_images)
    for studies in (reproduce.reproduce_studies(), reproduce.parity_studies(), reproduce.long_studies()):
        jobs = placed_jobs(studies, tmp_path)
        assert len({placed.folder for placed in jobs}) == len(jobs)
        assert {placed.job.config.threads for placed in jobs} == {1}
    groups = {study.name: {trial.group for trial in study.trials} for study in reproduce.reproduce_studies()}
    assert groups.keys() >= {"omniglot-vinyals", "omniglot-official"}
    assert EPHN in groups["coarse-to-fine-alphabets"] & groups["coarse-to-fine-digits"]
    monkeypatch.setattr(reproduce, "of_all", lambda device, losses: [])
    with pytest.raises(UserError, match="backends: only the reference is available"):
        reproduce.parity_studies()


def test_the_long_study_can_converge_and_has_every_margin_once_before_one_twice(monkeypatch):
    for module in (trials, margins):
        monkeypatch.setattr(module, "load", _some_images)
    (study,) = reproduce.long_studies()
    assert [trial.config.seed for trial in study.trials] == sorted(trial.config.seed for trial in study.trials)
    assert {trial.config.backbone.title for trial in study.trials} == {"conv4"}  # of 64 channels
    config = study.trials[0].config
    optimizer = build_optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    scheduler = build_scheduler(config, optimizer, lambda epoch: epoch)
    history = []
    for _ in range(config.epochs):
        history.append({"learning_rate": optimizer.param_groups[0]["lr"], "validation": 0.5})
        optimizer.step()
        scheduler.step()
    assert stopped_early(history) is None
    assert max(row["learning_rate"] for row in history[-20:]) < config.learning_rate / 7
