"""The readable definition of `magnet`; every backend must agree with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.enums import Similarity
from ...core.indices import check_members
from ...core.reductions import reduce_loss
from ...core.similarity import accumulation_dtype, take_rows
from ..contrast.op import Contrast
from ..contrast.reference import vectors

if TYPE_CHECKING:
    from .op import Magnet


def reference(a: Magnet) -> tuple[Tensor]:
    """A scalar or (B,): plain PyTorch, any device, differentiable to any order."""
    x, clusters = a.x.to(accumulation_dtype(a.x.dtype)), a.clusters
    rows, num_clusters = x.shape[0], a.cluster_labels.shape[0]
    counts = check_members(clusters, num_clusters)
    belongs = (torch.arange(num_clusters, device=x.device)[:, None] == clusters).to(x.dtype)  # (M, B)
    means = (belongs @ x) / counts[:, None]
    own = (x - take_rows(means, clusters)).square().sum(1)  # (B,) squared distances
    variance = (own.sum() / max(rows - 1, 1)).clamp(min=a.variance_floor)
    # A cluster's class by the first cluster that has it: its label may be any integer, also a reserved one.
    first = ((a.cluster_labels[:, None] == a.cluster_labels).long().cumsum(1) == 0).sum(1)
    measure, labels = Similarity.NEGATIVE_SQUARED_EUCLIDEAN, (take_rows(first, clusters), first)
    others = Contrast(x, means, clusters, *labels, scale=0.5 / variance, similarity=measure)
    # Without a finite variance the scale is not positive, and neither the loss nor a gradient is a number.
    _, negative_lse = vectors(others, any_scale=True)
    # No cluster of another class: negative_lse is -inf and the hinge is closed.
    loss = F.relu(a.alpha + own / (2 * variance) + negative_lse)
    return (reduce_loss(loss, torch.ones_like(loss), a.reduction),)
