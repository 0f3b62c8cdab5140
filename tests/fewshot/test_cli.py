"""The command as a user meets it: what it writes and what it prints. Mistakes have a file of their own."""

import functools
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fused_margins.fewshot import report as report_module
from fused_margins.fewshot.cli import main
from fused_margins.fewshot.config import Backbone, TrainConfig
from fused_margins.fewshot.optimization import build_scheduler
from fused_margins.fewshot.presets import PRESETS
from fused_margins.fewshot.runs import Run
from fused_margins.fewshot.studies import reproduce

from .conftest import SMALL, needs_cpu_backend, train

PNG = b"\x89PNG\r\n\x1a\n"


def test_train_then_evaluate(tmp_path, capsys, pictures):
    folder = tmp_path / "run"
    assert train(folder, "--loss", "margin-softmax", "--margin", "-0.3", "--labels", "coarse", "--seed", "4") == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["loss"] == {"name": "margin-softmax", "scale": 10.0, "margin": -0.3, "similarity": "cosine"}
    assert (config["labels"], config["seed"], config["backbone"]["channels"]) == ("coarse", 4, 4)
    rows = Run(folder).read_metrics()
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[1]["loss"] < rows[0]["loss"]
    report = json.loads((folder / "report.json").read_text())
    assert {"recall@1", "nmi", "map@r", "modes", "knc_error@10", "accuracy"} <= report["figures"].keys()
    assert all((folder / name).read_bytes().startswith(PNG) for name in ("loss.png", "embeddings.png"))
    assert f"| nmi | {100 * report['figures']['nmi']:.1f} |" in (folder / "report.md").read_text()
    page = (folder / "report.html").read_text()
    assert "In percent: recall@1 " in page
    assert f"nmi {100 * report['figures']['nmi']:.1f}" in page[: page.index("</header>")]
    assert '<a href="report.json">' in page
    assert "nmi" in capsys.readouterr().out

    (folder / "report.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "_draw", lambda run, trainer, task: {})  # the same pictures again
        assert main(["evaluate", str(folder)]) == 0
        assert json.loads((folder / "report.json").read_text()) == report
        assert main(["evaluate", str(folder), "--neighbours", "3"]) == 0
    judging = json.loads((folder / "report.json").read_text())["judging"]
    assert judging == {**report["judging"], "neighbours": [3]}
    assert json.loads((folder / "judging.json").read_text()) == judging
    assert main(["evaluate", str(folder / "none")]) == 2
    assert not (folder / "none").exists()


def test_knc_has_as_many_clusters_as_were_asked_for(trained):
    folder = trained
    errors = {}
    for clusters in (1, 5, 20):
        assert (
            main(["evaluate", str(folder), "--episodes", "5", "--neighbours", "1", "--knc-clusters", str(clusters)])
            == 0
        )
        errors[clusters] = json.loads((folder / "report.json").read_text())["figures"]["knc_error@1"]
    assert len(set(errors.values())) == 3


@pytest.mark.usefixtures("few_digits")
def test_the_number_of_threads_is_stored_and_used_again(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    assert train(tmp_path / "run", "--threads", "2") == 0
    assert main(["train", "--resume", "--output", str(tmp_path / "run"), "--episodes", "5"]) == 0
    assert used == [2, 2]
    assert train(tmp_path / "default") == 0
    assert json.loads((tmp_path / "default" / "config.json").read_text())["threads"] == torch.get_num_threads()


def test_classes_left_out_are_judged_as_novel(tmp_path):
    folder = tmp_path / "run"
    assert train(folder, "--classes", "0", "1", "2", "3", "4") == 0
    figures = json.loads((folder / "report.json").read_text())["figures"]
    for shots in (1, 5):
        name = f"novel_5way_{shots}shot"
        assert 0.2 < figures[name] <= 1
        # Five episodes: Student's t of four degrees of freedom and ddof 1, against 1.96 and ddof 0.
        assert figures[f"{name}_student"] == pytest.approx(
            2.7764 / 1.96 * (5 / 4) ** 0.5 * figures[f"{name}_interval"], rel=1e-3
        )
        assert 0.2 < figures[f"{name}_centroid"] <= 1


def test_a_run_is_not_overwritten_and_a_finished_one_resumes_to_itself(trained, capsys, contents):
    folder = trained
    before = contents(folder)
    assert train(folder, "--margin", "-0.3") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert contents(folder) == before
    assert main(["train", "--resume", "--output", str(folder), "--margin", "-0.3", "--episodes", "5"]) == 0
    assert contents(folder)["metrics.jsonl"] == before["metrics.jsonl"]


def test_control_c_stops_and_resume_completes_to_the_same_numbers(tmp_path, capsys):
    options = ["--blocks", "2", "--channels", "4", "--epochs", "15", "--threads", "1", "--episodes", "5"]
    metrics = tmp_path / "stopped" / "metrics.jsonl"

    def interrupt():
        deadline = time.monotonic() + 60
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    assert main(["train", "--output", str(tmp_path / "stopped"), *options]) == 130
    watcher.join()
    assert "stopped in epoch" in "".join(capsys.readouterr())
    assert 0 < len(metrics.read_text().splitlines()) < 15

    assert main(["train", "--resume", "--output", str(tmp_path / "stopped"), "--episodes", "5"]) == 0
    assert main(["train", "--output", str(tmp_path / "whole"), *options]) == 0
    figures = [json.loads((tmp_path / name / "report.json").read_text())["figures"] for name in ("stopped", "whole")]
    assert figures[0] == figures[1]
    assert metrics.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@needs_cpu_backend
@pytest.mark.parametrize("loss", ["margin-softmax", "triplet", "magnet"])
@pytest.mark.usefixtures("few_digits", "blank_pictures")
def test_parity_compares_every_step_and_the_end(tmp_path, capsys, loss):
    options = [*SMALL, "--loss", loss, "--output", str(tmp_path), "--episodes", "5", "--workers", "1"]
    options += ["--warm-epochs", "1"] if loss == "magnet" else []
    assert main(["parity", *options, "--steps", "4"]) == 0
    assert "within the tolerance" in " ".join(capsys.readouterr().out.split())
    folder = tmp_path / "parity" / f"{loss}-seed0-steps-reference-cpu"
    steps = json.loads((folder / "steps.json").read_text())["differences"]
    assert [step["step"] for step in steps] == list(range(4))
    text = (tmp_path / "report.md").read_text()
    for run in (f"{loss}, reference", f"{loss}, cpu", f"{loss}, reference, one bit changed"):
        assert f"| {run} |" in text
    if loss == "margin-softmax":  # the others may be the same to the bit in so few steps
        assert main(["parity", *options, "--steps", "4", "--tolerance", "1e-12"]) == 1
        assert "BEYOND the tolerance of 1e-12" in " ".join(capsys.readouterr().out.split())


@needs_cpu_backend
def test_parity_without_held_out_images_and_with_few_novel_classes(tmp_path):
    """The end is compared by what there is: three-way episodes."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 7, 8, 8), dtype=np.uint8)
    for number in range(7):
        split = "train" if number < 4 else "test"
        for image in range(7):
            path = tmp_path / "data" / split / f"class{number}" / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[number, image]).save(path)
    options = [*SMALL, "--dataset", f"folder:{tmp_path / 'data'}", "--image-size", "8", "--loss", "margin-softmax"]
    options += ["--output", str(tmp_path / "out"), "--episodes", "5", "--workers", "1", "--steps", "2"]
    assert main(["parity", *options]) == 0
    assert "At the end: novel_3way_1shot" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.usefixtures("few_digits", "blank_pictures")
def test_demo_in_miniature(tmp_path, monkeypatch):
    small = Backbone(blocks=2, channels=4, embedding_size=8)
    monkeypatch.setattr(reproduce, "TrainConfig", functools.partial(TrainConfig, backbone=small))
    options = ["--seeds", "0", "--epochs", "6", "--episodes", "5", "--workers", "1"]
    assert main(["demo", "--output", str(tmp_path), *options]) == 0
    studies = json.loads((tmp_path / "studies.json").read_text())["studies"]
    assert [study["name"] for study in studies][:2] == ["coarse-to-fine", "margins"]
    assert [len(study["trials"]) for study in studies][:2] == [3, 3]
    configs = [trial["config"] for study in studies for trial in study["trials"]]
    assert {c["loss"]["samples_per_cluster"] for c in configs if c["loss"]["name"] == "magnet"} == {16}
    schedules = {(c["epochs"], c["schedule"], c["labels"]) for c in configs}
    assert schedules == {(6, "one-cycle", "coarse"), (7, "warmup-steps", "fine")}
    assert "](margins/margins.png)" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "margins" / "margins.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("epochs", [*range(6, 13), 30])
def test_the_demo_has_a_schedule_for_any_number_of_epochs(epochs):
    for study in reproduce.demo_studies((0,), epochs, backends=("reference",)):
        for trial in study.trials:
            optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
            build_scheduler(trial.config, optimizer, lambda epoch: 10 * epoch)


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_dry_run_says_what_and_how_long_and_writes_nothing(tmp_path, capsys, command):
    assert main([command, *SMALL, "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "nothing is written" in output.lower()
    assert "about" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        (["magnet", "--seeds", "0", "--clusters-per-class", "2"], ["magnet", "softmax", "triplet"]),
        (
            ["coarse-to-fine", "--seeds", "0"],
            [f"{l}, {p} positives" for l in ("triplet", "InfoNCE") for p in ("random", "easy")],
        ),
    ],
)
@pytest.mark.usefixtures("few_digits")
def test_studies_in_miniature(tmp_path, command, groups):
    assert (
        main([*command, *SMALL, "--epochs", "7", "--output", str(tmp_path), "--episodes", "5", "--workers", "1"]) == 0
    )
    text = (tmp_path / "report.md").read_text()
    assert all(f"| {group} |" in text for group in groups)
    assert "not tested" in text  # one seed decides nothing
    assert ("with 2 clusters a class" in text) == ("--clusters-per-class" in command)


@pytest.mark.usefixtures("few_digits")
def test_compare_tabulates_runs(trained, tmp_path, capsys):
    assert train(tmp_path / "0", "--margin", "0") == 0
    capsys.readouterr()
    assert main(["compare", str(trained), str(tmp_path / "0"), "--output", str(tmp_path / "both.md")]) == 0
    text = (tmp_path / "both.md").read_text()
    assert "loss.margin" in text
    assert "nmi" in text


def test_data_lists_what_there_is_and_counts_a_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FUSED_MARGINS_DATA", str(tmp_path))
    assert main(["data"]) == 0
    assert "cub-retrieval" in capsys.readouterr().out
    assert main(["data", "digits"]) == 0
    assert "1198" in capsys.readouterr().out
    assert main(["data", "mini-imagenet"]) == 2
    assert "mini-imagenet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("few_digits")
def test_a_resumed_run_is_judged_as_it_was_to_be(tmp_path):
    folder = tmp_path / "run"
    assert train(folder, "--classes", "0", "1", "2", "3", "4", "--ways", "3") == 0
    before = json.loads((folder / "report.json").read_text())
    assert before["judging"]["ways"] == [3]
    assert main(["train", "--resume", "--output", str(folder)]) == 0
    assert json.loads((folder / "report.json").read_text())["figures"] == before["figures"]


def test_help_shows_what_matters_and_all_of_it_when_asked(capsys):
    texts = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main(["train", option])
        texts[option] = capsys.readouterr().out
        assert max(map(len, texts[option].splitlines())) <= 80
    assert "--dropblock-size" not in texts["--help"]
    assert "--dropblock-size" in texts["--help-all"]
    assert len(texts["--help"].splitlines()) <= 72  # three screens of 24 lines
    assert "0.35 for cosface" in texts["--help"]
    assert "example:\n  fused-margins train --dataset" in texts["--help"]
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("fused-margins 0.")


def test_presets_are_listed_each_with_what_it_is(capsys):
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    for name in PRESETS:
        assert name in listed
    assert "margin-softmax (scale 10.0, margin -0.1, similarity cosine) on digits" in listed


def test_a_plan_of_many_ranks_is_a_command(capsys):
    assert main(["plan", "--classes", "1000", "--ranks", "2"]) == 0
    assert "It fits" in capsys.readouterr().out
    assert main(["plan", "--classes", "1000", "--ranks", "0"]) == 2
