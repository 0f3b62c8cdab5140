"""`magnet` in C++ on a CPU (csrc/magnet/cpu.cpp): the tensors' memory, handed over."""

import torch
from torch import Tensor

from ..native import call, int64, matrix, module
from ..similarity import accumulation_dtype


def saved_size(rows: int, num_clusters: int, width: int) -> int:
    """Values that a forward hands to its backward: see ``csrc/magnet/cpu.h``."""
    return num_clusters * ((width + 15) // 16 * 16) + rows * (num_clusters + 1) + 2


def forward(
    x: Tensor, clusters: Tensor, cluster_labels: Tensor, alpha: float, variance_floor: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """loss, a scalar or (B,), and what the backward needs; the accumulation dtype."""
    assert module is not None
    (rows, width), num_clusters = x.shape, cluster_labels.shape[0]
    dtype = accumulation_dtype(x.dtype)
    loss = torch.empty((rows,) if reduction == "none" else (), dtype=dtype)
    saved = torch.empty(saved_size(rows, num_clusters, width), dtype=dtype)
    clusters, cluster_labels = int64(clusters), int64(cluster_labels)
    call(
        module.magnet_forward,
        matrix(x),
        num_clusters,
        clusters.data_ptr(),
        cluster_labels.data_ptr(),
        alpha,
        variance_floor,
        reduction,
        loss.data_ptr(),
        saved.data_ptr(),
    )
    return loss, saved


def backward(
    grad_loss: Tensor,
    x: Tensor,
    clusters: Tensor,
    cluster_labels: Tensor,
    saved: Tensor,
    alpha: float,
    variance_floor: float,
    reduction: str,
) -> Tensor:
    """Gradient of x."""
    assert module is not None
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    clusters, cluster_labels = int64(clusters), int64(cluster_labels)
    grad_loss, saved = grad_loss.contiguous(), saved.contiguous()
    call(
        module.magnet_backward,
        grad_loss.data_ptr(),
        matrix(x),
        cluster_labels.shape[0],
        clusters.data_ptr(),
        cluster_labels.data_ptr(),
        alpha,
        variance_floor,
        reduction,
        saved.data_ptr(),
        grad_x.data_ptr(),
    )
    return grad_x
