"""Every command that trains, stopped and called again: it goes on to the numbers that it would have had."""

import json
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from fused_margins.fewshot import report, trials
from fused_margins.fewshot.cli import main
from fused_margins.fewshot.config import Backbone, Judging, MarginSoftmax
from fused_margins.fewshot.presets import preset
from fused_margins.fewshot.runs import Run
from fused_margins.fewshot.studies import omniglot, reproduce
from fused_margins.fewshot.studies.margins import margin_sweep_study
from fused_margins.fewshot.suite import run_suite

from .conftest import needs_cpu_backend, with_digits
from .trainings import StopAfter

SMALL = ["--backbone", "convnet", "--blocks", "2", "--channels", "4", "--embedding-size", "8", "--episodes", "5"]
pytestmark = pytest.mark.usefixtures("few_digits", "blank_pictures")


@contextmanager
def interrupted(stop):
    """Within this block the user asks trainings to stop: after so many steps, or as soon as `stop()` is true."""
    asked = nullcontext(StopAfter(stop) if isinstance(stop, int) else stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "stop_on_interrupt", lambda: asked)
        yield


def _figures(folder):
    return json.loads((folder / "report.json").read_text())["figures"]


OPTIONS = ["--preset", "easy-positive-digits", "--seed", "4", "--epochs", "3", "--negatives", "hard", *SMALL]


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, _few):
    """A folder with a run of a preset, a seed and changed options that the user stopped, and the whole run."""
    with pytest.MonkeyPatch.context() as patch:
        with_digits(patch, _few)
        patch.setattr(report, "_draw", lambda run, trainer, task: {})
        patch.chdir(tmp_path_factory.mktemp("stopped"))
        with interrupted(2):
            assert main(["train", *OPTIONS]) == 130
        assert main(["train", *OPTIONS, "--output", "whole"]) == 0
        return Path.cwd()


@pytest.fixture
def stopped(stopped_once, tmp_path, monkeypatch):
    """A copy of the stopped run, beside the whole one."""
    shutil.copytree(stopped_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "easy-positive-digits-seed4"
    assert Run(folder).epochs_logged() < 3
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ["--output", "runs/easy-positive-digits-seed4"],  # as an interrupt says
        ["--preset", "easy-positive-digits", "--seed", "4"],
        OPTIONS,
    ],
)
def test_a_training_resumes_with_its_own_settings(stopped, tmp_path, options):
    config = Run(stopped).config()
    assert main(["train", "--resume", *options]) == 0
    assert Run(stopped).config() == config
    assert (config.seed, config.epochs, config.loss.negatives, config.labels) == (4, 3, "hard", "coarse")
    assert (stopped / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert _figures(stopped) == _figures(tmp_path / "whole")


def test_an_interrupt_prints_the_command_that_resumes(tmp_path, capsys):
    folder = tmp_path / "a run of mine"
    with interrupted(1):
        assert main(["train", "--output", str(folder), "--seed", "7", "--epochs", "2", *SMALL]) == 130
    assert f"continue with: fused-margins train --resume --output '{folder}'\n" in capsys.readouterr().out
    assert main(["train", "--resume", "--output", str(folder)]) == 0
    assert Run(folder).config().seed == 7


@pytest.mark.parametrize(
    ("options", "contradiction"),
    [
        (["--epochs", "9"], "epochs = 3, not 9"),
        (["--seed", "0"], "seed = 4, not 0"),
        (
            ["--negatives", "semihard", "--labels", "fine"],
            "labels = 'coarse', not 'fine', loss.negatives = 'hard', not",
        ),
        (["--loss", "magnet"], "loss.name = 'triplet', not 'magnet'"),
        (["--preset", "easy-positive-digits", "--channels", "5"], "backbone.channels = 4, not 5"),
        (["--preset", "magnet-digits"], "loss.name = 'triplet', not 'magnet'"),
    ],
)
def test_an_option_that_contradicts_the_run_is_named(stopped, capsys, contents, options, contradiction):
    before = contents(stopped)
    capsys.readouterr()
    assert main(["train", "--resume", "--output", str(stopped), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: resume: the run has ")
    assert contradiction in error
    assert error.count("\n") == 1
    assert contents(stopped) == before


# A command, and the number of epochs that its trainings have.
STUDIES = {
    "sweep": ("sweep --preset cosine-digits --seeds 3 --margin -0.1 0", 2),
    "coarse-to-fine": ("coarse-to-fine --preset easy-positive-digits --seeds 3", 2),
    "magnet": ("magnet --preset magnet-digits --seeds 3 --warm-epochs 1 --clusters-per-class 2", 2),
    "parity": ("parity --preset easy-positive-digits --seeds 3 --loss triplet --steps 2", 2),
    "one-shot": ("one-shot --preset cosine-omniglot --seeds 3", 2),
    "demo": ("demo --seeds 3", 6),
}


@pytest.fixture
def small_one_shot(monkeypatch):
    """The study of `one-shot` on digits: Omniglot is not at hand."""

    def study(config, losses, seeds, episodes):
        config = config.but(dataset="digits", loss=MarginSoftmax())
        return margin_sweep_study(config, (0.0,), seeds, Judging(episodes=episodes), "one-shot")

    monkeypatch.setattr(omniglot, "vinyals_study", study)
    monkeypatch.setattr(omniglot, "official_study", lambda *args: study(*args).__class__("none", "", "", [], {}))


@needs_cpu_backend
@pytest.mark.usefixtures("small_one_shot")
@pytest.mark.parametrize("name", STUDIES)
def test_the_same_command_resumes_a_study_and_names_a_changed_option(tmp_path, capsys, monkeypatch, contents, name):
    text, epochs = STUDIES[name]
    command = [*text.split(), *(["--episodes", "5"] if name == "demo" else SMALL), "--workers", "1"]
    monkeypatch.setattr(reproduce, "DEMO_MARGINS", (0.0,))
    with interrupted(1):
        assert main([*command, "--epochs", str(epochs), "--output", str(tmp_path / "out")]) == 130
    assert "the same command goes on" in capsys.readouterr().out
    begun = [path.parent for path in (tmp_path / "out").rglob("config.json")]
    assert len(begun) == 1
    assert Run(begun[0]).config().seed == 3
    before = contents(begun[0])
    assert main([*command, "--epochs", str(epochs + 3), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{begun[0]}: output: it holds a run of other settings, epochs = {epochs}, not {epochs + 3}" in error
    assert error.count("\n") == 1
    assert contents(begun[0]) == before
    if name != "sweep":  # the trainings of all studies are resumed by the same lines; once this one has its figures:
        with interrupted(lambda: bool(Run(begun[0]).result())):
            assert main([*command, "--epochs", str(epochs), "--output", str(tmp_path / "out")]) in (0, 130)
        assert Run(begun[0]).epochs_logged() == epochs
        return
    for out in ("out", "whole"):
        assert main([*command, "--epochs", str(epochs), "--output", str(tmp_path / out)]) == 0
    found, whole = (json.loads((tmp_path / out / "studies.json").read_text()) for out in ("out", "whole"))
    for study, other in zip(found["studies"], whole["studies"]):
        figures = [[(t["group"], t["config"], t["figures"]) for t in s["trials"]] for s in (study, other)]
        assert figures[0] == figures[1]


def test_reproduce_resumes(tmp_path, monkeypatch):
    config = preset("cosine-digits").but(epochs=2, threads=1, backbone=Backbone(blocks=2, channels=4, embedding_size=8))
    small = [margin_sweep_study(config, (0.0, 0.1), (1,), Judging(episodes=5))]
    for of_studies, options in (
        ("reproduce_studies", []),
        ("parity_studies", ["--parity"]),
        ("long_studies", ["--long"]),
    ):
        command = ["reproduce", *options, "--workers", "1", "--output", str(tmp_path / of_studies)]
        with monkeypatch.context() as patch:
            patch.setattr(reproduce, of_studies, lambda: small)
            with interrupted(1):
                assert main(command) == 130
            assert main(command) == 0
    run_suite(small, tmp_path / "whole", "whole", workers=1)
    folders = [tmp_path / name for name in ("reproduce_studies", "parity_studies", "long_studies", "whole")]
    reports = [(folder / "report.md").read_text().partition("\n")[2] for folder in folders]
    assert all(report == reports[-1] for report in reports)
