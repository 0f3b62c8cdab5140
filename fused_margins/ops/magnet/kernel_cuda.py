"""`magnet` in CUDA C++ (csrc/magnet/cuda.cu): the tensors' memory, handed over; five launches both ways."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...backends import cuda
from ...backends.cpu import int64
from ...backends.registry import MaybeTensors, Problem
from ...core.enums import Reduction
from ...core.similarity import accumulation_dtype
from .op import Magnet

COLUMNS = 1024  # clusters that it is made for


def can_run(problem: Problem) -> str | None:
    """Few clusters."""
    return None if problem.columns <= COLUMNS else f"takes up to {COLUMNS} columns, got {problem.columns}"


def saved_size(a: Magnet, plan: Any) -> int:
    """Values that a forward hands to its backward; see ``csrc/magnet/cuda.h``."""
    return cuda.module.magnet_saved_size(a.x.shape[0], a.cluster_labels.shape[0], a.x.shape[1])


def _arguments(a: Magnet) -> tuple[Any, ...]:
    """What both directions have in common."""
    labels = a.cluster_labels.shape[0], int64(a.clusters), int64(a.cluster_labels)
    return a.x, *labels, a.alpha, a.variance_floor, a.reduction


def forward(a: Magnet, plan: Any) -> tuple[Tensor, Tensor]:
    """loss, a scalar or (B,), and what the backward needs; the accumulation dtype."""
    rows, dtype = a.x.shape[0], accumulation_dtype(a.x.dtype)
    loss = a.x.new_empty((rows,) if a.reduction == Reduction.NONE else (), dtype=dtype)
    saved = a.x.new_empty(saved_size(a, plan), dtype=dtype)
    if not rows:
        return loss.zero_(), saved
    counters = cuda.tickets(a.x.device, 1)
    cuda.launch(cuda.module.magnet_forward, a.x.device, *_arguments(a), loss, saved, counters)
    return loss, saved


def backward(grads: MaybeTensors, a: Magnet, saved: Tensor, plan: Any, needs: Sequence[bool]) -> tuple[Tensor]:
    """Gradient of x."""
    grad_x = a.x.new_empty(a.x.shape)
    if not grad_x.numel():
        return (grad_x,)
    scratch = saved.new_empty(cuda.module.magnet_scratch_size(a.cluster_labels.shape[0], a.x.shape[1]))
    cuda.launch(cuda.module.magnet_backward, a.x.device, grads[0], *_arguments(a), saved, grad_x, scratch)
    return (grad_x,)
