"""The readable definition of `magnet`; every backend must agree with it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...reductions import reduce_loss
from ..contrast import reference as contrast_reference
from ..labels import check_members
from ..similarity import accumulation_dtype, take_rows


def magnet(
    x: Tensor, clusters: Tensor, cluster_labels: Tensor, alpha: float, variance_floor: float, reduction: str
) -> Tensor:
    """A scalar or (B,): plain PyTorch, any device, differentiable to any order."""
    x = x.to(accumulation_dtype(x.dtype))
    rows, num_clusters = x.shape[0], cluster_labels.shape[0]
    counts = check_members(clusters, num_clusters)
    belongs = (torch.arange(num_clusters, device=x.device)[:, None] == clusters).to(x.dtype)  # (M, B)
    means = (belongs @ x) / counts[:, None]
    own = (x - take_rows(means, clusters)).square().sum(1)  # (B,) squared distances
    variance = (own.sum() / max(rows - 1, 1)).clamp(min=variance_floor)
    # Without a finite variance the scale is not positive, and neither the loss nor a gradient is a number.
    _, negative_lse = contrast_reference.contrast(
        x,
        means,
        0.5 / variance,
        None,
        clusters,
        take_rows(cluster_labels, clusters),
        cluster_labels,
        None,
        "negative_squared_euclidean",
        "different",
        -1,
        any_scale=True,
    )
    # No cluster of another class: negative_lse is -inf and the hinge is closed.
    loss = F.relu(alpha + own / (2 * variance) + negative_lse)
    return reduce_loss(loss, torch.ones_like(loss), reduction)
