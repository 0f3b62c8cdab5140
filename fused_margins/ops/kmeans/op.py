"""What a call of `kmeans` is: the only list of its arguments. Clusters have no gradient."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..fields import Embeddings, Integer, Labels, Output, Values
from ..op import Op
from .reference import reference


class KMeans(NamedTuple):
    """Lloyd's iterations within every class apart, from k-means++ seeds that given random numbers choose.

    Args, returns, rules and source: see `fused_margins.ops.kmeans`.
    """

    x: Annotated[Tensor, Embeddings(("rows", "width"))]
    members: Annotated[Tensor, Labels(("rows",))]
    sizes: Annotated[Tensor, Labels(("classes",))]
    slots: Annotated[Tensor, Labels(("classes",))]
    waiting: Annotated[Tensor, Values(("most_slots", "rows"))]
    num_clusters: Annotated[int, Integer(low=0)] = 0
    num_iterations: Annotated[int, Integer(low=0)] = 20
    largest_class: Annotated[int, Integer(low=0)] = 0


class Outputs(NamedTuple):
    """Centroids grouped by class, the cluster of each sample, and its squared distance from there."""

    centroids: Annotated[Tensor, Output(("num_clusters", "width"))]
    assignments: Annotated[Tensor, Output(("rows",), dtype=lambda x: torch.int64)]
    squared_distances: Annotated[Tensor, Output(("rows",))]


def _check(a: KMeans) -> None:
    """What the kernels index memory by lies within it: values are read, as k-means does at every iteration."""
    rows, classes = a.x.shape[0], a.sizes.shape[0]
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


kmeans = Op("kmeans", KMeans, Outputs, reference, check=_check)
