"""`scores` in C++ on a CPU (csrc/scores/cpu.cpp): the tensors' memory, handed over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...backends.cpu import call, int64, matrix, module, pointer, vector
from ...core.checks import constant
from ...core.similarity import accumulation_dtype

if TYPE_CHECKING:
    from ...backends.registry import Problem
    from .op import Scores


def can_run(problem: Problem) -> str | None:
    """Every call."""
    return None


def saved_size(a: Scores, plan: Any) -> int:
    """Its backward needs the inputs alone."""
    return 0


def _inputs(a: Scores) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments that both directions have in common, and the tensors whose memory they are."""
    dtype, device = accumulation_dtype(a.x.dtype), a.x.device
    scale = vector(a.scale) if isinstance(a.scale, Tensor) else constant(a.scale, dtype, device)
    margin = vector(a.margin) if isinstance(a.margin, Tensor) else constant(a.margin, dtype, device)
    target, bias = int64(a.target), vector(a.bias)
    arguments = (
        matrix(a.x),
        matrix(a.y),
        pointer(target),
        scale.data_ptr(),
        scale.dim() > 0,
        pointer(bias),
        margin.data_ptr(),
        margin.dim() > 0,
        a.similarity,
        a.ignore_index,
        a.sign,
    )
    return arguments, (target, scale, bias, margin)


def forward(a: Scores, plan: Any) -> tuple[Tensor, Tensor]:
    """(B, N) in the dtype of x, and nothing saved."""
    assert module is not None
    scores = torch.empty(a.x.shape[0], a.y.shape[0], dtype=a.x.dtype)
    arguments, alive = _inputs(a)
    call(module.scores_forward, *arguments, scores.data_ptr())
    del alive
    return scores, torch.empty(0, dtype=accumulation_dtype(a.x.dtype))


def backward(
    grads: Sequence[Tensor | None], a: Scores, saved: Tensor, plan: Any, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x, y, scale, bias and margin, of those that are needed."""
    assert module is not None
    gradients = [
        torch.empty(t.shape, dtype=t.dtype) if need and isinstance(t, Tensor) else None
        for t, need in zip((a.x, a.y, a.scale, a.bias, a.margin), needs)
    ]
    arguments, alive = _inputs(a)
    call(module.scores_backward, pointer(grads[0]), *arguments, *map(pointer, gradients))
    del alive
    return gradients
