"""Heads on frozen features are those of scikit-learn; claims about margins ask for converged trainings."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from fused_margins.fewshot.cli import main
from fused_margins.fewshot.config import Backbone, Judging, MarginSoftmax, TrainConfig
from fused_margins.fewshot.datasets.features import Features, write_features
from fused_margins.fewshot.episodes import (
    centroid_accuracy,
    logistic_accuracy,
    neighbours_accuracy,
    sample_episodes,
    simple_shot_accuracy,
)
from fused_margins.fewshot.optimization import Validation, stopped_early
from fused_margins.fewshot.runs import Run
from fused_margins.fewshot.studies import Claim, Results
from fused_margins.fewshot.studies.margins import draw_base_classes, margin_sweep_study
from fused_margins.fewshot.trials import Trial

LABELS = torch.arange(8).repeat_interleave(12)


@pytest.fixture
def embeddings():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(8, 5, generator=generator)[LABELS] + torch.randn(96, 5, generator=generator)).relu() + 0.1


@pytest.fixture
def file(embeddings, tmp_path):
    path = tmp_path / "few.safetensors"
    split = torch.tensor([0, 0, 2]).repeat(32)
    write_features(path, Features(embeddings, LABELS, tuple("abcdefgh"), split), {})
    return path


def _episodes(shots):
    generator = torch.Generator().manual_seed(1)
    return sample_episodes(LABELS, n_way=4, k_shot=shots, num_queries=6, num_episodes=12, generator=generator)


def _by_scikit_learn(classifier, embeddings, episodes):
    x, labels, truth = embeddings.numpy(), episodes.support_labels().numpy(), episodes.query_labels().numpy()
    parts = zip(episodes.support.numpy(), episodes.query.numpy())
    with np.errstate(invalid="ignore"):  # of one shot there is no spread within classes
        return torch.tensor([classifier.fit(x[s], labels).score(x[q], truth) for s, q in parts], dtype=torch.float32)


@pytest.mark.parametrize("shots", [1, 3])
def test_heads_are_those_of_scikit_learn(shots, embeddings):
    episodes, unit, mean = _episodes(shots), F.normalize(embeddings), embeddings.mean(0)
    neighbours = KNeighborsClassifier(shots, metric="cosine", weights="distance")
    torch.testing.assert_close(neighbours_accuracy(embeddings, episodes), _by_scikit_learn(neighbours, unit, episodes))
    centred = F.normalize(embeddings - mean)
    expected = _by_scikit_learn(NearestCentroid(), centred, episodes)
    torch.testing.assert_close(simple_shot_accuracy(embeddings, episodes, mean), expected)
    by_cosine = KNeighborsClassifier(1, metric="cosine")
    centroids = [unit[support].view(4, shots, -1).mean(1) for support in episodes.support]  # of lengths of their own
    truth, queries = episodes.query_labels(), embeddings[episodes.query]
    expected_by_cosine = [by_cosine.fit(c, range(4)).score(q, truth) for c, q in zip(centroids, queries)]
    assert centroid_accuracy(embeddings, episodes).tolist() == pytest.approx(expected_by_cosine)
    if shots == 1:  # then centroids have unit length, too
        torch.testing.assert_close(centroid_accuracy(centred, episodes), expected)
        torch.testing.assert_close(neighbours_accuracy(embeddings, episodes), centroid_accuracy(embeddings, episodes))
    assert logistic_accuracy(embeddings, episodes).mean() > 0.3


def test_one_sample_of_each_of_many_classes_is_no_warning():
    labels, generator = torch.arange(30).repeat_interleave(3), torch.Generator().manual_seed(0)
    episodes = sample_episodes(labels, n_way=30, k_shot=1, num_queries=2, num_episodes=1, generator=generator)
    assert logistic_accuracy(torch.eye(30)[labels], episodes).tolist() == [1.0]


def test_the_command_tabulates_heads_and_does_nothing_twice(file, tmp_path, capsys):
    options = ["heads", "--features", str(file), "--seeds", "0", "1", "--episodes", "5", "--workers", "1"]
    assert main([*options, "--output", str(tmp_path / "heads")]) == 0
    text = (tmp_path / "heads" / "report.md").read_text(encoding="utf-8")
    assert "| SimpleShot |" in text
    assert "all 4 ways, 1-shot" in text
    stored = tmp_path / "heads" / "heads" / "heads-seed1" / "heads.json"
    before = stored.stat().st_mtime_ns
    assert main([*options, "--output", str(tmp_path / "heads")]) == 0
    assert stored.stat().st_mtime_ns == before


def test_base_classes_are_drawn_anew_for_each_seed(file):
    config = TrainConfig(
        dataset=f"features:{file}", backbone=Backbone(name="linear"), loss=MarginSoftmax(), epochs=2, batch_size=16
    )
    study = margin_sweep_study(config, (0.0,), (0, 1), Judging(episodes=4, all_ways=True), base_classes=3)
    first, second = (trial.config for trial in study.trials)
    assert (first.classes, len(second.classes)) == (draw_base_classes(8, 0, 3), 3)
    assert first.classes != second.classes
    assert first.validation_episodes == 600
    assert "all 5 ways" in study.columns
    with pytest.raises(Exception, match="base_classes: expected 2 or more of 8 classes"):
        margin_sweep_study(config, (0.0,), (0, 1), Judging(), base_classes=8)


def _history(accuracies, last_rate=1e-6):
    rates = np.linspace(1e-3, last_rate, len(accuracies))
    return [{"validation": a, "learning_rate": rate} for a, rate in zip(accuracies, rates)]


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        (_history([0.8] * 15), None),
        (_history([0.8] * 14), "14 epochs are too few to tell"),
        (_history([0.8] * 50 + [0.7] * 15), None),  # it fell
        (_history([0.1] * 5 + [0.8] * 40), None),
        (_history(np.linspace(0, 1, 40)), "validation accuracy rose by 25.6 points over the last 10 epochs"),
        (_history([0.8] * 35 + [0.806] * 10), "validation accuracy rose by 0.6 points over the last 10 epochs"),
        (_history([0.8] * 80 + [0.806] * 20), "validation accuracy rose by 0.6 points over the last 20 epochs"),
        (_history([0.8] * 30, last_rate=2e-4), "the learning rate is still 2.0e-04, of 1.0e-03 at its highest"),
    ],
)
def test_the_rule_of_convergence(history, reason):
    assert stopped_early(history) == reason


def test_validation_asks_the_same_every_time(images):
    validation = Validation(images, 30)
    vectors = images.pixels().flatten(1)
    assert validation(lambda _: vectors) == validation(lambda _: vectors.clone())
    assert validation.episodes.n_way == 5


@pytest.mark.parametrize(("early", "outcome"), [(None, "contradicted"), ("2 epochs", "not tested")])
def test_a_claim_about_margins_asks_for_converged_trainings(early, outcome, tmp_path):
    trials = [Trial(group, TrainConfig(seed=seed)) for group in ("a", "b") for seed in range(3)]
    for trial in trials:
        value = {"a": 0.5, "b": 0.7}[trial.group] + 0.01 * trial.config.seed
        stopped_early = early if trial is trials[-1] else None
        Run(tmp_path / trial.name).save_result({"figures": {"f": value}, "stopped_early": stopped_early})
    results = Results(tmp_path, trials)
    verdict = Claim("source", "a beats b", "a", "b", "f", of_converged=True).judge(results)
    assert verdict.outcome == outcome
    assert early is None or verdict.evidence == "base training stopped early: 1 of 6 trainings (2 epochs)"
    assert Claim("source", "a beats b", "a", "b", "f").judge(results).outcome == "contradicted"
    del results.stored[trials[0]]["stopped_early"]
    assert results.stopped_early("a") == "1 of 3 trainings (no validation episodes)"
