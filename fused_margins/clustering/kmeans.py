"""k-means of every class apart, and the draws and ordered sums that clusters need."""

import torch
from torch import Tensor

from ..core import checks
from ..core.reductions import sum_by
from ..core.similarity import accumulation_dtype
from ..ops.kmeans.op import KMeans, kmeans
from ..ops.kmeans.reference import winners

__all__ = ["kmeans_per_class", "sum_by"]


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
    checks.generator(generator)
    in_order, members = labels.long().sort(stable=True)
    classes, sizes = torch.unique_consecutive(in_order, return_counts=True)
    sample_class = torch.empty_like(members)
    sample_class[members] = torch.arange(len(classes), device=x.device).repeat_interleave(sizes)
    slots = sizes.clamp(max=clusters_per_class)  # (C,) clusters that each class may have
    slot_class = torch.arange(len(classes), device=x.device).repeat_interleave(slots)  # (K,)

    best = torch.full((len(classes),), torch.inf, dtype=torch.float64, device=x.device)  # (C,)
    for restart in range(num_restarts):
        waiting = exponential((int(slots.max()), len(x)), generator, x.device)
        numbers = {"num_clusters": len(slot_class), "largest_class": int(sizes.max())}
        call = KMeans(x, members, sizes, slots, waiting, num_iterations=num_iterations, **numbers)
        run = kmeans.run(call, backend)
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


def draw(weight: Tensor, group: Tensor, num_groups: int, generator: torch.Generator | None) -> Tensor:
    """One index a group (G,), with probability in proportion to weight (n,); a group without weight gives its first."""
    return winners(exponential(weight.shape, generator, weight.device), weight, group, num_groups)


def exponential(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Standard exponential waiting times in float64, drawn where the generator is."""
    source = device if generator is None else generator.device
    uniform = torch.rand(shape, generator=generator, device=source, dtype=torch.float64).to(device)
    return uniform.neg_().log1p_().neg_()


def ordered_sum(values: Tensor) -> Tensor:
    """Sum (0-d) of values (n,) in float64 and one order."""
    everything = torch.zeros_like(values, dtype=torch.int64)
    return sum_by(everything, values[:, None].double(), 1)[0, 0].to(values.dtype)


def checked_embeddings(embeddings: Tensor) -> Tensor:
    """The embeddings (n, D) in float32 or float64; every distance between two of them is finite."""
    checks.matrices(embeddings, embeddings, ("embeddings", "embeddings"))
    if embeddings.shape[1] == 0:
        raise ValueError("embeddings: expected a width of at least 1, got 0")
    x = embeddings.detach().to(accumulation_dtype(embeddings.dtype))
    finite = (4 * torch.linalg.vector_norm(x, dim=1).square()).isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(f"embeddings: expected finite values with finite squares, row {row} of {len(x)} has others")
    return x


def at_least_1(**values: int) -> None:
    """Integers from 1 on."""
    for argument, value in values.items():
        checks.integer(argument, value, 1)
