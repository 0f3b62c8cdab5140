"""k-means of every class apart, as the magnet index clusters a training set."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Generator, Tensor

from fused_margins.kmeans import kmeans_per_class
from fused_margins.ops.registry import Problem

from ..workload import (
    Contestant,
    Inputs,
    Judge,
    Outputs,
    Size,
    Step,
    Workload,
    euclidean_differences,
    on_device,
    ours,
    unless_installed,
)

CLUSTERS, ITERATIONS = 5, 20
# Samples, width, classes.
SHAPES = ((1_000, 128, 10), (10_000, 128, 100), (100_000, 128, 1_000))
# Where seeds fall decides which minimum is found; one so little above scikit-learn's is as good.
GRANTED = 1.05


def _samples(rows: int, width: int, classes: int, dtype: torch.dtype, g: Generator) -> Inputs:
    """Ragged classes, the largest six times the least, each of CLUSTERS modes that overlap."""
    share = torch.rand(classes, generator=g, device=g.device) + 0.2
    labels = torch.multinomial(share, rows, replacement=True, generator=g)
    modes = on_device(classes * CLUSTERS, width, generator=g) / 2
    mode = torch.randint(CLUSTERS, (rows,), generator=g, device=g.device)
    x = modes[labels * CLUSTERS + mode] + on_device(rows, width, generator=g)
    return {"embeddings": x.to(dtype), "labels": labels}


def _size(rows: int, width: int, classes: int) -> Size:
    text = f"{rows} x {width} x {classes}"
    return Size("index", text, lambda dtype, g: _samples(rows, width, classes, dtype, g), devices=("cpu",))


def _looped(cluster: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Inputs], Step]:
    """A step that calls `cluster` with the samples (m, D) and the number of clusters of one class after another; it
    returns assignments (m,)."""

    def prepare(inputs: Inputs) -> Step:
        x, labels = inputs["embeddings"].numpy(), inputs["labels"].numpy()

        def step() -> Outputs:
            order = np.argsort(labels, kind="stable")
            assignments = np.empty_like(labels)
            for c, members in enumerate(np.split(order, np.bincount(labels).cumsum()[:-1])):
                if len(members):
                    assignments[members] = c * CLUSTERS + cluster(x[members], min(CLUSTERS, len(members)))
            return {"assignments": torch.from_numpy(assignments)}

        return step

    return prepare


def _scikit_learn(inputs: Inputs) -> Step:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    def cluster(x: np.ndarray, clusters: int) -> np.ndarray:
        return KMeans(clusters, n_init=1, max_iter=ITERATIONS, tol=0, random_state=0).fit(x).labels_

    looped = _looped(cluster)(inputs)

    def step() -> Outputs:
        with threadpool_limits(torch.get_num_threads()):
            return looped()

    return step


def _faiss(inputs: Inputs) -> Step:
    import faiss

    def cluster(x: np.ndarray, clusters: int) -> np.ndarray:
        faiss.omp_set_num_threads(torch.get_num_threads())
        kmeans = faiss.Kmeans(x.shape[1], clusters, niter=ITERATIONS, min_points_per_centroid=1, seed=1)
        kmeans.train(x)
        return kmeans.index.search(x, 1)[1][:, 0]

    return _looped(cluster)(inputs)


def _our_clusters(inputs: Inputs, backend: str) -> Step:
    def step() -> Outputs:
        generator = torch.Generator().manual_seed(1)
        clustered = kmeans_per_class(
            **inputs, clusters_per_class=CLUSTERS, num_iterations=ITERATIONS, generator=generator, backend=backend
        )
        return {"assignments": clustered[2]}

    return step


def _problem(inputs: Inputs) -> Problem:
    x = inputs["embeddings"]
    clusters = CLUSTERS * (int(inputs["labels"].max()) + 1)
    return Problem("nearest", x.device.type, x.dtype, len(x), clusters, x.shape[1], "same")


def _too_slow(inputs: Inputs, backend: str) -> str | None:
    clusters = CLUSTERS * (int(inputs["labels"].max()) + 1)
    centroids = inputs["embeddings"].new_empty(clusters, inputs["embeddings"].shape[1])
    return euclidean_differences(inputs | {"centroids": centroids}, backend)


def sum_of_squares(x: Tensor, assignments: Tensor) -> float:
    """Of each sample's difference from the mean of its cluster, in float64."""
    x, (_, cluster) = x.double(), torch.unique(assignments, return_inverse=True)
    sums = torch.zeros(int(cluster.max()) + 1, x.shape[1], dtype=x.dtype).index_add_(0, cluster, x)
    means = sums / torch.bincount(cluster)[:, None]
    return float((x - means[cluster]).square().sum())


def judge_clusters(inputs: Inputs) -> Judge:
    """By the sum of squares, against scikit-learn's; and every cluster is of one class."""
    x, labels = inputs["embeddings"], inputs["labels"]
    expected = sum_of_squares(x, _scikit_learn(inputs)()["assignments"])

    def judge(contestant: Contestant, outputs: Outputs) -> list[str]:
        assignments = outputs["assignments"]
        if assignments.shape != labels.shape:
            return [f"assignments: expected shape {tuple(labels.shape)}, got {tuple(assignments.shape)}"]
        pairs = torch.unique(torch.stack([assignments, labels]), dim=1)
        faults = []
        if pairs.shape[1] != len(assignments.unique()):
            faults.append("assignments: a cluster has samples of two classes")
        if int(torch.bincount(pairs[1]).max()) > CLUSTERS:
            faults.append(f"assignments: a class has more than {CLUSTERS} clusters")
        found = sum_of_squares(x, assignments)
        if not found <= GRANTED * expected:
            faults.append(f"assignments: sum of squares {found:.6g}, granted {GRANTED:g} x {expected:.6g}")
        return faults

    return judge


WORKLOADS = (
    Workload(
        "kmeans",
        f"k-means++ of every class apart: {CLUSTERS} clusters a class, at most {ITERATIONS} iterations",
        "n x D x classes",
        tuple(_size(*shape) for shape in SHAPES),
        (torch.float32,),
        (
            Contestant(
                "scikit-learn",
                _scikit_learn,
                "KMeans in a loop over classes, n_init=1, tol=0; tries several candidates for each seed",
                refuses=unless_installed("sklearn"),
            ),
            Contestant(
                "faiss",
                _faiss,
                f"Kmeans in a loop over classes, niter={ITERATIONS}; seeds drawn evenly, always all iterations",
                refuses=unless_installed("faiss"),
            ),
            *ours(_our_clusters, _problem, _too_slow),
        ),
        judge_clusters,
    ),
)
