"""`magnet` in CUDA C++ (csrc/magnet/cuda.cu): the tensors' memory, handed over; three launches each way."""

import torch
from torch import Tensor

from .. import native
from ..cuda_launch import launch, matrix, tickets
from ..similarity import accumulation_dtype
from .kernel_cpu import saved_size


def forward(
    x: Tensor, clusters: Tensor, cluster_labels: Tensor, alpha: float, variance_floor: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """loss, a scalar or (B,), and what the backward needs; the accumulation dtype."""
    assert native.cuda_module is not None
    (rows, width), num_clusters = x.shape, cluster_labels.shape[0]
    dtype = accumulation_dtype(x.dtype)
    loss = x.new_empty((rows,) if reduction == "none" else (), dtype=dtype)
    saved = x.new_empty(saved_size(rows, num_clusters, width), dtype=dtype)
    if not rows:
        return loss.zero_(), saved
    clusters, cluster_labels = (t.to(torch.int64).contiguous() for t in (clusters, cluster_labels))
    counters = tickets(x.device, 1)
    launch(
        native.cuda_module.magnet_forward,
        x.device,
        matrix(x),
        num_clusters,
        clusters.data_ptr(),
        cluster_labels.data_ptr(),
        alpha,
        variance_floor,
        reduction,
        loss.data_ptr(),
        saved.data_ptr(),
        counters.data_ptr(),
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
    assert native.cuda_module is not None
    grad_x = x.new_empty(x.shape)
    if not grad_x.numel():
        return grad_x
    (rows, width), num_clusters = x.shape, cluster_labels.shape[0]
    clusters, cluster_labels = (t.to(torch.int64).contiguous() for t in (clusters, cluster_labels))
    grad_loss, saved = grad_loss.contiguous(), saved.contiguous()
    scratch = saved.new_empty(native.cuda_module.magnet_scratch_size(rows, num_clusters, width))
    counters = tickets(x.device, 1)
    launch(
        native.cuda_module.magnet_backward,
        x.device,
        grad_loss.data_ptr(),
        matrix(x),
        num_clusters,
        clusters.data_ptr(),
        cluster_labels.data_ptr(),
        alpha,
        variance_floor,
        reduction,
        saved.data_ptr(),
        grad_x.data_ptr(),
        scratch.data_ptr(),
        counters.data_ptr(),
    )
    return grad_x
