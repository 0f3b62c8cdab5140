"""The command as a user meets it: what it writes, what it prints, and its exit codes."""

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

from fused_margins.fewshot import backends, jobs, trainer
from fused_margins.fewshot import report as report_module
from fused_margins.fewshot.cli import main
from fused_margins.fewshot.config import Backbone, TrainConfig
from fused_margins.fewshot.runs import Run
from fused_margins.fewshot.studies import demo

from .conftest import SMALL

needs_cpu_backend = pytest.mark.skipif(
    "cpu" not in backends.available("cpu", [backends.SOFTMAX]), reason="the cpu backend is not built"
)
PNG = b"\x89PNG\r\n\x1a\n"


def _train(folder, *options):
    return main(["train", "--output", str(folder), *SMALL, "--episodes", "5", *options])


def test_train_then_evaluate(tmp_path, capsys, pictures):
    folder = tmp_path / "run"
    assert _train(folder, "--loss", "margin-softmax", "--margin", "-0.3", "--labels", "coarse", "--seed", "4") == 0
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
    assert _train(tmp_path / "run", "--threads", "2") == 0
    assert main(["train", "--resume", "--output", str(tmp_path / "run"), "--episodes", "5"]) == 0
    assert used == [2, 2]
    assert _train(tmp_path / "default") == 0
    assert json.loads((tmp_path / "default" / "config.json").read_text())["threads"] == torch.get_num_threads()


def test_classes_left_out_are_judged_as_novel(tmp_path):
    folder = tmp_path / "run"
    assert _train(folder, "--classes", "0", "1", "2", "3", "4") == 0
    figures = json.loads((folder / "report.json").read_text())["figures"]
    for shots in (1, 5):
        name = f"novel_5way_{shots}shot"
        assert 0.2 < figures[name] <= 1
        # Five episodes: Student's t of four degrees of freedom and ddof 1, against 1.96 and ddof 0.
        assert figures[f"{name}_student"] == pytest.approx(
            2.7764 / 1.96 * (5 / 4) ** 0.5 * figures[f"{name}_interval"], rel=1e-3
        )
        assert 0.2 < figures[f"{name}_centroid"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "magnet", "--margin", "1"], "loss: magnet has no option 'margin', it takes alpha"),
        (["--scale", "-1"], "scale: Input should be greater than 0, got -1"),
        (["--dataset", "imagenet"], "dataset: expected one of cifar-fs, cub, cub-retrieval, digits"),
        (["--classes", "3", "12"], "classes: expected different values in [0, 10), got [3, 12]"),
        (["--blocks", "7"], "blocks: 7 blocks halve 8 x 8 images to nothing, at most 3 fit"),
        (
            ["--backend", "abacus"],
            "backend: expected one of 'auto', 'cpu', 'cuda', 'triton', 'reference', got 'abacus'",
        ),
        (["--device", "cuda:77"], "device: 'cuda:77' cannot be used"),
        (["--device", "meta"], "device: 'meta' cannot be used"),
        (["--preset", "cosine-imagenet"], "preset: expected one of neg-cosine-digits"),
        (["--loss", "triplet", "--negatives", "all"], "loss: triplet: negatives: Input should be 'semihard'"),
        (["--loss", "triplet", "--margin", "-0.1"], "margin: Input should be greater than or equal to 0"),
        (["--loss", "margin", "--beta", "-1"], "beta: Input should be greater than 0"),
        (["--margin", "nan"], "margin: Input should be a finite number"),
        (["--classes", "0", "1", "2", "--shots", "1", "999"], "shots: expected fewer than the"),
        (["--resume"], "no run here"),
        (["--resume", "--dry-run"], "dry_run: it describes a training that has not begun"),
        (["--samples-per-class", "65"], "samples_per_class: expected at most half of the 128 images of a batch"),
    ],
)
def test_mistakes_get_one_clear_line_and_leave_no_run(tmp_path, capsys, arguments, message):
    folder = tmp_path / "run"
    assert main(["train", "--output", str(folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not folder.exists()


HUGE = "1" + 400 * "0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs: Input should be greater than or equal to 1, got 0"),
        (["--epochs", HUGE], "epochs: Input should be less than or equal to 1000000, got 1000"),
        (["--epochs", "1" + 5000 * "0"], "--epochs: Exceeds the limit"),
        (["--epochs", "many"], "--epochs: invalid literal for int() with base 10: 'many'"),
        (["--ways", "many"], "--ways: expected {None}|{[INT [INT ...]]}, got ['many']"),
        (["--episodes", HUGE], "episodes: Input should be less than"),
        (["--threads", "1000000000"], "threads: Input should be less than or equal to 1024, got 1000000000"),
        (["--channels", "1000000000"], "channels: Input should be less than or equal to 100000, got 1000000000"),
        (["--channels", "100000"], "GiB are needed to train these weights"),
        (["--embedding-size", "100000", "--loss", "triplet", "--memory", "10000000"], "GiB are needed"),
        (["--loss", "triplet", "--memory", HUGE], "loss: triplet: memory: Input should be less than"),
        (["--loss", "magnet", "--samples-per-cluster", "1000"], "samples_per_cluster: expected at most 199, of which"),
        (["--loss", "magnet", "--num-clusters", HUGE], "loss: magnet: num_clusters: Input should be less than"),
        (
            ["--batch-size", "100000", "--samples-per-class", "9999"],
            "samples_per_class: expected at most 119, of which",
        ),
        (["--crop-padding", "8"], "crop_padding: expected fewer than the 8 pixels of a side, got 8"),
        (
            ["--perturbation", "1e300"],
            "perturbation: Input should be 0 or from 1e-38 to 1e38, as kernels compute in float32, got 1e+300",
        ),
        (
            ["--scale", "1e-300"],
            "scale: Input should be 0 or from 1e-38 to 1e38, as kernels compute in float32, got 1e-300",
        ),
        (["--backbone", "conv4", "--blocks", "3"], "blocks: only convnet takes a number of blocks, not conv4, got 3"),
        (["--ways", "5"], "ways: digits has no novel classes for episodes"),
        (["--ways", "6", "--classes", "0", "1", "2", "3", "4"], "ways: expected at most the 5 novel classes of digits"),
    ],
)
def test_impossible_settings_get_one_line(tmp_path, capsys, arguments, message):
    assert main(["train", "--output", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 400
    assert not any(word in error for word in ("pydantic", "tyro", "TrainConfig", "Judging", "Backbone", "class '"))
    assert not (tmp_path / "run").exists()


def test_more_threads_than_a_machine_takes_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "available_cores", lambda: 2)
    for command in (["train"], ["sweep", "--dry-run"]):
        assert main([*command, "--threads", "65", "--output", str(tmp_path / "out")]) == 2
        assert "threads: expected at most 64 on this machine, got 65" in capsys.readouterr().err


def test_memory_that_is_not_there_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    class Short(torch.nn.Module):
        def __init__(self, *args):
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you ..."
            )

    monkeypatch.setattr(trainer, "_check_memory", lambda *args: None)
    monkeypatch.setattr(trainer, "Network", Short)
    assert main(["train", "--output", str(tmp_path / "run")]) == 2
    assert "error: not enough memory: try a smaller batch_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--seed", "3"], "seed: a study has several, give --seeds; got 3"),
        (["one-shot", "--dataset", "digits"], "dataset: these protocols are of omniglot alone, got digits"),
        (["parity", "--seeds", "0", "--backend", "cpu"], "backend: it is --backends that are compared, got cpu"),
        (
            ["coarse-to-fine", "--labels", "fine"],
            "labels: the training is on coarse labels, the judgement on fine ones",
        ),
        (["parity", "--margin", "-0.9"], "loss: which one are these options for?"),
        (["magnet", "--loss", "triplet"], "loss: it is magnet that is compared with softmax and triplet, got triplet"),
    ],
)
def test_options_that_a_study_would_ignore_are_refused(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--output", str(tmp_path / "study")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--los", "magnet"], "Unrecognized options: --los, magnet; perhaps you meant --loss"),
        (["train", "--loss", "lion"], "invalid choice 'lion' for argument '--loss'. Expected one of ("),
        (["train", "--margin"], "Missing value for argument '--margin'"),
        (["train", "--nonsense"], "Unrecognized options: --nonsense"),
        (["nonsense"], "Unrecognized options: nonsense Available subcommands: demo, data"),
        (["evaluate"], "Missing from fused-margins evaluate: PATH"),
        ([], "Expected one of {demo, data, embed"),
    ],
)
def test_options_that_do_not_parse_exit_with_two_and_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not set(error) & set("╭╰│─")


def test_a_file_in_the_way_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert _train(tmp_path / "file" / "run") == 2
    assert "file" in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_resumes_only_as_it_was(trained, capsys, contents):
    folder = trained
    before = contents(folder)
    assert _train(folder, "--margin", "-0.3") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["train", "--resume", "--output", str(folder), "--epochs", "9"]) == 2
    assert "resume: the run has epochs = 2, not 9" in capsys.readouterr().err
    assert main(["train", "--resume", "--output", str(folder), "--margin", "0.1"]) == 2
    assert "resume: the run has loss.margin = -0.3, not 0.1" in capsys.readouterr().err
    assert main(["train", "--resume", "--output", str(folder), "--preset", "neg-cosine-digits"]) == 2
    assert "resume: the run has loss.margin = -0.3, not -0.1" in capsys.readouterr().err
    assert contents(folder) == before
    assert main(["train", "--resume", "--output", str(folder), "--margin", "-0.3", "--episodes", "5"]) == 0
    assert contents(folder)["metrics.jsonl"] == before["metrics.jsonl"]


@pytest.mark.parametrize(
    "damage",
    [
        "half",
        {"epoch": 99},
        {"epoch": "a"},
        {"history": []},
        {},
        {"losses": ["a"], "epoch": 1},
        {"history": [{"epoch": 0}, {"epoch": 1}]},
        {"model": {}},
        {"model": []},
        {"optimizer": {}},
        {"generator": torch.zeros(3)},
    ],
)
def test_a_corrupt_checkpoint_is_one_line_and_changes_nothing(trained, capsys, contents, damage):
    folder = trained
    if damage == "half":
        data = (folder / "checkpoint.pt").read_bytes()
        (folder / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    else:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        torch.save(state | damage if damage else [state], folder / "checkpoint.pt")
    before = contents(folder)
    capsys.readouterr()
    for arguments in (["train", "--resume", "--output", str(folder)], ["evaluate", str(folder)]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "checkpoint.pt: not a usable checkpoint" in error
        assert error.count("\n") == 1
        assert "Trainer" not in error
    assert contents(folder) == before


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


def test_a_configuration_that_is_no_text_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    for arguments in (["train", "--resume", "--output", str(tmp_path)], ["evaluate", str(tmp_path)]):
        assert main(arguments) == 2
        assert "config.json: not text" in capsys.readouterr().err


@pytest.mark.usefixtures("few_digits")
def test_a_run_that_diverges_can_be_looked_at_and_resumed(tmp_path, capsys):
    folder = tmp_path / "run"
    wild = ["--learning-rate", "1e30", "--similarity", "dot", "--no-normalize"]
    assert _train(folder, *wild) == 2
    assert "training diverged" in capsys.readouterr().err
    assert main(["train", "--resume", "--output", str(folder)]) == 2
    assert "training diverged" in capsys.readouterr().err


def test_parity_wants_a_step(capsys):
    assert main(["parity", "--steps", "0"]) == 2
    assert "steps: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.usefixtures("few_digits", "blank_pictures")
def test_demo_in_miniature(tmp_path, monkeypatch):
    small = Backbone(blocks=2, channels=4, embedding_size=8)
    monkeypatch.setattr(demo, "TrainConfig", functools.partial(TrainConfig, backbone=small))
    options = ["--seeds", "0", "--epochs", "6", "--episodes", "5", "--workers", "1"]
    assert main(["demo", "--output", str(tmp_path), *options]) == 0
    studies = json.loads((tmp_path / "studies.json").read_text())["studies"]
    assert [study["name"] for study in studies][:2] == ["coarse-to-fine", "margins"]
    assert [len(study["trials"]) for study in studies][:2] == [4, 3]
    assert "](margins/margins.png)" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "margins" / "margins.png").read_bytes().startswith(PNG)


@pytest.mark.usefixtures("few_digits")
def test_a_preset_is_where_other_options_go_on_from(tmp_path):
    folder = tmp_path / "run"
    assert _train(folder, "--preset", "easy-positive-digits", "--negatives", "hard") == 0
    resumed = ["train", "--resume", "--output", str(folder), "--episodes", "5"]
    assert main([*resumed, "--negatives", "hard"]) == 0  # an option of the loss that the run has
    config = json.loads((folder / "config.json").read_text())
    assert (config["labels"], config["loss"]["name"], config["loss"]["positives"]) == ("coarse", "triplet", "easy")
    assert (config["loss"]["negatives"], config["epochs"]) == ("hard", 2)


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
    assert _train(tmp_path / "0", "--margin", "0") == 0
    capsys.readouterr()
    assert main(["compare", str(trained), str(tmp_path / "0"), "--output", str(tmp_path / "both.md")]) == 0
    text = (tmp_path / "both.md").read_text()
    assert "loss.margin" in text
    assert "nmi" in text


def test_demo_wants_different_seeds(capsys):
    assert main(["demo", "--seeds", "1", "1"]) == 2
    assert "seeds: expected one or more different numbers" in capsys.readouterr().err


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
    assert _train(folder, "--classes", "0", "1", "2", "3", "4", "--ways", "3") == 0
    before = json.loads((folder / "report.json").read_text())
    assert before["judging"]["ways"] == [3]
    assert main(["train", "--resume", "--output", str(folder)]) == 0
    assert json.loads((folder / "report.json").read_text())["figures"] == before["figures"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--margin", "nan"], "margin: expected one or more different finite numbers"),
        (["sweep", "--seeds", "-1"], "seeds: expected one or more different numbers of at least 0, got [-1]"),
        (["sweep", "--preset", "magnet-digits"], "loss: a sweep over margins is one of margin-softmax, got magnet"),
        (["sweep", "--labels", "coarse"], "labels: a sweep over margins asks for novel fine classes"),
        (["sweep", "--classes", "0", "1", "2", "3", "4", "5"], "asks for 5-way episodes, digits has 4 novel classes"),
        (["magnet", "--epochs", "5"], "warm_epochs: expected fewer than the 5 epochs, got 5"),
        (["magnet", "--held-out", "0.1"], "the test split is held out already"),
        (["parity", "--backends", "cpu", "cpu"], "backends: expected two or more different ones"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--output", str(tmp_path / "study"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
