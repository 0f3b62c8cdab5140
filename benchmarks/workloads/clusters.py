"""Distances to cluster centres with their gradients, and the nearest centre of the own class, as k-means assigns
samples."""

from functools import partial

import torch
from torch import Generator, Tensor

from fused_margins.functional import cluster_distances
from fused_margins.ops.nearest import nearest

from ..correctness import check_choice, check_values
from ..implementations import differentiated, on_device, ours, peer, returned, usual
from ..workload import DEVICES, Inputs, Size, Workload

EUCLIDEAN = "negative_squared_euclidean"
DISTANCE_SHAPES = ((1024, 64, 50), (2048, 128, 2000))
CLASSES = 100
# Samples, width, centres.
LABELLED_SHAPE, SHAPE, GPU_SHAPE = (20_000, 128, 2_000), (100_000, 128, 2_000), (1_000_000, 128, 4_096)
PRODUCTS_AT_ONCE = 1 << 24  # 64 MiB in float32


def _size(name: str, shape: tuple[int, int, int], device: str, *dtypes: torch.dtype, labelled: bool = False) -> Size:
    rows, width, centres = shape

    def make(dtype: torch.dtype, g: Generator) -> Inputs:
        x, y = on_device(rows, width, generator=g), on_device(centres, width, generator=g)
        points = {"embeddings": x.to(dtype), "centroids": y.to(dtype)}
        if not labelled:
            return points
        labels = torch.randint(CLASSES, (rows,), generator=g, device=g.device)
        return points | {
            "labels": labels,
            "centroid_labels": torch.arange(centres, device=g.device) * CLASSES // centres,
        }

    return Size(name, shape, make, products=rows * width * centres, devices=(device,), dtypes=dtypes or None)


def _index_sizes(on_cpu: tuple[int, int, int], labelled: bool) -> tuple[Size, Size]:
    on_gpu = _size("index", GPU_SHAPE, "cuda", torch.float32, torch.bfloat16, labelled=labelled)
    return _size("index", on_cpu, "cpu", labelled=labelled), on_gpu


def eager_distances(embeddings: Tensor, centroids: Tensor) -> Tensor:
    return torch.cdist(embeddings, centroids).square()


def product_distances(embeddings: Tensor, centroids: Tensor) -> Tensor:
    lengths = embeddings.square().sum(1, keepdim=True) + centroids.square().sum(1)
    return (lengths - 2 * embeddings @ centroids.T).clamp(min=0)


def eager_nearest(embeddings: Tensor, centroids: Tensor, labels: Tensor, centroid_labels: Tensor) -> Tensor:
    distances = torch.cdist(embeddings.float(), centroids.float())  # it takes nothing narrower on a GPU
    return distances.masked_fill_(labels[:, None] != centroid_labels, torch.inf).argmin(1)


def by_class(rows: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows sorted by label and padded to the largest class (classes, most, D), which rows they are (-1: padding), and
    the class and place of each row."""
    order = labels.argsort()
    group = labels[order]
    count = torch.bincount(group, minlength=classes)
    place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[group]
    padded = rows.new_zeros(classes, int(count.max()), rows.shape[1])
    padded[group, place] = rows[order]
    member = order.new_full(padded.shape[:2], -1)
    member[group, place] = order
    place = torch.empty_like(place).scatter_(0, order, place)
    return padded, member, labels, place


def sorted_nearest(embeddings: Tensor, centroids: Tensor, labels: Tensor, centroid_labels: Tensor) -> Tensor:
    # In float32: distances rounded to 16 bits choose other centres.
    x, _, group, place = by_class(embeddings.float(), labels, CLASSES)
    y, member, _, _ = by_class(centroids.float(), centroid_labels, CLASSES)
    half_squared = (y.square().sum(2) / 2).masked_fill_(member < 0, torch.inf)  # padding is never nearest
    chosen = torch.baddbmm(half_squared[:, None], x, y.mT, alpha=-1).argmin(2)  # (classes, most)
    return member[group, chosen[group, place]]


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


def faiss_nearest(embeddings: Tensor, centroids: Tensor) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return torch.from_numpy(faiss.knn(embeddings.float().numpy(), centroids.float().numpy(), 1)[1][:, 0])


def flash_nearest(embeddings: Tensor, centroids: Tensor) -> Tensor:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    squared = embeddings.float().square().sum(1)
    return euclid_assign_triton(embeddings[None], centroids[None], squared[None])[0].long()


def our_nearest(backend: str, **inputs: Tensor) -> Tensor:
    return nearest(**_search(inputs), backend=backend)[1][:, 0]


def _search(inputs: Inputs) -> Inputs:
    """The arguments of `nearest`: within classes where there are labels."""
    sides = {"x": inputs["embeddings"], "y": inputs["centroids"], "self_index": None, "similarity": EUCLIDEAN}
    if "labels" in inputs:
        return sides | {"row_labels": inputs["labels"], "column_labels": inputs["centroid_labels"], "relation": "same"}
    row_labels, column_labels = (torch.zeros(len(sides[t]), dtype=torch.int64, device=sides[t].device) for t in "xy")
    return sides | {"row_labels": row_labels, "column_labels": column_labels, "relation": "any"}


def _call(inputs: Inputs) -> tuple[str, Inputs]:
    return "scores", {"x": inputs["embeddings"], "y": inputs["centroids"], "scale": 1.0, "similarity": EUCLIDEAN}


distances, choice = differentiated("distances", "embeddings", "centroids"), returned("index")

exact_distances = partial(distances, partial(cluster_distances, backend="reference"))
NOT_CENTRED = "not centred: it cancels far from the origin"
OF_FLASH = "the assignment of its k-means, with the settings that it chooses, and the squared lengths that it is given"
WORKLOADS = (
    Workload(
        "cluster_distances",
        "Squared distances to all centres: the matrix and the gradients of both sides",
        "B x D x K",
        tuple(_size("batch", shape, device) for shape in DISTANCE_SHAPES for device in DEVICES),
        (
            *usual(distances, eager_distances, "torch.cdist, squared"),
            peer("matmul form", distances, product_distances, f"|x|^2 + |y|^2 - 2xy, {NOT_CENTRED}"),
            *ours(distances, cluster_distances),
        ),
        partial(check_values, truth=exact_distances, call=_call),
    ),
    Workload(
        "nearest_cluster",
        f"Nearest centre of the own class among {CLASSES} classes, no gradient",
        "B x D x K",
        _index_sizes(LABELLED_SHAPE, True),
        (
            *usual(choice, eager_nearest, "torch.cdist, mask, argmin"),
            peer("sorted bmm", choice, sorted_nearest, "both sides sorted by label and padded, a product a class"),
            *ours(choice, our_nearest, most_products=2**30),
        ),
        partial(check_choice, search=_search),
    ),
    Workload(
        "nearest_of_all",
        "Nearest of all centres, Euclidean, no gradient",
        "B x D x K",
        _index_sizes(SHAPE, False),
        (
            *usual(choice, eager_nearest_of_all, "torch.cdist, argmin"),
            peer("products in blocks", choice, product_nearest, f"rows that fill 64 MiB; {NOT_CENTRED}"),
            peer("faiss", choice, faiss_nearest, "faiss.knn", needs="faiss", devices=("cpu",)),
            peer("flash-kmeans", choice, flash_nearest, OF_FLASH, needs="flash_kmeans", devices=("cuda",)),
            *ours(choice, our_nearest, most_products=2**30),
        ),
        partial(check_choice, search=_search),
    ),
)
