"""Figures against values worked out by hand or by another formula."""

import math

import pytest
import torch

from fused_margins.fewshot import metrics

# Angles in degrees, and labels; nearest other by cosine: 0 -> 10, 10 -> 0, 25 -> 10, 90 -> 100, 100 -> 90.
ANGLES = torch.deg2rad(torch.tensor([0.0, 10.0, 25.0, 90.0, 100.0]))
CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
LABELS = torch.tensor([0, 1, 0, 2, 2])


def test_recall_at_k_by_hand():
    # Sample 0 finds its class mate second, sample 2 second, sample 1 never: 2/5 at 1, 4/5 from 2 on.
    recalls = metrics.recall_at_k(CIRCLE, LABELS, ks=(1, 2, 4))
    assert recalls == {"recall@1": 0.4, "recall@2": 0.8, "recall@4": 0.8}


def test_recall_looks_at_directions_only():
    stretched = CIRCLE * torch.tensor([[1.0], [9.0], [0.1], [3.0], [5.0]])
    assert metrics.recall_at_k(stretched, LABELS, ks=(1,)) == {"recall@1": 0.4}


def test_recall_with_more_neighbours_asked_than_there_are():
    assert metrics.recall_at_k(CIRCLE[:2], torch.tensor([0, 1]), ks=(8,)) == {"recall@8": 0.0}
    assert metrics.recall_at_k(CIRCLE[:2], torch.tensor([1, 1]), ks=(8,)) == {"recall@8": 1.0}


def test_purity_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    clusters = torch.tensor([5, 5, 1, 1, 1, 1])
    assert metrics.purity(labels, clusters) == pytest.approx((2 + 2) / 6)


def _blobs(num_classes=4, per_class=20, spread=0.05):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    return torch.eye(num_classes)[labels] + spread * torch.randn(len(labels), num_classes, generator=generator), labels


def test_separate_blobs_agree_with_their_labels_whatever_the_names():
    embeddings, labels = _blobs()
    renamed = torch.tensor([7, 2, 9, 4])[labels]
    assert metrics.cluster_agreement(embeddings, renamed) == {"nmi": pytest.approx(1), "purity": 1.0}


def test_labels_without_meaning_have_little_agreement():
    embeddings, labels = _blobs()
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert metrics.cluster_agreement(embeddings, shuffled)["nmi"] < 0.15


def test_collapsed_embeddings_score_zero_without_a_warning():
    assert metrics.cluster_agreement(torch.ones(20, 3), torch.arange(4).repeat(5))["nmi"] == pytest.approx(0)


def test_knc_error_counts_what_lies_among_the_other_class():
    embeddings, labels = _blobs()
    test_labels = torch.tensor([0, 1, 2, 3, 3])
    test = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0])]  # the last one lies where class 0 is
    error = metrics.knc_error(embeddings, labels, test, test_labels, clusters_per_class=2, num_neighbours=3)
    assert error == pytest.approx(1 / 5)


def test_discriminability_by_hand():
    # Centres at 5 and 85 degrees, each class spread by 5 degrees either way: exact values from trigonometry.
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 80.0, 90.0]))
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[2.0], [1.0], [3.0], [1.0]])
    radius = math.cos(math.radians(5))  # of both centres
    between = (2 * radius * math.sin(math.radians(40))) ** 2
    within = 1 - radius**2
    measured = metrics.discriminability(embeddings, torch.tensor([0, 0, 1, 1]))
    assert measured == pytest.approx(between / within, rel=1e-4)


def test_intervals_by_hand():
    mean, interval = metrics.mean_and_interval(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    assert mean == pytest.approx(0.5)
    assert interval == pytest.approx(1.96 * math.sqrt(0.05) / 2)  # variance with ddof 0: 0.05
    mean, interval = metrics.mean_and_student_interval([0.2, 0.4, 0.6, 0.8])
    assert mean == pytest.approx(0.5)
    assert interval == pytest.approx(3.182446 * math.sqrt(0.2 / 3) / 2)  # ddof 1; t of 3 degrees of freedom
    assert metrics.mean_and_student_interval([0.7]) == (pytest.approx(0.7), 0.0)
