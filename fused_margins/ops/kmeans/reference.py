"""The readable definition of `kmeans`; every backend must agree with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.enums import Similarity
from ...core.reductions import sum_by
from ...core.similarity import accumulation_dtype
from ..nearest.op import Nearest, nearest

if TYPE_CHECKING:
    from .op import KMeans


def reference(a: KMeans) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids (K, D), assignments (n,), squared distances (n,)."""
    return in_passes(a, "reference")


def in_passes(a: KMeans, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: all classes in the same passes, each an assignment by `nearest` on that backend."""
    check_values(a)
    x = a.x.to(accumulation_dtype(a.x.dtype))
    classes = torch.arange(len(a.sizes), device=x.device)
    sample_class = torch.empty_like(a.members)
    sample_class[a.members] = classes.repeat_interleave(a.sizes)
    slot_class = classes.repeat_interleave(a.slots)  # (K,)
    seeds = _seeds(x, sample_class, a.slots, a.waiting)
    return _lloyd(x, sample_class, seeds, slot_class, a.num_iterations, backend)


def check_values(a: KMeans) -> None:
    """What memory is indexed by lies within it. Every backend asks, at every call: the values are another call's."""
    rows, classes = a.x.shape[0], a.sizes.shape[0]
    for name, t in (("x", a.x), ("waiting", a.waiting)):
        if not bool(t.isfinite().all()):
            raise ValueError(f"{name}: expected finite values")
    for name, values, total in (("sizes", a.sizes, rows), ("slots", a.slots, a.num_clusters)):
        if bool((values < 1).any()) or int(values.sum()) != total:
            raise ValueError(f"{name}: expected {classes} numbers from 1 on, {total} together")
    if bool((a.slots > a.sizes).any()):
        raise ValueError("slots: expected at most as many clusters as samples in each class")
    if classes and int(a.sizes.max()) != a.largest_class:
        raise ValueError(f"largest_class: expected the largest of sizes, got {a.largest_class}")
    if bool(((a.members < 0) | (a.members >= rows)).any()) or torch.unique(a.members).shape[0] != rows:
        raise IndexError(f"members: expected every one of the {rows} samples once")
    if tuple(a.waiting.shape) != (int(a.slots.max()) if classes else 0, rows):
        raise ValueError(
            f"waiting: expected one row for each cluster of a class, {rows} wide, got {tuple(a.waiting.shape)}"
        )


def _seeds(x: Tensor, sample_class: Tensor, slots: Tensor, waiting: Tensor) -> Tensor:
    """k-means++ (K, D): the next seed of a class is drawn in proportion to squared distance from those it has."""
    first_slot = slots.cumsum(0) - slots
    seeds = x.new_zeros(int(slots.sum()), x.shape[1])
    squared = x.new_ones(x.shape[0])
    for taken in range(int(slots.max())):
        drawn = winners(waiting[taken], squared, sample_class, len(slots))  # (C,)
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
        own = Nearest(x, centroids, sample_class, slot_class, similarity=Similarity.NEGATIVE_SQUARED_EUCLIDEAN)
        u, index = nearest.run(own, backend)
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


def winners(waiting: Tensor, weight: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """One index a group (G,): the least waiting / weight (n,), the lowest of equals; without weight the group's first.

    A race of exponential waiting times draws in proportion to the weight. Its winner is a minimum, so it does not
    depend on the order of a summation.
    """
    time = torch.where(weight > 0, waiting / weight, torch.inf)
    first = time.new_full((num_groups,), torch.inf).scatter_reduce(0, group, time, "amin")
    index = torch.arange(len(weight), device=weight.device)
    index = torch.where(time == first[group], index, len(weight))
    return index.new_full((num_groups,), len(weight)).scatter_reduce(0, group, index, "amin")
