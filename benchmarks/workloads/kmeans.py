"""k-means of every class apart, as the magnet index clusters a training set."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Generator, Tensor

from fused_margins.kmeans import kmeans_per_class

from ..implementations import on_device, ours, peer, returned
from ..workload import Check, Implementation, Inputs, Outputs, Size, Workload

CLUSTERS, ITERATIONS = 5, 20
SHAPES = ((1_000, 128, 10), (10_000, 128, 100), (100_000, 128, 1_000))
# Where seeds fall decides which minimum is found; one so little above scikit-learn's is as good.
GRANTED = 1.05


def _size(rows: int, width: int, classes: int) -> Size:
    def make(dtype: torch.dtype, g: Generator) -> Inputs:
        """Ragged classes, the largest six times the least, each of CLUSTERS modes that overlap."""
        share = torch.rand(classes, generator=g, device=g.device) + 0.2
        labels = torch.multinomial(share, rows, replacement=True, generator=g)
        modes = on_device(classes * CLUSTERS, width, generator=g) / 2
        mode = torch.randint(CLUSTERS, (rows,), generator=g, device=g.device)
        x = modes[labels * CLUSTERS + mode] + on_device(rows, width, generator=g)
        return {"embeddings": x.to(dtype), "labels": labels}

    products = rows * width * classes * CLUSTERS
    return Size("index", (rows, width, classes), make, products=products, devices=("cpu",))


def _looped(cluster: Callable[[np.ndarray, int], np.ndarray], embeddings: Tensor, labels: Tensor) -> Tensor:
    """Assignments: `cluster` gets the samples (m, D) and the number of clusters of one class after another."""
    x, classes = embeddings.numpy(), labels.numpy()
    assignments = np.empty_like(classes)
    members_of = np.split(np.argsort(classes, kind="stable"), np.bincount(classes).cumsum()[:-1])
    for c, members in enumerate(members_of):
        if len(members):
            assignments[members] = c * CLUSTERS + cluster(x[members], min(CLUSTERS, len(members)))
    return torch.from_numpy(assignments)


def scikit_learn(embeddings: Tensor, labels: Tensor) -> Tensor:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    def cluster(x: np.ndarray, clusters: int) -> np.ndarray:
        return KMeans(clusters, n_init=1, max_iter=ITERATIONS, tol=0, random_state=0).fit(x).labels_

    with threadpool_limits(torch.get_num_threads()):
        return _looped(cluster, embeddings, labels)


def faiss_kmeans(embeddings: Tensor, labels: Tensor) -> Tensor:
    import faiss

    def cluster(x: np.ndarray, clusters: int) -> np.ndarray:
        kmeans = faiss.Kmeans(x.shape[1], clusters, niter=ITERATIONS, min_points_per_centroid=1, seed=1)
        kmeans.train(x)
        return kmeans.index.search(x, 1)[1][:, 0]

    faiss.omp_set_num_threads(torch.get_num_threads())
    return _looped(cluster, embeddings, labels)


def our_clusters(embeddings: Tensor, labels: Tensor, backend: str) -> Tensor:
    options = {"num_iterations": ITERATIONS, "generator": torch.Generator().manual_seed(1), "backend": backend}
    return kmeans_per_class(embeddings, labels, CLUSTERS, **options)[2]


def sum_of_squares(x: Tensor, assignments: Tensor) -> float:
    """Of each sample's difference from the mean of its cluster, in float64."""
    x, (_, cluster) = x.double(), torch.unique(assignments, return_inverse=True)
    sums = torch.zeros(int(cluster.max()) + 1, x.shape[1], dtype=x.dtype).index_add_(0, cluster, x)
    means = sums / torch.bincount(cluster)[:, None]
    return float((x - means[cluster]).square().sum())


def check_clusters(inputs: Inputs) -> Check:
    """By the sum of squares, against scikit-learn's; and every cluster is of one class."""
    x, labels = inputs["embeddings"], inputs["labels"]
    expected = sum_of_squares(x, scikit_learn(**inputs))

    def check(implementation: Implementation, outputs: Outputs) -> list[str]:
        assignments = outputs["assignments"]
        if assignments.shape != labels.shape:
            return [f"assignments: expected shape {tuple(labels.shape)}, got {tuple(assignments.shape)}"]
        pairs = torch.unique(torch.stack([assignments, labels]), dim=1)
        if pairs.shape[1] != len(assignments.unique()):
            return ["assignments: a cluster has samples of two classes"]
        if int(torch.bincount(pairs[1]).max()) > CLUSTERS:
            return [f"assignments: a class has more than {CLUSTERS} clusters"]
        found = sum_of_squares(x, assignments)
        fault = f"assignments: sum of squares {found:.6g}, granted {GRANTED:g} x {expected:.6g}"
        return [] if found <= GRANTED * expected else [fault]

    return check


prepare = returned("assignments")
OF_SKLEARN = "KMeans in a loop over classes, n_init=1, tol=0; tries several candidates for each seed"
OF_FAISS = f"Kmeans in a loop over classes, niter={ITERATIONS}; seeds drawn evenly, always all iterations"
WORKLOADS = (
    Workload(
        "kmeans",
        f"k-means++ of every class apart: {CLUSTERS} clusters a class, at most {ITERATIONS} iterations",
        "n x D x classes",
        tuple(_size(*shape) for shape in SHAPES),
        (
            peer("scikit-learn", prepare, scikit_learn, OF_SKLEARN, needs="sklearn"),
            peer("faiss", prepare, faiss_kmeans, OF_FAISS, needs="faiss"),
            *ours(prepare, our_clusters, most_products=2**30),
        ),
        check_clusters,
    ),
)
