"""Figures against values worked out by hand or by another formula."""

import math

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score

from fused_margins.fewshot import metrics

# Angles in degrees, and labels; nearest other by cosine: 0 -> 10, 10 -> 0, 25 -> 10, 90 -> 100, 100 -> 90.
ANGLES = torch.deg2rad(torch.tensor([0.0, 10.0, 25.0, 90.0, 100.0]))
CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
LABELS = torch.tensor([0, 1, 0, 2, 2])


def test_recall_at_k_by_hand():
    # Sample 0 finds its class mate second, sample 2 second, sample 1 never: 2/5 at 1, 4/5 from 2 on.
    stretched = CIRCLE * torch.tensor([[1.0], [9.0], [0.1], [3.0], [5.0]])  # directions alone count
    recalls = metrics.recall_at_k(stretched, LABELS, ks=(1, 2, 4))
    assert recalls == {"recall@1": 0.4, "recall@2": 0.8, "recall@4": 0.8}


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


def test_collapsed_embeddings_score_zero_without_a_warning():
    assert metrics.cluster_agreement(torch.ones(20, 3), torch.arange(4).repeat(5))["nmi"] == pytest.approx(0)


def test_knc_error_counts_what_lies_among_the_other_class():
    embeddings, labels = _blobs()
    test_labels = torch.tensor([0, 1, 2, 3, 3])
    test = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0])]  # the last one lies where class 0 is
    errors = metrics.knc_errors(embeddings, labels, test, test_labels, [3], clusters_per_class=2)
    assert errors == pytest.approx({3: 1 / 5})


def _random(size=60, num_classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (size,), generator=generator)
    labels[0] = 99  # alone in its class
    return torch.randn(size, 5, generator=generator) + torch.nn.functional.one_hot(labels % 5, 5), labels


@pytest.mark.parametrize("few", [200, 3])
@pytest.mark.parametrize("numbers_at_once", [1 << 22, 100])
def test_map_at_r_is_that_of_a_peer(few, numbers_at_once, monkeypatch):
    monkeypatch.setattr(metrics, "FEW_NEIGHBOURS", few)  # both ways of a search, at once and in blocks
    monkeypatch.setattr(metrics, "NUMBERS_AT_ONCE", numbers_at_once)
    embeddings, labels = _random(200, 9, seed=1)
    peer = AccuracyCalculator(
        ("mean_average_precision_at_r",), k="max_bin_count", knn_func=CustomKNN(CosineSimilarity())
    )
    theirs = peer.get_accuracy(embeddings, labels)["mean_average_precision_at_r"]
    assert metrics.mean_average_precision_at_r(embeddings, labels) == pytest.approx(theirs, rel=1e-5)


def test_map_at_r_at_its_ends():
    embeddings, labels = _blobs()
    assert metrics.mean_average_precision_at_r(embeddings, labels) == 1
    assert metrics.mean_average_precision_at_r(embeddings[:3], torch.arange(3)) == 0
    pairs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]])
    assert metrics.mean_average_precision_at_r(pairs, torch.tensor([0, 0, 1, 1])) == 0


@pytest.mark.parametrize("k", [1, 4, 250])
def test_nearest_others_come_in_order_and_never_include_oneself(k):
    embeddings, _ = _random(30)
    index = metrics.nearest_others(embeddings, k)
    assert index.shape == (30, k)
    cosine = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(embeddings).T
    for i in range(30):
        ranked = cosine[i].argsort(descending=True)
        ranked = ranked[ranked != i][:k].tolist()
        assert index[i].tolist() == ranked + [-1] * (k - len(ranked))


def _places(place_of_class, per_class=40, far=20.0, seed=0):
    """A coarse class for each list, a fine one for each place in it; those at one place are mixed."""
    embeddings, fine, coarse = [], [], []
    generator = torch.Generator().manual_seed(seed)
    for c, places in enumerate(place_of_class):
        for place in places:
            centre = torch.zeros(8)
            centre[place] = far
            embeddings.append(centre + torch.randn(per_class, 8, generator=generator))
            fine += [len(embeddings)] * per_class
            coarse += [10 - c] * per_class  # the second comes first in ascending order
    return torch.cat(embeddings), torch.tensor(fine), torch.tensor(coarse)


def test_modes_kept_are_the_places_of_the_classes():
    kept, present = metrics.modes_kept(*_places([[0, 0, 0, 0, 0], [0, 1, 2, 3, 4]]))
    assert kept.tolist() == [pytest.approx(5), pytest.approx(1, abs=0.05)]
    assert present.tolist() == [pytest.approx(5)] * 2
    kept, present = metrics.modes_kept(*_places([[0, 1, 0, 1], [3]]))
    assert kept.tolist() == [1, pytest.approx(2, abs=0.1)]
    assert present.tolist() == [1, pytest.approx(4)]


def test_modes_are_an_effective_number_and_not_a_matter_of_chance():
    # Many small classes at one place: clusters and labels agree by chance alone, and that does not count.
    kept, present = metrics.modes_kept(*_places([[0] * 20], per_class=15))
    assert kept.tolist() == [pytest.approx(1, abs=0.15)]
    # One of the two classes has a tenth of the samples: it is a mode, but not a whole one.
    x, fine, coarse = _places([[0, 1]], per_class=100)
    kept, present = metrics.modes_kept(x[:110], fine[:110], coarse[:110])
    assert present.tolist() == [pytest.approx(math.exp(-(10 / 11) * math.log(10 / 11) - (1 / 11) * math.log(1 / 11)))]
    assert torch.allclose(kept, present)
    # As many classes as samples: nothing to tell apart.
    kept, _ = metrics.modes_kept(x[:5], torch.arange(5), torch.zeros(5, dtype=torch.int64))
    assert kept.tolist() == [1]


def test_clusters_are_as_good_as_those_of_scikit_learn():
    images, labels = load_digits(return_X_y=True)
    theirs = KMeans(10, n_init=10, random_state=0).fit_predict(images[:700])
    ours = metrics.cluster_agreement(torch.tensor(images[:700] / 16), torch.tensor(labels[:700]))
    assert ours["nmi"] == pytest.approx(normalized_mutual_info_score(labels[:700], theirs), abs=0.03)


def test_knc_errors_of_several_numbers_are_those_of_each():
    embeddings, labels = _random(200, 9, seed=1)
    test, test_labels = _random(50, 9, seed=2)
    data = (embeddings, labels, test, test_labels)
    errors = metrics.knc_errors(*data, [1, 3, 10, 999], clusters_per_class=3)
    assert list(errors) == [1, 3, 10, 999]
    for number, error in errors.items():
        assert {number: error} == metrics.knc_errors(*data, [number], clusters_per_class=3)
    assert len(set(errors.values())) > 1
    with pytest.raises(ValueError, match="num_neighbours: expected at least 1, got 0"):
        metrics.knc_errors(*data, [0, 3])


def test_discriminability_is_its_definition():
    embeddings, labels = _random(80, 6, seed=3)
    unit = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)
    members = [unit[labels == c] for c in labels.unique()]
    centres = [m.mean(0) for m in members]
    within = sum(sum((x - c).square().sum() for x in m) / len(m) for m, c in zip(members, centres)) / len(members)
    pairs = [(a, b) for i, a in enumerate(centres) for j, b in enumerate(centres) if i != j]
    between = sum((a - b).square().sum() for a, b in pairs) / len(pairs)
    assert metrics.discriminability(embeddings, labels) == pytest.approx(float(between / within))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_network_has_no_discriminability(dtype):
    labels = torch.arange(40) % 4
    one = torch.rand(16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    same = one.expand(40, 16)
    rounded = same * (1 + torch.finfo(dtype).eps * (torch.arange(40) % 3 - 1))[:, None]  # of other batches
    for embeddings in (same, rounded, torch.zeros_like(same), same * math.nan, torch.full_like(same, math.inf)):
        assert math.isnan(metrics.discriminability(embeddings, labels))
    collapsed = torch.eye(16, dtype=dtype)[labels]
    assert math.isnan(metrics.discriminability(collapsed, labels))
    assert math.isnan(metrics.discriminability(same + torch.eye(16, dtype=dtype)[labels], torch.zeros_like(labels)))


def test_intervals_by_hand():
    mean, interval = metrics.mean_and_interval(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    assert mean == pytest.approx(0.5)
    assert interval == pytest.approx(1.96 * math.sqrt(0.05) / 2)  # variance with ddof 0: 0.05
    mean, interval = metrics.mean_and_student_interval([0.2, 0.4, 0.6, 0.8])
    assert mean == pytest.approx(0.5)
    assert interval == pytest.approx(3.182446 * math.sqrt(0.2 / 3) / 2)  # ddof 1; t of 3 degrees of freedom
    assert metrics.mean_and_student_interval([0.7]) == (pytest.approx(0.7), 0.0)
