"""The magnet loss of a batch of M clusters with n samples each, and its gradient."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fused_margins.functional import magnet_loss
from fused_margins.ops.registry import Problem

from ..gate import judge_loss
from ..workload import (
    Contestant,
    Inputs,
    Size,
    Step,
    Workload,
    auto,
    captured,
    compiled,
    forward_backward,
    on_device,
    ours,
)

ALPHA, VARIANCE_FLOOR = 1.0, 1e-4
SHAPES = ((12, 4, 128), (12, 16, 1024), (12, 64, 1024))
ON_GPU = ((12, 16, 1024),)  # of these: a batch is a few launches, whatever its size
CLUSTERS_PER_CLASS = 3


def _size(num_clusters: int, samples: int, width: int) -> Size:
    def make(dtype: torch.dtype, g: Generator) -> Inputs:
        clusters = torch.arange(num_clusters, device=g.device).repeat_interleave(samples)
        centres = 0.1 * on_device(num_clusters, width, generator=g)
        embeddings = centres[clusters] + on_device(num_clusters * samples, width, generator=g)
        return {
            "embeddings": embeddings.to(dtype),
            "clusters": clusters,
            "cluster_labels": torch.arange(num_clusters, device=g.device) // CLUSTERS_PER_CLASS,
        }

    devices = ("cpu", "cuda") if (num_clusters, samples, width) in ON_GPU else ("cpu",)
    return Size("batch", f"{num_clusters} x {samples} x {width}", make, devices=devices)


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


def _step(function: Callable[..., Tensor], inputs: Inputs) -> Step:
    return forward_backward(lambda arguments: {"loss": function(**arguments)}, inputs, ("embeddings",))


def _our_step(inputs: Inputs, backend: str) -> Step:
    def loss(embeddings: Tensor, clusters: Tensor, cluster_labels: Tensor) -> Tensor:
        return magnet_loss(
            embeddings, clusters, cluster_labels, alpha=ALPHA, variance_floor=VARIANCE_FLOOR, backend=backend
        )

    return _step(loss, inputs)


def _problem(inputs: Inputs) -> Problem:
    x = inputs["embeddings"]
    return Problem("magnet", x.device.type, x.dtype, x.shape[0], len(inputs["cluster_labels"]), x.shape[1])


PEERS = (
    Contestant("eager", lambda inputs: _step(eager_magnet, inputs)),
    Contestant("torch.compile", lambda inputs: _step(compiled(eager_magnet), inputs), "of the eager code"),
)

WORKLOADS = (
    Workload(
        "magnet",
        "Magnet loss and gradient, also through the means and the variance",
        "clusters x samples x D",
        tuple(_size(*shape) for shape in SHAPES),
        (torch.float32,),
        (*PEERS, *ours(_our_step, _problem), *(captured(c) for c in (*PEERS, auto(_our_step)))),
        judge_loss(_our_step),
    ),
)
