"""Per-class k-means against scikit-learn, and degenerate data."""

import math

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from fused_margins.clustering import kmeans_per_class
from fused_margins.ops.kmeans import kernel_cpu, reference

from .checks import assert_clustering_holds, inertia, seeded


def test_quality_is_that_of_scikit_learn(digits, backend):
    x, labels = digits
    theirs = sum(KMeans(4, n_init=5, random_state=0).fit(x[labels == c].numpy()).inertia_ for c in range(10))
    centroids, centroid_labels, assignments = kmeans_per_class(
        x, labels, 4, num_restarts=4, generator=seeded(), backend=backend
    )
    assert torch.bincount(centroid_labels).tolist() == [4] * 10
    ours = inertia(x, centroids, assignments)
    assert ours < 1.02 * theirs
    single = [inertia(x, *kmeans_per_class(x, labels, 4, generator=seeded(s), backend=backend)[::2]) for s in range(3)]
    assert max(single) < 1.08 * theirs
    assert min(single) > 0.97 * ours


def test_each_class_keeps_the_best_of_its_restarts(digits):
    x, labels = digits
    labels = labels % 3
    values = []
    for restarts in (1, 2, 5):
        centroids, _, assignments = kmeans_per_class(x, labels, 6, num_restarts=restarts, generator=seeded(2))
        squared = (x - centroids[assignments]).square().sum(1)
        values.append([float(squared[labels == c].sum()) for c in range(3)])
    # The first restarts are the same ones, so each class can only get better.
    assert all(b <= a * (1 + 1e-6) for a, b in zip(values[0] + values[1], values[1] + values[2]))
    assert sum(values[2]) < sum(values[0])


def test_seeds_are_spread():
    # Thirty classes, each of four tight groups far apart: k-means++ seeds one cluster in each, Lloyd alone would not.
    x = torch.arange(480.0) % 4 * 1000 + torch.rand(480, generator=seeded())
    labels = torch.arange(480) // 16
    centroids, _, assignments = kmeans_per_class(x[:, None], labels, 4, generator=seeded())
    assert inertia(x[:, None], centroids, assignments) < 480


def test_ragged_classes(blobs, backend):
    x, labels = blobs
    result = kmeans_per_class(x, labels, 5, num_iterations=100, generator=seeded(), backend=backend)
    assert result[1].tolist() == [-3] * 5 + [4] * 3 + [8] * 5
    assert_clustering_holds(x, labels, result)
    one_each = kmeans_per_class(x, labels, 1, generator=seeded(), backend=backend)
    assert_clustering_holds(x, labels, one_each)
    assert len(one_each[0]) == 3


def test_duplicates_make_fewer_clusters(backend):
    x = torch.tensor([[1.0, 2.0]] * 6 + [[5.0, 5.0]] * 3 + [[7.0, 7.0]] + [[0.0, 0.0]])
    labels = torch.tensor([0] * 6 + [1] * 4 + [2])
    result = kmeans_per_class(x, labels, 3, generator=seeded(), backend=backend)
    assert result[1].tolist() == [0, 1, 1, 2]  # as many as there are distinct samples
    assert_clustering_holds(x, labels, result)
    assert inertia(x, result[0], result[2]) == 0


def test_empty_clusters_are_reseeded(backend):
    # Seeds 1 and 2 of class 0 and seed 4 of class 1 are so far off that no sample is theirs.
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [20.0], [0.0], [0.5], [9.0]])
    sample_class, slot_class = torch.tensor([0] * 5 + [1] * 3), torch.tensor([0, 0, 0, 1, 1])
    seeds = torch.tensor([[1.0], [1e3], [2e3], [0.0], [-1e3]])
    centroids, assignments, squared = reference._lloyd(x, sample_class, seeds, slot_class, 20, backend)
    assert torch.bincount(assignments, minlength=5).min() >= 1
    assert sorted(centroids[:3].flatten().tolist()) == [1.0, 10.0, 20.0]
    assert sorted(centroids[3:].flatten().tolist()) == [0.25, 9.0]
    torch.testing.assert_close(squared, (x - centroids[assignments]).square().sum(1))


def test_one_sample_and_one_class(backend):
    centroids, centroid_labels, assignments = kmeans_per_class(torch.ones(1, 3), torch.tensor([5]), 4, backend=backend)
    assert torch.equal(centroids, torch.ones(1, 3))
    assert (centroid_labels.tolist(), assignments.tolist()) == ([5], [0])


def test_far_from_the_origin(digits, backend):
    x, labels = digits[0][:, 20:28].double(), digits[1]
    near = kmeans_per_class(x, labels, 3, generator=seeded(), backend=backend)
    far = kmeans_per_class((x + 4096).float(), labels, 3, generator=seeded(), backend=backend)  # float32: steps of 5e-4
    assert inertia(x, far[0].double() - 4096, far[2]) < 1.05 * inertia(x, near[0], near[2])
    many = torch.rand(20000, 2, generator=seeded()) + 4096  # a plain float32 sum of these is off by several units
    centroid, _, _ = kmeans_per_class(many, torch.zeros(20000).long(), 1, generator=seeded(), backend=backend)
    torch.testing.assert_close(centroid[0].double(), many.double().mean(0), atol=1e-3, rtol=0)


def test_backends_agree_and_a_generator_decides(digits):
    x, labels = digits
    runs = [kmeans_per_class(x, labels, 3, generator=seeded(7), backend=b) for b in ("reference", "auto", "auto")]
    for run in runs[1:]:
        assert torch.equal(run[2], runs[0][2])
        assert torch.equal(run[0], runs[1][0])
        torch.testing.assert_close(run[0], runs[0][0])
    assert not torch.equal(kmeans_per_class(x, labels, 3, generator=seeded(8))[2], runs[0][2])


def six_points_a_class() -> tuple[Tensor, Tensor]:
    # Some classes have fewer distinct samples than clusters: seeds fall on one another.
    points, labels = torch.randn(1800, 5, generator=seeded()), torch.randint(300, (3000,), generator=seeded(1))
    return points[labels * 6 + torch.randint(6, (3000,), generator=seeded(2))], labels**2 // 3


def many_classes() -> tuple[Tensor, Tensor]:
    # In a few of so many, a cluster loses all its samples on the way and moves to the farthest one.
    return torch.randn(200_000, 2, generator=seeded(), dtype=torch.float64), torch.arange(200_000) % 20_000


@pytest.mark.parametrize("samples", [six_points_a_class, many_classes])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_call_is_the_loop_over_nearest(monkeypatch, device_for, samples, transposed):
    device_for("nearest", "cpu")
    x, labels = samples()
    if transposed:
        x = x.T.contiguous().T
    calls = []
    call = kernel_cpu.call
    monkeypatch.setattr(kernel_cpu, "call", lambda *args: calls.append(1) or call(*args))
    one_call = kmeans_per_class(x, labels, 4, generator=seeded(1))
    assert calls == [1]
    monkeypatch.setattr(kernel_cpu, "CLASS_BYTES", 0)
    loop = kmeans_per_class(x, labels, 4, generator=seeded(1))
    assert calls == [1]
    assert torch.equal(one_call[1], loop[1])
    assert torch.equal(one_call[2], loop[2])
    torch.testing.assert_close(one_call[0], loop[0])


def test_bad_input(blobs):
    x, labels = blobs
    for bad in (math.nan, math.inf, 1e25):  # 1e25 squared is beyond float32
        y = x.clone()
        y[4, 1] = bad
        with pytest.raises(ValueError, match=r"embeddings: expected finite values.*row 4 of 30"):
            kmeans_per_class(y, labels, 2)
    with pytest.raises(ValueError, match="at least one sample"):
        kmeans_per_class(x[:0], labels[:0], 2)
    with pytest.raises(TypeError, match="labels: expected an integer dtype"):
        kmeans_per_class(x, labels.float(), 2)
    with pytest.raises(ValueError, match=r"labels: expected shape \(30,\), got \(29,\)"):
        kmeans_per_class(x, labels[1:], 2)
    with pytest.raises(ValueError, match="embeddings: expected a matrix"):
        kmeans_per_class(x[0], labels, 2)
    for option in ("clusters_per_class", "num_iterations", "num_restarts"):
        with pytest.raises(ValueError, match=f"{option}: expected at least 1, got 0"):
            kmeans_per_class(x, labels, **({"clusters_per_class": 2} | {option: 0}))
