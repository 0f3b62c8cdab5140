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


kmeans = Op("kmeans", KMeans, Outputs, reference)
