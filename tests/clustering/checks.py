"""What every clustering must be."""

import torch
from torch import Tensor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inertia(x: Tensor, centroids: Tensor, assignments: Tensor) -> float:
    return float((x - centroids[assignments]).double().square().sum())


def assert_clustering_holds(x: Tensor, labels: Tensor, result: tuple[Tensor, Tensor, Tensor]) -> None:
    """Clusters have members, of their class alone, and centroids their mean; each sample is with its nearest."""
    centroids, centroid_labels, assignments = result
    assert centroids.isfinite().all()
    assert torch.equal(centroid_labels, centroid_labels.sort().values)
    for m in range(len(centroids)):
        members = [i for i in range(len(x)) if assignments[i] == m]
        assert members
        assert all(labels[i] == centroid_labels[m] for i in members)
        torch.testing.assert_close(centroids[m], x[members].mean(0))
    for i in range(len(x)):
        own = (x[i] - centroids[assignments[i]]).norm()
        assert own <= min((x[i] - c).norm() for c, l in zip(centroids, centroid_labels) if l == labels[i]) + 1e-5
