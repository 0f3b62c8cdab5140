"""The demo's tables and checks, from outcomes whose figures are known."""

import json

import numpy as np
import pytest

from fused_margins.fewshot.config import TrainConfig
from fused_margins.fewshot.demo import COARSE_TO_FINE, MARGINS, Job, Outcome, base_classes, demo_jobs
from fused_margins.fewshot.demo_report import EASY, RANDOM, DemoReport
from fused_margins.fewshot.parity import StepDifference

SEEDS = (3, 1)


def _outcome(part, name, seed, losses=None, backends=None, **figures):
    job = Job(part, name, TrainConfig(seed=seed), 5, backends)
    models = 1 if backends is None else 2
    return Outcome(job, losses or [[1.0]] * models, [figures] * models, seconds=1.0)


def _outcomes(easy_nmi=(0.7, 0.8), random_nmi=(0.6, 0.5), knc_error=0.02, difference=1e-6):
    outcomes = []
    for i, seed in enumerate(SEEDS):
        for name in COARSE_TO_FINE:
            nmi = {EASY: easy_nmi, RANDOM: random_nmi}.get(name, (0.4, 0.4))[i]
            figures = {"recall@1": 0.9, "nmi": nmi, "purity": 0.5, "knc_error": knc_error}
            outcomes.append(_outcome("coarse_to_fine", name, seed, **figures))
            outcomes[-1].points = np.zeros((599, 2))  # one for each held-out digit
        for margin in MARGINS:
            figures = {"novel_1shot": 0.5 - 0.1 * margin, "novel_5shot": 0.7, "accuracy": 0.99, "novel_nmi": 0.4}
            outcomes.append(_outcome("margins", f"{margin:g}", seed, novel_discriminability=2.0, **figures))
    parity = _outcome(
        "parity", "magnet", 1, backends=("reference", "cpu"), **{"recall@1": 0.9, "nmi": 0.4, "knc_error": 0.1}
    )
    parity.differences = [StepDifference(0, 1.0, difference / 2, difference, "head.bias", 0.0)]
    return [*outcomes, parity]


def test_values_stand_in_the_order_of_seeds_and_differences_are_paired():
    report = DemoReport(_outcomes(), seconds=1)
    assert report.seeds == [1, 3]
    assert report.values("coarse_to_fine", EASY, "nmi") == [0.8, 0.7]
    mean, interval = report.difference("coarse_to_fine", EASY, RANDOM, "nmi")
    assert mean == pytest.approx((0.1 + 0.3) / 2)
    assert interval == pytest.approx(12.7062 * 0.1, rel=1e-4)  # t of one degree of freedom x standard error


def test_tables_show_the_means():
    report = DemoReport(_outcomes(), seconds=1)
    rows = {row[0]: row for row in report.coarse_to_fine_table().rows}
    assert rows[EASY][2].startswith("75.0 ±")
    assert rows["easy minus random, paired"][2].startswith("20.0 ±")
    margins = {row[0]: row for row in report.margins_table().rows}
    assert margins["-0.3"][1].startswith("53.0 ±")
    assert margins["-0.3"][5].startswith("3.0 ±")
    assert margins["0"][5] == "-"


@pytest.mark.parametrize(
    ("change", "number"),
    [({"easy_nmi": (0.5, 0.5), "random_nmi": (0.6, 0.5)}, 0), ({"knc_error": 0.04}, 1), ({"difference": 0.1}, 2)],
)
def test_checks_fail_when_the_outcomes_do_not_bear_them_out(change, number):
    assert [check.holds for check in DemoReport(_outcomes(), seconds=1).checks()] == [True] * 3
    failed = DemoReport(_outcomes(**change), seconds=1).checks()
    assert [check.holds for check in failed] == [i != number for i in range(3)]


def test_without_a_second_backend_there_is_no_parity_to_report():
    outcomes = [o for o in _outcomes() if o.job.part != "parity"]
    report = DemoReport(outcomes, seconds=1)
    assert report.parity_table() is None
    assert len(report.checks()) == 2


def test_what_is_written_is_what_was_measured(tmp_path):
    report = DemoReport(_outcomes(), seconds=1)
    report.write(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert len(data["runs"]) == len(_outcomes())
    assert [check["holds"] for check in data["checks"]] == [True] * 3
    (step,) = [json.loads(line) for line in (tmp_path / "parity.jsonl").read_text().splitlines()]
    assert (step["loss_name"], step["gradient_difference"]) == ("magnet", 1e-6)
    text = (tmp_path / "report.md").read_text()
    assert all(table.markdown() in text for table in report.tables())
    pictures = [line[4:-1].split("](")[1] for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == 5
    assert all((tmp_path / name).exists() for name in pictures)


def test_all_methods_meet_the_same_seeds_and_base_digits():
    jobs = demo_jobs((0, 1), epochs=2, num_episodes=5, backends=None)
    for seed in (0, 1):
        of_seed = [job for job in jobs if job.config.seed == seed]
        assert [job.name for job in of_seed if job.part == "coarse_to_fine"] == list(COARSE_TO_FINE)
        assert {job.config.classes for job in of_seed if job.part == "margins"} == {base_classes(seed)}
    assert base_classes(0) != base_classes(1)
    assert len(set(base_classes(0))) == 5
