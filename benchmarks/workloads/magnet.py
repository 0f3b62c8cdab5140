"""The magnet loss of a batch of M clusters with n samples each, and its gradient."""

from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fused_margins.functional import magnet_loss

from ..correctness import check_values
from ..implementations import differentiated, graphs, on_device, ours, usual
from ..workload import Inputs, Size, Workload

ALPHA, VARIANCE_FLOOR = 1.0, 1e-4
SHAPES = ((12, 4, 128), (12, 16, 1024), (12, 64, 1024))
ON_GPU = SHAPES[1]  # a batch is a few launches, whatever its size
CLUSTERS_PER_CLASS = 3


def _size(num_clusters: int, samples: int, width: int) -> Size:
    def make(dtype: torch.dtype, g: Generator) -> Inputs:
        clusters = torch.arange(num_clusters, device=g.device).repeat_interleave(samples)
        centres = 0.1 * on_device(num_clusters, width, generator=g)
        embeddings = centres[clusters] + on_device(num_clusters * samples, width, generator=g)
        cluster_labels = torch.arange(num_clusters, device=g.device) // CLUSTERS_PER_CLASS
        return {"embeddings": embeddings.to(dtype), "clusters": clusters, "cluster_labels": cluster_labels}

    shape = (num_clusters, samples, width)
    return Size("batch", shape, make, devices=("cpu", "cuda") if shape == ON_GPU else ("cpu",))


def eager_magnet(embeddings: Tensor, clusters: Tensor, cluster_labels: Tensor) -> Tensor:
    """Distances to all means as one matrix product."""
    belongs = F.one_hot(clusters, len(cluster_labels)).to(embeddings.dtype)  # (B, M)
    means = (belongs.T @ embeddings) / belongs.sum(0)[:, None]
    squared = embeddings.square().sum(1, keepdim=True) + means.square().sum(1) - 2 * embeddings @ means.T
    own = squared.gather(1, clusters[:, None])[:, 0]
    variance = (own.sum() / (len(embeddings) - 1)).clamp(min=VARIANCE_FLOOR)
    same = cluster_labels[clusters][:, None] == cluster_labels
    impostors = (-squared / (2 * variance)).masked_fill(same, -torch.inf).logsumexp(1)
    return F.relu(ALPHA + own / (2 * variance) + impostors).mean()


def _call(inputs: Inputs) -> tuple[str, Inputs]:
    others = {name: inputs[name] for name in ("clusters", "cluster_labels")}
    return "magnet", {"x": inputs["embeddings"], "alpha": ALPHA, "variance_floor": VARIANCE_FLOOR} | others


prepare = differentiated("loss", "embeddings")
our_magnet = partial(magnet_loss, alpha=ALPHA, variance_floor=VARIANCE_FLOOR)
truth = partial(prepare, partial(our_magnet, backend="reference"))
USUAL = usual(prepare, eager_magnet)

WORKLOADS = (
    Workload(
        "magnet",
        "Magnet loss and gradient, also through the means and the variance",
        "clusters x samples x D",
        tuple(_size(*shape) for shape in SHAPES),
        (
            *USUAL,
            *ours(prepare, our_magnet),
            *graphs(USUAL, prepare, our_magnet),
        ),
        partial(check_values, truth=truth, call=_call),
    ),
)
