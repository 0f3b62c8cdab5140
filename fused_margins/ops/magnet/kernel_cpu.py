"""`magnet` in C++ on a CPU (csrc/magnet/cpu.cpp): the tensors' memory, handed over."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends.cpu import call, empty_like, int64, module
from ...backends.registry import MaybeTensors
from ...core.enums import Reduction
from ...core.similarity import accumulation_dtype
from .op import Magnet


def saved_size(a: Magnet, plan: Any) -> int:
    """Values that a forward hands to its backward; see ``csrc/magnet/cpu.h``."""
    return module.magnet_saved_size(a.x.shape[0], a.cluster_labels.shape[0], a.x.shape[1])


def _arguments(a: Magnet) -> tuple[Any, ...]:
    """What both directions have in common."""
    labels = a.cluster_labels.shape[0], int64(a.clusters), int64(a.cluster_labels)
    return a.x, *labels, a.alpha, a.variance_floor, a.reduction


def forward(a: Magnet, plan: Any) -> tuple[Tensor, Tensor]:
    """loss, a scalar or (B,), and what the backward needs; the accumulation dtype."""
    dtype = accumulation_dtype(a.x.dtype)
    loss = torch.empty((a.x.shape[0],) if a.reduction == Reduction.NONE else (), dtype=dtype)
    saved = torch.empty(saved_size(a, plan), dtype=dtype)
    call(module.magnet_forward, *_arguments(a), loss, saved)
    return loss, saved


def backward(grads: MaybeTensors, a: Magnet, saved: Tensor, plan: Any, needs: Sequence[bool]) -> tuple[Tensor]:
    """Gradient of x."""
    grad_x = empty_like(a.x)
    call(module.magnet_backward, grads[0], *_arguments(a), saved, grad_x)
    return (grad_x,)
