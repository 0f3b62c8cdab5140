"""Distances to cluster centres with their gradients, and the nearest centre of the own class, as k-means assigns
samples."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from fused_margins.functional import cluster_distances
from fused_margins.ops.nearest import nearest
from fused_margins.ops.registry import Problem

from ..gate import judge_choice, judge_loss
from ..workload import (
    Contestant,
    Inputs,
    Outputs,
    Size,
    Step,
    Workload,
    compiled,
    euclidean_differences,
    forward_backward,
    ours,
)

EUCLIDEAN = "negative_squared_euclidean"
DISTANCE_SHAPES = ((1024, 64, 50), (2048, 128, 2000))
SAMPLES, WIDTH, CENTRES, CLASSES = 20_000, 128, 2_000, 100


def _points(rows: int, width: int, centres: int, dtype: torch.dtype, g: Generator) -> Inputs:
    x, y = torch.randn(rows, width, generator=g), torch.randn(centres, width, generator=g)
    return {"embeddings": x.to(dtype), "centroids": y.to(dtype)}


def _distance_size(rows: int, width: int, centres: int) -> Size:
    return Size("batch", f"{rows} x {width} x {centres}", lambda dtype, g: _points(rows, width, centres, dtype, g))


def _labelled(dtype: torch.dtype, g: Generator) -> Inputs:
    labels = {
        "labels": torch.randint(CLASSES, (SAMPLES,), generator=g),
        "centroid_labels": torch.arange(CENTRES) // (CENTRES // CLASSES),
    }
    return _points(SAMPLES, WIDTH, CENTRES, dtype, g) | labels


def _problem(op: str, inputs: Inputs) -> Problem:
    x, y = inputs["embeddings"], inputs["centroids"]
    return Problem(op, x.device.type, x.dtype, x.shape[0], y.shape[0], x.shape[1])


def eager_distances(embeddings: Tensor, centroids: Tensor) -> Tensor:
    return torch.cdist(embeddings, centroids).square()


def product_distances(embeddings: Tensor, centroids: Tensor) -> Tensor:
    lengths = embeddings.square().sum(1, keepdim=True) + centroids.square().sum(1)
    return (lengths - 2 * embeddings @ centroids.T).clamp(min=0)


def _distances(function: Callable[..., Tensor], inputs: Inputs) -> Step:
    return forward_backward(lambda arguments: {"distances": function(**arguments)}, inputs, ("embeddings", "centroids"))


def _our_distances(inputs: Inputs, backend: str) -> Step:
    return _distances(lambda **arguments: cluster_distances(**arguments, backend=backend), inputs)


def eager_nearest(embeddings: Tensor, centroids: Tensor, labels: Tensor, centroid_labels: Tensor) -> Tensor:
    distances = torch.cdist(embeddings, centroids)
    return distances.masked_fill_(labels[:, None] != centroid_labels, torch.inf).argmin(1)


def _by_class(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows sorted by label and padded to the largest class (classes, most, D); their order, and each one's class and
    place."""
    order = labels.argsort()
    group = labels[order]
    count = torch.bincount(group, minlength=CLASSES)
    place = torch.arange(len(rows)) - (count.cumsum(0) - count)[group]
    padded = rows.new_zeros(CLASSES, int(count.max()), rows.shape[1])
    padded[group, place] = rows[order]
    return padded, order, group, place


def sorted_nearest(embeddings: Tensor, centroids: Tensor, labels: Tensor, centroid_labels: Tensor) -> Tensor:
    x, x_order, group, place = _by_class(embeddings, labels)
    y, y_order, y_group, y_place = _by_class(centroids, centroid_labels)
    half_squared = torch.full(y.shape[:2], torch.inf)  # padding is never nearest
    half_squared[y_group, y_place] = centroids[y_order].square().sum(1) / 2
    chosen = torch.baddbmm(half_squared[:, None], x, y.mT, alpha=-1).argmin(2)  # (classes, most)
    member = y_order.new_zeros(half_squared.shape)
    member[y_group, y_place] = y_order
    index = torch.empty_like(labels)
    index[x_order] = member[group, chosen[group, place]]
    return index


def _choice(function: Callable[..., Tensor], inputs: Inputs) -> Step:
    def step() -> Outputs:
        return {"index": function(**inputs)}

    return step


def _our_nearest(inputs: Inputs, backend: str) -> Step:
    search = _search(inputs)
    return lambda: {"index": nearest(**search, backend=backend)[1][:, 0]}


def _search(inputs: Inputs) -> Inputs:
    return {
        "x": inputs["embeddings"],
        "y": inputs["centroids"],
        "row_labels": inputs["labels"],
        "column_labels": inputs["centroid_labels"],
        "self_index": None,
        "similarity": EUCLIDEAN,
        "relation": "same",
    }


def _search_all(inputs: Inputs) -> Inputs:
    x, y = inputs["embeddings"], inputs["centroids"]
    labels = {
        "row_labels": torch.zeros(len(x), dtype=torch.int64),
        "column_labels": torch.zeros(len(y), dtype=torch.int64),
    }
    return {"x": x, "y": y, "self_index": None, "similarity": EUCLIDEAN, "relation": "any"} | labels


def _any_nearest(inputs: Inputs, backend: str) -> Step:
    search = _search_all(inputs)
    return lambda: {"index": nearest(**search, backend=backend)[1][:, 0]}


WORKLOADS = (
    Workload(
        "cluster_distances",
        "Squared distances to all centres: the matrix and the gradients of both sides",
        "B x D x K",
        tuple(_distance_size(*shape) for shape in DISTANCE_SHAPES),
        (torch.float32,),
        (
            Contestant("eager", lambda inputs: _distances(eager_distances, inputs), note="torch.cdist, squared"),
            Contestant(
                "torch.compile", lambda inputs: _distances(compiled(eager_distances), inputs), "of the eager code"
            ),
            Contestant(
                "matmul form",
                lambda inputs: _distances(product_distances, inputs),
                note="|x|^2 + |y|^2 - 2xy, not centred: it cancels far from the origin",
            ),
            *ours(_our_distances, lambda inputs: _problem("scores", inputs)),
        ),
        judge_loss(_our_distances),
    ),
    Workload(
        "nearest_cluster",
        f"Nearest centre of the own class among {CLASSES} classes, no gradient",
        "B x D x K",
        (Size("index", f"{SAMPLES} x {WIDTH} x {CENTRES}", _labelled),),
        (torch.float32,),
        (
            Contestant("eager", lambda inputs: _choice(eager_nearest, inputs), note="torch.cdist, mask, argmin"),
            Contestant("torch.compile", lambda inputs: _choice(compiled(eager_nearest), inputs), "of the eager code"),
            Contestant(
                "sorted bmm",
                lambda inputs: _choice(sorted_nearest, inputs),
                note="both sides sorted by label and padded, a product a class",
            ),
            *ours(_our_nearest, lambda inputs: _problem("nearest", inputs), euclidean_differences),
        ),
        judge_choice(_search),
    ),
    Workload(
        "nearest_of_all",
        "Nearest of all centres, Euclidean, no gradient",
        "B x D x K",
        (Size("index", "100000 x 128 x 2000", lambda dtype, g: _points(100_000, 128, 2_000, dtype, g)),),
        (torch.float32,),
        (
            Contestant(
                "eager",
                lambda inputs: _choice(
                    lambda embeddings, centroids: torch.cdist(embeddings, centroids).argmin(1), inputs
                ),
                note="torch.cdist, argmin",
            ),
            *ours(
                lambda inputs, backend: _any_nearest(inputs, backend),
                lambda inputs: _problem("nearest", inputs),
                euclidean_differences,
            ),
        ),
        judge_choice(_search_all),
    ),
)
