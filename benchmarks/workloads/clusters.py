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
    on_device,
    ours,
    unless_installed,
)

EUCLIDEAN = "negative_squared_euclidean"
DISTANCE_SHAPES = ((1024, 64, 50), (2048, 128, 2000))
CLASSES = 100
# Samples, width, centres.
LABELLED_SHAPE, SHAPE, GPU_SHAPE = (20_000, 128, 2_000), (100_000, 128, 2_000), (1_000_000, 128, 4_096)
PRODUCTS_AT_ONCE = 1 << 24  # 64 MiB in float32


def _points(rows: int, width: int, centres: int, dtype: torch.dtype, g: Generator) -> Inputs:
    x, y = on_device(rows, width, generator=g), on_device(centres, width, generator=g)
    return {"embeddings": x.to(dtype), "centroids": y.to(dtype)}


def _distance_size(rows: int, width: int, centres: int) -> Size:
    return Size("batch", f"{rows} x {width} x {centres}", lambda dtype, g: _points(rows, width, centres, dtype, g))


def _labelled(rows: int, width: int, centres: int, dtype: torch.dtype, g: Generator) -> Inputs:
    labels = {
        "labels": torch.randint(CLASSES, (rows,), generator=g, device=g.device),
        "centroid_labels": torch.arange(centres, device=g.device) * CLASSES // centres,
    }
    return _points(rows, width, centres, dtype, g) | labels


def _index_sizes(make: Callable[..., Inputs], on_cpu: tuple[int, int, int]) -> tuple[Size, ...]:
    def size(shape: tuple[int, int, int], device: str, *dtypes: torch.dtype) -> Size:
        text = " x ".join(map(str, shape))
        return Size("index", text, lambda dtype, g: make(*shape, dtype, g), devices=(device,), dtypes=dtypes)

    return size(on_cpu, "cpu", torch.float32), size(GPU_SHAPE, "cuda", torch.float32, torch.bfloat16)


def _problem(op: str, inputs: Inputs, relation: str = "different") -> Problem:
    x, y = inputs["embeddings"], inputs["centroids"]
    return Problem(op, x.device.type, x.dtype, x.shape[0], y.shape[0], x.shape[1], relation)


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
    distances = torch.cdist(embeddings.float(), centroids.float())  # it takes nothing narrower on a GPU
    return distances.masked_fill_(labels[:, None] != centroid_labels, torch.inf).argmin(1)


def _by_class(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows sorted by label and padded to the largest class (classes, most, D); their order, and each one's class and
    place."""
    order = labels.argsort()
    group = labels[order]
    count = torch.bincount(group, minlength=CLASSES)
    place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[group]
    padded = rows.new_zeros(CLASSES, int(count.max()), rows.shape[1])
    padded[group, place] = rows[order]
    return padded, order, group, place


def sorted_nearest(embeddings: Tensor, centroids: Tensor, labels: Tensor, centroid_labels: Tensor) -> Tensor:
    # In float32: distances rounded to 16 bits choose other centres.
    x, x_order, group, place = _by_class(embeddings.float(), labels)
    y, y_order, y_group, y_place = _by_class(centroids.float(), centroid_labels)
    half_squared = y.new_full(y.shape[:2], torch.inf)  # padding is never nearest
    half_squared[y_group, y_place] = centroids[y_order].float().square().sum(1) / 2
    chosen = torch.baddbmm(half_squared[:, None], x, y.mT, alpha=-1).argmin(2)  # (classes, most)
    member = y_order.new_zeros(half_squared.shape)
    member[y_group, y_place] = y_order
    index = torch.empty_like(labels)
    index[x_order] = member[group, chosen[group, place]]
    return index


def eager_nearest_of_all(embeddings: Tensor, centroids: Tensor) -> Tensor:
    return torch.cdist(embeddings.float(), centroids.float()).argmin(1)


def product_nearest(embeddings: Tensor, centroids: Tensor) -> Tensor:
    """Blocks of rows, for the products not to go through memory; their sums in float32."""
    half_squared = centroids.float().square().sum(1) / 2
    if embeddings.device.type == "cpu" and embeddings.dtype != torch.float32:  # no products with float32 sums there
        embeddings, centroids = embeddings.float(), centroids.float()

    def products(rows: Tensor) -> Tensor:
        if rows.dtype == torch.float32:
            return rows @ centroids.T
        return torch.mm(rows, centroids.T, out_dtype=torch.float32)

    blocks = embeddings.split(max(1, PRODUCTS_AT_ONCE // len(centroids)))
    return torch.cat([(products(rows) - half_squared).argmax(1) for rows in blocks])


def _faiss_nearest(inputs: Inputs) -> Step:
    import faiss

    x, y = inputs["embeddings"].float().numpy(), inputs["centroids"].float().numpy()

    def step() -> Outputs:
        faiss.omp_set_num_threads(torch.get_num_threads())
        return {"index": torch.from_numpy(faiss.knn(x, y, 1)[1][:, 0])}

    return step


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
        "row_labels": torch.zeros(len(x), dtype=torch.int64, device=x.device),
        "column_labels": torch.zeros(len(y), dtype=torch.int64, device=x.device),
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
        _index_sizes(_labelled, LABELLED_SHAPE),
        (torch.float32,),
        (
            Contestant("eager", lambda inputs: _choice(eager_nearest, inputs), note="torch.cdist, mask, argmin"),
            Contestant("torch.compile", lambda inputs: _choice(compiled(eager_nearest), inputs), "of the eager code"),
            Contestant(
                "sorted bmm",
                lambda inputs: _choice(sorted_nearest, inputs),
                note="both sides sorted by label and padded, a product a class",
            ),
            *ours(_our_nearest, lambda inputs: _problem("nearest", inputs, "same"), euclidean_differences),
        ),
        judge_choice(_search),
    ),
    Workload(
        "nearest_of_all",
        "Nearest of all centres, Euclidean, no gradient",
        "B x D x K",
        _index_sizes(_points, SHAPE),
        (torch.float32,),
        (
            Contestant("eager", lambda inputs: _choice(eager_nearest_of_all, inputs), note="torch.cdist, argmin"),
            Contestant(
                "torch.compile", lambda inputs: _choice(compiled(eager_nearest_of_all), inputs), "of the eager code"
            ),
            Contestant(
                "products in blocks",
                lambda inputs: _choice(product_nearest, inputs),
                note="rows that fill 64 MiB with their products; not centred: it cancels far from the origin",
            ),
            Contestant("faiss", _faiss_nearest, "faiss.knn", refuses=unless_installed("faiss"), devices=("cpu",)),
            *ours(
                _any_nearest,
                lambda inputs: _problem("nearest", inputs, "any"),
                euclidean_differences,
            ),
        ),
        judge_choice(_search_all),
    ),
)
