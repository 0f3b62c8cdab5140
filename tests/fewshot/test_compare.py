"""Runs side by side, from folders with figures that are known."""

import json

import pytest

from fused_margins.fewshot.config import MarginSoftmax, TrainConfig
from fused_margins.fewshot.report import Comparison, read_run, read_runs
from fused_margins.fewshot.runs import Run
from fused_margins.fewshot.terminal import UserError


def _store(folder, margin, seed, nmi, **more):
    config = TrainConfig(epochs=1, seed=seed, loss=MarginSoftmax(margin=margin))
    run = Run.create(folder, config)
    run.append_metrics({"epoch": 0, "loss": 1.0, "learning_rate": 0.1})
    run.save_result({"figures": {"nmi": nmi, "nmi_interval": 0.01, "nmi_student": 0.02}, "seconds": 2.0, **more})
    return folder


@pytest.fixture
def folders(tmp_path):
    """Margin 0 on seeds 0 and 1, margin -0.3 on the same."""
    figures = {(0.0, 0): 0.5, (0.0, 1): 0.7, (-0.3, 0): 0.6, (-0.3, 1): 0.9}
    return [_store(tmp_path / f"{m}-{s}", m, s, nmi, peak_mib=500.0) for (m, s), nmi in figures.items()]


def test_seeds_make_groups_and_differences_are_paired(folders):
    comparison = Comparison([read_run(folder) for folder in folders])
    assert comparison.groups == ["margin 0.0", "margin -0.3"]
    settings, figures, differences = comparison.tables()
    assert settings.rows[0] == ["loss.margin", "0.0", "-0.3"]
    assert figures.rows[0] == ["nmi", "60.0 ± 127.1", "75.0 ± 190.6"]
    assert [row[0] for row in figures.rows] == ["nmi", "seconds", "peak"]
    assert figures.rows[2][1] == "500 MiB"
    assert differences.rows[0] == ["nmi", "+15.0 ± 63.5"]  # 0.1 and 0.2


def test_how_many_trainings_converged_is_said_where_it_was_asked(tmp_path):
    reasons = {"a": {"stopped_early": None}, "b": {"stopped_early": "rose by 0.7 points"}, "c": {}}
    runs = [
        read_run(_store(tmp_path / name, 0.0, seed, 0.5, **more)) for seed, (name, more) in enumerate(reasons.items())
    ]
    assert Comparison(runs).figures_table().rows[-1] == ["converged", "1 of 2"]


@pytest.mark.parametrize("suffix", [".html", ".md", ".json"])
def test_a_comparison_is_written(folders, tmp_path, suffix):
    path = tmp_path / f"both{suffix}"
    Comparison([read_run(folder) for folder in folders]).write(path)
    text = path.read_text(encoding="utf-8")
    assert "margin -0.3" in text
    if suffix == ".json":
        assert json.loads(text)["groups"][1]["minus_first"]["nmi"] == pytest.approx([0.1, 0.2])


def test_a_study_s_folder_gives_its_runs_and_pictures_are_left_out(folders, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    for folder in folders[2:]:
        folder.rename(study / folder.name)
    (study / "margins.png").write_bytes(b"picture")
    runs, left_out = read_runs([*folders[:2], study])
    assert [run.folder for run in runs] == [*folders[:2], study / "-0.3-0", study / "-0.3-1"]
    assert left_out == []
    runs, left_out = read_runs(sorted(study.iterdir()))  # as a shell makes of study/*
    assert [run.seed for run in runs] == [0, 1]
    assert left_out == [f"{study / 'margins.png'}: not a folder"]
    with pytest.raises(UserError, match="expected two or more, got 0"):
        Comparison(read_runs([study / "margins.png"])[0])


def test_below_a_folder_what_cannot_be_compared_is_left_out_and_said(folders, tmp_path):
    Run.create(tmp_path / "begun", TrainConfig(epochs=2))
    _store(tmp_path / "twin", 0.0, 0, 0.5)
    runs, left_out = read_runs([tmp_path])
    assert sorted(run.folder for run in runs) == sorted(folders)
    assert [text.split("; continue")[0] for text in left_out] == [
        f"{tmp_path / 'begun'}: not finished, 0 of 2 epochs",
        f"{tmp_path / 'twin'}: the same settings and seed as {tmp_path / '0.0-0'}",
    ]
    with pytest.raises(UserError, match="not finished"):
        read_runs([tmp_path / "begun"])  # this one was meant


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("report.json", '{"figures": {}, "judging": 3}', "not a report of a run"),
        ("report.json", '{"figures": {}, "judging": null}', "not a report of a run"),
        ("report.json", f'{{"figures": {{"nmi": 1{"0" * 400}}}}}', "not a report of a run"),
        ("metrics.jsonl", "1", "line 1: expected an object with the numbers loss and learning_rate, got 1"),
        ("metrics.jsonl", '{"loss": 1.0}', "line 1: expected an object with the numbers loss and learning_rate, got"),
        ("metrics.jsonl", '{"loss": "a", "learning_rate": 1}', "line 1: expected an object"),
        ("metrics.jsonl", '{"loss": NaN, "learning_rate": 1}', "line 1: expected an object"),
        ("metrics.jsonl", f'{{"loss": 1{"0" * 400}, "learning_rate": 1}}', "line 1: expected an object"),
    ],
    ids=["judging", "no-judging", "huge-figure", "number", "no-rate", "text", "nan", "huge-loss"],
)
def test_files_that_no_run_writes_are_named(folders, file, text, message):
    (folders[0] / file).write_text(text)
    with pytest.raises(UserError, match=f"{folders[0] / file}: {message}"):
        read_run(folders[0])


def test_what_cannot_be_compared_is_named(folders, tmp_path):
    with pytest.raises(UserError, match="no run here"):
        read_run(tmp_path)
    run = Run.create(tmp_path / "begun", TrainConfig(epochs=2))
    with pytest.raises(UserError, match="not finished, 0 of 2 epochs"):
        read_run(run.folder)
    for _ in range(2):
        run.append_metrics({"epoch": 0, "loss": 1.0, "learning_rate": 0.1})
    with pytest.raises(UserError, match=r"no report\.json"):
        read_run(run.folder)
    with pytest.raises(UserError, match="the same settings and seed 0"):
        Comparison([read_run(folders[0]), read_run(folders[0])])
    with pytest.raises(UserError, match="expected two or more, got 1"):
        Comparison([read_run(folders[0])])
