"""k-means of every class apart: all classes in the same passes, or on a CPU one after another while it is cached."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import checks, kmeans_cpu
from .ops.nearest import nearest
from .ops.similarity import accumulation_dtype

EUCLIDEAN = "negative_squared_euclidean"


@torch.no_grad()
def kmeans_per_class(
    embeddings: Tensor,
    labels: Tensor,
    clusters_per_class: int,
    *,
    num_iterations: int = 20,
    num_restarts: int = 1,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """k-means of every class apart: k-means++ seeds, then Lloyd's iterations.

        minimise over centroids c, for each class, sum over its samples of min_k |x_i - c_k|^2

    An empty cluster is moved to the sample of its class that lies farthest from its centroid. A class with fewer
    distinct samples than clusters gets as many clusters as it can fill.

    Args:
        embeddings: (n, D), finite; float64, float32, bfloat16 or float16. labels: (n,) integers.
        clusters_per_class: K, at least 1.
        num_iterations: at most so many updates of the centroids; it stops where no assignment changes.
        num_restarts: runs from new seeds; each class keeps its best.
        generator: draws the seeds; None for torch's global one. The same state gives the same bits.
        backend: of the assignment; "auto", or the name of one. "auto" and "cpu" cluster classes that fit into a core's
            cache in one call, a class a thread.

    Returns:
        centroids (M, D), float32 (float64 for float64), grouped by class in ascending order; centroid_labels (M,)
        int64; assignments (n,) int64 in [0, M). Every cluster has a member.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, no samples, embeddings that are not finite.

    Gradients: none.

    Source: Arthur and Vassilvitskii, k-means++: The advantages of careful seeding, 2007, section 2.2.

    >>> import torch
    >>> from fused_margins.kmeans import kmeans_per_class
    >>> embeddings = torch.tensor([[0.0], [0.2], [5.0], [9.0]])
    >>> centroids, centroid_labels, assignments = kmeans_per_class(embeddings, torch.tensor([0, 0, 0, 1]), 2)
    >>> centroid_labels, centroids[assignments].flatten()
    (tensor([0, 0, 1]), tensor([0.1000, 0.1000, 5.0000, 9.0000]))
    """
    x = checked_embeddings(embeddings)
    checks.labels("labels", labels, x.shape[0], x)
    if x.shape[0] == 0:
        raise ValueError("embeddings: expected at least one sample, got none")
    at_least_1(clusters_per_class=clusters_per_class, num_iterations=num_iterations, num_restarts=num_restarts)
    in_order, members = labels.long().sort(stable=True)
    classes, sizes = torch.unique_consecutive(in_order, return_counts=True)
    sample_class = torch.empty_like(members)
    sample_class[members] = torch.arange(len(classes), device=x.device).repeat_interleave(sizes)
    slots = sizes.clamp(max=clusters_per_class)  # (C,) clusters that each class may have
    slot_class = torch.arange(len(classes), device=x.device).repeat_interleave(slots)  # (K,)

    best = torch.full((len(classes),), torch.inf, dtype=torch.float64, device=x.device)  # (C,)
    with torch.autocast(x.device.type, enabled=False):
        for restart in range(num_restarts):
            if backend in ("auto", "cpu") and kmeans_cpu.refuses(x, sizes) is None:
                waiting = _waiting((int(slots.max()), len(x)), generator, x.device)
                run = kmeans_cpu.cluster(x, members, sizes, slots, waiting, num_iterations)
            else:
                seeds = _seeds(x, sample_class, slots, generator)
                run = _lloyd(x, sample_class, seeds, slot_class, num_iterations, backend)
            if restart == 0:
                centroids, assignments, _ = run
            if num_restarts > 1:
                squared = sum_by(sample_class, run[2][:, None].double(), len(classes))[:, 0]  # (C,)
                better = squared < best
                centroids = torch.where(better[slot_class, None], run[0], centroids)
                assignments = torch.where(better[sample_class], run[1], assignments)
                best = torch.where(better, squared, best)

    filled = torch.bincount(assignments, minlength=len(centroids)) > 0
    renumbered = filled.cumsum(0) - 1
    return centroids[filled], classes[slot_class[filled]], renumbered[assignments]


def _seeds(x: Tensor, sample_class: Tensor, slots: Tensor, generator: torch.Generator | None) -> Tensor:
    """k-means++ (K, D): the next seed of a class is drawn in proportion to squared distance from those it has."""
    first_slot = slots.cumsum(0) - slots
    seeds = x.new_zeros(int(slots.sum()), x.shape[1])
    squared = x.new_ones(x.shape[0])
    for taken in range(int(slots.max())):
        drawn = draw(squared, sample_class, len(slots), generator)  # (C,)
        open_classes = slots > taken
        seeds[first_slot[open_classes] + taken] = x[drawn[open_classes]]
        distance = (x - x[drawn[sample_class]]).square().sum(1)
        squared = distance if taken == 0 else torch.minimum(squared, distance)
    return seeds


def _lloyd(
    x: Tensor, sample_class: Tensor, centroids: Tensor, slot_class: Tensor, num_iterations: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids (K, D), assignments (n,), and the squared distance (n,) of each sample from its centroid."""

    def assign(centroids: Tensor) -> tuple[Tensor, Tensor]:
        u, index = nearest(
            x, centroids, sample_class, slot_class, similarity=EUCLIDEAN, relation="same", backend=backend
        )
        return index[:, 0], -u[:, 0]

    assignments, squared = assign(centroids)
    for _ in range(num_iterations):
        counts = torch.bincount(assignments, minlength=len(centroids))
        # Means of differences from the old centroid: no cancellation, however far the data lie from the origin.
        shift = sum_by(assignments, x - centroids[assignments], len(centroids)) / counts.clamp(min=1)[:, None]
        centroids = centroids + shift
        if bool((counts == 0).any()):
            centroids = _reseed(x, sample_class, centroids, slot_class, counts == 0, squared)
        previous = assignments
        assignments, squared = assign(centroids)
        if torch.equal(previous, assignments):
            break
    return centroids, assignments, squared


def _reseed(
    x: Tensor, sample_class: Tensor, centroids: Tensor, slot_class: Tensor, empty: Tensor, squared: Tensor
) -> Tensor:
    """Centroids with each empty cluster on a sample of its class: the r-th such cluster on the r-th farthest sample."""
    farthest = squared.argsort(descending=True, stable=True)
    farthest = farthest[sample_class[farthest].argsort(stable=True)]  # grouped by class, farthest first
    sizes = torch.bincount(sample_class)
    first = sizes.cumsum(0) - sizes
    slot = empty.nonzero()[:, 0]
    of_class = slot_class[slot]  # ascending
    rank = torch.arange(len(slot), device=x.device) - torch.searchsorted(of_class, of_class)
    return centroids.index_copy(0, slot, x[farthest[first[of_class] + rank]])


def draw(weight: Tensor, group: Tensor, num_groups: int, generator: torch.Generator | None) -> Tensor:
    """One index a group (G,), with probability in proportion to weight (n,); a group without weight gives its first.

    A race of exponential waiting times: its winner is a minimum, so it does not depend on the order of a summation.
    """
    time = _waiting(weight.shape, generator, weight.device) / weight
    time = torch.where(weight > 0, time, torch.inf)
    first = time.new_full((num_groups,), torch.inf).scatter_reduce(0, group, time, "amin")
    index = torch.arange(len(weight), device=weight.device)
    index = torch.where(time == first[group], index, len(weight))
    return index.new_full((num_groups,), len(weight)).scatter_reduce(0, group, index, "amin")


def _waiting(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Standard exponential waiting times in float64, drawn where the generator is."""
    source = device if generator is None else generator.device
    uniform = torch.rand(shape, generator=generator, device=source, dtype=torch.float64).to(device)
    return uniform.neg_().log1p_().neg_()


def sum_by(group: Tensor, values: Tensor, num_groups: int) -> Tensor:
    """Sums (G, D) of the rows of values (n, D), each group's in order: no atomics, so the same bits for any threads."""
    sizes = torch.bincount(group, minlength=num_groups)
    return F.embedding_bag(group.argsort(stable=True), values, sizes.cumsum(0) - sizes, mode="sum")


def ordered_sum(values: Tensor) -> Tensor:
    """Sum (0-d) of values (n,) in float64 and one order."""
    everything = torch.zeros_like(values, dtype=torch.int64)
    return sum_by(everything, values[:, None].double(), 1)[0, 0].to(values.dtype)


def checked_embeddings(embeddings: Tensor) -> Tensor:
    """The embeddings (n, D) in float32 or float64; every distance between two of them is finite."""
    checks.matrices(embeddings, embeddings, ("embeddings", "embeddings"))
    x = embeddings.detach().to(accumulation_dtype(embeddings.dtype))
    finite = (4 * torch.linalg.vector_norm(x, dim=1).square()).isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(f"embeddings: expected finite values with finite squares, row {row} of {len(x)} has others")
    return x


def at_least_1(**values: int) -> None:
    for argument, value in values.items():
        if value < 1:
            raise ValueError(f"{argument}: expected at least 1, got {value}")
