"""What a study says of stored figures: means, paired differences, and verdicts on claims."""

import pytest

from fused_margins.fewshot.config import Judging, MarginSoftmax, TrainConfig
from fused_margins.fewshot.runs import Run, plain
from fused_margins.fewshot.studies import (
    CONTRADICTED,
    FEW_SEEDS,
    NO_DIFFERENCE,
    NOT_TESTED,
    REPRODUCED,
    Claim,
    Results,
    Study,
    Verdict,
    claims_table,
)
from fused_margins.fewshot.terminal import UserError
from fused_margins.fewshot.trials import Trial


def _trial(group, seed):
    return Trial(group, TrainConfig(seed=seed, loss=MarginSoftmax(margin=-0.1 if group == "a" else 0.0)))


def _store(folder, trial, **figures):
    result = {"config": plain(trial.config), "judging": plain(trial.judging), "figures": figures, "seconds": 1.0}
    result["epochs"] = trial.config.epochs
    Run(folder / trial.name).save_result(result)


@pytest.fixture
def results(tmp_path):
    """Groups a and b on seeds 3, 1 and 5, given in that order; b has a fourth seed."""
    trials = [_trial(group, seed) for seed in (3, 1, 5) for group in "ab"] + [_trial("b", 7)]
    nmi = {"a": {1: 0.8, 3: 0.7, 5: 0.75}, "b": {1: 0.5, 3: 0.6, 5: 0.55, 7: 0.9}}
    for trial in trials:
        value = nmi[trial.group][trial.config.seed]
        _store(tmp_path, trial, nmi=value, steady=0.9 - (trial.group == "b"), modes=None)
    return Results(tmp_path, trials)


def test_values_stand_by_seed_and_differences_are_paired(results):
    assert results.groups == ["a", "b"]
    assert list(results.values("a", "nmi").items()) == [(1, 0.8), (3, 0.7), (5, 0.75)]
    mean, interval = results.difference("a", "b", "nmi")
    assert mean == pytest.approx((0.3 + 0.1 + 0.2) / 3)  # seed 7 has no partner
    assert interval == pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-4)  # t of two degrees of freedom x standard error
    assert results.num_seeds("a", "b") == 3


def test_the_table_has_groups_and_then_differences(results):
    table = results.table("title", {"NMI": "nmi", "modes": "modes"}, baseline="b")
    assert [row[0] for row in table.rows] == ["a", "b", "a minus b"]
    assert table.rows[0][1].startswith("75.0 ± ")
    assert table.rows[2][1].startswith("+20.0 ± ")
    assert table.rows[0][2] == "-"  # a figure that does not exist


@pytest.mark.parametrize(
    ("claim", "outcome"),
    [
        (Claim("s", "c", "a", "b", "steady"), REPRODUCED),
        (Claim("s", "c", "b", "a", "steady"), CONTRADICTED),
        (Claim("s", "c", "a", "b", "nmi"), NO_DIFFERENCE),
        (Claim("s", "c", reason="needs a GPU"), NOT_TESTED),
    ],
)
def test_verdicts(results, claim, outcome):
    verdict = claim.judge(results)
    assert verdict.outcome == outcome
    assert "GPU" in verdict.evidence if outcome == NOT_TESTED else "minus" in verdict.evidence


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_decide_nothing(tmp_path, seeds):
    trials = [_trial(group, seed) for group in "ab" for seed in range(seeds)]
    for trial in trials:
        _store(tmp_path, trial, nmi=0.9 if trial.group == "a" else 0.1)
    assert Claim("s", "c", "a", "b", "nmi").judge(Results(tmp_path, trials)).outcome == NOT_TESTED


def test_one_seed_has_the_interval_of_its_episodes_and_no_other(tmp_path):
    trials = [_trial("a", 0), _trial("b", 0)]
    for trial in trials:
        _store(tmp_path, trial, nmi=0.5, novel=0.6, novel_interval=0.01)
    table = Results(tmp_path, trials).table("title", {"NMI": "nmi", "novel": "novel"}, baseline="b")
    assert [row[1:] for row in table.rows] == [["50.0", "60.0 ± 1.0"], ["50.0", "60.0 ± 1.0"], ["+0.0", "+0.0"]]


def test_a_trial_is_finished_with_its_own_settings_only(tmp_path):
    trial = _trial("a", 0)
    folder = tmp_path / trial.name
    assert not trial.finished(folder)
    _store(tmp_path, trial, nmi=1.0)
    assert trial.finished(folder)
    assert not Trial("a", trial.config.but(epochs=3)).finished(folder)
    assert not Trial("a", trial.config, Judging(episodes=5)).finished(folder)
    Run(folder).save_result(Run(folder).result() | {"epochs": trial.config.epochs - 1})
    assert not trial.finished(folder)  # half-trained


def test_two_trials_of_one_name_are_refused():
    with pytest.raises(UserError, match="two trials are called a-seed0"):
        Study("s", "title", "lead", [_trial("a", 0), _trial("a", 0)], {})


def test_claims_that_want_nothing_but_seeds_share_a_row():
    seedless = [Verdict(f"claim {number}", "A 2020", NOT_TESTED, FEW_SEEDS) for number in range(3)]
    judged = Verdict("another", "B 2021", REPRODUCED, "+1 ± 0.5")
    table = claims_table([seedless[0], judged, *seedless[1:]])
    assert table.rows == [
        ["3 differences between methods", "A 2020", NOT_TESTED, FEW_SEEDS],
        ["another", "B 2021", REPRODUCED, "+1 ± 0.5"],
    ]
    assert [row[0] for row in claims_table([seedless[0], judged]).rows] == ["claim 0", "another"]


def test_one_seed_has_students_interval_where_there_is_no_other(tmp_path):
    trials = [_trial("a", 0)]
    _store(tmp_path, trials[0], official_runs=0.9, official_runs_student=0.03)
    assert Results(tmp_path, trials).mean("a", "official_runs") == (0.9, 0.03)
