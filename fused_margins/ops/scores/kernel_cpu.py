"""`scores` in C++ on a CPU (csrc/scores/cpu.cpp): the tensors' memory, handed over."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends.cpu import call, empty_like, int64, module, row_factor, vector
from ...backends.registry import MaybeTensors
from ...core.similarity import accumulation_dtype
from .op import Scores


def saved_size(a: Scores, plan: Any) -> int:
    """Its backward needs the inputs alone."""
    return 0


def _arguments(a: Scores) -> tuple[Any, ...]:
    """What both directions have in common."""
    dtype, device = accumulation_dtype(a.x.dtype), a.x.device
    scale, margin = row_factor(a.scale, dtype, device), row_factor(a.margin, dtype, device)
    factors = scale, scale.dim() > 0, vector(a.bias), margin, margin.dim() > 0
    return a.x, a.y, int64(a.target), *factors, a.similarity, a.ignore_index, a.sign


def forward(a: Scores, plan: Any) -> tuple[Tensor, Tensor]:
    """(B, N) in the dtype of x, and nothing saved."""
    scores = torch.empty(a.x.shape[0], a.y.shape[0], dtype=a.x.dtype)
    call(module.scores_forward, *_arguments(a), scores)
    return scores, torch.empty(0, dtype=accumulation_dtype(a.x.dtype))


def backward(grads: MaybeTensors, a: Scores, saved: Tensor, plan: Any, needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of x, y, scale, bias and margin, of those that are needed."""
    variables = (a.x, a.y, a.scale, a.bias, a.margin)
    gradients = [empty_like(t) if need and isinstance(t, Tensor) else None for t, need in zip(variables, needs)]
    call(module.scores_backward, grads[0], *_arguments(a), *gradients)
    return gradients
